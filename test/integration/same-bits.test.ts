/** Twelve cells of the same-bits matrix that touch every value of every dimension; `npm run test:matrix` runs all that is sensible. */
import { describe, expect, it } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { cellName, runCell, type Cell, type CellResult } from '../matrix/same-bits.ts';

const plain: Cell = { tp: '1', pp: '1', link: 'auto', others: 0, prefillChunk: 256, cached: false, executor: 'cpu', isa: 'auto' };
const cells: Cell[] = [
  { ...plain, isa: 'avx2', cached: true },
  { ...plain, tp: '2', link: 'shm', others: 8 },
  { ...plain, tp: '3', prefillChunk: 64, cached: true },
  { ...plain, tp: '3:2:1', link: 'shm', prefillChunk: 129 },
  { ...plain, tp: '5', prefillChunk: 129, cached: true },
  { ...plain, pp: '2', link: 'shm', others: 8, prefillChunk: 7 },
  { ...plain, pp: '3', link: 'grpc', cached: true },
  { ...plain, tp: '2', pp: '2', link: 'shm', prefillChunk: 64 },
  { ...plain, tp: '2', link: 'grpc', prefillChunk: 129 },
  { ...plain, tp: '2', link: 'nats', cached: true },
  { ...plain, pp: '2', link: 'nats', prefillChunk: 64 },
  { ...plain, isa: 'avx512', others: 8 },
  { ...plain, tp: '2', executor: 'reference', cached: true },
];
const outputTokens = 12;

describe('same bits', () => {
  let first: Promise<CellResult> | null = null;
  const expected = (): Promise<CellResult> => (first ??= runCell(plain, outputTokens));
  const { isas } = loadAddon().cpuFeatures();

  for (const cell of cells) {
    const missing = cell.isa === 'avx512' && !isas.includes('avx512');
    // Without AVX-512 the portable set takes its place: it runs the same kernel source, but far too slowly for company.
    const run: Cell = missing ? { ...cell, isa: 'portable', others: 0, cached: true } : cell;
    it(`same bits - ${cellName(run)} equals one worker`, async () => {
      const want = await expected();
      const got = await runCell(run, outputTokens);
      expect(got.greedy).toBe(want.greedy);
      expect(got.sampled).toBe(want.sampled);
      expect(got.prompt).toBe(want.prompt);
      expect(got.cachedTokens > 0).toBe(run.cached);
    });
  }
});
