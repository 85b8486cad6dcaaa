import { describe, expect, it } from 'vitest';
import { StepPipeline } from '../../../../coordinator/engine/step-pipeline.ts';
import type { StepPlan, StepResult } from '../../../../protocol/step-plan.ts';

function makePlan(step: number, rows: number, after = 0): StepPlan {
  const tokens = Array.from({ length: rows }, () => 1);
  const sequences = [{ slot: 0, position: 0, tokens, after, newBlocks: [], outputs: [] }];
  return {
    type: 'step_plan',
    placement: 'p',
    epoch: 1,
    step,
    opened: [],
    closed: [],
    sequences,
    waitTimeoutMs: 2000,
    resultWaits: false,
  };
}

const makeResult = (step: number, times: Partial<StepResult> = {}): StepResult => ({
  type: 'step_result',
  placement: 'p',
  epoch: 1,
  step,
  outputs: [],
  totalUs: 1000,
  collectiveUs: 0,
  receiveUs: 0,
  sampleUs: 0,
  idleUs: 0,
  ...times,
});

describe('step pipeline', () => {
  it('step pipeline - measures a step from its publish, or from the result before it', () => {
    const pipeline = new StepPipeline();
    pipeline.published(makePlan(1, 1), 0, 0);
    pipeline.published(makePlan(2, 1), 0, 0);
    pipeline.completed(makeResult(1), 1, 100);
    expect(pipeline.numbers(100)).toMatchObject({ stepMs: 100, steps: 1, stepsInFlight: 1, outputTokens: 1 });
    pipeline.completed(makeResult(2), 1, 300);
    expect(pipeline.numbers(300)).toMatchObject({ stepMs: 102, stepsInFlight: 0 });
    expect(pipeline.numbers(300).stepSeconds).toBeCloseTo(0.3, 9);
  });

  it('step pipeline - gives steps a deadline by their rows and by what steps took, at least 2 s', () => {
    const pipeline = new StepPipeline();
    // Nothing measured: 20 ms a row, ten times.
    expect(pipeline.waitTimeoutMs(5)).toBe(2000);
    expect(pipeline.waitTimeoutMs(100)).toBe(20_000);
    pipeline.published(makePlan(1, 1), 0, 0);
    pipeline.completed(makeResult(1), 1, 50);
    // Only small steps measured: 50 ms a row.
    expect(pipeline.waitTimeoutMs(100)).toBe(50_000);
    expect(pipeline.waitTimeoutMs(1)).toBe(2000);
    pipeline.published(makePlan(2, 100), 100, 50);
    pipeline.completed(makeResult(2), 1, 850);
    expect(pipeline.waitTimeoutMs(100)).toBe(8_000);
    // Waits for what is ahead too.
    pipeline.published(makePlan(3, 100), 100, 850);
    expect(pipeline.waitTimeoutMs(100)).toBe(16_000);
    expect(pipeline.waitTimeoutMs(100_000)).toBe(600_000);
    pipeline.begin(3);
    expect(pipeline.waitTimeoutMs(100)).toBe(60_000);
  });

  it('step pipeline - has as many micro-batches as stages, and one more for each stage time that a round spends on links', () => {
    const pipeline = new StepPipeline();
    expect(pipeline.microBatches).toBe(1);
    pipeline.begin(2);
    expect(pipeline.microBatches).toBe(2);
    // Each step waits for the token of the one before; the last stage computes for 3 ms of it.
    let step = 0;
    const round = (receiveMs: number) => {
      pipeline.published(makePlan(++step, 1, step - 1), 0, 0);
      const receiveUs = 1_000 * receiveMs;
      pipeline.completed(makeResult(step, { totalUs: 3_000 + receiveUs, receiveUs }), 1, 0);
    };
    const rounds = (receiveMs: number) => {
      for (let i = 0; i < 32; i++) round(receiveMs);
    };
    // The first step of an epoch is no measure, and no round is known behind it.
    round(500);
    round(500);
    // Rounds of 40 ms, of which two stages take 6: 17 ms a hop, 2 * 17 / 3 = 11.3.
    rounds(37);
    expect(pipeline.microBatches).toBe(13);
    // A stage that hardly waits says nothing about links.
    rounds(0.4);
    expect(pipeline.microBatches).toBe(13);
    // 2.2 ms a hop, 2 * 2.2 / 3 = 1.47.
    rounds(7.4);
    expect(pipeline.microBatches).toBe(3);
    // Links are not longer because there is more to do.
    rounds(37);
    expect(pipeline.microBatches).toBe(3);
    rounds(3.4);
    expect(pipeline.microBatches).toBe(2);
  });

  it('step pipeline - tells how long what is in flight will surely keep the workers busy, once it is like what came back', () => {
    const pipeline = new StepPipeline();
    expect(pipeline.aheadMs(0)).toBe(0);
    pipeline.published(makePlan(1, 40), 40, 0);
    expect(pipeline.aheadMs(0)).toBeNull();
    // The first step of an epoch is no measure.
    pipeline.completed(makeResult(1, { totalUs: 800_000 }), 1, 0);
    pipeline.published(makePlan(2, 40), 40, 0);
    expect(pipeline.aheadMs(0)).toBeNull();
    pipeline.completed(makeResult(2, { totalUs: 80_000 }), 1, 80);
    pipeline.published(makePlan(3, 20), 20, 80);
    // 40 ms are expected of the running step, of which it may take three quarters.
    expect(pipeline.aheadMs(80)).toBe(30);
    expect(pipeline.aheadMs(100)).toBe(10);
    pipeline.published(makePlan(4, 10), 10, 100);
    expect(pipeline.aheadMs(100)).toBe(30);
    expect(pipeline.aheadMs(150)).toBe(20);
    // The next one runs since the result.
    pipeline.completed(makeResult(3, { totalUs: 40_000 }), 1, 150);
    expect(pipeline.aheadMs(155)).toBe(10);
  });

  /** Two steps of a row came back, of 5 ms each. */
  const measured = (): StepPipeline => {
    const pipeline = new StepPipeline();
    for (const step of [1, 2]) {
      pipeline.published(makePlan(step, 1), 0, 0);
      pipeline.completed(makeResult(step, { totalUs: 5_000 }), 1, 0);
    }
    return pipeline;
  };
  const publish = (pipeline: StepPipeline, plans: StepPlan[], prefillTokens: number[] = []): StepPlan[] => {
    for (const [i, plan] of plans.entries()) pipeline.published(plan, prefillTokens[i] ?? 0, 0);
    pipeline.joinResults(plans);
    return plans;
  };
  const waits = (plans: StepPlan[]): boolean[] => plans.map(({ resultWaits }) => resultWaits);

  it('step pipeline - joins the results of steps that together take up to 20 ms, none where nothing is known or stages are several', () => {
    const decode = [3, 4, 5, 6, 7].map((step) => makePlan(step, 1));
    const pipeline = measured();
    expect(waits(publish(pipeline, decode))).toEqual([true, true, true, false, false]);
    expect(pipeline.roomToJoin(3)).toBe(true);
    expect(pipeline.roomToJoin(4)).toBe(false);
    const unmeasured = new StepPipeline();
    expect(waits(publish(unmeasured, [makePlan(1, 1), makePlan(2, 1)]))).toEqual([false, false]);
    const stages = measured();
    stages.begin(2);
    expect(waits(publish(stages, [makePlan(1, 1), makePlan(2, 1)]))).toEqual([false, false]);
  });

  it('step pipeline - joins the results of two steps that together take up to 32 ms, of three no more than 20', () => {
    const ofMs = (ms: number): StepPipeline => {
      const pipeline = new StepPipeline();
      for (const step of [1, 2]) {
        pipeline.published(makePlan(step, 1), 0, 0);
        pipeline.completed(makeResult(step, { totalUs: 1_000 * ms }), 1, 0);
      }
      return pipeline;
    };
    const plans = (): StepPlan[] => [3, 4, 5, 6].map((step) => makePlan(step, 1));
    expect(waits(publish(ofMs(16), plans()))).toEqual([true, false, true, false]);
    expect(waits(publish(ofMs(17), plans()))).toEqual([false, false, false, false]);
    const pairs = ofMs(16);
    publish(pairs, plans());
    expect([1, 2].map((steps) => pairs.roomToJoin(steps))).toEqual([true, false]);
  });

  it('step pipeline - lets no first token wait, and no result for a step with a prompt', () => {
    const pipeline = measured();
    pipeline.published(makePlan(3, 10), 10, 0);
    pipeline.completed(makeResult(3, { totalUs: 10_000 }), 1, 0);
    // Steps of 5, 5, 10 + 5 (a prompt) and 5 ms.
    const plans = [makePlan(4, 1), makePlan(5, 1), makePlan(6, 11), makePlan(7, 1)];
    expect(waits(publish(pipeline, plans, [0, 0, 10]))).toEqual([true, false, false, false]);
  });

  it('step pipeline - knows of steps whose results come together how far they are by what they take', () => {
    const pipeline = measured();
    publish(
      pipeline,
      [3, 4, 5].map((step) => makePlan(step, 1)),
    );
    publish(
      pipeline,
      [6, 7].map((step) => makePlan(step, 1)),
    );
    expect(pipeline.allSilent).toBe(false);
    // Three quarters of 15 ms, and 10 ms of steps that begin later.
    expect([0, 10, 12, 30].map((ms) => pipeline.aheadMs(ms))).toEqual([21.25, 11.25, 10, 10]);
    expect([0, 4, 5, 10, 30].map((ms) => pipeline.stepsToBegin(ms))).toEqual([4, 4, 3, 2, 2]);
    for (const step of [3, 4, 5]) pipeline.completed(makeResult(step, { totalUs: 5_000 }), 1, 16);
    expect(pipeline.allSilent).toBe(true);
    expect(pipeline.stepsToBegin(21)).toBe(0);
    // What a step takes is the workers' word: none of these came 16 ms after the one before.
    expect(pipeline.tokensPerMs(1)).toBe(0.2);
  });

  it('step pipeline - calls a step overdue half a second after the workers should have', () => {
    const pipeline = new StepPipeline();
    pipeline.published(makePlan(1, 3), 3, 1000);
    pipeline.published(makePlan(2, 1), 0, 1000);
    expect(pipeline.overdue(3500)).toBeNull();
    expect(pipeline.overdue(3501)).toEqual({ step: 1, tokens: 3, waitedMs: 2501, limitMs: 2500 });
    pipeline.completed(makeResult(1), 0, 3600);
    expect(pipeline.overdue(6100)).toBeNull();
    expect(pipeline.overdue(6101)).toMatchObject({ step: 2, waitedMs: 2501 });
    pipeline.abandon();
    expect(pipeline.overdue(1e9)).toBeNull();
  });

  it('step pipeline - counts idle time as a bubble only while there was work', () => {
    const pipeline = new StepPipeline();
    pipeline.published(makePlan(1, 1), 0, 0);
    pipeline.completed(makeResult(1, { idleUs: 9_000_000, receiveUs: 400 }), 1, 10);
    expect(pipeline.numbers(10)).toMatchObject({ bubbleRatio: 0, bubbleSeconds: 0, receiveSeconds: 0.0004 });
    pipeline.published(makePlan(2, 1), 0, 10);
    pipeline.completed(makeResult(2, { idleUs: 3000, receiveUs: 400 }), 1, 20);
    const { bubbleSeconds, bubbleRatio } = pipeline.numbers(20);
    expect(bubbleSeconds).toBeCloseTo(0.0034, 9);
    // Means with weight 0.02: bubble 0.02 * 3400 = 68 of 68 + 600.
    expect(bubbleRatio).toBeCloseTo(68 / 668, 9);
    pipeline.rest();
    pipeline.published(makePlan(3, 1), 0, 5000);
    pipeline.completed(makeResult(3, { idleUs: 5_000_000 }), 1, 5010);
    expect(pipeline.numbers(5010).bubbleSeconds).toBeCloseTo(0.0034, 9);
  });

  it('step pipeline - tells steps that were planned ahead from rounds through the coordinator', () => {
    const pipeline = new StepPipeline();
    const draft = (step: number, rows: number): StepPlan => {
      const plan = makePlan(step, rows);
      const outputs = Array.from({ length: rows }, (_, row) => ({ row, score: null, banned: [] }));
      return { ...plan, sequences: [{ ...plan.sequences[0]!, outputs }] };
    };
    expect(pipeline.tokensPerMs(1)).toBeNull();
    pipeline.published(makePlan(1, 40), 40, 0);
    pipeline.published(makePlan(2, 1), 0, 0);
    pipeline.completed(makeResult(1), 1, 100);
    pipeline.completed(makeResult(2, { totalUs: 3_900, idleUs: 100 }), 1, 104);
    expect(pipeline.tokensPerMs(1)).toBe(0.25);
    // A round may take twice as long as long as none was measured.
    expect(pipeline.roundMs(8)).toBe(8);
    pipeline.published(draft(3, 8), 0, 105);
    pipeline.completed(makeResult(3), 5, 110);
    expect(pipeline.numbers(110)).toMatchObject({ prefillTokens: 40, outputTokens: 7 });
    expect(pipeline.roundMs(8)).toBe(6);
    // The most similar number of rows.
    expect(pipeline.roundMs(4)).toBe(6);
    expect(pipeline.tokensPerMs(1)).toBe(0.25);
    // Steps that are planned ahead let what is known of rounds fade: after a while they are tried again.
    pipeline.published(makePlan(4, 1), 0, 110);
    for (let step = 5; step < 105; step++) {
      pipeline.published(makePlan(step, 1), 0, step);
      pipeline.completed(makeResult(step - 1), 1, 110 + step);
    }
    expect(pipeline.roundMs(8)).toBeCloseTo(6 * 0.999 ** 99, 9);
    pipeline.begin(1);
    expect(pipeline.tokensPerMs(1)).toBeNull();
  });

  it('step pipeline - gives rates that fade when nothing happens', () => {
    const pipeline = new StepPipeline();
    pipeline.published(makePlan(1, 40), 40, 0);
    pipeline.completed(makeResult(1), 1, 0);
    expect(pipeline.numbers(0)).toMatchObject({ outputTokensPerSecond: 0.1, prefillTokensPerSecond: 4, prefillTokens: 40 });
    expect(pipeline.numbers(10_000).prefillTokensPerSecond).toBeCloseTo(4 / Math.E, 9);
  });

  it('step pipeline - keeps sums over epochs and forgets speeds', () => {
    const pipeline = new StepPipeline();
    pipeline.published(makePlan(1, 1), 0, 0);
    pipeline.completed(makeResult(1), 1, 900);
    pipeline.published(makePlan(2, 1), 0, 900);
    pipeline.begin(1);
    expect(pipeline.numbers(900)).toMatchObject({ steps: 1, stepsInFlight: 0 });
    expect(pipeline.waitTimeoutMs(1)).toBe(2000);
  });
});
