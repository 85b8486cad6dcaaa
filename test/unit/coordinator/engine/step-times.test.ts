import { describe, expect, it } from 'vitest';
import { StepTimes } from '../../../../coordinator/engine/step-times.ts';
import type { PromptDemand } from '../../../../coordinator/scheduler/scheduler.ts';

/** One prompt of 2,000 tokens, of which none is computed, beside 16 streams that decode. */
const demand = (fields: Partial<PromptDemand> = {}): PromptDemand => ({
  decodeRows: 16,
  decoding: 16,
  waiting: 1,
  tokens: 2_000,
  tokensLeft: 2_000,
  completedTokens: 0,
  stepsSince: 0,
  ...fields,
});

/** 16 rows take 20 ms, a prompt token 1 ms. */
function measuredTimes(): StepTimes {
  const times = new StepTimes();
  times.observe({ decodeRows: 16, prefillTokens: 0, ms: 20 });
  times.observe({ decodeRows: 16, prefillTokens: 50, ms: 70 });
  return times;
}

describe('step times', () => {
  it('step times - a prompt has the step for itself when nobody decodes, a careful chunk before anything was measured', () => {
    const times = new StepTimes();
    expect(times.prefillTokensMax(demand({ decodeRows: 0, decoding: 0 }), null)).toBe(Number.POSITIVE_INFINITY);
    expect(times.prefillTokensMax(demand({ decodeRows: 4 }), null)).toBe(64);
  });

  it('step times - a long prompt gets as many tokens as fit between a decode step and the target', () => {
    const times = new StepTimes();
    times.observe({ decodeRows: 16, prefillTokens: 0, ms: 30 });
    times.observe({ decodeRows: 16, prefillTokens: 50, ms: 80 });
    // A token costs (80 - 30) / 50 = 1 ms; half of a decode step is 15 ms of prefill.
    expect(times.prefillTokensMax(demand({ waiting: 0 }), null)).toBe(15);
    expect(times.prefillTokensMax(demand(), 100)).toBe(70);
    // Never less than 12, whatever the target.
    expect(times.prefillTokensMax(demand(), 31)).toBe(12);
    // The most similar number of rows that was seen stands for others: 13 ms of rows, 20 ms are nobody's loss.
    times.observe({ decodeRows: 1, prefillTokens: 0, ms: 4 });
    expect(times.prefillTokensMax(demand({ decodeRows: 1 }), null)).toBe(16);
    expect(times.prefillTokensMax(demand({ decodeRows: 2 }), 104)).toBe(100);
  });

  it('step times - where many long prompts wait for each stream, a step may take longer, up to 100 ms', () => {
    const times = new StepTimes();
    times.observe({ decodeRows: 8, prefillTokens: 0, ms: 10 });
    times.observe({ decodeRows: 8, prefillTokens: 10, ms: 15 });
    const tokensMax = (waiting: number, decoding: number, targetMs: number | null) =>
      times.prefillTokensMax(demand({ decodeRows: 8, waiting, decoding }), targetMs);
    // 10 ms of rows, half a millisecond a prompt token. One prompt beside 16 streams: 20 ms.
    expect(tokensMax(1, 16, null)).toBe(20);
    // As many prompts as streams: 50 ms. Two for each stream: 90 ms. More: 100 ms.
    expect(tokensMax(8, 8, null)).toBe(80);
    expect(tokensMax(16, 8, null)).toBe(160);
    expect(tokensMax(120, 8, null)).toBe(180);
    // A target that was asked for is kept.
    expect(tokensMax(120, 8, 30)).toBe(40);
  });

  it('step times - a short prompt is computed at once, or in the number of equal steps that comes nearest to 100 ms each', () => {
    const times = measuredTimes();
    const tokensMax = (tokens: number, tokensLeft = tokens) => times.prefillTokensMax(demand({ tokens, tokensLeft }), null);
    // What is left of the 100 ms others may have.
    expect(tokensMax(64)).toBe(100);
    expect(tokensMax(128)).toBe(128);
    expect(tokensMax(149)).toBe(149);
    expect(tokensMax(150)).toBe(75);
    expect(tokensMax(400)).toBe(100);
    expect(tokensMax(400, 149)).toBe(149);
    // Longer ones go at the pace of the streams to their end: half of 20 ms would be 10.
    expect(tokensMax(401)).toBe(12);
    expect(tokensMax(401, 30)).toBe(12);
    // So does a short one where a pace was asked for: 50 ms, of which rows take 20.
    expect(times.prefillTokensMax(demand({ tokens: 64, tokensLeft: 64 }), 50)).toBe(30);
  });

  it('step times - beside no streams a prompt gets whole steps, but a short one that others wait behind has its first token before they are begun', () => {
    const times = measuredTimes();
    const alone = { decodeRows: 0, decoding: 0, tokens: 128, tokensLeft: 128 };
    expect(times.prefillTokensMax(demand(alone), null)).toBe(Number.POSITIVE_INFINITY);
    expect(times.prefillTokensMax(demand({ ...alone, waiting: 2 }), null)).toBe(128);
    expect(times.prefillTokensMax(demand({ ...alone, waiting: 2, tokens: 401 }), null)).toBe(Number.POSITIVE_INFINITY);
  });

  it('step times - behind short prompts the streams have steps for themselves, of together half of what those took, two at most', () => {
    const times = measuredTimes();
    const after = (completedTokens: number, stepsSince: number, fields: Partial<PromptDemand> = {}) =>
      times.prefillTokensMax(demand({ tokens: 128, tokensLeft: 128, completedTokens, stepsSince, ...fields }), null);
    // A decode step takes 20 ms, a prompt token 1 ms.
    expect([0, 1, 2].map((stepsSince) => after(128, stepsSince))).toEqual([0, 0, 128]);
    expect([0, 1].map((stepsSince) => after(50, stepsSince))).toEqual([0, 128]);
    expect(after(16, 0)).toBe(128);
    // Nobody decodes, a long prompt, or a pace that was asked for: nothing to make good.
    expect(after(128, 0, { decodeRows: 0, decoding: 0, waiting: 2 })).toBe(128);
    expect(after(128, 0, { tokens: 2_000, tokensLeft: 2_000 })).toBe(12);
    expect(times.prefillTokensMax(demand({ tokens: 64, tokensLeft: 64, completedTokens: 128 }), 50)).toBe(30);
    // What a step without prompts takes is not known yet: nothing to compare with.
    const unmeasured = new StepTimes();
    unmeasured.observe({ decodeRows: 0, prefillTokens: 100, ms: 100 });
    expect(unmeasured.prefillTokensMax(demand({ tokens: 128, tokensLeft: 128, completedTokens: 128 }), null)).toBe(128);
  });

  it('step times - what a token costs follows the latest chunks, deep in a prompt it is more', () => {
    const times = new StepTimes();
    times.observe({ decodeRows: 8, prefillTokens: 0, ms: 20 });
    for (let i = 0; i < 20; i++) times.observe({ decodeRows: 8, prefillTokens: 20, ms: 40 });
    const early = times.prefillTokensMax(demand({ decodeRows: 8, waiting: 0 }), null);
    for (let i = 0; i < 20; i++) times.observe({ decodeRows: 8, prefillTokens: 20, ms: 60 });
    // Half of 20 ms at 1 ms a token would be 10.
    expect(early).toBe(12);
    // Nearly 2 ms a token now.
    expect(times.prefillTokensMax(demand({ decodeRows: 8 }), 120)).toBe(50);
  });

  it('step times - expects of a step what its rows and its prompt tokens took lately', () => {
    const times = new StepTimes();
    expect(times.stepMs({ decodeRows: 1, prefillTokens: 0 })).toBeNull();
    times.observe({ decodeRows: 16, prefillTokens: 0, ms: 20 });
    expect(times.stepMs({ decodeRows: 16, prefillTokens: 0 })).toBe(20);
    expect(times.stepMs({ decodeRows: 16, prefillTokens: 8 })).toBeNull();
    times.observe({ decodeRows: 16, prefillTokens: 50, ms: 70 });
    expect(times.stepMs({ decodeRows: 16, prefillTokens: 8 })).toBe(28);
    expect(times.stepMs({ decodeRows: 0, prefillTokens: 8 })).toBe(8);
  });

  it('step times - small chunks and empty steps teach nothing', () => {
    const times = new StepTimes();
    times.observe({ decodeRows: 4, prefillTokens: 0, ms: 10 });
    times.observe({ decodeRows: 4, prefillTokens: 2, ms: 500 });
    expect(times.decodeMs(4)).toBe(10);
    expect(times.prefillTokensMax(demand({ decodeRows: 4 }), null)).toBe(64);
  });
});
