/** `--wire q8` with the real model: reductions and hidden states rounded on their way between ranks. */
import { afterEach, describe, expect, it } from 'vitest';
import { complete, startServe, type Served } from './helpers/serve.ts';

let served: Served;
afterEach(() => served.stop());

const greedy = { prompt: 'The capital of France is', max_tokens: 8, temperature: 0, logprobs: 1 };

async function answered(...args: string[]): Promise<{ text: string; logprobs: (number | null)[] }> {
  served = await startServe(['--log-level', 'error', '--context-tokens-max', '512', ...args]);
  const { text, logprobs } = (await complete(served, greedy)).choices[0]!;
  return { text, logprobs: logprobs?.token_logprobs ?? [] };
}

describe('wire', () => {
  it('wire - q8 answers nearly as f32 does, and over tcp as over gRPC, in stages of two ranks', async () => {
    const cut = ['--tp', '2', '--pp', '2'];
    const exact = await answered(...cut);
    await served.stop();
    const tcp = await answered(...cut, '--wire', 'q8', '--link', 'tcp');
    await served.stop();
    const grpc = await answered(...cut, '--wire', 'q8', '--link', 'grpc');
    expect(tcp.text).toContain('Paris');
    expect(tcp.logprobs).toHaveLength(8);
    expect(grpc).toEqual(tcp);
    expect(tcp.logprobs).not.toEqual(exact.logprobs);
    expect(Math.abs((tcp.logprobs[0] ?? 0) - (exact.logprobs[0] ?? 0))).toBeLessThan(0.2);
  });
});
