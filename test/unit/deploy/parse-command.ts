/** Parses command lines of `shardmesh` without running anything. */
import type { Command } from 'commander';
import { shardmeshProgram } from '../../../deploy/cli/main.ts';

export interface ParsedCommand {
  /** `models pull` */
  name: string;
  /** Arguments that are no options. */
  operands: string[];
  options: Record<string, unknown>;
}

export const leaves = (command: Command, path: string[] = []): { path: string[]; command: Command }[] =>
  command.commands.length === 0
    ? [{ path, command }]
    : command.commands.flatMap((child) => leaves(child, [...path, child.name()]));

/** @throws {CommanderError} what is wrong with the command line */
export async function parseCommand(args: string[]): Promise<ParsedCommand> {
  const program = await shardmeshProgram();
  const parsed: ParsedCommand[] = [];
  for (const { path, command } of leaves(program)) {
    for (let one: Command | null = command; one; one = one.parent)
      one.exitOverride().configureOutput({ writeErr: () => undefined });
    command.action(() => {
      parsed.push({ name: path.join(' '), operands: command.args, options: command.opts() });
    });
  }
  program.parse(args, { from: 'user' });
  const [command] = parsed;
  if (!command) throw new Error(`${args.join(' ')} ran no command`);
  return command;
}

/** Words of a shell command line without quotes, a trailing `&` and what follows several blanks (an explanation) left out. */
export const wordsOf = (line: string): string[] =>
  (line.trim().split(/ {2,}/)[0] ?? '').split(' ').filter((word) => word !== '' && word !== '&');

/** What a command prints for `--help`, examples included. */
export function helpText(command: Command): string {
  let text = '';
  command.configureOutput({ writeOut: (part) => (text += part) });
  command.outputHelp();
  return text;
}
