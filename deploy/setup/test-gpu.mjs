/**
 * `npm run test:gpu`: builds the CUDA kernels and runs their tests on this machine's card, the same cases that `npm test` runs on an emulated one. Without a card
 * the programs say why they skip; without nvcc the build says what is missing.
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { buildCuda } from './build-cuda.mjs';
import { cudaBuild } from './cuda-part.mjs';
import { line } from './progress.mjs';
import { SetupError } from './run-command.mjs';

try {
  await buildCuda();
  for (const program of ['cuda_linear_test', 'cuda_step_test']) {
    const { status } = spawnSync(join(cudaBuild, program), { stdio: 'inherit' });
    if (status !== 0) process.exitCode = 1;
  }
} catch (error) {
  line(`test:gpu failed: ${error instanceof SetupError ? error.message : error.stack}`);
  process.exitCode = 1;
}
