import { describe, expect, test } from 'vitest';
import { kvBytesPerBlock, planPlacements, type PlannerOptions } from '../../../../coordinator/planner/placement-planner.ts';
import type { MachineSpeed } from '../../../../coordinator/planner/speed-model.ts';
import { planText } from '../../../../deploy/cli/plan.ts';
import { makeFacts } from './make-facts.ts';

const MiB = 1024 ** 2;
const shares = (count: number, parts: number[] | null = null) => ({ count, parts });

/** Bound by memory: eight tokens cost what one costs. 10 GB/s a core. */
const memoryBound: MachineSpeed = {
  cores: 2,
  hostCores: 2,
  kernels: [
    { threads: 1, tokens: 1, bytesPerSecond: 10e9 },
    { threads: 2, tokens: 1, bytesPerSecond: 20e9 },
  ],
  link: { seconds: 1e-6, bytesPerSecond: 100e9 },
  stepSeconds: 0,
  wakeSeconds: 0,
  service: { stepSeconds: 0, workerSeconds: 0, sequenceSeconds: 0 },
};
/** Bound by arithmetic: eight tokens cost eight times what one costs. */
const computeBound: MachineSpeed = {
  ...memoryBound,
  kernels: [1, 2].flatMap((threads) => [
    { threads, tokens: 1, bytesPerSecond: threads * 10e9 },
    { threads, tokens: 8, bytesPerSecond: threads * 1.25e9 },
  ]),
};

const options = (change: Partial<PlannerOptions> = {}): PlannerOptions => ({
  facts: makeFacts(),
  tensorParallel: shares(2),
  pipelineParallel: shares(1),
  bits: 'exact',
  activations: 'int8',
  kvType: 'auto',
  wire: 'f32',
  contextTokensMax: null,
  blockTokens: 16,
  kvCacheBytes: 256 * MiB,
  machine: memoryBound,
  memoryBytes: 8_192 * MiB,
  contextTokens: 0,
  kvBytesPerBlock: (program, blockTokens) => kvBytesPerBlock(program.kv, blockTokens),
  ...change,
});

