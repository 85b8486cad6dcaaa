import OpenAI from 'openai';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { HttpServer } from '../../../../coordinator/http/server.ts';
import { ShardmeshError } from '../../../../protocol/errors.ts';
import { answer, exactLogprob, post, startServer, type FakeEngine } from './fake-engine.ts';

let server: HttpServer;
let engine: FakeEngine;
let url: string;
beforeEach(async () => {
  ({ server, engine, url } = await startServer());
});
afterEach(() => server.close());

const client = (): OpenAI => new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 });
const chat = { model: 'tiny', messages: [{ role: 'user' as const, content: 'Hello' }] };

describe('chat completions', () => {
  it('chat completions - answers a whole completion with usage and cached tokens', async () => {
    const completion = await client().chat.completions.create(chat);
    expect(completion.choices[0]?.message.content).toBe('Hi!');
    expect(completion.choices[0]?.finish_reason).toBe('stop');
    expect(completion.usage).toEqual({
      prompt_tokens: 11,
      completion_tokens: 3,
      total_tokens: 14,
      prompt_tokens_details: { cached_tokens: 2 },
    });
  });

  it('chat completions - streams role, text, reason and usage', async () => {
    const chunks = [];
    for await (const chunk of await client().chat.completions.create({
      ...chat,
      stream: true,
      stream_options: { include_usage: true },
    }))
      chunks.push(chunk);
    expect(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('')).toBe('Hi!');
    expect(chunks[0]?.choices[0]?.delta.role).toBe('assistant');
    expect(chunks.at(-2)?.choices[0]?.finish_reason).toBe('stop');
    expect(chunks.at(-1)?.usage?.total_tokens).toBe(14);
  });

  it('chat completions - with continuous_usage_stats each event says what was used so far', async () => {
    const totals = [];
    for await (const { usage } of await client().chat.completions.create({
      ...chat,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true } as { include_usage: boolean },
    }))
      totals.push([usage?.prompt_tokens, usage?.completion_tokens]);
    expect(totals.at(-1)).toEqual([11, 3]);
    expect(totals).toContainEqual([11, 1]);
    expect(totals).toContainEqual([11, 2]);
  });

  it('chat completions - keeps the choices of n apart, streamed or not', async () => {
    const whole = await client().chat.completions.create({ ...chat, n: 3 });
    expect(whole.choices.map((choice) => [choice.index, choice.message.content])).toEqual([
      [0, 'Hi!'],
      [1, 'Hi!'],
      [2, 'Hi!'],
    ]);
    const texts = ['', '', ''];
    for await (const chunk of await client().chat.completions.create({ ...chat, n: 3, stream: true }))
      for (const choice of chunk.choices) texts[choice.index] += choice.delta.content ?? '';
    expect(texts).toEqual(['Hi!', 'Hi!', 'Hi!']);
  });

  it('chat completions - prints log-probabilities as exact fp32 values', async () => {
    const completion = await client().chat.completions.create({ ...chat, logprobs: true, top_logprobs: 1 });
    const entry = completion.choices[0]?.logprobs?.content?.[0];
    expect(entry).toEqual({
      token: 'H',
      logprob: exactLogprob,
      bytes: [72],
      top_logprobs: [{ token: 'H', logprob: exactLogprob, bytes: [72] }],
    });
  });

  it('chat completions - an error before the first token is a status, later it is an event in the stream', async () => {
    engine.refuse = new ShardmeshError('queue_full', undefined, { retryAfterSeconds: 3, details: { limit: 4 } });
    const refused = await post(url, '/v1/chat/completions', { ...chat, stream: true });
    expect([refused.status, refused.headers.get('retry-after')]).toEqual([429, '3']);
    engine.refuse = null;
    engine.script = async function* () {
      yield { type: 'token', choice: 0, token: 72, text: 'H', logprob: null };
      yield { type: 'error', code: 'worker_lost', message: 'worker w1 was lost', retryAfterSeconds: 1 };
    };
    const text = await (await post(url, '/v1/chat/completions', { ...chat, stream: true })).text();
    expect(text).toContain('"code":"worker_lost"');
    expect(text).not.toContain('[DONE]');
  });

  it('chat completions - a client that leaves cancels its request', async () => {
    engine.script = async function* () {
      for (;;) {
        yield { type: 'token', choice: 0, token: 72, text: 'H', logprob: null };
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    };
    const stream = await client().chat.completions.create({ ...chat, stream: true });
    for await (const _ of stream) break;
    await expect.poll(() => engine.cancelled.length, { timeout: 2_000 }).toBeGreaterThan(0);
  });
});

