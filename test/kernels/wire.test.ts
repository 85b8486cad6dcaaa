/** Values on their way between ranks, and what a token costs on the wire. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { loadAddon, type WireType } from '../../kernels/index.ts';
import { cutModel, unitsOfModel, vectorsSent } from '../../kernels/programs/index.ts';
import { makeFacts } from '../unit/coordinator/planner/make-facts.ts';

const { kernelTest } = loadAddon();
const numbers = (values: Iterable<number>): Float32Array => Float32Array.from(values);

describe('wire types', () => {
  test('wire - f32 is what it was', () => {
    const x = numbers([0, -0, 1.5, -3e38, 1e-30, NaN]);
    const { bytes, values } = kernelTest.wire({ type: 'f32', x });
    expect([bytes.length, values]).toEqual([24, x]);
  });

  test('wire - bf16 rounds to nearest even', () => {
    const x = [1, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 1 + 2 ** -8 + 2 ** -20, -1 - 2 ** -8, 3.4e38, Infinity];
    const { bytes, values } = kernelTest.wire({ type: 'bf16', x: numbers(x) });
    expect(bytes.length).toBe(14);
    expect([...values]).toEqual([1, 1, 1 + 2 ** -6, 1 + 2 ** -7, -1, Infinity, Infinity]);
  });

  test('wire - q8 takes 34 bytes for 32 values, a half as scale, and rounds to nearest even', () => {
    const x = numbers([...Array.from({ length: 32 }, (_, i) => (i === 5 ? -127 : i + 0.5)), 254, 1, 3, -2]);
    const { bytes, values } = kernelTest.wire({ type: 'q8', x });
    expect(bytes.length).toBe(34 + 6);
    expect([...bytes.subarray(0, 2), ...bytes.subarray(34, 36)]).toEqual([0x00, 0x3c, 0x00, 0x40]);
    expect([...values.subarray(0, 8)]).toEqual([0, 2, 2, 4, 4, -127, 6, 8]);
    expect([...values.subarray(32)]).toEqual([254, 0, 4, -2]);
  });

  test.each(['bf16', 'q8'] as const)('wire - a value that is not finite stays not finite in %s', (type) => {
    for (const bad of [NaN, Infinity, -Infinity]) {
      const values = kernelTest.wire({ type, x: numbers([1, bad, 2]) }).values;
      expect(Number.isFinite(values[1])).toBe(false);
    }
    expect([...kernelTest.wire({ type, x: new Float32Array(40) }).values]).toEqual(Array.from({ length: 40 }, () => 0));
  });
});

const halfOf = (low = 0, high = 0): number => {
  const exponent = (high >> 2) & 31;
  const mantissa = ((high & 3) << 8) | low;
  return exponent === 0 ? mantissa * 2 ** -24 : (1024 + mantissa) * 2 ** (exponent - 25);
};

/** x / scale to nearest even, with the scale of the group, as `wire.h` defines it: one value at a time. */
function q8Of(x: Float32Array, scale: number): number[] {
  const inverse = scale > 0 ? Math.fround(1 / scale) : 0;
  return Array.from(x, (value) => {
    const exact = Math.min(127, Math.max(-127, Math.fround(value * inverse)));
    const floor = Math.floor(exact);
    const up = exact - floor > 0.5 || (exact - floor === 0.5 && floor % 2 !== 0);
    return Math.fround(scale * (floor + (up ? 1 : 0)));
  });
}

/** The upper half of the bits, to nearest even. */
function bf16Of(value: number): number {
  const bits = new Uint32Array(Float32Array.of(value).buffer);
  const word = bits[0] ?? 0;
  bits[0] = (((word + 0x7fff + ((word >>> 16) & 1)) >>> 16) << 16) >>> 0;
  return new Float32Array(bits.buffer)[0] ?? 0;
}

describe('wire types on random rows', () => {
  const finite = fc.float({ noNaN: true, noDefaultInfinity: true, min: -65_000, max: 65_000 });
  const rows = fc.float32Array({ minLength: 1, maxLength: 32, noNaN: true, noDefaultInfinity: true, min: -65_000, max: 65_000 });

  test('wire - q8 gives every value of a group, whole or short, what its definition says', () => {
    fc.assert(
      fc.property(rows, (x) => {
        const { bytes, values } = kernelTest.wire({ type: 'q8', x });
        const scale = halfOf(bytes[0], bytes[1]);
        const amax = Math.max(...x.map(Math.abs));
        expect(Math.abs(scale - amax / 127)).toBeLessThanOrEqual(Math.max(2 ** -25, (amax / 127) * 2 ** -11));
        expect(Array.from(values, (value) => value + 0)).toEqual(q8Of(x, scale).map((value) => value + 0));
      }),
      { numRuns: 500 },
    );
  });

  test('wire - bf16 gives every value its nearest', () => {
    fc.assert(
      fc.property(fc.array(finite, { minLength: 1, maxLength: 70 }), (x) => {
        expect([...kernelTest.wire({ type: 'bf16', x: numbers(x) }).values]).toEqual(x.map(bf16Of));
      }),
      { numRuns: 500 },
    );
  });
});

describe('bytes a token', () => {
  // 32 layers, hidden size 4,096, two nodes: 272 KiB of q8 values and 1,024 KiB of f32 are what distributed-llama publishes for this shape.
  const facts = makeFacts({
    layers: 32,
    hiddenSize: 4_096,
    heads: 32,
    kvHeads: 8,
    headSize: 128,
    feedForwardSize: 14_336,
    vocabularySize: 128_256,
  });
  const units = unitsOfModel(facts);
  const cut = cutModel(units, { count: 2, parts: null }, { count: 1, parts: null });
  const sentByRank = (type: WireType): number[] => {
    const frame = (vectors: number): number =>
      kernelTest.wire({ type, x: new Float32Array(vectors * facts.hiddenSize) }).tcpBytes;
    return (cut.stages[0]?.ranks ?? []).map(
      (rank) => facts.layers * vectorsSent(units, rank).reduce((sum, vectors) => sum + frame(vectors), 0),
    );
  };

  test.each([
    ['q8', 272, 1.05],
    ['bf16', 512, 1.05],
    ['f32', 1_024, 1.05],
  ] as const)(
    'bytes a token - both reductions of every layer in %s cost each of two nodes at most 5 %% over %i KiB',
    (type, kibibytes, most) => {
      const sent = sentByRank(type);
      expect(sent).toHaveLength(2);
      for (const bytes of sent) {
        expect(bytes).toBeGreaterThanOrEqual(kibibytes * 1024);
        expect(bytes).toBeLessThanOrEqual(most * kibibytes * 1024);
      }
    },
  );
});
