/** A client that sees streams and their errors as they come, and reads `/metrics`. */
import type { Served } from './serve.ts';

type Target = Pick<Served, 'url' | 'model'>;

export interface TypedError {
  message: string;
  type: string;
  code: string;
}

export interface Stream {
  /** Text so far. */
  text(): string;
  tokens(): number;
  /** Errors that came as events. */
  errors(): TypedError[];
  /** `finish_reason` of the last chunk that had one. */
  finishReason(): string | null;
  /** Resolves when the connection has ended; `done`: it ended with `[DONE]`. */
  readonly ended: Promise<{ done: boolean }>;
  /** Resolves when `count` tokens have come. */
  reached(count: number): Promise<void>;
  abort(): void;
}

/** POST /v1/completions, streamed. @throws the answer's error when it is not 200 */
export async function openStream(target: Target, body: Record<string, unknown>): Promise<Stream> {
  const abort = new AbortController();
  const response = await fetch(`${target.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model: target.model, stream: true, ...body }),
    signal: abort.signal,
  });
  if (!response.ok || !response.body) throw new Error(`HTTP ${response.status}: ${await response.text()}`);
  let text = '';
  let tokens = 0;
  let finishReason: string | null = null;
  const errors: TypedError[] = [];
  let done = false;
  let waiting: { count: number; resolve: () => void; reject: (error: Error) => void }[] = [];
  const take = (line: string): void => {
    if (line === 'data: [DONE]') done = true;
    if (!line.startsWith('data: {')) return;
    const event = JSON.parse(line.slice(6)) as {
      error?: TypedError;
      choices?: { text: string; finish_reason: string | null }[];
    };
    if (event.error) errors.push(event.error);
    const choice = event.choices?.[0];
    if (!choice) return;
    text += choice.text;
    finishReason = choice.finish_reason ?? finishReason;
    tokens++;
    for (const one of waiting) if (tokens >= one.count) one.resolve();
    waiting = waiting.filter((one) => tokens < one.count);
  };
  const read = async (stream: ReadableStream<Uint8Array>): Promise<{ done: boolean }> => {
    const decoder = new TextDecoder();
    let rest = '';
    try {
      for await (const part of stream as unknown as AsyncIterable<Uint8Array>) {
        const lines = (rest + decoder.decode(part, { stream: true })).split('\n');
        rest = lines.pop() ?? '';
        for (const line of lines) take(line);
      }
    } catch (error) {
      if (!abort.signal.aborted) errors.push({ message: String(error), type: 'connection', code: 'connection_broken' });
    }
    for (const one of waiting) one.reject(new Error(`the stream ended after ${tokens} tokens: ${JSON.stringify(errors)}`));
    return { done };
  };
  const ended = read(response.body);
  return {
    text: () => text,
    tokens: () => tokens,
    errors: () => errors,
    finishReason: () => finishReason,
    ended,
    reached: (count) =>
      new Promise((resolve, reject) => {
        if (tokens >= count) resolve();
        else waiting.push({ count, resolve, reject });
      }),
    abort: () => abort.abort(),
  };
}

export interface Answer {
  status: number;
  retryAfter: string | null;
  code: string | null;
  text: string | null;
}

/** One small completion, answered whole, whatever the status. */
export async function tryComplete(
  target: Target,
  body: Record<string, unknown> = {},
  headers: Record<string, string> = {},
): Promise<Answer> {
  const response = await fetch(`${target.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: JSON.stringify({ model: target.model, prompt: 'One, two,', max_tokens: 4, temperature: 0, ...body }),
  });
  const answer = (await response.json()) as { error?: { code: string }; choices?: { text: string }[] };
  return {
    status: response.status,
    retryAfter: response.headers.get('retry-after'),
    code: answer.error?.code ?? null,
    text: answer.choices?.[0]?.text ?? null,
  };
}

/** Samples of `/metrics` by name, with labels where there are any: `shardmesh_mesh_epoch`, `shardmesh_worker_rss_bytes{worker="…",…}`. */
export async function readMetrics(target: Pick<Served, 'url'>): Promise<Map<string, number>> {
  const response = await fetch(`${target.url}/metrics`);
  const samples = new Map<string, number>();
  for (const line of (await response.text()).split('\n')) {
    const match = /^([a-z_]+(?:\{.*\})?) (\S+)$/.exec(line);
    if (match) samples.set(match[1] ?? '', Number(match[2]));
  }
  return samples;
}

export async function metric(target: Pick<Served, 'url'>, name: string): Promise<number> {
  const samples = await readMetrics(target);
  const value = samples.get(name);
  if (value === undefined) throw new Error(`no metric ${name}; there are ${[...samples.keys()].join(', ')}`);
  return value;
}

/** Sum over the workers of one of their numbers. */
export async function workerSum(target: Pick<Served, 'url'>, name: string): Promise<number> {
  let sum = 0;
  for (const [key, value] of await readMetrics(target)) if (key.startsWith(`${name}{`)) sum += value;
  return sum;
}
