/**
 * `npm run test:gpu`: builds the CUDA kernels and the addon with them, and runs on this machine's card what `npm test` runs on an emulated one: each kernel and
 * exported programs (test/gpu/run.sh, which needs no Node), then whole programs in the addon, and meshes over HTTP. Without a card all of it says why it skips; without nvcc the build says what is missing.
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { buildCuda, cardFolder } from './build-cuda.mjs';
import { root } from './paths.mjs';
import { line } from './progress.mjs';
import { SetupError } from './run-command.mjs';
import { setUp } from './setup.mjs';

const vitest = join(root, 'node_modules', 'vitest', 'vitest.mjs');

try {
  await buildCuda();
  const { status } = spawnSync('sh', [join(cardFolder, 'run.sh'), '--tests'], { stdio: 'inherit' });
  if (status !== 0) process.exitCode = 1;
  await setUp({ only: 'build' });
  const programs = spawnSync(
    process.execPath,
    [
      vitest,
      'run',
      '--project',
      'gpu',
      'test/gpu/cuda-program.test.ts',
      'test/gpu/cuda-peer.test.ts',
      'test/gpu/cuda-mesh.test.ts',
    ],
    {
      cwd: root,
      stdio: 'inherit',
    },
  );
  if (programs.status !== 0) process.exitCode = 1;
} catch (error) {
  line(`test:gpu failed: ${error instanceof SetupError ? error.message : error.stack}`);
  process.exitCode = 1;
}
