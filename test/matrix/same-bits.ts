/**
 * One cell of the same-bits matrix: a way to cut, link, batch, chunk, cache and execute. Every cell must give the same output log-probabilities, compared as
 * exact numbers over HTTP.
 */
import { complete, startServe, type Served } from '../integration/helpers/serve.ts';

export interface Cell {
  tp: string;
  pp: string;
  link: 'auto' | 'shm' | 'grpc' | 'nats';
  /** Other streams that run at the same time. */
  others: number;
  prefillChunk: number;
  cached: boolean;
  executor: 'cpu' | 'reference';
  isa: 'auto' | 'avx512' | 'avx2' | 'portable';
}

/** Long enough for three chunks of 64, two spans of 256 with its answer, and a block border inside a chunk. */
export const prompt = [
  'A pipeline is only as fast as its slowest stage. When a worker waits for its neighbour it does no useful work, and the time it loses cannot be bought back',
  'later. The usual answer is to cut the work into smaller pieces, so that every stage has something to do while the next piece is on its way. Pieces that are',
  'too small cost more to send than they save, and pieces that are too large leave gaps at the start and at the end. A good scheduler measures both and',
  'chooses the size that keeps the line moving. Tensor parallelism is different: here every worker holds a slice of each layer, and all of them meet twice a layer',
  'to add up what they found. The meeting is short, but there are many of them, and each one is as slow as the slowest who comes. That is why it belongs',
  'inside one machine, or at least on one fast link, while the stages of a pipeline may be far apart.',
].join(' ');

export interface CellResult {
  /** Output tokens and log-probabilities, greedy. */
  greedy: string;
  /** The same with a seed at temperature 1. */
  sampled: string;
  /** Log-probabilities of the prompt's own tokens. */
  prompt: string;
  cachedTokens: number;
}

export const cellArguments = ({ tp, pp, link, prefillChunk, executor, isa, cached }: Cell): string[] => [
  ...['--tp', tp, '--pp', pp, '--link', link, '--executor', executor, '--isa', isa],
  ...[
    '--prefill-chunk-max',
    String(prefillChunk),
    '--context-tokens-max',
    '512',
    '--kv-cache-bytes',
    '64m',
    '--log-level',
    'warn',
  ],
  ...(cached ? [] : ['--no-prefix-cache']),
];

export const cellName = ({ tp, pp, link, others, prefillChunk, cached, executor, isa }: Cell): string =>
  `tp ${tp}, pp ${pp}, ${link}, ${others ? `among ${others} others` : 'alone'}, chunks of ${prefillChunk}, ${cached ? 'cached' : 'not cached'}, ${executor}${executor === 'cpu' ? ` ${isa}` : ''}`;

async function ask(served: Served, body: Record<string, unknown>): Promise<{ bits: string; cachedTokens: number }> {
  const { choices, usage } = await complete(served, { prompt, logprobs: 3, ...body });
  const logprobs = choices[0]?.logprobs;
  return {
    bits: JSON.stringify([logprobs?.tokens, logprobs?.token_logprobs, logprobs?.top_logprobs]),
    cachedTokens: usage.prompt_tokens_details.cached_tokens,
  };
}

export async function runCell(cell: Cell, outputTokens: number): Promise<CellResult> {
  const served = await startServe(cellArguments(cell));
  const stop = new AbortController();
  try {
    if (cell.cached) await complete(served, { prompt, max_tokens: 1 });
    const others = Array.from({ length: cell.others }, async (_, index) => {
      while (!stop.signal.aborted)
        await complete(served, { prompt: `Stream number ${index} counts:`, max_tokens: 8 + index, seed: index });
    });
    const greedy = await ask(served, { max_tokens: outputTokens, temperature: 0 });
    const sampled = await ask(served, { max_tokens: outputTokens, temperature: 1, top_p: 0.95, seed: 7 });
    const scored = await ask(served, { max_tokens: 0, echo: true });
    stop.abort();
    await Promise.all(others);
    return { greedy: greedy.bits, sampled: sampled.bits, prompt: scored.bits, cachedTokens: greedy.cachedTokens };
  } finally {
    stop.abort();
    await served.stop();
  }
}
