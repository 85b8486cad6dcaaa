/**
 * The same-bits matrix. A cell is a way to cut, link, batch, chunk, cache and execute; every cell must give the same log-probabilities, compared as exact
 * numbers over HTTP. A mesh serves four cells: its requests run alone and among others, and twice for each tenant, whose first request finds no cached prefix
 * and whose second one does.
 */
import { complete, startServe, type Served } from '../integration/helpers/serve.ts';

export interface MeshShape {
  tp: string;
  pp: string;
  link: 'auto' | 'shm' | 'tcp' | 'grpc' | 'nats';
  prefillChunk: number;
  executor: 'cpu' | 'reference';
  isa: 'auto' | 'amx' | 'avx512' | 'avx2' | 'portable';
}

export interface Company {
  /** Other streams that run at the same time. */
  others: number;
  cached: boolean;
}

export const plainShape: MeshShape = { tp: '1', pp: '1', link: 'auto', prefillChunk: 256, executor: 'cpu', isa: 'auto' };

const sentences = [
  'A pipeline is only as fast as its slowest stage. When a worker waits for its neighbour it does no useful work, and the time it loses cannot be bought back',
  'later. The usual answer is to cut the work into smaller pieces, so that every stage has something to do while the next piece is on its way. Pieces that are',
  'too small cost more to send than they save, and pieces that are too large leave gaps at the start and at the end. A good scheduler measures both and',
  'chooses the size that keeps the line moving. Tensor parallelism is different: here every worker holds a slice of each layer, and all of them meet twice a layer',
  'to add up what they found. The meeting is short, but there are many of them, and each one is as slow as the slowest who comes. That is why it belongs',
  'inside one machine, or at least on one fast link, while the stages of a pipeline may be far apart.',
];
/** Long enough for three chunks of 64, two spans of 256 with its answer, and a block border inside a chunk; `short` is for executors that are slow. */
export const prompts = { long: sentences.join(' '), short: sentences[0]! };
export type PromptName = keyof typeof prompts;

export interface Asked {
  outputTokens: number;
  prompt: PromptName;
}

export interface CellResult {
  /** Output tokens and log-probabilities, greedy. */
  greedy: string;
  /** The same with a seed at temperature 1. */
  sampled: string;
  /** Text with a seed and no log-probabilities: ranks send their best candidates in place of logits. */
  unreported: string;
  /** Prompt tokens of the greedy request that came from the prefix cache. */
  cachedTokens: number;
}

export const shapeName = ({ tp, pp, link, prefillChunk, executor, isa }: MeshShape): string =>
  `tp ${tp}, pp ${pp}, ${link}, chunks of ${prefillChunk}, ${executor}${executor === 'cpu' ? ` ${isa}` : ''}`;

export const companyName = ({ others, cached }: Company): string =>
  `${others ? `among ${others} others` : 'alone'}, ${cached ? 'cached' : 'not cached'}`;

/** The API key of a tenant: prefixes are cached for each tenant apart. */
const keyOf = (tenant: string): string => `same-bits-tenant-${tenant}`;
const tenants = ['greedy-alone', 'sampled-alone', 'greedy-among', 'sampled-among', 'others'];

export class MatrixMesh {
  readonly #served: Served;

  private constructor(served: Served) {
    this.#served = served;
  }

  /** @param main  main file of the command line, when not this build's */
  static async start({ tp, pp, link, prefillChunk, executor, isa }: MeshShape, main?: string): Promise<MatrixMesh> {
    const args = [
      ...['--tp', tp, '--pp', pp, '--link', link, '--executor', executor, '--isa', isa],
      ...['--prefill-chunk-max', String(prefillChunk), '--context-tokens-max', '512'],
      ...['--kv-cache-bytes', '64m', '--log-level', 'warn'],
    ];
    const env = { SHARDMESH_API_KEYS: tenants.map(keyOf).join(',') };
    return new MatrixMesh(await startServe(args, { env, timeoutMs: 120_000, ...(main === undefined ? {} : { main }) }));
  }

  async stop(): Promise<void> {
    await this.#served.stop();
  }

  /** A cell that is not cached runs before the cached one of the same company. */
  async run({ others, cached }: Company, { outputTokens, prompt: name }: Asked): Promise<CellResult> {
    const prompt = prompts[name];
    return this.#among(others, async () => {
      const where = others === 0 ? 'alone' : 'among';
      const greedy = await this.#ask(`greedy-${where}`, { prompt, max_tokens: outputTokens, temperature: 0 });
      const seeded = { prompt, max_tokens: outputTokens, temperature: 1, top_p: 0.95, seed: 7 };
      const sampled = await this.#ask(`sampled-${where}`, seeded);
      for (const { cachedTokens } of [greedy, sampled])
        if (cachedTokens > 0 !== cached) throw new Error(`${cachedTokens} prompt tokens came from the prefix cache`);
      const { choices } = await complete(this.#served, { ...seeded, top_p: 1 }, keyOf(`sampled-${where}`));
      return {
        greedy: greedy.bits,
        sampled: sampled.bits,
        unreported: choices[0]?.text ?? '',
        cachedTokens: greedy.cachedTokens,
      };
    });
  }

  /** Log-probabilities of the prompt's own tokens; computed without the prefix cache. */
  async promptScores(others: number, { prompt: name }: Pick<Asked, 'prompt'>): Promise<string> {
    const body = { prompt: prompts[name], max_tokens: 0, echo: true };
    return this.#among(others, async () => (await this.#ask('greedy-alone', body)).bits);
  }

  async #ask(tenant: string, body: Record<string, unknown>): Promise<{ bits: string; cachedTokens: number }> {
    const { choices, usage } = await complete(this.#served, { logprobs: 3, ...body }, keyOf(tenant));
    const logprobs = choices[0]?.logprobs;
    return {
      bits: JSON.stringify([logprobs?.tokens, logprobs?.token_logprobs, logprobs?.top_logprobs]),
      cachedTokens: usage.prompt_tokens_details.cached_tokens,
    };
  }

  async #among<T>(others: number, run: () => Promise<T>): Promise<T> {
    let stopped = false;
    const streams = Array.from({ length: others }, async (_, index) => {
      const body = { prompt: `Stream number ${index} counts:`, max_tokens: 8 + index, seed: index };
      while (!stopped) await complete(this.#served, body, keyOf('others'));
    });
    try {
      return await run();
    } finally {
      stopped = true;
      await Promise.all(streams);
    }
  }
}
