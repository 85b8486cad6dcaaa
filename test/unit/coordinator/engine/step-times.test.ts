import { describe, expect, it } from 'vitest';
import { StepTimes } from '../../../../coordinator/engine/step-times.ts';

describe('step times', () => {
  it('step times - a prompt has the step for itself when nobody decodes, a careful chunk before anything was measured', () => {
    const times = new StepTimes();
    expect(times.prefillTokensMax(0, 0, null)).toBe(Number.POSITIVE_INFINITY);
    expect(times.prefillTokensMax(4, 0, null)).toBe(64);
  });

  it('step times - prefill gets as many tokens as fit between a decode step and the target', () => {
    const times = new StepTimes();
    times.observe({ decodeRows: 16, prefillTokens: 0, ms: 30 });
    times.observe({ decodeRows: 16, prefillTokens: 50, ms: 80 });
    // A token costs (80 - 30) / 50 = 1 ms; 0.6 of a decode step are 18 ms of prefill.
    expect(times.prefillTokensMax(16, 0, null)).toBe(18);
    expect(times.prefillTokensMax(16, 0, 100)).toBe(70);
    // Never less than 16, whatever the target.
    expect(times.prefillTokensMax(16, 0, 31)).toBe(16);
    // The most similar number of rows that was seen stands for others: 13 ms of rows, 20 ms are nobody's loss.
    times.observe({ decodeRows: 1, prefillTokens: 0, ms: 4 });
    expect(times.prefillTokensMax(1, 0, null)).toBe(16);
    expect(times.prefillTokensMax(2, 0, 104)).toBe(100);
  });

  it('step times - where many prompts wait for each stream, a step may take longer, up to 100 ms', () => {
    const times = new StepTimes();
    times.observe({ decodeRows: 8, prefillTokens: 0, ms: 10 });
    times.observe({ decodeRows: 8, prefillTokens: 10, ms: 15 });
    // 10 ms of rows, half a millisecond a prompt token. One prompt beside 16 streams: 20 ms.
    expect(times.prefillTokensMax(8, 1 / 16, null)).toBe(20);
    // As many prompts as streams: 50 ms. Two for each stream: 90 ms. More: 100 ms.
    expect(times.prefillTokensMax(8, 1, null)).toBe(80);
    expect(times.prefillTokensMax(8, 2, null)).toBe(160);
    expect(times.prefillTokensMax(8, 15, null)).toBe(180);
    // A target that was asked for is kept.
    expect(times.prefillTokensMax(8, 15, 30)).toBe(40);
  });

  it('step times - what a token costs follows the latest chunks, deep in a prompt it is more', () => {
    const times = new StepTimes();
    times.observe({ decodeRows: 8, prefillTokens: 0, ms: 20 });
    for (let i = 0; i < 20; i++) times.observe({ decodeRows: 8, prefillTokens: 20, ms: 40 });
    const early = times.prefillTokensMax(8, 0, null);
    for (let i = 0; i < 20; i++) times.observe({ decodeRows: 8, prefillTokens: 20, ms: 60 });
    // 0.6 * 20 ms at 1 ms a token would be 12.
    expect(early).toBe(16);
    // Nearly 2 ms a token now.
    expect(times.prefillTokensMax(8, 0, 120)).toBe(50);
  });

  it('step times - small chunks and empty steps teach nothing', () => {
    const times = new StepTimes();
    times.observe({ decodeRows: 4, prefillTokens: 0, ms: 10 });
    times.observe({ decodeRows: 4, prefillTokens: 2, ms: 500 });
    expect(times.decodeMs(4)).toBe(10);
    expect(times.prefillTokensMax(4, 0, null)).toBe(64);
  });
});
