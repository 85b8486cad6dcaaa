/** Runs engine requests for a route: cancels them when the client leaves, turns an error event into a thrown error, counts tokens. */
import type { FastifyRequest } from 'fastify';
import { isErrorCode, ShardmeshError } from '../../protocol/errors.ts';
import type { EngineEvent, EngineRequest, RequestHandle } from '../engine/engine-types.ts';
import { onDisconnect } from './disconnect.ts';
import type { StreamOptions } from './schemas.ts';
import type { HttpServerOptions } from './server.ts';

/** What the log line and `usage` of a request say: numbers and codes, never text. */
export interface RequestSummary {
  promptTokens: number;
  cachedTokens: number;
  outputTokens: number;
  /** From the request's arrival to its first output token; null: there was none. */
  firstTokenMs: number | null;
  /** Code of the error it ended with. */
  error: string | null;
}

export const emptySummary = (): RequestSummary => ({
  promptTokens: 0,
  cachedTokens: 0,
  outputTokens: 0,
  firstTokenMs: null,
  error: null,
});

export function eventError(event: Extract<EngineEvent, { type: 'error' }>): ShardmeshError {
  const code = isErrorCode(event.code) ? event.code : 'internal';
  return new ShardmeshError(
    code,
    event.message,
    event.retryAfterSeconds === null ? {} : { retryAfterSeconds: event.retryAfterSeconds },
  );
}

/**
 * Submits all requests and hands their events to `take` as they come, `index` telling which request an event is of. All are cancelled when the client
 * closes the connection or anything fails; `take` is not called any more once this has returned.
 * @throws {ShardmeshError} the first error of any of them
 */
export async function runRequests(
  { engine, metrics }: Pick<HttpServerOptions, 'engine' | 'metrics'>,
  requests: EngineRequest[],
  request: FastifyRequest,
  take: (index: number, event: Exclude<EngineEvent, { type: 'error' }>) => void | Promise<void>,
): Promise<void> {
  const { summary } = request;
  for (const one of requests) summary.promptTokens += one.promptTokens.length;
  const handles: RequestHandle[] = [];
  // One object, so that the first failure is known whichever loop met it.
  const state: { failure: unknown; failed: boolean; clientLeft: boolean } = { failure: null, failed: false, clientLeft: false };
  const fail = (error: unknown): void => {
    if (state.failed) return;
    state.failed = true;
    state.failure = error;
    for (const handle of handles) handle.cancel();
  };
  const unwatch = onDisconnect(request.raw.socket, () => {
    state.clientLeft = true;
    fail(new ShardmeshError('request_cancelled'));
  });
  const read = async (handle: RequestHandle, index: number): Promise<void> => {
    const lastTokenAt: number[] = [];
    for await (const event of handle.events) {
      if (state.failed) return;
      if (event.type === 'error') throw eventError(event);
      if (event.type === 'prompt') summary.cachedTokens += event.cachedTokens;
      else if (event.type === 'token') {
        summary.outputTokens++;
        const now = performance.now();
        const before = lastTokenAt[event.choice];
        lastTokenAt[event.choice] = now;
        if (before !== undefined) metrics.observeTokenGap(now - before);
        else {
          metrics.observeFirstToken(now - request.receivedAt);
          summary.firstTokenMs ??= now - request.receivedAt;
        }
      }
      await take(index, event);
    }
  };
  try {
    try {
      for (const one of requests) {
        if (state.clientLeft) break;
        handles.push(engine.submit(one));
      }
    } catch (error) {
      fail(error);
    }
    await Promise.all(handles.map((handle, index) => read(handle, index).catch(fail)));
    if (state.failed) throw state.failure;
  } finally {
    unwatch();
  }
}

/**
 * The `usage` of an event that carries text: null with `include_usage` (the last event has the numbers), what was used so far with `continuous_usage_stats`
 * besides it, as vLLM has it.
 */
export function usageSoFar(options: StreamOptions | undefined, summary: RequestSummary) {
  if (!options?.include_usage) return {};
  return { usage: options.continuous_usage_stats ? usage(summary) : null };
}

export function usage({ promptTokens, cachedTokens, outputTokens }: RequestSummary) {
  return {
    prompt_tokens: promptTokens,
    completion_tokens: outputTokens,
    total_tokens: promptTokens + outputTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens },
  };
}
