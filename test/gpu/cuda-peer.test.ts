/**
 * Whole programs whose ranks read each other's sums, all on this machine's card and in this process: what test/kernels/cuda-peer-program.test.ts asks of emulated cards. Needs
 * `npm run build:cuda`; skips where there is no card. Ranks in processes of their own: `build/cuda/cuda_peer_processes_test`, which `npm run test:gpu` runs first.
 */
import { describe } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { describeCudaPeerPrograms } from '../kernels/cuda-peer-programs.ts';

const { absent } = loadAddon().cudaFacts();

describe.skipIf(absent !== null)(`cuda peers on a card${absent === null ? '' : ` (skipped: ${absent})`}`, () => {
  describeCudaPeerPrograms(() => Promise.resolve(loadAddon()));
});
