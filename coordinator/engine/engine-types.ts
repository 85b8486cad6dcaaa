/** What the HTTP side asks of the engine, and what the engine says back. The engine tokenises nothing: requests arrive as token ids. */
import type { SamplingParams } from '../../protocol/step-plan.ts';

export interface EngineRequest {
  /** `req_` + base32; in headers, logs and every error. */
  id: string;
  /** API key id; prefix cache and quotas are per tenant. */
  tenant: string;
  promptTokens: number[];
  /** `choice` 0..n-1 is filled in by the engine. */
  sampling: Omit<SamplingParams, 'choice'>;
  n: number;
  /** Most output tokens of each choice; 0 is allowed (scoring only). */
  outputTokensMax: number;
  outputTokensMin: number;
  stopStrings: string[];
  /** Besides the model's own end tokens (unless `ignoreEos`). */
  stopTokenIds: number[];
  ignoreEos: boolean;
  /** Log-probabilities of prompt tokens: candidates each, 0..20; null = none. Such a request skips reading the prefix cache. */
  promptLogprobs: number | null;
  /** Absolute, on the monotonic clock of `performance.now()`. */
  deadlineAt: number;
}

export interface TokenLogprob {
  token: number;
  /** Exact fp32 value as a double. */
  logprob: number;
  top: { token: number; logprob: number }[];
}

export type FinishReason = 'stop' | 'length';

export type EngineEvent =
  /** Once, before any token: the prompt is computed. `promptLogprobs[0]` is null (nothing precedes it). */
  | { type: 'prompt'; cachedTokens: number; promptLogprobs: (TokenLogprob | null)[] | null }
  /** One output token, the one that ends the sequence included (its text is left out then). `text` may be empty (half a UTF-8 character, or held back as the possible start of a stop string) and then comes with a later one. */
  | { type: 'token'; choice: number; token: number; text: string; logprob: TokenLogprob | null }
  /** `text`: what was held back and now turned out not to be a stop string. */
  | { type: 'finished'; choice: number; reason: FinishReason; text: string; outputTokens: number }
  /** The request is over. `code` is of the error table of `protocol/errors.ts`. */
  | { type: 'error'; code: string; message: string; retryAfterSeconds: number | null };

export interface RequestHandle {
  readonly id: string;
  /** Ends after the last choice is `finished`, or after an `error`. */
  readonly events: AsyncIterable<EngineEvent>;
  /** Client gone: no further token is computed for it, its blocks are free within a step. */
  cancel(): void;
}

export interface EngineStatus {
  /** A placement is complete and connected. */
  meshReady: boolean;
  /** Why not, in words for an operator; null when ready. */
  reason: string | null;
  draining: boolean;
  waiting: number;
  running: number;
  kvBlocksTotal: number;
  kvBlocksUsed: number;
  /** Time of the last step that came back, `performance.now()`; null = none yet. */
  lastStepAt: number | null;
}

export interface Engine {
  /**
   * Queues a request.
   * @throws {ShardmeshError} `queue_full` (429), `mesh_unavailable` (503), `draining` (503), `context_length_exceeded` (400)
   */
  submit(request: EngineRequest): RequestHandle;
  status(): EngineStatus;
}
