import { describe, expect, test } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { gaussian, uniform } from './tiny-model.ts';

const kernels = loadAddon().kernelTest;

function sample(logits: Float32Array, change: Partial<Parameters<typeof kernels.sample>[0]> = {}): Int32Array {
  return kernels.sample({
    logits,
    positions: [0, 1],
    temperature: 1,
    topP: 1,
    topK: 0,
    minP: 0,
    seed: 42n,
    choice: 0,
    repetition: 1,
    presence: 0,
    frequency: 0,
    bias: [],
    prompt: [],
    output: [],
    banned: [],
    ...change,
  });
}

const normalLogits = (count: number, seed: number, scale = 3) => {
  const next = uniform(seed);
  return Float32Array.from({ length: count }, () => scale * gaussian(next));
};

/** How often each token comes at 20,000 positions. */
function frequencies(logits: Float32Array, change: Partial<Parameters<typeof kernels.sample>[0]> = {}): Map<number, number> {
  const counts = new Map<number, number>();
  const draws = 20_000;
  for (const token of sample(logits, { positions: [0, draws], ...change }))
    counts.set(token, (counts.get(token) ?? 0) + 1 / draws);
  return counts;
}

/** Greatest distance from softmax(logits / temperature) restricted to `kept`. */
function distance(counts: Map<number, number>, logits: Float32Array, kept: number[], temperature = 1): number {
  const weights = kept.map((t) => Math.exp(logits[t]! / temperature));
  const total = weights.reduce((a, b) => a + b, 0);
  return Math.max(...kept.map((t, i) => Math.abs((counts.get(t) ?? 0) - weights[i]! / total)));
}

const ranked = (logits: Float32Array) => Array.from(logits.keys()).sort((a, b) => logits[b]! - logits[a]! || a - b);

