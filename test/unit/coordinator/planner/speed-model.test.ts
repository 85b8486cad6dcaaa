import { describe, expect, test } from 'vitest';
import { kernelSpeed, predictSpeed, type MachineSpeed, type PlacementLoad } from '../../../../coordinator/planner/speed-model.ts';

/** 10 GB/s on one core, 16 on two; 8 tokens take 1.25 times the time of one. */
const kernels = [
  { threads: 1, tokens: 1, bytesPerSecond: 10e9 },
  { threads: 1, tokens: 8, bytesPerSecond: 8e9 },
  { threads: 2, tokens: 1, bytesPerSecond: 16e9 },
  { threads: 2, tokens: 8, bytesPerSecond: 12.8e9 },
];
const machine: MachineSpeed = {
  cores: 2,
  hostCores: 2,
  kernels,
  link: { seconds: 10e-6, bytesPerSecond: 1e9 },
  stepSeconds: 0,
  wakeSeconds: 50e-6,
  service: { stepSeconds: 0, workerSeconds: 0, sequenceSeconds: 0 },
};
const rank = (matrixBytes: number, vectors: [number, number] = [1, 1]) => ({ matrixBytes, kvBytesPerToken: 0, vectors });
const whole: PlacementLoad = { hiddenSize: 1_000, wireBytes: 4, stages: [{ layers: 10, ranks: [rank(80e6)] }] };
const split: PlacementLoad = { hiddenSize: 1_000, wireBytes: 4, stages: [{ layers: 10, ranks: [rank(40e6), rank(40e6)] }] };
const piped: PlacementLoad = {
  hiddenSize: 1_000,
  wireBytes: 4,
  stages: [
    { layers: 5, ranks: [rank(40e6)] },
    { layers: 5, ranks: [rank(40e6)] },
  ],
};
const one = { streams: 1, contextTokens: 0 };
const eight = { streams: 8, contextTokens: 0 };

describe('kernel speed', () => {
  test('kernel speed - gives back the measured points', () => {
    expect(kernels.map(({ threads, tokens }) => kernelSpeed(kernels, threads, tokens))).toEqual([10e9, 8e9, 16e9, 12.8e9]);
  });

  test('kernel speed - lies on a line in speed between thread counts, in time between token counts', () => {
    expect(kernelSpeed(kernels, 1.5, 1)).toBeCloseTo(13e9, 0);
    // 1/10 and 1/8 seconds a GB at 1 and 8 tokens: 4.5 tokens lie half way, 0.1125.
    expect(kernelSpeed(kernels, 1, 4.5)).toBeCloseTo(1e9 / 0.1125, 0);
  });

  test('kernel speed - stays at the most threads measured, and goes on in tokens', () => {
    expect(kernelSpeed(kernels, 64, 1)).toBe(16e9);
    expect(kernelSpeed(kernels, 1, 15)).toBeCloseTo(1e9 / 0.15, 0);
  });

  test('kernel speed - goes through the origin below the least threads measured', () => {
    expect(kernelSpeed([{ threads: 4, tokens: 1, bytesPerSecond: 8e9 }], 1, 1)).toBe(2e9);
  });

  test('kernel speed - never lets noise make more tokens faster', () => {
    const noisy = [
      { threads: 1, tokens: 1, bytesPerSecond: 5e9 },
      { threads: 1, tokens: 8, bytesPerSecond: 6e9 },
    ];
    expect(kernelSpeed(noisy, 1, 64)).toBe(5e9);
  });

  test('kernel speed - needs a measured point', () => {
    expect(() => kernelSpeed([], 1, 1)).toThrow('no kernel speed was measured');
  });
});

