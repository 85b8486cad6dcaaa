import { describe, expect, test } from 'vitest';
import { loadAddon, type KernelTest } from '../../kernels/index.ts';
import { gaussian, randomTensor, uniform } from './tiny-model.ts';

const kernels: KernelTest = loadAddon().kernelTest;
const f = Math.fround;

/** Random normal values. */
function normal(count: number, seed: number, scale = 1): Float32Array {
  const next = uniform(seed);
  return Float32Array.from({ length: count }, () => scale * gaussian(next));
}

/** fma in fp32, right whenever a * b + c is exact or safely rounded in double: the products here have at most 48 bits. */
const fma = (a: number, b: number, c: number): number => f(a * b + c);

function tree(leaves: number[]): number {
  if (leaves.length === 1) return leaves[0]!;
  const left = Math.ceil(leaves.length / 2);
  return f(tree(leaves.slice(0, left)) + tree(leaves.slice(left)));
}

function halving(partial: number[]): number {
  for (let distance = partial.length / 2; distance >= 1; distance /= 2)
    for (let i = 0; i < distance; i++) partial[i] = f(partial[i]! + partial[i + distance]!);
  return partial[0]!;
}

function roundEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 !== 0) ? floor + 1 : floor;
}

/** One block of a format with chosen bytes, and the 32 or 256 values it stands for, written down from the format's description. */
const half = (value: number): [number, number] => {
  // 1.0 = 0x3c00, 0.5 = 0x3800, 2.0 = 0x4000, 0.25 = 0x3400
  const bits = { 0.25: 0x3400, 0.5: 0x3800, 1: 0x3c00, 2: 0x4000, [-1]: 0xbc00 }[value]!;
  return [bits & 255, bits >> 8];
};