describe('sampler', () => {
  const logits = normalLogits(1_000, 1);
  const order = ranked(logits);

  test('sampler - temperature 0 takes the best token, the lower id when two are equal', () => {
    expect(Array.from(sample(logits, { temperature: 0 }))).toEqual([order[0]]);
    const equal = Float32Array.from({ length: 5_000 }, (_, i) => (i === 4_711 || i === 1_234 || i === 3_000 ? 7 : i / 5_000));
    expect(Array.from(sample(equal, { temperature: 0 }))).toEqual([1_234]);
    expect(Array.from(sample(Float32Array.from([-0, 0, -1]), { temperature: 0 }))).toEqual([0]);
  });

  test('sampler - draws follow the softmax', () => {
    const counts = frequencies(logits);
    expect(distance(counts, logits, order)).toBeLessThan(0.012);
    expect(counts.size).toBeGreaterThan(200);
  });

  test('sampler - temperature sharpens and flattens', () => {
    expect(distance(frequencies(logits, { temperature: 0.5 }), logits, order, 0.5)).toBeLessThan(0.012);
    expect(distance(frequencies(logits, { temperature: 2 }), logits, order, 2)).toBeLessThan(0.012);
  });

  test('sampler - rare tokens of a large vocabulary are drawn as often as they should be', () => {
    const flat = normalLogits(50_000, 2, 0.1);
    const counts = frequencies(flat);
    const low = [...counts].filter(([token]) => token < 25_000).reduce((sum, [, share]) => sum + share, 0);
    expect(low).toBeGreaterThan(0.485);
    expect(low).toBeLessThan(0.515);
    expect(counts.size).toBeGreaterThan(16_000); // 50,000 * (1 - e^-0.4) = 16,484 expected
    expect(counts.size).toBeLessThan(17_000);
  });

  test.each([1, 2, 17])('sampler - top-k %i keeps exactly the k best', (k) => {
    const counts = frequencies(logits, { topK: k, temperature: 3 });
    const kept = order.slice(0, k);
    expect([...counts.keys()].sort((a, b) => a - b)).toEqual([...kept].sort((a, b) => a - b));
    expect(distance(counts, logits, kept, 3)).toBeLessThan(0.015);
  });

  test('sampler - top-k cuts between equal logits by id', () => {
    const equal = new Float32Array(64).fill(1);
    expect([...frequencies(equal, { topK: 3 }).keys()].sort()).toEqual([0, 1, 2]);
  });

  test.each([0.1, 0.5, 0.9])('sampler - top-p %f keeps the fewest best tokens that reach it', (p) => {
    const weights = order.map((t) => Math.exp(logits[t]! - logits[order[0]!]!));
    const total = weights.reduce((a, b) => a + b, 0);
    let sum = 0;
    const kept = order.slice(0, weights.findIndex((w) => (sum += w / total) >= p) + 1);
    const counts = frequencies(logits, { topP: p });
    for (const token of counts.keys()) expect(kept).toContain(token);
    expect(distance(counts, logits, kept)).toBeLessThan(0.015);
  });

  test('sampler - top-p 0 leaves the best token, top-p of equal tokens cuts by id', () => {
    expect([...frequencies(logits, { topP: 0 }).keys()]).toEqual([order[0]]);
    const equal = new Float32Array(100).fill(-2);
    expect([...frequencies(equal, { topP: 0.0501 }).keys()].sort()).toEqual([0, 1, 2, 3, 4, 5]);
    expect([...frequencies(equal, { topP: 0.05 }).keys()].sort()).toEqual([0, 1, 2, 3, 4]);
  });

  test('sampler - top-p counts the mass of what top-k left', () => {
    const four = Float32Array.from([0, 0, 0, 0, ...new Array<number>(100).fill(-0.01)]);
    expect([...frequencies(four, { topK: 4, topP: 0.5 }).keys()].sort()).toEqual([0, 1]);
  });

  test('sampler - min-p keeps what has at least that share of the best', () => {
    const some = Float32Array.from([5, 4.4, 4.2, 0]); // e^-0.6 = 0.549, e^-0.8 = 0.449
    expect([...frequencies(some, { minP: 0.5 }).keys()].sort()).toEqual([0, 1]);
    expect([...frequencies(some, { minP: 0.44 }).keys()].sort()).toEqual([0, 1, 2]);
  });

  test('sampler - banned tokens never come, whatever else is asked', () => {
    const some = Float32Array.from([9, 8, 1, 0]);
    expect(Array.from(sample(some, { temperature: 0, banned: [0] }))).toEqual([1]);
    expect([...frequencies(some, { banned: [0, 1] }).keys()].sort()).toEqual([2, 3]);
    expect([...frequencies(some, { banned: [0, 1], topK: 3, topP: 0.99 }).keys()].sort()).toEqual([2, 3]);
  });

  test('sampler - a bias moves a token, penalties push seen tokens down', () => {
    const greedy = { temperature: 0 };
    const some = Float32Array.from([2, 1.5, -1, -1.2]);
    expect(Array.from(sample(some, { ...greedy, bias: [[3, 100]] }))).toEqual([3]);
    // Repetition divides positive logits, of prompt tokens too: 2 / 1.5 = 1.33.
    expect(Array.from(sample(some, { ...greedy, repetition: 1.5, prompt: [0] }))).toEqual([1]);
    // ... and multiplies negative ones: -1 * 1.5 = -1.5.
    expect(Array.from(sample(some, { ...greedy, repetition: 1.5, prompt: [2], banned: [0, 1] }))).toEqual([3]);
    // Presence counts once, over the output only.
    expect(Array.from(sample(some, { ...greedy, presence: 0.6, prompt: [0] }))).toEqual([0]);
    expect(Array.from(sample(some, { ...greedy, presence: 0.6, output: [0] }))).toEqual([1]);
    // Frequency counts every time: 2 - 2 * 0.2 = 1.6, 2 - 3 * 0.2 = 1.4.
    expect(Array.from(sample(some, { ...greedy, frequency: 0.2, output: [0, 0] }))).toEqual([0]);
    expect(Array.from(sample(some, { ...greedy, frequency: 0.2, output: [0, 0, 0] }))).toEqual([1]);
  });

  test('sampler - the same seed, choice and position give the same token; each of them matters', () => {
    const flat = normalLogits(5_000, 3, 0.5);
    const draw = (change: Partial<Parameters<typeof kernels.sample>[0]>) =>
      Array.from(sample(flat, { positions: [100, 140], ...change }));
    const base = draw({});
    expect(draw({})).toEqual(base);
    expect(draw({ positions: [110, 140] })).toEqual(base.slice(10));
    expect(draw({ seed: 43n })).not.toEqual(base);
    expect(draw({ seed: 42n + (1n << 63n) })).not.toEqual(base);
    expect(draw({ choice: 1 })).not.toEqual(base);
    expect(new Set(base).size).toBeGreaterThan(30);
  });

  test('sampler - a seed keeps its tokens for good', () => {
    // A change of these ids is a change of the arithmetic version.
    expect(Array.from(sample(normalLogits(5_000, 3, 0.5), { positions: [0, 8] }))).toMatchInlineSnapshot(`
      [
        1870,
        3766,
        1080,
        3235,
        1186,
        1988,
        4504,
        1992,
      ]
    `);
  });

  test('sampler - Gumbel noise has the mean and spread of its distribution', () => {
    const noise = kernels.elementary({ name: 'gumbel', x: Float32Array.from({ length: 200_000 }, (_, i) => i) });
    const mean = noise.reduce((a, b) => a + b, 0) / noise.length;
    const variance = noise.reduce((a, b) => a + (b - mean) ** 2, 0) / noise.length;
    expect(mean).toBeCloseTo(0.5772, 1.9);
    expect(variance).toBeCloseTo(Math.PI ** 2 / 6, 1.5);
    const largest = noise.reduce((a, b) => Math.max(a, b));
    expect(largest).toBeGreaterThan(10);
    expect(largest).toBeLessThan(23);
  });
});

describe('log-probabilities', () => {
  test.each([7, 1_024, 1_025, 5_000, 49_152])(
    'log-probabilities - %i logits give the true value to 1e-6, best first',
    (count) => {
      const logits = normalLogits(count, count);
      const largest = logits.reduce((a, b) => Math.max(a, b));
      const logTotal = Math.log(logits.reduce((sum, x) => sum + Math.exp(x - largest), 0));
      const [own, ...top] = kernels.score({ logits, token: 3, top: 5 });
      expect(Math.abs(own! - (logits[3]! - largest - logTotal))).toBeLessThan(2e-6);
      expect(top.filter((_, i) => i % 2 === 0)).toEqual(ranked(logits).slice(0, 5));
      top
        .filter((_, i) => i % 2 === 1)
        .forEach((logprob, i) =>
          expect(Math.abs(logprob - (logits[ranked(logits)[i]!]! - largest - logTotal))).toBeLessThan(2e-6),
        );
    },
  );

  test('log-probabilities - equal logits list the lower id first, and a small vocabulary gives what it has', () => {
    const [own, ...top] = kernels.score({ logits: Float32Array.from([1, 1, 1, 1]), token: 2, top: 20 });
    expect(own).toBe(Math.fround(-Math.log(4)));
    expect(top.filter((_, i) => i % 2 === 0)).toEqual([0, 1, 2, 3]);
  });
});
