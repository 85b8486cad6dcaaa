/** The `shardmesh` command. Each subcommand is a file of its own; options are named once, in `options.ts`. */
import { Command, CommanderError } from 'commander';
import { ShardmeshError } from '../../protocol/errors.ts';
import { doctorCommand } from './doctor.ts';
import { keysCommand } from './keys.ts';
import { modelsCommand } from './models.ts';
import { planCommand } from './plan.ts';
import { serveCommand } from './serve.ts';
import { workerCommand } from './worker.ts';

/** Every command with its options, before anything is parsed. */
export function shardmeshProgram(): Command {
  const program = new Command('shardmesh')
    .description('Distributed LLM serving over a mesh of shard workers: any number of unequal shards, the same bits.')
    .exitOverride()
    .showHelpAfterError('(add --help for the options)');
  for (const command of [serveCommand, workerCommand, planCommand, modelsCommand, doctorCommand, keysCommand])
    program.addCommand(command());
  return program;
}

/** @param args  without the program's name. Sets the exit code: 1 for failures, 2 for a wrong command line or configuration. */
export async function main(args: string[]): Promise<void> {
  const program = shardmeshProgram();
  try {
    await program.parseAsync(args, { from: 'user' });
  } catch (error) {
    if (error instanceof CommanderError) {
      process.exitCode = error.exitCode === 0 ? 0 : 2;
      return;
    }
    const known = error instanceof ShardmeshError || (error as Error).name === 'ModelFileError';
    process.stderr.write(`shardmesh: ${known ? (error as Error).message : ((error as Error).stack ?? String(error))}\n`);
    process.exitCode = error instanceof ShardmeshError && error.code === 'config_invalid' ? 2 : 1;
  }
}

// A worker process is started with this file as its module.
if (process.argv[1] && import.meta.url === new URL(`file://${process.argv[1]}`).href) await main(process.argv.slice(2));