describe('reference, block formats', () => {
  const read = (type: string, data: number[], columns: number) =>
    Array.from(kernels.readRows({ set: 'reference', parts: 1, type, rows: 1, from: 0, columns, data: Uint8Array.from(data) }));
  const nibbles = Array.from({ length: 16 }, (_, j) => j | ((15 - j) << 4)); // value j is j, value 16 + j is 15 - j
  const ramp = [...Array.from({ length: 16 }, (_, j) => j), ...Array.from({ length: 16 }, (_, j) => 15 - j)];

  test('reference - Q4_0 is d * (q - 8)', () => {
    expect(read('Q4_0', [...half(0.5), ...nibbles], 32)).toEqual(ramp.map((q) => 0.5 * (q - 8)));
  });

  test('reference - Q4_1 is d * q + m', () => {
    expect(read('Q4_1', [...half(0.5), ...half(-1), ...nibbles], 32)).toEqual(ramp.map((q) => 0.5 * q - 1));
  });

  test('reference - Q5_0 takes the fifth bit of value j from bit j', () => {
    const high = [0b0000_0101, 0, 0, 0x80]; // values 0, 2 and 31
    const expected = ramp.map((q, j) => 2 * (q + ([0, 2, 31].includes(j) ? 16 : 0) - 16));
    expect(read('Q5_0', [...half(2), ...high, ...nibbles], 32)).toEqual(expected);
  });

  test('reference - Q5_1 is d * q + m with five bits', () => {
    const expected = ramp.map((q, j) => 2 * (q + (j === 8 ? 16 : 0)) + 0.25);
    expect(read('Q5_1', [...half(2), ...half(0.25), 0, 1, 0, 0, ...nibbles], 32)).toEqual(expected);
  });

  test('reference - Q8_0 is d * q, -128 included', () => {
    const q = Array.from({ length: 32 }, (_, j) => (j === 3 ? -128 : j * 4 - 60));
    expect(read('Q8_0', [...half(0.25), ...q.map((v) => v & 255)], 32)).toEqual(q.map((v) => 0.25 * v));
  });

  /** 12 bytes of six-bit scales and minima of eight groups. */
  const packSix = (scales: number[], minima: number[]) => {
    const bytes = new Array<number>(12).fill(0);
    for (let j = 0; j < 4; j++) {
      bytes[j] = scales[j]! | ((scales[j + 4]! >> 4) << 6);
      bytes[j + 4] = minima[j]! | ((minima[j + 4]! >> 4) << 6);
      bytes[j + 8] = (scales[j + 4]! & 15) | ((minima[j + 4]! & 15) << 4);
    }
    return bytes;
  };
  const scales = [1, 63, 17, 5, 40, 33, 2, 62];
  const minima = [0, 1, 63, 32, 20, 47, 16, 9];
  const next = uniform(3);
  const q4 = Array.from({ length: 256 }, () => Math.floor(next() * 16));
  // Byte i of 32-byte row r: value i of group 2r in the low half, of group 2r + 1 in the high half.
  const rows4 = Array.from(
    { length: 128 },
    (_, at) => q4[Math.floor(at / 32) * 64 + (at % 32)]! | (q4[Math.floor(at / 32) * 64 + 32 + (at % 32)]! << 4),
  );

  test('reference - Q4_K is d * sc * q - dmin * mn, groups of 32', () => {
    const expected = q4.map((q, i) => f(0.5 * scales[i >> 5]! * q - 0.25 * minima[i >> 5]!));
    expect(read('Q4_K', [...half(0.5), ...half(0.25), ...packSix(scales, minima), ...rows4], 256)).toEqual(expected);
  });

  test('reference - Q5_K takes the fifth bit of group g from bit g', () => {
    const high = Array.from({ length: 32 }, (_, i) => (i * 37 + 11) & 255);
    const expected = q4.map(
      (q, i) => 0.5 * scales[i >> 5]! * (q + (((high[i % 32]! >> (i >> 5)) & 1) << 4)) - 0.25 * minima[i >> 5]!,
    );
    expect(read('Q5_K', [...half(0.5), ...half(0.25), ...packSix(scales, minima), ...high, ...rows4], 256)).toEqual(expected);
  });

  test('reference - Q6_K is d * sc * (q - 32), scales of 16 values', () => {
    const q = Array.from({ length: 256 }, () => Math.floor(next() * 64));
    const sc = Array.from({ length: 16 }, (_, i) => (i % 2 ? -1 : 1) * (i * 8 + 3));
    const low = new Array<number>(128).fill(0);
    const high = new Array<number>(64).fill(0);
    q.forEach((value, i) => {
      const [part, inPart] = [i >> 7, i & 127];
      const [row, column] = [inPart >> 5, inPart & 31];
      low[part * 64 + (row & 1) * 32 + column]! |= (value & 15) << (row >= 2 ? 4 : 0);
      high[part * 32 + column]! |= (value >> 4) << (2 * row);
    });
    const expected = q.map((value, i) => 0.5 * sc[i >> 4]! * (value - 32) + 0);
    expect(read('Q6_K', [...low, ...high, ...sc.map((v) => v & 255), ...half(0.5)], 256)).toEqual(expected);
  });

  test('reference - a slice inside a super-block skips its leading groups', () => {
    const data = Uint8Array.from([...half(0.5), ...half(0.25), ...packSix(scales, minima), ...rows4]);
    const slice = kernels.readRows({ set: 'reference', parts: 1, type: 'Q4_K', rows: 1, from: 96, columns: 64, data });
    const expected = q4.map((q, i) => f(0.5 * scales[i >> 5]! * q - 0.25 * minima[i >> 5]!)).slice(96, 160);
    expect(Array.from(slice)).toEqual(expected);
  });

  test('reference - data of the wrong length is refused with both numbers', () => {
    expect(() => read('Q8_0', [1, 2, 3], 32)).toThrow('data has 3 bytes, needed are 34');
  });
});

