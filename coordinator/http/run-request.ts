/** Runs engine requests for a route: cancels them when the client leaves, turns an error event into a thrown error. */
import type { ServerResponse } from 'node:http';
import { isErrorCode, ShardmeshError } from '../../protocol/errors.ts';
import type { EngineEvent, EngineRequest, RequestHandle } from '../engine/engine-types.ts';
import type { HttpServerOptions } from './server.ts';

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
 * closes the connection or anything fails.
 * @throws {ShardmeshError} the first error of any of them
 */
export async function runRequests(
  { engine, metrics }: Pick<HttpServerOptions, 'engine' | 'metrics'>,
  requests: EngineRequest[],
  response: ServerResponse,
  take: (index: number, event: Exclude<EngineEvent, { type: 'error' }>) => void | Promise<void>,
): Promise<void> {
  const handles: RequestHandle[] = [];
  const cancelAll = (): void => handles.forEach((handle) => handle.cancel());
  response.once('close', cancelAll);
  const submittedAt = performance.now();
  try {
    for (const request of requests) handles.push(engine.submit(request));
    await Promise.all(
      handles.map(async (handle, index) => {
        const lastTokenAt: number[] = [];
        for await (const event of handle.events) {
          if (event.type === 'error') throw eventError(event);
          if (event.type === 'token') {
            const now = performance.now();
            const before = lastTokenAt[event.choice];
            if (before === undefined) metrics.observeFirstToken(now - submittedAt);
            else metrics.observeTokenGap(now - before);
            lastTokenAt[event.choice] = now;
          }
          await take(index, event);
        }
      }),
    );
    if (response.destroyed && !response.writableEnded) throw new ShardmeshError('request_cancelled');
  } catch (error) {
    cancelAll();
    throw error;
  } finally {
    response.off('close', cancelAll);
  }
}

export interface UsageCount {
  promptTokens: number;
  cachedTokens: number;
  outputTokens: number;
}

export function usage({ promptTokens, cachedTokens, outputTokens }: UsageCount) {
  return {
    prompt_tokens: promptTokens,
    completion_tokens: outputTokens,
    total_tokens: promptTokens + outputTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens },
  };
}