describe('speed model', () => {
  test('speed model - one worker on two cores: 80 MB at 16 GB/s are 5 ms', () => {
    const { tokensPerSecond, tokenSeconds, linkShare } = predictSpeed(whole, machine, one);
    expect(tokensPerSecond).toBeCloseTo(200, 6);
    expect(tokenSeconds).toBeCloseTo(0.005, 9);
    expect(linkShare).toBe(0);
  });

  test('speed model - eight streams share the bytes of a step', () => {
    // 80 MB at 12.8 GB/s: 6.25 ms for 8 tokens.
    expect(predictSpeed(whole, machine, eight).tokensPerSecond).toBeCloseTo(1280, 6);
  });

  test('speed model - two ranks pay two reductions a layer', () => {
    // Both cores read 80 MB in 5 ms; 20 reductions of 10 us and one vector of 4,000 bytes at 1 GB/s (4 us).
    const { tokenSeconds, linkShare } = predictSpeed(split, machine, one);
    expect(tokenSeconds).toBeCloseTo(0.005 + 20 * 14e-6, 9);
    expect(linkShare).toBeCloseTo(0.00028 / 0.00528, 6);
  });

  test('speed model - the slowest rank sets the pace', () => {
    const uneven = { hiddenSize: 1_000, wireBytes: 4, stages: [{ layers: 10, ranks: [rank(60e6), rank(20e6)] }] };
    expect(predictSpeed(uneven, machine, one).tokenSeconds).toBeCloseTo(60e6 / 8e9 + 0.00028, 9);
  });

  test('speed model - every vector that the others send is read', () => {
    const cut = { hiddenSize: 1_000, wireBytes: 4, stages: [{ layers: 10, ranks: [rank(40e6, [1, 2]), rank(40e6, [2, 1])] }] };
    // 3 vectors each time, the receiver with the fewest of its own reads 2 of them: 18 us.
    expect(predictSpeed(cut, machine, one).tokenSeconds).toBeCloseTo(0.005 + 20 * 18e-6, 9);
  });

  test('speed model - one stream through two stages uses one core at a time', () => {
    // Twice 40 MB at 10 GB/s, and two hops of 14 us to a stage that sleeps: 50 us to wake it, 250 us for what it has lost.
    expect(predictSpeed(piped, machine, one).tokenSeconds).toBeCloseTo(0.008 + 2 * 314e-6, 9);
  });

  test('speed model - several streams fill both stages with micro-batches', () => {
    // 4 tokens a micro-batch; both cores busy: 16 GB/s falls to 1 / (1/16 + (1/12.8 - 1/16) * 3/7), each gets half; two rounds of a stage.
    const bytesPerSecond = 1e9 / (1 / 16 + ((1 / 12.8 - 1 / 16) * 3) / 7);
    expect(predictSpeed(piped, machine, eight).tokenSeconds).toBeCloseTo(
      (2 * 40e6) / (bytesPerSecond / 2) + 2 * (10e-6 + 16e-6 + 50e-6 + 250e-6),
      9,
    );
  });

  test('speed model - replicas deal streams and cores out evenly and share memory', () => {
    // Each replica has one core and 4 streams, and reads its own 80 MB.
    const bytesPerSecond = 1e9 / (1 / 16 + ((1 / 12.8 - 1 / 16) * 3) / 7);
    expect(predictSpeed(whole, machine, eight, 2).tokensPerSecond).toBeCloseTo(8 / (80e6 / (bytesPerSecond / 2)), 6);
    // One stream keeps one of them busy, on its one core.
    expect(predictSpeed(whole, machine, one, 2).tokensPerSecond).toBeCloseTo(125, 6);
  });

  test('speed model - reads the K/V of every token in every context', () => {
    const load = {
      hiddenSize: 1_000,
      wireBytes: 4,
      stages: [{ layers: 10, ranks: [{ matrixBytes: 80e6, kvBytesPerToken: 10_000, vectors: [1, 1] as const }] }],
    };
    expect(predictSpeed(load, machine, { streams: 1, contextTokens: 1_600 }).tokenSeconds).toBeCloseTo(96e6 / 16e9, 9);
    expect(predictSpeed(load, machine, { streams: 8, contextTokens: 1_000 }).tokenSeconds).toBeCloseTo(160e6 / 12.8e9, 9);
  });

  test('speed model - more workers than cores wait to be scheduled in, and one core has two of three ranks', () => {
    const three = { hiddenSize: 1_000, wireBytes: 4, stages: [{ layers: 10, ranks: [rank(30e6), rank(25e6), rank(25e6)] }] };
    // One core reads 30 MB, the other 50. Two vectors of the others: 10 + 8 us, and 75 us to get a core.
    expect(predictSpeed(three, machine, one).tokenSeconds).toBeCloseTo(50e6 / 8e9 + 20 * 93e-6, 9);
  });

  test('speed model - unequal ranks are laid on cores so that the fullest has least', () => {
    const ranks = [rank(10e6), rank(30e6), rank(20e6)];
    const uneven = { hiddenSize: 1_000, wireBytes: 4, stages: [{ layers: 10, ranks }] };
    expect(predictSpeed(uneven, machine, one).tokenSeconds).toBeCloseTo(30e6 / 8e9 + 20 * 93e-6, 9);
  });

  describe('with a coordinator that takes CPU', () => {
    const service = { stepSeconds: 800e-6, workerSeconds: 200e-6, sequenceSeconds: 100e-6 };
    const served = { ...machine, service };
    const extra = (load: PlacementLoad, workload: typeof one, on: MachineSpeed = served): number =>
      predictSpeed(load, on, workload).tokenSeconds -
      predictSpeed(load, { ...on, service: machine.service }, workload).tokenSeconds;

    test('speed model - three quarters of it come on top where every core computes', () => {
      expect(extra(whole, one)).toBeCloseTo(0.75 * 800e-6, 9);
      expect(extra(split, one)).toBeCloseTo(0.75 * 1000e-6, 9);
      expect(extra(split, eight)).toBeCloseTo(0.75 * 1700e-6, 9);
    });

    test('speed model - every micro-batch is a step', () => {
      expect(extra(piped, eight)).toBeCloseTo(0.75 * (2 * 1000e-6 + 6 * 100e-6), 9);
    });

    test('speed model - a core that does not compute takes all of it', () => {
      expect(extra(piped, one)).toBe(0);
      expect(extra(whole, one, { ...served, cores: 1 })).toBe(0);
      expect(extra(split, one, { ...served, hostCores: 4 })).toBe(0);
    });
  });

  test('speed model - the fixed cost of a step is paid once a token', () => {
    expect(predictSpeed(whole, { ...machine, stepSeconds: 0.005 }, one).tokensPerSecond).toBeCloseTo(100, 6);
  });

  test('speed model - refuses a placement without ranks and a workload without streams', () => {
    expect(() => predictSpeed({ hiddenSize: 1, wireBytes: 4, stages: [] }, machine, one)).toThrow('at least one rank');
    expect(() => predictSpeed(whole, machine, { streams: 0, contextTokens: 0 })).toThrow('at least one stream');
  });
});
