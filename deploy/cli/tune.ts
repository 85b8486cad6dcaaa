/** `shardmesh tune`: measures on this host's card what its kernels are launched with, and keeps it for the workers of this host. Results keep their bits. */
import { Command, Option } from 'commander';
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { keepTuning, readTuning, tuningPath } from '../../kernels/cuda/tuning.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import { ShardmeshError } from '../../protocol/errors.ts';

interface Values {
  program?: string;
}

export function tuneCommand(): Command {
  return new Command('tune')
    .description(
      "Measures this host's NVIDIA card, for some minutes: which kernel for how many tokens, how work is shared. Workers started later use it; results keep their bits.",
    )
    .addOption(new Option('--program <file>', 'the gpu_bench to measure with (default: that of npm run build:cuda)'))
    .addHelpText(
      'after',
      `
The file is cuda-tuning.json beside downloaded models (SHARDMESH_CACHE); without it workers use what is built in.

Example:
  shardmesh tune
`,
    )
    .action((values: Values) => tune(values.program ?? builtProgram()));
}

/** Where `npm run build:cuda` leaves it: in the checkout that this file, or what it was compiled to, lies in. */
function builtProgram(): string {
  let folder = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(folder, 'package.json')) && folder !== dirname(folder)) folder = dirname(folder);
  return join(folder, 'build', 'cuda', 'card', 'gpu_bench');
}

export function tune(program: string): void {
  if (!existsSync(program))
    throw new ShardmeshError(
      'config_invalid',
      `${program} is not there: run npm run build:cuda first (nvcc 12.8 or later), or name a gpu_bench with --program`,
    );
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-tune-'));
  try {
    const made = join(folder, 'tuning.json');
    const { status } = spawnSync(program, ['--tune', made], { stdio: 'inherit' });
    if (status !== 0) throw new ShardmeshError('internal', `${program} ended with ${status ?? 'a signal'}; nothing was changed`);
    if (!existsSync(made)) throw new ShardmeshError('config_invalid', 'no card here to tune for; nothing was changed');
    const cache = defaultCacheDirectory();
    const { card } = keepTuning(tuningPath(cache), readTuning(cache), readFileSync(made, 'utf8'));
    process.stdout.write(`kept for ${card} in ${tuningPath(cache)}\n`);
  } finally {
    rmSync(folder, { recursive: true });
  }
}
