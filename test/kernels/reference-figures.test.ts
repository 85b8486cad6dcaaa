/**
 * The default model against figures that are not ours: log-probabilities of a float32 forward pass made with another library from the same file, weights
 * dequantised. With fp32 activations and K/V our reference must match them; with int8 activations and K/V the cost must stay inside the gate.
 */
import { readFileSync } from 'node:fs';
import { afterAll, describe, expect, it } from 'vitest';
import { cachedModelPath, deviationOf, loadScoringModel, type ReferenceFigures } from './score-model.ts';

const figures = JSON.parse(
  readFileSync(new URL('../fixtures/reference-smollm2-135m-instruct-q4_1.json', import.meta.url), 'utf8'),
) as ReferenceFigures;
const path = await cachedModelPath('smollm2-135m-instruct-q4_1');

describe.skipIf(path === null)('reference figures of the default model', async () => {
  const exact = path === null ? null : await loadScoringModel(path, 'reference-f32');
  const quantised = path === null ? null : await loadScoringModel(path, 'cpu');
  const precise = path === null ? null : await loadScoringModel(path, 'cpu', { activations: 'int16' });
  afterAll(() => Promise.all([exact?.close(), quantised?.close(), precise?.close()]));

  it('reference executor with fp32 activations - matches every token of the text and of a sample to 1e-3', async () => {
    const { tokens, maxAbsolute } = await deviationOf(exact!, [...figures.text, ...figures.samples.slice(0, 1)]);
    expect(tokens).toBe(556);
    expect(maxAbsolute).toBeLessThan(1e-3);
  });

  it('reference executor with fp32 activations - matches the 20 best next tokens of each chat to 1e-3', async () => {
    for (const { ids, top } of figures.chat.slice(0, 4)) {
      const { firstTop } = await exact!.generate(ids, 1);
      const byToken = new Map(firstTop.map((entry) => [entry.token, entry.logprob]));
      // The 20th may change places with the 21st.
      for (const [token, logprob] of top.slice(0, 18)) expect(Math.abs((byToken.get(token) ?? 0) - logprob)).toBeLessThan(1e-3);
    }
  });

  it('cpu executor - stays inside the gate over text and samples: 0.085 mean absolute, 1.5 % perplexity', async () => {
    const { tokens, meanAbsolute, perplexityRatio } = await deviationOf(quantised!, [...figures.text, ...figures.samples]);
    expect(tokens).toBe(3427);
    expect(meanAbsolute).toBeLessThan(0.085);
    expect(Math.abs(perplexityRatio - 1)).toBeLessThan(0.015);
  });

  it('cpu executor with int16 activations, f16 K and V - stays within 0.003 of fp32 on average', async () => {
    const { tokens, meanAbsolute } = await deviationOf(precise!, [...figures.text, ...figures.samples.slice(0, 1)]);
    expect(tokens).toBe(556);
    expect(meanAbsolute).toBeLessThan(0.003);
  });

  it('cpu executor - gives the greedy tokens of each chat as long as the choice is clear', async () => {
    for (const { ids, greedy, margin } of figures.chat) {
      const unclear = margin.findIndex((value) => value <= 0.5);
      const clear = unclear < 0 ? greedy.length : unclear;
      if (clear === 0) continue;
      const { tokens } = await quantised!.generate(ids, clear);
      expect(tokens).toEqual(greedy.slice(0, clear));
    }
  });
});