describe('reference, products', () => {
  const columns = 320;
  const tokens = 3;
  const rows = 5;
  const x = normal(tokens * columns, 11);
  const segments = [4, 7, 10];
  const whole: [number, number][] = [[0, 3]];

  test.each([
    ['Q4_0', 'int8'],
    ['Q4_1', 'int8'],
    ['Q8_0', 'int8'],
    ['Q4_0', 'int16'],
    ['Q4_1', 'int16'],
    ['Q8_0', 'int16'],
  ] as const)('reference - a %s product of %s activations is the written chain of fma, bit for bit', (type, activations) => {
    const largest = activations === 'int8' ? 127 : 127 * 256;
    const tensor = randomTensor(type, rows, columns, 0.3, uniform(5));
    const bytes = tensor.blocks.length / (rows * 10);
    const view = new DataView(tensor.blocks.buffer);
    const one = (value: number) =>
      Array.from(
        kernels.readRows({
          set: 'reference',
          parts: 1,
          type: 'F16',
          rows: 1,
          from: 0,
          columns: 32,
          data: new Uint8Array(Uint16Array.from({ length: 32 }, () => value).buffer),
        }),
      )[0]!;
    const bias = normal(rows, 12);
    const expected: number[] = [];
    for (let t = 0; t < tokens; t++)
      for (let r = 0; r < rows; r++) {
        const sums: number[] = [];
        for (let s = 0, g = 0; s < 3; s++) {
          let acc = 0;
          for (; g < segments[s]!; g++) {
            const group = x.subarray(t * columns + g * 32, t * columns + g * 32 + 32);
            const amax = Math.max(...group.map(Math.abs));
            const sa = f(amax / largest);
            const inverse = f(largest / amax);
            const q = Array.from(group, (v) => roundEven(f(v * inverse)));
            const at = (r * 10 + g) * bytes;
            const d = one(view.getUint16(at, true));
            const w = Array.from({ length: 32 }, (_, j) => {
              if (type === 'Q8_0') return view.getInt8(at + 2 + j);
              const byte = tensor.blocks[at + (type === 'Q4_0' ? 2 : 4) + (j % 16)]!;
              return (j < 16 ? byte & 15 : byte >> 4) - (type === 'Q4_0' ? 8 : 0);
            });
            const dot = w.reduce((sum, v, j) => sum + v * q[j]!, 0);
            acc = fma(f(dot * d), sa, acc);
            if (type === 'Q4_1') acc = fma(one(view.getUint16(at + 2, true)), f(sa * q.reduce((a, b) => a + b, 0)), acc);
          }
          sums.push(acc);
        }
        expected.push(f(tree(sums) + bias[r]!));
      }
    const args = {
      parts: 1,
      type,
      rows,
      from: 0,
      columns,
      data: tensor.blocks,
      x,
      tokens,
      segments,
      subtrees: whole,
      bias,
      activations,
    };
    expect(Array.from(kernels.linear({ set: 'reference', ...args }))).toEqual(expected);
    expect(Array.from(kernels.linear({ set: 'reference', ...args, parts: 3 }))).toEqual(expected);
    // And it means the right thing.
    const exact = (t: number, r: number) =>
      tensor.values.subarray(r * columns, (r + 1) * columns).reduce((sum, w, k) => sum + w * x[t * columns + k]!, bias[r]!);
    for (let t = 0; t < tokens; t++)
      for (let r = 0; r < rows; r++)
        expect(Math.abs(expected[t * rows + r]! - exact(t, r))).toBeLessThan(activations === 'int8' ? 0.2 : 0.001);
    const plain = kernels.linear({ set: 'reference-f32', ...args });
    for (let t = 0; t < tokens; t++) for (let r = 0; r < rows; r++) expect(plain[t * rows + r]).toBeCloseTo(exact(t, r), 4);
  });

  test('reference - an F32 product is one chain of fma over unquantised x', () => {
    const tensor = randomTensor('F32', 2, 64, 0.3, uniform(6));
    const input = normal(64, 13);
    const out = kernels.linear({
      set: 'reference',
      parts: 1,
      type: 'F32',
      rows: 2,
      from: 0,
      columns: 64,
      data: tensor.blocks,
      x: input,
      tokens: 1,
      activations: 'int8' as const,
      segments: [2],
      subtrees: [[0, 1]],
      bias: null,
    });
    const chain = (r: number) => input.reduce((acc, v, k) => fma(tensor.values[r * 64 + k]!, v, acc), 0);
    expect(Array.from(out)).toEqual([chain(0), chain(1)]);
  });

  test('reference - subtree sums joined by finish_tree equal the whole tree', () => {
    const tensor = randomTensor('Q4_1', rows, columns, 0.3, uniform(8));
    const args = {
      set: 'reference',
      parts: 1,
      type: 'Q4_1',
      rows,
      from: 0,
      columns,
      data: tensor.blocks,
      x,
      tokens,
      activations: 'int8' as const,
      segments: [1, 2, 3, 4, 5, 6, 7, 8, 10],
      bias: null,
    };
    const complete = kernels.linear({ ...args, subtrees: [[0, 9]] });
    // Nine units cut 4 : 5. tree(9) = tree(5) + tree(4), tree(5) = tree(3) + tree(2), tree(3) = tree(2) + leaf.
    const nodes: [number, number][] = [
      [0, 3],
      [3, 1],
      [4, 1],
      [5, 4],
    ];
    const values = kernels.linear({ ...args, subtrees: nodes });
    const bounds = nodes.map(([first, count]): [number, number] => [first, first + count]);
    const common = { set: 'reference', parts: 2, units: 9, width: rows, tokens };
    const residual = normal(tokens * rows, 14);
    const bias = normal(rows, 15);
    const joined = kernels.finishTree({ ...common, nodes: bounds, values, bias, residual });
    expect(joined).toEqual(kernels.finishTree({ ...common, nodes: [[0, 9]], values: complete, bias, residual }));
    expect(Array.from(joined)).toEqual(Array.from(residual, (v, i) => f(v + f(complete[i]! + bias[i % rows]!))));
  });

  test('reference - a group that is too small to divide by counts as zero, and extremes stay exact', () => {
    const data = new Uint8Array(34 * 2);
    const view = new DataView(data.buffer);
    for (const at of [0, 34]) {
      view.setUint16(at, 0x3c00, true);
      for (let j = 0; j < 32; j++) view.setInt8(at + 2 + j, -128);
    }
    const input = new Float32Array(64).fill(1e-38);
    input.fill(-3, 32);
    const args = {
      parts: 1,
      type: 'Q8_0',
      rows: 1,
      from: 0,
      columns: 64,
      data,
      x: input,
      tokens: 1,
      activations: 'int8' as const,
      segments: [2],
      subtrees: whole.map((): [number, number] => [0, 1]),
      bias: null,
    };
    expect(Array.from(kernels.linear({ set: 'reference', ...args }))).toEqual([f(-128 * -127 * 32 * f(3 / 127))]);
  });
});