describe('placement planner', () => {
  test('placement planner - counts bytes and KV room of every worker', () => {
    const { asked, model, units, activations, kv } = planPlacements(options());
    // Layer: 3,538,944 values of Q4_1 (20 bytes for 32) and two norms; embedding 49,152 x 576 of Q8_0; last norm.
    expect(model.weightBytes).toBe(30 * (2_211_840 + 4_608) + 30_081_024 + 2_304);
    expect(units).toEqual({ attention: 9, feedForward: 16, vocabulary: 48 });
    expect({ activations, kv }).toEqual({ activations: 'int8', kv: { key: 'int8', value: 'int8' } });
    expect(asked.shards.map(({ stage, rank, layers, units: own, kvHeads }) => ({ stage, rank, layers, own, kvHeads }))).toEqual([
      {
        stage: 0,
        rank: 0,
        layers: { from: 0, to: 30 },
        own: { attentionUnits: { from: 0, to: 5 }, feedForwardUnits: { from: 0, to: 8 }, vocabularyUnits: { from: 0, to: 24 } },
        kvHeads: 2,
      },
      {
        stage: 0,
        rank: 1,
        layers: { from: 0, to: 30 },
        own: { attentionUnits: { from: 5, to: 9 }, feedForwardUnits: { from: 8, to: 16 }, vocabularyUnits: { from: 24, to: 48 } },
        kvHeads: 2,
      },
    ]);
    // 30 layers x 2 heads x (64 + 4 + 64 + 4) bytes; 256 MiB hold 2,056 blocks of 16 tokens.
    expect(asked.shards[0]).toMatchObject({ kvBytesPerToken: 8_160, kvTokens: 32_896 });
    expect(asked.kvTokens).toBe(32_896);
    expect(asked.bits).toBe('exact');
  });

  test('placement planner - offers tp up to the cores, two stages, replicas of a whole', () => {
    const names = (cores: number) =>
      planPlacements(options({ machine: { ...memoryBound, cores } })).placements.map((one) => one.name);
    expect(names(2)).toEqual(['tp 1 pp 1', 'tp 2 pp 1', 'tp 1 pp 2', '2 replicas of tp 1 pp 1']);
    expect(names(4)).toEqual([
      'tp 1 pp 1',
      'tp 2 pp 1',
      'tp 3 pp 1',
      'tp 4 pp 1',
      'tp 1 pp 2',
      'tp 2 pp 2',
      '2 replicas of tp 1 pp 1',
      '3 replicas of tp 1 pp 1',
      '4 replicas of tp 1 pp 1',
    ]);
  });

  test('placement planner - lists what was asked for when it is none of those', () => {
    const { asked, placements, advice } = planPlacements(options({ tensorParallel: shares(3, [3, 2, 1]) }));
    expect(placements[0]).toBe(asked);
    expect(asked.name).toBe('tp 3:2:1 pp 1');
    expect(asked.shards.map(({ units }) => units.feedForwardUnits)).toEqual([
      { from: 0, to: 8 },
      { from: 8, to: 13 },
      { from: 13, to: 16 },
    ]);
    expect(advice[0]).toBe('3 workers share 2 cores: right, but every reduction waits for the scheduler');
  });

  test('placement planner - more ranks than units are refused by name', () => {
    expect(() => planPlacements(options({ tensorParallel: shares(10) }))).toThrow(
      /10 ranks, but the model has 9 attention units/,
    );
  });

  test('placement planner - says that replicas beat a split when arithmetic is what takes the time', () => {
    const { placements, advice } = planPlacements(options({ machine: computeBound }));
    const of = (name: string) => placements.find((one) => one.name === name)?.eightStreams.tokensPerSecond ?? 0;
    // 96.4 MB of matrices are 4.8 ms a token on two cores; only the split pays for reductions.
    expect(of('2 replicas of tp 1 pp 1')).toBeCloseTo(207.4, 1);
    expect(of('tp 2 pp 1')).toBeLessThan(of('2 replicas of tp 1 pp 1'));
    expect(advice).toContainEqual(
      expect.stringMatching(
        /^fits one worker: 2 replicas would give more throughput than a split \(207 tokens\/s against 2\d\d tokens\/s of tp 2 pp 1, 8 streams\)$/,
      ),
    );
  });

  test('placement planner - does not praise replicas when memory is what takes the time', () => {
    const { placements, advice } = planPlacements(options());
    const of = (name: string) => placements.find((one) => one.name === name)?.eightStreams.tokensPerSecond ?? 0;
    // Each replica reads all weights for its own four streams.
    expect(of('2 replicas of tp 1 pp 1') / of('tp 1 pp 1')).toBeCloseTo(0.5, 6);
    expect(advice).toEqual(['fits one worker (349 MiB with its KV cache)']);
  });

  test('placement planner - says when one worker would be faster than the split', () => {
    const slowLink = { ...memoryBound, link: { seconds: 200e-6, bytesPerSecond: 1e9 } };
    const { advice } = planPlacements(options({ machine: slowLink }));
    // 60 reductions of 200 us and more are 12 ms on top of 4.8 ms.
    expect(advice).toContainEqual(
      expect.stringMatching(
        /^one worker with all 2 cores would be faster than tp 2 pp 1 for one stream: 207 tokens\/s against 5\d\.\d tokens\/s$/,
      ),
    );
  });

  test('placement planner - says what does not fit into memory', () => {
    const { asked, placements, advice } = planPlacements(options({ memoryBytes: 300 * MiB }));
    expect(asked.fits).toBe(false);
    expect(placements.every((one) => !one.fits)).toBe(true);
    expect(advice).toEqual([
      'tp 2 pp 1 needs 606 MiB for weights and KV cache, 300 MiB are available: lower --kv-cache-bytes, or take a smaller model',
      'does not fit one worker: 349 MiB with its KV cache, 300 MiB are available on this machine',
    ]);
  });

  test('placement planner - says when the KV cache is too small for one long sequence', () => {
    const small = options({ kvCacheBytes: 16 * MiB });
    expect(planPlacements(small).advice[0]).toBe(
      'the KV cache of tp 2 pp 1 holds 2048 tokens, one sequence of the longest context needs 8192: raise --kv-cache-bytes, or lower --context-tokens-max',
    );
    expect(planPlacements({ ...small, contextTokensMax: 2_048 }).advice[0]).not.toContain('KV cache of');
  });

  test('placement planner - BF16 weights promise their bits per kind only where that is allowed, rounded activations none', () => {
    const bitsOf = (type: 'F16' | 'BF16', bits: 'exact' | 'per-kind' | 'free') =>
      planPlacements(options({ facts: makeFacts({}, type, type), bits })).asked.bits;
    expect([bitsOf('BF16', 'exact'), bitsOf('F16', 'exact'), bitsOf('F16', 'per-kind')]).toEqual(['exact', 'exact', 'exact']);
    expect(bitsOf('BF16', 'per-kind')).toBe('per-kind');
    expect([bitsOf('BF16', 'free'), bitsOf('F16', 'free')]).toEqual(['free', 'exact']);
    expect(planPlacements(options({ wire: 'q8' })).asked.bits).toBe('free');
    expect(planPlacements(options({ wire: 'q8' })).placements.find((one) => one.workers === 1)?.bits).toBe('exact');
    expect(planPlacements(options({ kvType: 'f16-int8' })).asked).toMatchObject({ bits: 'exact', kvTokens: 22_816 });
  });
});

describe('plan', () => {
  test('plan - prints units, bytes, KV room, bits, speeds and where they come from', () => {
    const report = planPlacements(options({ machine: computeBound }));
    const text = planText(report, [{ what: 'one exchange over shared memory', value: '1.0 us', source: 'measured' }], 16).join(
      '\n',
    );
    expect(text).toContain('Test 135M (llama): 30 layers, 92.1 MiB of weights');
    expect(text).toContain('tp 2 pp 1: 2 workers, exact bits');
    const bf16 = { facts: makeFacts({}, 'BF16', 'BF16'), bits: 'free' } as const;
    const headOf = (more: Partial<PlannerOptions>) => planText(planPlacements(options({ ...bf16, ...more })), [], 16)[3];
    expect(headOf({})).toMatch(/bits free: what runs beside a request may change its answer, because --bits free .* on cards$/);
    expect(headOf({ wire: 'q8' })).toMatch(
      /--bits free .* on cards; another split may give another answer, because --wire rounds/,
    );
    expect(text).toMatch(/stage 0 rank 1 +0\.\.29 +5\.\.8 +8\.\.15 +24\.\.47 +2 +46\.\d MiB +32896 tokens/);
    expect(text).toMatch(/2 replicas of tp 1 pp 1 +2 +92\.1 MiB +43840 tokens +exact +104 +207 +0 %$/m);
    expect(text).toMatch(/tp 2 pp 1 .*<- asked for$/m);
    expect(text).toMatch(/one exchange over shared memory +1\.0 us +measured/);
    expect(text).toContain('note: fits one worker: 2 replicas would give more throughput');
  });
});
