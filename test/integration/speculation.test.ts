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
  { prompt: code, max_tokens: 48, temperature: 0, logprobs: 3 },
  { prompt: code, max_tokens: 24, temperature: 0.6, top_p: 0.9, seed: 5, logprobs: 2, n: 2 },
  {
    prompt: code,
    max_tokens: 32,
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
  { prompt: story, max_tokens: 16, temperature: 0.8, seed: 1, logprobs: 0 },
];

const answer = async (served: Served, body: Record<string, unknown>): Promise<unknown> => {
  const { choices, usage } = await complete(served, body);
  return { choices, tokens: usage.completion_tokens };
};

async function alone(served: Served): Promise<unknown[]> {
  const answers: unknown[] = [];
  for (const body of asked) answers.push(await answer(served, body));
  return answers;
}

const among = (served: Served): Promise<unknown[]> => Promise.all(asked.map((body) => answer(served, body)));

/** Draft tokens so far, and those that were right. */
async function drafts(served: Served): Promise<{ all: number; accepted: number }> {
  const metrics = await (await fetch(`${served.url}/metrics`)).text();
  const sum = (name: string): number =>
    Number(new RegExp(`^shardmesh_spec_decode_num_${name}_tokens_total (\\d+)$`, 'm').exec(metrics)![1]);
  return { all: sum('draft'), accepted: sum('accepted') };
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

  it('speculation - drafts give the same tokens and log-probabilities as none, alone and among others, with ranks and with stages', async () => {
    const [plain, ranks, stages] = servers as [Served, Served, Served];
    const want = await alone(plain);
    expect(await drafts(plain)).toEqual({ all: 0, accepted: 0 });
    for (const served of [ranks, stages]) {
      expect(await alone(served)).toEqual(want);
      const { all, accepted } = await drafts(served);
      expect(accepted).toBeGreaterThan(10);
      expect(all).toBeGreaterThanOrEqual(accepted);
    }
    expect(await among(ranks)).toEqual(want);
  });
});
