import { afterAll, describe, expect, it } from 'vitest';
import { createHash } from 'node:crypto';
import { readFileSync, rmSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { readGguf } from '../../../../kernels/model-file/gguf-reader.ts';
import { readModelFacts, type ModelFacts } from '../../../../kernels/model-file/model-facts.ts';
import { checkScales } from '../../../../kernels/model-file/scale-check.ts';
import { readSliceBytes, sliceOf, sliceParts, sliceSha256, type Slice } from '../../../../kernels/model-file/slice.ts';
import { buildProgram, cutModel, unitsOfModel } from '../../../../kernels/programs/index.ts';
import type { TensorType } from '../../../../kernels/programs/program.ts';
import { scratchDirectory, tensorData, tinyModel, writeGguf, type TinyModel } from './gguf-writer.ts';

const directory = scratchDirectory();
afterAll(() => rmSync(directory, { recursive: true, force: true }));

function model(options: TinyModel = {}): { path: string; facts: ModelFacts; bytes: Buffer } {
  const path = writeGguf(directory, tinyModel(options), `${JSON.stringify(options).length}.gguf`);
  return { path, facts: readModelFacts(readGguf(path), 'ab'.repeat(32)), bytes: readFileSync(path) };
}
function slice(facts: ModelFacts, tp: number, rank: number, pp = 1, stage = 0): Slice {
  const cut = cutModel(unitsOfModel(facts), { count: tp, parts: null }, { count: pp, parts: null });
  return sliceOf(buildProgram(facts, cut, { stage, rank, activations: 'int8', kvType: 'auto', contextTokensMax: null }), facts);
}
/** The slice, put together the slow and obvious way. */
const expected = (bytes: Buffer, { entries }: Slice): Buffer =>
  Buffer.concat(
    entries.flatMap(({ offset, rows, rowBytes, rowStride }) =>
      Array.from({ length: rows }, (_, row) => bytes.subarray(offset + row * rowStride, offset + row * rowStride + rowBytes)),
    ),
  );

describe('slice', () => {
  it('slice - of one rank is all tensors, in the order of the file', () => {
    const { facts } = model();
    const whole = slice(facts, 1, 0);
    expect(whole.entries.map(({ tensor }) => tensor)).toEqual(facts.tensors.map(({ name }) => name));
    expect(whole.bytes).toBe(facts.tensors.reduce((sum, tensor) => sum + tensor.bytes, 0));
    expect(whole.entries.every(({ rowBytes, rowStride }) => rowBytes === rowStride)).toBe(true);
  });

  it('slice - of a row-parallel weight is the own columns of each row', () => {
    const { facts } = model();
    const second = slice(facts, 2, 1);
    const down = second.entries.find(({ tensor }) => tensor === 'blk.0.ffn_down.weight');
    const tensor = facts.tensors.find(({ name }) => name === 'blk.0.ffn_down.weight');
    // 256 features in Q8_0: 8 blocks of 34 bytes a row; the second half begins at block 4.
    expect(down).toMatchObject({ offset: (tensor?.offset ?? 0) + 4 * 34, rows: 128, rowBytes: 136, rowStride: 272 });
  });

  it('slice - holds the whole block where a border lies inside it', () => {
    const { facts } = model({ heads: 8, kvHeads: 4, matrixType: 12, feedForward: 512, vocabulary: 2048 });
    const [first, second] = [slice(facts, 2, 0), slice(facts, 2, 1)].map(({ entries }) =>
      entries.find(({ tensor }) => tensor === 'blk.1.attn_output.weight'),
    );
    // 8 heads of 32: columns 0..128 and 128..256 of one block of 256.
    expect([first?.rowBytes, second?.rowBytes]).toEqual([144, 144]);
    expect(first?.offset).toBe(second?.offset);
  });

  it('slice - reads the same bytes whole, in parts, and from any position', async () => {
    const { path, facts, bytes } = model();
    for (const [tp, rank] of [
      [1, 0],
      [2, 1],
      [3, 0],
    ] as const) {
      const part = slice(facts, tp, rank);
      const all = expected(bytes, part);
      expect(all.length).toBe(part.bytes);
      const file = await open(path, 'r');
      try {
        const parts: Buffer[] = [];
        for await (const piece of sliceParts(file, part)) parts.push(piece);
        expect(Math.max(...parts.map(({ length }) => length))).toBeLessThanOrEqual(256 * 1024);
        expect(Buffer.concat(parts).equals(all)).toBe(true);
        for (const [from, length] of [
          [0, 1],
          [137, 999],
          [part.bytes - 5, 5],
          [Math.floor(part.bytes / 3), 70_001],
        ] as const) {
          const target = Buffer.alloc(length);
          await readSliceBytes(file, part, from, target);
          expect(target.equals(all.subarray(from, from + length)), `${tp} ${rank} ${from}`).toBe(true);
        }
      } finally {
        await file.close();
      }
      expect(await sliceSha256(path, part)).toBe(createHash('sha256').update(all).digest('hex'));
    }
  });

  it('slice - has one address for one content, another for another', () => {
    const { facts } = model();
    const addresses = [
      slice(facts, 1, 0),
      slice(facts, 2, 0),
      slice(facts, 2, 1),
      slice(facts, 2, 0, 2, 1),
      slice({ ...facts, sourceSha256: 'cd'.repeat(32) }, 1, 0),
    ].map(({ address }) => address);
    expect(new Set(addresses).size).toBe(5);
    expect(slice(facts, 2, 1).address).toBe(addresses[2]);
    expect(addresses[0]).toMatch(/^[0-9a-f]{64}$/);
  });

  it('slice - of a range the model does not have is refused', () => {
    const { facts } = model();
    const weight = {
      tensor: 'blk.0.attn_q.weight',
      type: 'Q8_0',
      rows: { from: 0, to: 129 },
      columns: { from: 0, to: 128 },
      use: 'matrix',
    } as const;
    expect(() => sliceOf({ weights: [weight] }, facts)).toThrow('rows 0..129, columns 0..128: the tensor has 128 rows of 128');
    expect(() => sliceOf({ weights: [{ ...weight, type: 'Q4_0' }] }, facts)).toThrow('the model has no such tensor');
  });

  it('slice - of a file that was cut off meanwhile is an error', async () => {
    const { facts, bytes } = model();
    const path = writeGguf(directory, {}, 'short.gguf');
    const { writeFileSync } = await import('node:fs');
    writeFileSync(path, bytes.subarray(0, bytes.length - 10));
    await expect(sliceSha256(path, slice(facts, 1, 0))).rejects.toThrow('inside tensor output_norm.weight');
  });
});

describe('scale check', () => {
  const spoiled: [TensorType, number, number, number][] = [
    ['Q4_0', 2, 18, 0],
    ['Q4_1', 3, 20, 2],
    ['Q8_0', 8, 34, 0],
    ['Q4_K', 12, 144, 2],
    ['Q6_K', 14, 210, 208],
  ];
  it.each(spoiled)('scale check - finds an infinite scale in the last block of %s', (type, id, bytes, offset) => {
    const data = tensorData(id, [512], 3);
    expect(() => checkScales('w', type, data)).not.toThrow();
    data.writeUInt16LE(0xfc00, data.length - bytes + offset);
    expect(() => checkScales('w', type, data)).toThrow(
      `tensor w (${type}) has a scale that is not finite, in block ${data.length / bytes - 1}`,
    );
    data.writeUInt16LE(0x7e01, data.length - bytes + offset);
    expect(() => checkScales('w', type, data)).toThrow('not finite');
  });

  it('scale check - finds NaN in float weights, aligned in memory or not', () => {
    for (const shift of [0, 1]) {
      const data = Buffer.alloc(64 + shift).subarray(shift);
      checkScales('w', 'F32', data);
      data.writeFloatLE(NaN, 60);
      expect(() => checkScales('w', 'F32', data)).toThrow('tensor w (F32) has a value that is not finite, in block 15');
      data.writeUInt32LE(0, 60);
      data.writeUInt16LE(0x7f80, 62);
      expect(() => checkScales('w', 'BF16', data)).toThrow('in block 31');
      data.writeUInt16LE(0x7c00, 62);
      expect(() => checkScales('w', 'F16', data)).toThrow('in block 31');
    }
  });

  it('scale check - takes the largest finite half', () => {
    const data = tensorData(8, [64], 1);
    data.writeUInt16LE(0xfbff, 0);
    expect(() => checkScales('w', 'Q8_0', data)).not.toThrow();
  });
});
