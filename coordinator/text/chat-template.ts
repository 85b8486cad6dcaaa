/**
 * Chat templates: Jinja source out of a model file, so untrusted code. It runs in the interpreter of @huggingface/jinja, which reaches no object of
 * ours (every value is the interpreter's own), under budgets for steps, depth, sizes and time.
 *
 * Text of a client never becomes a special token: every special token that it spells is broken by a mark before rendering, special tokens are looked for in the
 * rendered text, and the marks are dropped from what is left.
 */
import { ShardmeshError } from '../../protocol/errors.ts';
import { templateLimits } from '../../protocol/limits.ts';
import { Environment, Interpreter, parse, tokenize } from './jinja.ts';
import type { Node, RuntimeValue } from './jinja.ts';
import type { SpecialTokenFinder } from './special-tokens.ts';

export const renderLimits = {
  ...templateLimits,
  /** Nesting of expressions and statements, those of macros that call each other included; each costs a few frames of the stack. */
  expressionDepthMax: 1_024,
  /** Elements of a list that `range`, `split` or `+` makes. */
  elementsMax: 262_144,
  /** Characters and elements produced by all operations together. */
  workMax: 64 << 20,
  /** Product of the lengths that one search, replacement or join works on: these may take quadratic time. */
  productMax: 64 << 20,
  /** Time is a last resort: whatever a template does within the budgets above takes less on any machine that is not overloaded. */
  timeMaxMs: 2_000,
  /** The lexer of the interpreter is quadratic in runs of white space. */
  whiteSpaceRunMax: 512,
  /** Characters of an error of the template that a client sees. */
  messageCharactersMax: 300,
} as const;

/** What a template cannot do, whatever messages it is given. */
export class TemplateBudgetError extends Error {
  override name = 'TemplateBudgetError';
}

export interface TemplateVariables {
  messages: unknown[];
  tools: unknown[] | null;
  add_generation_prompt: boolean;
  /** `bos_token` and the like, spelled out. */
  specialTokens: Readonly<Record<string, string>>;
}

export interface ChatTemplateOptions {
  /** Clock of `strftime_now`. */
  now?: () => Date;
  timeMaxMs?: number;
}

export class ChatTemplate {
  readonly #program: Node;
  /** Nodes whose value is printed where they stand. */
  readonly #printed = new WeakSet<object>();
  readonly #now: () => Date;
  readonly #timeMaxMs: number;
  readonly source: string;

