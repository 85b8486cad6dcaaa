/** Whole programs on this machine's card: what test/kernels/cuda-program.test.ts asks of the emulated one. Needs `npm run build:cuda`; skips where there is no card. */
import { describe } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { describeCudaPrograms } from '../kernels/cuda-programs.ts';

const { absent } = loadAddon().cudaFacts();

describe.skipIf(absent !== null)(`cuda executor on a card${absent === null ? '' : ` (skipped: ${absent})`}`, () => {
  describeCudaPrograms(() => Promise.resolve(loadAddon()));
});
