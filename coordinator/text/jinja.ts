/** What we use of @huggingface/jinja, with types: those of the package itself do not resolve in an ES module. */
import * as jinja from '@huggingface/jinja';

export interface Node {
  type: string;
}

export interface RuntimeValue {
  type: string;
  value: unknown;
}

export interface Environment {
  /** Declares a variable from a plain JavaScript value. */
  set(name: string, value: unknown): RuntimeValue;
}

export interface Interpreter {
  run(program: Node): RuntimeValue;
  /** Value of one node. Operands come from here too: the interpreter calls it for each before it operates on them. `undefined` = nothing there. */
  evaluate(statement: Node | undefined, environment: Environment): RuntimeValue;
}

interface Jinja {
  Environment: new () => Environment;
  Interpreter: new (environment: Environment) => Interpreter;
  tokenize: (source: string, options: { lstrip_blocks: boolean; trim_blocks: boolean }) => unknown[];
  parse: (tokens: unknown[]) => Node;
}

export const { Environment, Interpreter, parse, tokenize } = jinja as unknown as Jinja;