  /**
   * @throws {ShardmeshError} `template_failed`: too long, or not a template
   */
  constructor(source: string, { now = () => new Date(), timeMaxMs = renderLimits.timeMaxMs }: ChatTemplateOptions = {}) {
    this.source = source;
    this.#now = now;
    this.#timeMaxMs = timeMaxMs;
    const { sourceCharactersMax, whiteSpaceRunMax } = renderLimits;
    if (source.length > sourceCharactersMax)
      throw failed(`it has ${source.length} characters; the limit is ${sourceCharactersMax}`);
    const run = longestWhiteSpaceRun(source);
    if (run > whiteSpaceRunMax) throw failed(`it has ${run} white space characters in a row; the limit is ${whiteSpaceRunMax}`);
    try {
      this.#program = parse(tokenize(source, { lstrip_blocks: true, trim_blocks: true }));
      collectPrinted(this.#program, this.#printed);
    } catch (error) {
      throw failed(describe(error), error);
    }
  }

  /**
   * The rendered text.
   * @throws {TemplateBudgetError} a budget was exceeded
   * @throws {Error} the template refused the messages, or made a mistake
   */
  render(variables: TemplateVariables): string {
    const environment = new Environment();
    const globals: Record<string, unknown> = {
      true: true,
      false: false,
      none: null,
      True: true,
      False: false,
      None: null,
      range: boundedRange,
      raise_exception: (message: unknown) => {
        throw new Error(typeof message === 'string' ? message : 'raise_exception');
      },
      strftime_now: (format: unknown) => strftime(this.#now(), format),
      messages: variables.messages,
      tools: variables.tools,
      documents: null,
      add_generation_prompt: variables.add_generation_prompt,
      ...variables.specialTokens,
    };
    for (const [name, value] of Object.entries(globals)) environment.set(name, value);
    const text = new BudgetedInterpreter(environment, this.#printed, this.#timeMaxMs).run(this.#program).value as string;
    const bytes = Buffer.byteLength(text);
    if (bytes > renderLimits.outputBytesMax) {
      throw new TemplateBudgetError(`its output has ${bytes} bytes; the limit is ${renderLimits.outputBytesMax}`);
    }
    return text;
  }
}

export interface RenderedChat {
  /** The rendered text, as a reader sees it. */
  prompt: string;
  /** The same, cut: special tokens of the template as numbers, all else as plain text. */
  parts: (string | number)[];
}

/**
 * Renders a chat and finds the special tokens that come from the template.
 *
 * A special token that a message spells is broken by a mark behind its first character. A template may also cut messages and join the pieces; so if any message
 * has a character that a special token begins with, the chat is rendered once more with a mark behind every such character, which no cutting can undo, and that rendering
 * is taken if the two differ in their special tokens.
 *
 * @param specials finds the special tokens (length 2 and more)
 * @throws {ShardmeshError} `template_failed`
 */
export function renderChat(template: ChatTemplate, specials: SpecialTokenFinder, variables: TemplateVariables): RenderedChat {
  try {
    const data: unknown = [variables.messages, variables.tools];
    const mark = chooseMark(template.source, data);
    const render = (everywhere: boolean): (string | number)[] => {
      const shield = (value: unknown[]): unknown[] =>
        mapStrings(value, (text) => specials.shield(text, mark.character, everywhere)) as unknown[];
      const text = template.render({
        ...variables,
        messages: shield(variables.messages),
        tools: variables.tools === null ? null : shield(variables.tools),
      });
      const parts: (string | number)[] = [];
      for (const part of specials.split(text)) {
        if (part === '') continue;
        const clean = typeof part === 'number' ? part : mark.remove(part);
        if (clean !== '') parts.push(clean);
      }
      return parts;
    };
    let parts = render(false);
    if (anyString(data, (text) => specials.mayBegin(text))) {
      const careful = render(true);
      const tokensOf = (list: (string | number)[]): string => list.filter((part) => typeof part === 'number').join();
      if (tokensOf(parts) !== tokensOf(careful)) parts = careful;
    }
    const textOf = (part: string | number): string => (typeof part === 'number' ? (specials.textOf(part) ?? '') : part);
    return { parts, prompt: parts.map(textOf).join('') };
  } catch (error) {
    if (error instanceof ShardmeshError) throw error;
    throw failed(describe(error), error);
  }
}

// --- budgets

/**
 * Counts every evaluation of the interpreter, and checks operands before an operation that may be costly sees them: `evaluate` returns each operand to its parent,
 * so a frame for the parent knows all of them in time.
 */
class BudgetedInterpreter extends Interpreter {
  #steps = 0;
  #work = 0;
  #depth = 0;
  #callDepth = 0;
  #clockAt = 0;
  readonly #timeMaxMs: number;
  readonly #endsAt: number;
  readonly #printed: WeakSet<object>;
  readonly #frames: Frame[] = [];
  readonly #sizes = new WeakMap<object, number>();
  /** Length of the string that a method belongs to. */
  readonly #receivers = new WeakMap<object, number>();
  readonly #nodeCounts = new WeakMap<object, number>();

  constructor(environment: Environment, printed: WeakSet<object>, timeMaxMs: number) {
    super(environment);
    this.#printed = printed;
    this.#timeMaxMs = timeMaxMs;
    this.#endsAt = performance.now() + timeMaxMs;
  }

  override evaluate(statement: Node | undefined, environment: Environment): RuntimeValue {
    if (statement === undefined) return super.evaluate(statement, environment);
    const isCall = statement.type === 'CallExpression' || statement.type === 'CallStatement';
    const frame: Frame = { node: statement, largest: 0, second: 0, receiver: 0 };
    let value: RuntimeValue | undefined;
    this.#frames.push(frame);
    this.#depth++;
    if (isCall) this.#callDepth++;
    try {
      this.#count(statement);
      value = super.evaluate(statement, environment);
    } finally {
      // `break` and `continue` come through here as exceptions.
      this.#frames.pop();
      this.#depth--;
      if (isCall) this.#callDepth--;
    }
    // `first` and `last` of an empty list are a hole in the interpreter; Jinja says undefined.
    value ??= super.evaluate(undefined, environment);
    this.#weigh(value, frame);
    const parent = this.#frames.at(-1);
    if (parent !== undefined) this.#handOver(value, frame, parent);
    return value;
  }

  #count(node: Node): void {
    this.#step(1);
    if (this.#depth > renderLimits.expressionDepthMax) throw exceeded('nested expressions', renderLimits.expressionDepthMax);
    if (this.#callDepth > renderLimits.depthMax) throw exceeded('calls inside calls', renderLimits.depthMax);
    // The interpreter walks the whole body of a macro each time it meets the definition.
    if (node.type === 'Macro' || node.type === 'CallStatement') this.#spend(this.#countNodes(node));
  }

  #step(steps: number): void {
    this.#steps += steps;
    if (this.#steps > renderLimits.stepsMax) throw exceeded('steps', renderLimits.stepsMax);
    if (this.#steps < this.#clockAt) return;
    this.#clockAt = this.#steps + 64;
    if (performance.now() > this.#endsAt) throw exceeded('milliseconds', this.#timeMaxMs);
  }

  #spend(units: number): void {
    this.#work += units;
    if (this.#work > renderLimits.workMax) throw exceeded('characters of work', renderLimits.workMax);
  }

  /** Bounds what an evaluation made. */
  #weigh(value: RuntimeValue, { node, largest }: Frame): void {
    if (value.type === 'StringValue') {
      const length = lengthOf(value);
      if (length > renderLimits.outputBytesMax) throw exceeded('characters in one text', renderLimits.outputBytesMax);
      if (producers.has(node.type)) this.#spend(length);
    } else if (isContainer(value)) {
      const length = lengthOf(value);
      if (length > renderLimits.elementsMax) throw exceeded('elements in one list', renderLimits.elementsMax);
      if (producers.has(node.type)) this.#spend(length);
      if (this.#printed.has(node)) this.#spend(this.#sizeOf(value, 0));
    } else if (value.type === 'FunctionValue' && node.type === 'MemberExpression' && largest > 0) {
      this.#receivers.set(value, largest);
    }
  }

  /** Hands an operand to the operation that asked for it: refused here if the operation could be costly with it. */
  #handOver(value: RuntimeValue, child: Frame, parent: Frame): void {
    const { node } = parent;
    if (value.type === 'FunctionValue') parent.receiver = Math.max(parent.receiver, this.#receivers.get(value) ?? 0);
    else note(parent, lengthOf(value));
    if (node.type === 'FilterExpression' || node.type === 'FilterStatement') {
      const filter = filterName(node);
      if (isContainer(value) && deepFilters.has(filter)) this.#spend(this.#sizeOf(value, 0));
      if (value.type === 'IntegerValue' && indentingFilters.has(filter) && (value.value as number) > indentMax) {
        throw exceeded('spaces of indentation', indentMax);
      }
      // `{% filter %}` collects its operand from many pieces.
      if (node.type === 'FilterStatement') parent.second = parent.largest;
      if (quadraticFilters.has(filter)) checkProduct(parent.largest, parent.second);
    } else if (node.type === 'BinaryExpression') {
      const operator = (node as unknown as { operator: { value: string } }).operator.value;
      if (operator === 'in' || operator === 'not in') checkProduct(parent.largest, parent.second);
      else if (isList(value) && stringifying.has(operator)) this.#spend(this.#sizeOf(value, 0));
    } else if (node.type === 'CallExpression' && parent.receiver > 0) {
      checkProduct(parent.receiver, parent.largest);
    } else if (node.type === 'For' && !this.#printed.has(child.node)) {
      // What is looped over: the interpreter makes a scope for each element before any step of the body.
      this.#step(lengthOf(value) * stepsPerElement);
    }
  }

  /** Characters and elements of a value when it is written out; what is in it twice counts twice. */
  #sizeOf(value: RuntimeValue, depth: number): number {
    if (!isContainer(value)) return 1 + lengthOf(value);
    const known = this.#sizes.get(value);
    if (known !== undefined) return known;
    if (depth >= renderLimits.depthMax) throw exceeded('values inside values', renderLimits.depthMax);
    const content = value.value as RuntimeValue[] | Map<string, RuntimeValue>;
    let size = 1;
    // Only namespaces change after they are made; what holds one is measured anew each time.
    let isFixed = value.type !== 'NamespaceValue';
    for (const [key, element] of content.entries()) {
      size += (typeof key === 'string' ? key.length : 0) + this.#sizeOf(element, depth + 1);
      if (size > renderLimits.outputBytesMax) throw exceeded('characters in one value', renderLimits.outputBytesMax);
      if (isContainer(element) && !this.#sizes.has(element)) isFixed = false;
    }
    if (isFixed) this.#sizes.set(value, size);
    return size;
  }

  #countNodes(node: object): number {
    const known = this.#nodeCounts.get(node);
    if (known !== undefined) return known;
    let count = 1;
    const children: Iterable<unknown> =
      node instanceof Map ? [...node.keys(), ...node.values()] : (Object.values(node) as unknown[]);
    for (const child of children) if (typeof child === 'object' && child !== null) count += this.#countNodes(child);
    this.#nodeCounts.set(node, count);
    return count;
  }
}

interface Frame {
  node: Node;
  /** The two largest operands so far, in characters or elements. */
  largest: number;
  second: number;
  /** Length of the string whose method is called. */
  receiver: number;
}

/** Nodes that make new text or lists rather than hand on what is there. */
const producers = new Set([
  'CallExpression',
  'CallStatement',
  'FilterExpression',
  'FilterStatement',
  'BinaryExpression',
  'MemberExpression',
  'For',
]);
/** Filters that write out or compare whole values. */
const deepFilters = new Set(['tojson', 'string', 'join', 'sort', 'unique', 'dictsort']);
/** Filters whose time may be the product of their operands. */
const quadraticFilters = new Set(['replace', 'join', 'indent', 'selectattr', 'rejectattr', 'map', 'sort', 'dictsort']);
const indentingFilters = new Set(['indent', 'tojson']);
const indentMax = 64;
/** What an iteration costs beside its body: two scopes and the `loop` variable. */
const stepsPerElement = 4;
/** Operators that turn a list into text when the other side is text. */
const stringifying = new Set(['+', '~', '==', '!=']);

function isList(value: RuntimeValue): boolean {
  return value.type === 'ArrayValue' || value.type === 'TupleValue';
}

function isContainer(value: RuntimeValue): boolean {
  return isList(value) || value.type === 'ObjectValue' || value.type === 'NamespaceValue';
}

/** Characters of a string, entries of a container, else 0. */
function lengthOf(value: RuntimeValue): number {
  if (value.type === 'StringValue') return (value.value as string).length;
  if (isList(value)) return (value.value as unknown[]).length;
  return isContainer(value) ? (value.value as Map<string, unknown>).size : 0;
}

function collectPrinted(node: object, printed: WeakSet<object>): void {
  for (const [name, child] of node instanceof Map ? [...node].flat().entries() : Object.entries(node)) {
    if (typeof child !== 'object' || child === null) continue;
    if (Array.isArray(child) && (name === 'body' || name === 'alternate' || name === 'defaultBlock')) {
      for (const statement of child as object[]) printed.add(statement);
    }
    collectPrinted(child as object, printed);
  }
}

function note(frame: Frame, size: number): void {
  if (size > frame.largest) {
    frame.second = frame.largest;
    frame.largest = size;
  } else if (size > frame.second) {
    frame.second = size;
  }
}

function checkProduct(a: number, b: number): void {
  if (a * b > renderLimits.productMax) throw exceeded('characters times characters in one search', renderLimits.productMax);
}

function filterName(node: Node): string {
  const { filter } = node as unknown as { filter: { type: string; value: string; callee?: { value: string } } };
  return filter.type === 'CallExpression' ? (filter.callee?.value ?? '') : filter.value;
}

function exceeded(what: string, limit: number): TemplateBudgetError {
  return new TemplateBudgetError(`it needs more than ${limit} ${what}`);
}

/** Python's `range`. */
function boundedRange(first: unknown, second?: unknown, third?: unknown): number[] {
  const numbers = [first, second, third].filter((value) => value !== undefined);
  if (!numbers.every((value) => Number.isSafeInteger(value))) throw new Error('range() takes whole numbers');
  const [start, stop, step] = (numbers.length === 1 ? [0, ...numbers, 1] : [...numbers, 1]) as [number, number, number];
  if (step === 0) throw new Error('range() step must not be zero');
  const count = Math.max(0, Math.ceil((stop - start) / step));
  if (count > renderLimits.elementsMax) throw exceeded('elements in one list', renderLimits.elementsMax);
  return Array.from({ length: count }, (_, index) => start + index * step);
}

const monthNames = 'January February March April May June July August September October November December'.split(' ');
const dayNames = 'Sunday Monday Tuesday Wednesday Thursday Friday Saturday'.split(' ');

/** The directives of Python's strftime that templates use, in the C locale and local time; others stay as they are. */
function strftime(date: Date, format: unknown): string {
  if (typeof format !== 'string' || format.length > 1_024)
    throw new Error('strftime_now() takes a format of at most 1024 characters');
  const two = (value: number): string => String(value).padStart(2, '0');
  const month = monthNames[date.getMonth()] ?? '';
  const day = dayNames[date.getDay()] ?? '';
  const directives: Record<string, () => string> = {
    Y: () => String(date.getFullYear()),
    y: () => two(date.getFullYear() % 100),
    m: () => two(date.getMonth() + 1),
    d: () => two(date.getDate()),
    B: () => month,
    b: () => month.slice(0, 3),
    A: () => day,
    a: () => day.slice(0, 3),
    H: () => two(date.getHours()),
    I: () => two(date.getHours() % 12 || 12),
    M: () => two(date.getMinutes()),
    S: () => two(date.getSeconds()),
    p: () => (date.getHours() < 12 ? 'AM' : 'PM'),
    '%': () => '%',
  };
  return format.replace(/%([A-Za-z%])/g, (whole, directive: string) => directives[directive]?.() ?? whole);
}

// --- marks

interface Mark {
  character: string;
  /** Drops the mark, also where the template wrote it out as a JSON escape. */
  remove(text: string): string;
}

/** Noncharacters first, then private use: the first that neither template nor data has, as itself or as a JSON escape. */
function chooseMark(source: string, data: unknown): Mark {
  const used = new Set<number>();
  const collect = (text: string): void => {
    for (const match of text.matchAll(/[\ufdd0-\ufdef\ue000-\uf8ff]|\\u([0-9a-fA-F]{4})/gu)) {
      used.add(match[1] === undefined ? match[0].charCodeAt(0) : parseInt(match[1], 16));
    }
  };
  collect(source);
  anyString(data, (text) => {
    collect(text);
    return false;
  });
  const pick = (from: number, to: number): number | null => {
    for (let code = from; code <= to; code++) if (!used.has(code)) return code;
    return null;
  };
  const code = pick(0xfdd0, 0xfdef) ?? pick(0xe000, 0xf8ff);
  if (code === null) throw new Error('the messages use every noncharacter and every private character of Unicode; leave one out');
  const character = String.fromCharCode(code);
  const escape = `\\u${code.toString(16).padStart(4, '0')}`;
  return { character, remove: (text) => text.replaceAll(character, '').replaceAll(escape, '') };
}

/** A copy of JSON-like data with every string and key replaced. */
function mapStrings(value: unknown, replace: (text: string) => string, depth = 0): unknown {
  if (typeof value === 'string') return replace(value);
  if (typeof value !== 'object' || value === null) return value;
  checkDepth(depth);
  if (Array.isArray(value)) return value.map((element) => mapStrings(element, replace, depth + 1));
  // fromEntries defines `__proto__` as a property like any other.
  return Object.fromEntries(Object.entries(value).map(([key, entry]) => [replace(key), mapStrings(entry, replace, depth + 1)]));
}

function anyString(value: unknown, test: (text: string) => boolean, depth = 0): boolean {
  if (typeof value === 'string') return test(value);
  if (typeof value !== 'object' || value === null) return false;
  checkDepth(depth);
  if (Array.isArray(value)) return value.some((element) => anyString(element, test, depth + 1));
  return Object.entries(value).some(([key, entry]) => test(key) || anyString(entry, test, depth + 1));
}

function checkDepth(depth: number): void {
  if (depth > renderLimits.depthMax) throw new Error(`messages and tools are nested deeper than ${renderLimits.depthMax}`);
}

// --- errors

function failed(reason: string, cause?: unknown): ShardmeshError {
  const { messageCharactersMax } = renderLimits;
  const short = reason.length > messageCharactersMax ? `${reason.slice(0, messageCharactersMax)}…` : reason;
  return new ShardmeshError('template_failed', `The chat template of the model failed: ${short}.`, { param: 'messages', cause });
}

function describe(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  return message.replace(/[.\s]+$/u, '');
}

function longestWhiteSpaceRun(text: string): number {
  let longest = 0;
  let run = 0;
  for (let i = 0; i < text.length; i++) {
    run = isWhiteSpace(text.charCodeAt(i)) ? run + 1 : 0;
    if (run > longest) longest = run;
  }
  return longest;
}

function isWhiteSpace(unit: number): boolean {
  return unit === 32 || (unit >= 9 && unit <= 13) || (unit > 127 && /\s/u.test(String.fromCharCode(unit)));
}
