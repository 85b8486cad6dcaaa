/** The `shardmesh` command. Each subcommand is a file of its own; options are named once, in `options.ts`. */
import { setFlagsFromString } from 'node:v8';
import { Command, CommanderError } from 'commander';
import { workerExit } from '../../coordinator/mesh/worker-exit.ts';
import { ShardmeshError } from '../../protocol/errors.ts';

/**
 * V8 optimises a function after this many bytes of its bytecode have run; its own figure (132 KB) is made for programs that have cores to themselves. Here whatever the
 * event loops take is taken from kernels on the same cores, and the code of a step is small and known to be hot: one stream decodes 12 to 15 % faster in its first
 * 1,600 tokens, the same as ever after 3,000.
 */
setFlagsFromString('--interrupt-budget=20000');

/** Loaded one at a time: a worker process must not carry the HTTP server and the tokenizer. */
const commands: Record<string, () => Promise<Command>> = {
  serve: async () => (await import('./serve.ts')).serveCommand(),
  worker: async () => (await import('./worker.ts')).workerCommand(),
  plan: async () => (await import('./plan.ts')).planCommand(),
  models: async () => (await import('./models.ts')).modelsCommand(),
  trace: async () => (await import('./trace.ts')).traceCommand(),
  enroll: async () => (await import('./enroll.ts')).enrollCommand(),
  bench: async () => (await import('./bench.ts')).benchCommand(),
  keys: async () => (await import('./keys.ts')).keysCommand(),
  tune: async () => (await import('./tune.ts')).tuneCommand(),
  doctor: async () => (await import('./doctor.ts')).doctorCommand(),
};

/** The program with the named command, or with every command, before anything is parsed. */
export async function shardmeshProgram(name = ''): Promise<Command> {
  const program = new Command('shardmesh')
    .description('Distributed LLM serving over a mesh of shard workers: any number of unequal shards, the same bits.')
    .exitOverride()
    .showHelpAfterError('(add --help for the options)');
  const named = Object.hasOwn(commands, name) ? commands[name] : undefined;
  for (const load of named ? [named] : Object.values(commands)) program.addCommand(await load());
  return program;
}

/** @param args  without the program's name. Sets the exit code: 1 for failures, 2 for a wrong command line or configuration, 72 for a worker without a card. */
export async function main(args: string[]): Promise<void> {
  const program = await shardmeshProgram(args[0]);
  try {
    await program.parseAsync(args, { from: 'user' });
  } catch (error) {
    if (error instanceof CommanderError) {
      process.exitCode = error.exitCode === 0 ? 0 : 2;
      return;
    }
    const known = error instanceof ShardmeshError || (error as Error).name === 'ModelFileError';
    process.stderr.write(`shardmesh: ${known ? (error as Error).message : ((error as Error).stack ?? String(error))}\n`);
    const code = error instanceof ShardmeshError ? error.code : null;
    process.exitCode = code === 'config_invalid' ? 2 : code === 'card_absent' ? workerExit.cardAbsent : 1;
  }
}

// A worker process is started with this file as its module.
if (process.argv[1] && import.meta.url === new URL(`file://${process.argv[1]}`).href) await main(process.argv.slice(2));
