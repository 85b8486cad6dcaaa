/** Both models of the catalogue against all figures that are not ours: every text, sample and chat. Takes half an hour; the default model's short form is in `npm test`. */
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { cachedModelPath, deviationOf, loadScoringModel, type ReferenceFigures } from '../kernels/score-model.ts';

const models = [
  {
    name: 'smollm2-135m-instruct-q4_1',
    gate: { meanAbsolute: 0.085, perplexity: 0.015 },
  },
  {
    // f16 K, because k has a bias: int8 K would cost 0.3.
    name: 'qwen2.5-coder-0.5b-instruct-q4_k_m',
    gate: { meanAbsolute: 0.045, perplexity: 0.015 },
  },
];

for (const { name, gate } of models) {
  const path = await cachedModelPath(name);
  const figures = JSON.parse(
    readFileSync(new URL(`../fixtures/reference-${name}.json`, import.meta.url), 'utf8'),
  ) as ReferenceFigures;
  const everything = [...figures.text, ...figures.samples];

  describe.skipIf(path === null)(`figures of ${name} (shardmesh models pull ${name})`, () => {
    it(`${name} cpu - stays inside the gate`, async () => {
      const model = await loadScoringModel(path!, 'cpu');
      const deviation = await deviationOf(model, everything);
      console.log(name, 'cpu', deviation);
      expect(deviation.meanAbsolute).toBeLessThan(gate.meanAbsolute);
      expect(Math.abs(deviation.perplexityRatio - 1)).toBeLessThan(gate.perplexity);
      for (const { ids, greedy, margin } of figures.chat) {
        const unclear = margin.findIndex((value) => value <= 0.5);
        const clear = unclear < 0 ? greedy.length : unclear;
        if (clear > 0) expect((await model.generate(ids, clear)).tokens).toEqual(greedy.slice(0, clear));
      }
      await model.close();
    });

    it(`${name} cpu with int16 activations, f16 K and V - stays within 0.003 of fp32 on average`, async () => {
      const model = await loadScoringModel(path!, 'cpu', { activations: 'int16' });
      const deviation = await deviationOf(model, everything);
      console.log(name, 'cpu int16', deviation);
      expect(deviation.meanAbsolute).toBeLessThan(0.003);
      await model.close();
    });

    it(`${name} reference with fp32 activations - matches every token to 1e-3`, async () => {
      const model = await loadScoringModel(path!, 'reference-f32');
      const deviation = await deviationOf(model, everything);
      console.log(name, 'reference-f32', deviation);
      expect(deviation.maxAbsolute).toBeLessThan(1e-3);
      for (const { ids, top } of figures.chat) {
        const byToken = new Map((await model.generate(ids, 1)).firstTop.map((entry) => [entry.token, entry.logprob]));
        for (const [token, logprob] of top.slice(0, 18)) expect(Math.abs((byToken.get(token) ?? 0) - logprob)).toBeLessThan(1e-3);
      }
      await model.close();
    });

    it(`${name} reference - gives the bits of the cpu executor`, async () => {
      const [text] = figures.text;
      const bits = [];
      for (const kind of ['cpu', 'reference'] as const) {
        const model = await loadScoringModel(path!, kind);
        bits.push(await model.score(text!.ids.slice(0, 100)));
        await model.close();
      }
      expect(bits[1]).toEqual(bits[0]);
    });
  });
}