describe('reference, norm, rope and activation', () => {
  test('reference - rms_norm sums 128 interleaved partials, then halves', () => {
    const width = 288;
    const x = normal(width * 2, 21);
    const w = normal(width, 22);
    const expected = [0, 1].flatMap((t) => {
      const row = x.subarray(t * width, (t + 1) * width);
      const partial = new Array<number>(128).fill(0);
      row.forEach((v, i) => (partial[i % 128] = fma(v, v, partial[i % 128]!)));
      const r = f(1 / f(Math.sqrt(f(f(halving(partial) / width) + f(1e-5)))));
      return Array.from(row, (v, i) => f(f(v * r) * w[i]!));
    });
    expect(Array.from(kernels.rmsNorm({ set: 'reference', parts: 2, x, w, epsilon: 1e-5, width, tokens: 2 }))).toEqual(expected);
  });

  test.each(['adjacent', 'half'] as const)('reference - rope rotates %s pairs and leaves the rest of a head alone', (style) => {
    const x = normal(2 * 2 * 64, 23);
    const positions = [5, 700];
    const out = kernels.rope({
      set: 'reference',
      parts: 1,
      x,
      heads: 2,
      headSize: 64,
      dimensions: 32,
      style,
      base: 10_000,
      scale: 1,
      positions,
    });
    for (let t = 0; t < 2; t++)
      for (let h = 0; h < 2; h++)
        for (let i = 0; i < 16; i++) {
          const at = t * 128 + h * 64;
          const [a, b] = style === 'half' ? [at + i, at + i + 16] : [at + 2 * i, at + 2 * i + 1];
          const angle = positions[t]! * 10_000 ** ((-2 * i) / 32);
          const [c, s] = [f(Math.cos(angle)), f(Math.sin(angle))];
          expect(out[a]).toBe(f(f(x[a]! * c) - f(x[b]! * s)));
          expect(out[b]).toBe(f(f(x[a]! * s) + f(x[b]! * c)));
        }
    for (let head = 0; head < 4; head++)
      expect(out.subarray(head * 64 + 32, head * 64 + 64)).toEqual(x.subarray(head * 64 + 32, head * 64 + 64));
  });

  test('reference - silu and gelu_tanh are near their definitions, also far out', () => {
    const gate = Float32Array.from([-200, -90, -20, -1, -0, 0, 0.5, 3, 30, 200]);
    const up = new Float32Array(gate.length).fill(2);
    const run = (activation: 'silu' | 'gelu_tanh') =>
      kernels.gatedActivation({ set: 'reference', parts: 1, gate, up, width: gate.length, tokens: 1, activation });
    const silu = run('silu');
    const gelu = run('gelu_tanh');
    gate.forEach((g, i) => {
      expect(silu[i]).toBeCloseTo((2 * g) / (1 + Math.exp(-g)), 5);
      expect(gelu[i]).toBeCloseTo(g * (1 + Math.tanh(0.7978845608 * (g + 0.044715 * g ** 3))), 5);
    });
  });

  test('elementary functions - exp, log, sine and cosine are near the true ones', () => {
    const x = Float32Array.from({ length: 4_000 }, (_, i) => -i * 0.0217);
    kernels.elementary({ name: 'exp', x }).forEach((y, i) => expect(Math.abs(y / Math.exp(x[i]!) - 1)).toBeLessThan(2e-7));
    const positive = Float32Array.from({ length: 4_000 }, (_, i) => 1e-9 * 1.012 ** i);
    kernels.elementary({ name: 'log', x: positive }).forEach((y, i) => {
      const exact = Math.log(positive[i]!);
      expect(Math.abs(y - exact)).toBeLessThan(3e-7 * Math.max(1, Math.abs(exact)));
    });
    const angles = Float32Array.from({ length: 4_000 }, (_, i) => i * 23.71);
    expect(kernels.elementary({ name: 'sin', x: angles })).toEqual(angles.map((a) => Math.sin(a)));
    expect(kernels.elementary({ name: 'cos', x: angles })).toEqual(angles.map((a) => Math.cos(a)));
    expect(Array.from(kernels.elementary({ name: 'exp', x: Float32Array.from([0, -0, -87.5, -Infinity]) }))).toEqual([
      1, 1, 0, 0,
    ]);
  });
});

