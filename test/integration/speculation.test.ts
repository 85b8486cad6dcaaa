/** Drafts change nothing but time: with them and without, the real model gives the same tokens and the same exact log-probabilities. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { complete, startServe, type Served } from './helpers/serve.ts';

const source = `class Cart:
    def __init__(self, customer):
        self.customer = customer
        self.items = []

    def add_item(self, name, price):
        if price < 0:
            raise ValueError("price must not be negative")
        self.items.append((name, price))

    def total(self):
        return sum(price for name, price in self.items)
`;
const code = `# Before:\n${source}\n# After renaming add_item to insert_item:\n`;
const story = 'Once upon a time there was a keeper of a lighthouse who';

const asked: Record<string, unknown>[] = [
  { prompt: code, max_tokens: 64, temperature: 0, logprobs: 3 },
  { prompt: code, max_tokens: 40, temperature: 0.6, top_p: 0.9, seed: 5, logprobs: 2, n: 2 },
  {
    prompt: code,
    max_tokens: 48,
    min_tokens: 8,
    temperature: 0.5,
    seed: 7,
    logprobs: 1,
    repetition_penalty: 1.02,
    presence_penalty: 0.1,
    frequency_penalty: 0.02,
    logit_bias: { 30: 0.5 },
    stop: ['items = []', 'total'],
  },
  { prompt: story, max_tokens: 24, temperature: 0.8, seed: 1, logprobs: 0 },
];

const answer = async (served: Served, body: Record<string, unknown>): Promise<unknown> => {
  const { choices, usage } = await complete(served, body);
  return { choices, tokens: usage.completion_tokens };
};

async function answers(served: Served): Promise<{ alone: unknown[]; among: unknown[]; accepted: number; drafted: number }> {
  const alone: unknown[] = [];
  for (const body of asked) alone.push(await answer(served, body));
  const among = await Promise.all(asked.map((body) => answer(served, body)));
  const metrics = await (await fetch(`${served.url}/metrics`)).text();
  const sum = (name: string): number => Number(new RegExp(`^shardmesh_${name} (\\d+)$`, 'm').exec(metrics)![1]);
  return { alone, among, accepted: sum('draft_tokens_accepted_total'), drafted: sum('draft_tokens_total') };
}

describe('speculation', () => {
  const cuts = [
    ['--speculation', 'off'],
    ['--tp', '2'],
    ['--pp', '2'],
  ];
  const limits = ['--context-tokens-max', '512', '--kv-cache-bytes', '64m', '--log-level', 'warn'];
  let servers: Served[] = [];

  beforeAll(async () => void (servers = await Promise.all(cuts.map((cut) => startServe([...cut, ...limits])))));
  afterAll(async () => void (await Promise.all(servers.map((served) => served.stop()))));

  it('speculation - drafts give the same tokens and log-probabilities as none, alone and among others, however the mesh is cut', async () => {
    const [plain, ...others] = servers;
    const want = await answers(plain!);
    expect(want).toMatchObject({ accepted: 0, drafted: 0 });
    expect(want.among).toEqual(want.alone);
    for (const served of others) {
      const { alone, among, accepted, drafted } = await answers(served);
      expect(alone).toEqual(want.alone);
      expect(among).toEqual(want.alone);
      expect(accepted).toBeGreaterThan(20);
      expect(drafted).toBeGreaterThanOrEqual(accepted);
    }
  });
});
