/**
 * Whole programs whose ranks are in one graph, all on this machine's card and in this process: what test/kernels/cuda-card-program.test.ts asks of an emulated card. Needs
 * `npm run build:cuda`; skips where there is no card.
 */
import { describe } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { describeCudaCardPrograms } from '../kernels/cuda-card-programs.ts';

const { absent } = loadAddon().cudaFacts();

describe.skipIf(absent !== null)(`cuda ranks on one card${absent === null ? '' : ` (skipped: ${absent})`}`, () => {
  describeCudaCardPrograms(() => Promise.resolve(loadAddon()));
});