describe('reference, attention', () => {
  const headSize = 32;
  const kvHead = [0, 0, 1, 1, 1];
  const heads = kvHead.length;
  const make = (tokens: number, rows: number) => ({
    heads,
    headSize,
    kvHeads: 2,
    kvHead,
    scale: 1 / Math.sqrt(headSize),
    window: null as number | null,
    blockTokens: 16,
    blockTable: Array.from({ length: Math.ceil(tokens / 16) }, (_, i) => i),
    k: normal(tokens * 2 * headSize, 31),
    v: normal(tokens * 2 * headSize, 32),
    q: normal(rows * heads * headSize, 33, 2),
    rows,
    fill: 0,
    parts: 1,
  });
  type Case = ReturnType<typeof make>;

  const exact = (c: Case): Float64Array => {
    const tokens = c.k.length / (2 * headSize);
    const out = new Float64Array(c.q.length);
    for (let row = 0; row < c.rows; row++)
      for (let h = 0; h < heads; h++) {
        const p = tokens - c.rows + row;
        const from = c.window === null ? 0 : Math.max(0, p - c.window + 1);
        const scores: number[] = [];
        const at = (j: number) => (j * 2 + kvHead[h]!) * headSize;
        const q = (row * heads + h) * headSize;
        for (let j = from; j <= p; j++) {
          let s = 0;
          for (let d = 0; d < headSize; d++) s += c.q[q + d]! * c.k[at(j) + d]!;
          scores.push(s * c.scale);
        }
        const largest = Math.max(...scores);
        const weights = scores.map((s) => Math.exp(s - largest));
        const total = weights.reduce((a, b) => a + b, 0);
        weights.forEach((w, i) => {
          for (let d = 0; d < headSize; d++) out[q + d]! += (w / total) * c.v[at(from + i) + d]!;
        });
      }
    return out;
  };
  const worst = (a: Float32Array, b: Float64Array) => a.reduce((largest, v, i) => Math.max(largest, Math.abs(v - b[i]!)), 0);

  test.each([1, 16, 17, 64, 65, 256, 257, 600])('reference - attention over %i keys is near the exact one', (tokens) => {
    const c = make(tokens, Math.min(tokens, 3));
    expect(worst(kernels.attention({ set: 'reference-f32', key: 'f32', value: 'f32', ...c }), exact(c))).toBeLessThan(1e-5);
    expect(worst(kernels.attention({ set: 'reference', key: 'f16', value: 'f16', ...c }), exact(c))).toBeLessThan(0.005);
    expect(worst(kernels.attention({ set: 'reference', key: 'f16', value: 'int8', ...c }), exact(c))).toBeLessThan(0.05);
    expect(worst(kernels.attention({ set: 'reference', key: 'int8', value: 'int8', ...c }), exact(c))).toBeLessThan(0.12);
  });

  test('reference - a window hides what is older, exactly', () => {
    const c = { ...make(300, 2), window: 70 };
    expect(worst(kernels.attention({ set: 'reference', key: 'f16', value: 'int8', ...c }), exact(c))).toBeLessThan(0.05);
    // What lies before the window has no influence on any bit.
    const other = { ...c, k: c.k.slice(), v: c.v.slice() };
    other.k.fill(9, 0, 229 * 2 * headSize);
    other.v.fill(-9, 0, 229 * 2 * headSize);
    expect(kernels.attention({ set: 'reference', key: 'int8', value: 'int8', ...other })).toEqual(
      kernels.attention({ set: 'reference', key: 'int8', value: 'int8', ...c }),
    );
  });

  test.each([
    { key: 'int8', value: 'int8' },
    { key: 'f16', value: 'int8' },
    { key: 'f16', value: 'f16' },
  ] as const)(
    'reference - bits of $key K and $value V do not hang on blocks, chunks, parts or what was in the cache',
    (types) => {
      const c = make(300, 40);
      const base = kernels.attention({ set: 'reference', ...types, ...c });
      const blocks = c.blockTable.map((b) => (b * 7 + 3) % 19);
      expect(new Set(blocks).size).toBe(19);
      expect(kernels.attention({ set: 'reference', ...types, ...c, blockTable: blocks })).toEqual(base);
      expect(kernels.attention({ set: 'reference', ...types, ...c, blockTokens: 64, blockTable: [4, 0, 3, 1, 2] })).toEqual(base);
      expect(kernels.attention({ set: 'reference', ...types, ...c, parts: 3 })).toEqual(base);
      expect(kernels.attention({ set: 'reference', ...types, ...c, fill: 255 })).toEqual(base); // NaN scales in slots never written
      const last = kernels.attention({ set: 'reference', ...types, ...c, rows: 1, q: c.q.slice(-heads * headSize) });
      expect(last).toEqual(base.slice(-heads * headSize));
    },
  );

  test('reference - one key gives its value back', () => {
    const c = make(1, 1);
    const out = kernels.attention({ set: 'reference', key: 'int8', value: 'int8', ...c });
    for (let h = 0; h < heads; h++)
      for (let d = 0; d < headSize; d++) {
        const value = c.v.subarray(kvHead[h]! * headSize, (kvHead[h]! + 1) * headSize);
        const amax = Math.max(...value.map(Math.abs));
        const [sv, inverse] = [f(amax / 127), f(127 / amax)];
        const q = roundEven(f(value[d]! * inverse));
        expect(out[h * headSize + d]).toBe(f(q * 255 * f(sv / 255)));
      }
  });
});
