/** The whole same-bits matrix: every cut with every link, chunk size, company and cache state, on every executor that this machine has. */
import { describe, expect, it } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { cellName, runCell, type Cell, type CellResult } from './same-bits.ts';

const plain: Cell = { tp: '1', pp: '1', link: 'auto', others: 0, prefillChunk: 256, cached: false, executor: 'cpu', isa: 'auto' };
const outputTokens = 24;
const { isas } = loadAddon().cpuFeatures();

/** All combinations but those that say the same twice: a single worker has no link. The reference executor, slow, runs each cut once. */
function allCells(): Cell[] {
  const cells: Cell[] = [];
  for (const tp of ['1', '2', '3', '3:2:1', '5'])
    for (const pp of ['1', '2', '3']) {
      for (const link of tp === '1' && pp === '1' ? (['auto'] as const) : (['shm', 'grpc', 'nats'] as const))
        for (const others of [0, 8])
          for (const prefillChunk of [256, 7, 64, 129])
            for (const cached of [false, true]) {
              // Over the broker a token of a wide cut takes tenths of a second: one chunk size says enough there.
              if (link === 'nats' && (prefillChunk === 7 || others > 0)) continue;
              cells.push({ ...plain, tp, pp, link, others, prefillChunk, cached });
            }
      for (const isa of isas) cells.push({ ...plain, tp, pp, isa });
      cells.push({ ...plain, tp, pp, executor: 'reference', cached: true });
    }
  return cells;
}

describe('same bits, whole matrix', () => {
  let first: Promise<CellResult> | null = null;
  for (const cell of allCells())
    it(`same bits - ${cellName(cell)}`, async () => {
      const want = await (first ??= runCell(plain, outputTokens));
      const got = await runCell(cell, outputTokens);
      expect({ ...got, cachedTokens: got.cachedTokens > 0 }).toEqual({ ...want, cachedTokens: cell.cached });
    });
});
