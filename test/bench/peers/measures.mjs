/** What is measured over HTTP, of our server and of others with the same client (`shardmesh bench`'s own). */
import { CompletionClient } from '../../../dist/deploy/bench/completion-client.js';
import { figures } from '../../../dist/deploy/bench/figures.js';
import { parseLengthDistribution } from '../../../dist/deploy/bench/length-distribution.js';
import { runLoad } from '../../../dist/deploy/bench/run-load.js';
import { Workload } from '../../../dist/deploy/bench/workload.js';

/** What a server answers greedily. */
export async function greedy(server, prompt, tokens) {
  const { text, error } = await connected(server, (client) => client.stream(prompt, tokens));
  if (error) throw new Error(`${server.url} does not answer: ${error}`);
  return text;
}

let seed = 1;
/** Prompts that nobody has seen yet. */
const workload = (prompt, output) =>
  new Workload({
    seed: seed++,
    promptTokens: parseLengthDistribution(String(prompt)),
    outputTokens: parseLengthDistribution(String(output)),
    turns: 1,
    sharedPrefix: null,
  });

/** A server as `load` and the measures take it: { url, model }. */
export async function target(url) {
  const { data } = await (await fetch(`${url}/v1/models`)).json();
  return { url, model: data[0].id };
}

/** Connections of its own for each measurement: while a rival's tool runs, this process sees no end of an idle one. */
async function connected(server, measure) {
  const client = new CompletionClient({ ...server, apiKey: null, timeoutMs: 120_000, extraBody: { ignore_eos: true } });
  try {
    return await measure(client);
  } finally {
    client.close();
  }
}

async function load(server, { streams, requests = null, seconds = null, prompt, output }) {
  const run = await connected(server, (client) =>
    runLoad(client, workload(prompt, output), {
      load: { kind: 'closed', streams },
      seed: seed++,
      chat: false,
      requestsMax: requests,
      secondsMax: seconds,
      onProgress: () => undefined,
    }),
  );
  const found = figures(run, null);
  if (found.failed > 0) throw new Error(`requests failed: ${JSON.stringify(found.errors)}`);
  return found;
}

/** Output tokens per second of `streams` streams that begin together, prompts of 16 tokens and their prefill included. */
export const decode = async (server, streams, output) =>
  (await load(server, { streams, requests: streams, prompt: 16, output })).outputTokensPerSecond;

/** Output tokens per second while `streams` streams decode, by each one's mean time per token after its first: without prompts. */
export const decodeAlone = async (server, streams, output) =>
  (streams * 1000) / (await load(server, { streams, requests: streams, prompt: 16, output })).tpotMs.p50;

/** Prompt tokens per second of one prompt until its first token is there. */
export async function prefill(server, tokens) {
  const { promptTokens, ttftMs } = await load(server, { streams: 1, requests: 1, prompt: tokens, output: 1 });
  return (promptTokens.mean * 1000) / ttftMs.p50;
}

/** { tokensPerSecond, ttftMs } of 16 streams, 128 tokens in, 64 out. */
export async function serve(server) {
  const { outputTokensPerSecond, ttftMs } = await load(server, { streams: 16, requests: 48, prompt: 128, output: 64 });
  return { tokensPerSecond: outputTokensPerSecond, ttftMs: ttftMs.p50 };
}

/** 99th percentile of the gaps of 16 streams while prompts of 2,000 tokens arrive one after the other, over the median gap without them. */
export async function pace(server) {
  const streams = { streams: 16, prompt: 16, output: 400 };
  const alone = await load(server, { ...streams, seconds: 5 });
  const [among] = await Promise.all([
    load(server, { ...streams, seconds: 15 }),
    load(server, { streams: 1, seconds: 15, prompt: 1_990, output: 1 }),
  ]);
  return { ratio: among.itlMs.p99 / alone.itlMs.p50, aloneMs: alone.itlMs.p50, p99Ms: among.itlMs.p99, p50Ms: among.itlMs.p50 };
}

/** Time to the first token of a 2,000-token prompt that was asked before, over that of the first time. */
export async function repeated(server) {
  const text = workload(1_990, 1).text(1_990);
  const ttft = async () => {
    const { chunkAt, sentAt, error } = await connected(server, (client) => client.stream(text, 1));
    if (error) throw new Error(`a repeated prompt: ${error}`);
    return chunkAt[0] - sentAt;
  };
  const first = await ttft();
  return { ratio: (await ttft()) / first, firstMs: first };
}