describe('completions', () => {
  it('completions - scores a prompt with echo, logprobs and max_tokens 0', async () => {
    const completion = await client().completions.create({
      model: 'tiny',
      prompt: 'abc',
      echo: true,
      logprobs: 0,
      max_tokens: 0,
    });
    expect(completion.choices[0]?.text).toBe('abc');
    expect(completion.choices[0]?.logprobs?.token_logprobs).toEqual([null, exactLogprob, exactLogprob]);
    expect(completion.choices[0]?.logprobs?.text_offset).toEqual([0, 1, 2]);
    expect(engine.requests[0]).toMatchObject({ outputTokensMax: 0, promptLogprobs: 0 });
  });

  it('completions - takes a string, a list, token ids and lists of them', async () => {
    for (const prompt of ['ab', ['ab', 'cd'], [97, 98], [[97], [98, 99]]]) {
      const response = await post(url, '/v1/completions', { model: 'tiny', prompt, n: 2 });
      expect(response.status).toBe(200);
    }
    expect(engine.requests.map((request) => request.promptTokens)).toEqual([
      [97, 98],
      [97, 98],
      [99, 100],
      [97, 98],
      [97],
      [98, 99],
    ]);
  });
});

describe('other routes', () => {
  it('models - lists the served model', async () => {
    expect((await client().models.list()).data.map((model) => model.id)).toEqual(['tiny']);
    await expect(client().models.retrieve('other')).rejects.toMatchObject({ status: 404, code: 'model_not_found' });
  });

  it('tokenize and detokenize - are each other back', async () => {
    const { tokens, count } = (await (await post(url, '/tokenize', { prompt: 'abc' })).json()) as {
      tokens: number[];
      count: number;
    };
    expect([tokens, count]).toEqual([[97, 98, 99], 3]);
    expect(await (await post(url, '/detokenize', { tokens })).json()).toEqual({ prompt: 'abc' });
  });

  it('readyz - is not ready while the mesh is not, while the canary fails, while draining', async () => {
    expect((await fetch(`${url}/readyz`)).status).toBe(200);
    engine.state = { ...engine.state, meshReady: false };
    expect((await fetch(`${url}/readyz`)).status).toBe(503);
    expect((await fetch(`${url}/health`)).status).toBe(503);
    const other = await startServer({ canary: async () => false });
    expect((await fetch(`${other.url}/readyz`)).status).toBe(503);
    await other.server.close();
  });

  it('drain - refuses new requests and lets running ones finish', async () => {
    let release = (): void => undefined;
    const gate = new Promise<void>((resolve) => (release = resolve));
    engine.script = async function* (request) {
      await gate;
      yield* answer(request);
    };
    engine.state = { ...engine.state, running: 1 };
    const running = post(url, '/v1/chat/completions', chat);
    await expect.poll(() => engine.requests.length).toBe(1);
    const drained = server.drain(5_000);
    const refused = await post(url, '/v1/chat/completions', chat);
    expect([refused.status, refused.headers.get('connection')]).toEqual([503, 'close']);
    release();
    expect((await running).status).toBe(200);
    engine.state = { ...engine.state, running: 0 };
    await drained;
  });
});
