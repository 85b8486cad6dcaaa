/** From a checked body to an engine request: defaults, and the checks that need the model (vocabulary, context). */
import { randomBytes } from 'node:crypto';
import { ShardmeshError } from '../../protocol/errors.ts';
import { httpLimits } from '../../protocol/limits.ts';
import type { EngineRequest } from '../engine/engine-types.ts';
import type { ServedModel } from './server.ts';
import type { SamplingBody } from './schemas.ts';

export interface RequestContext {
  requestId: string;
  tenant: string;
  deadlineAt: number;
}

/** `max_tokens` and log-probabilities differ between the two routes, the rest is the same. */
export interface RouteParameters {
  promptTokens: number[];
  /** Field that the prompt came in. */
  promptParam: 'prompt' | 'messages';
  outputTokensMax: number | undefined;
  logprobs: number | null;
  promptLogprobs: number | null;
}

function checkTokens(param: string, tokens: readonly number[], vocabularySize: number): void {
  const wrong = tokens.find((token) => token >= vocabularySize);
  if (wrong !== undefined)
    throw new ShardmeshError(
      'invalid_value',
      `${param}: token id ${wrong} is not in the vocabulary (0..${vocabularySize - 1}).`,
      { param },
    );
}

/** @throws {ShardmeshError} naming the field */
export function engineRequest(
  body: SamplingBody,
  model: ServedModel,
  context: RequestContext,
  route: RouteParameters,
): EngineRequest {
  const { promptTokens, promptParam } = route;
  const { contextTokensMax, vocabularySize } = model;
  if (promptTokens.length === 0) throw new ShardmeshError('invalid_value', 'The prompt has no tokens.', { param: promptParam });
  const room = contextTokensMax - promptTokens.length;
  const outputTokensMax = route.outputTokensMax ?? room;
  if (room < 0 || (room === 0 && outputTokensMax > 0) || outputTokensMax > room)
    throw new ShardmeshError(
      'context_length_exceeded',
      `The prompt has ${promptTokens.length} tokens${route.outputTokensMax === undefined ? '' : ` and ${outputTokensMax} output tokens are asked for`}; the context holds ${contextTokensMax}. Shorten the prompt or lower max_tokens.`,
      { param: room <= 0 ? promptParam : 'max_tokens' },
    );
  const outputTokensMin = body.min_tokens ?? 0;
  if (outputTokensMin > outputTokensMax)
    throw new ShardmeshError('invalid_value', `min_tokens (${outputTokensMin}) is larger than max_tokens (${outputTokensMax}).`, {
      param: 'min_tokens',
    });
  const logitBias = Object.entries(body.logit_bias ?? {}).map(([token, bias]): [number, number] => [Number(token), bias]);
  checkTokens(
    'logit_bias',
    logitBias.map(([token]) => token),
    vocabularySize,
  );
  checkTokens('stop_token_ids', body.stop_token_ids ?? [], vocabularySize);
  checkTokens(promptParam, promptTokens, vocabularySize);
  const stops = body.stop === undefined ? [] : typeof body.stop === 'string' ? [body.stop] : body.stop;
  return {
    id: context.requestId,
    tenant: context.tenant,
    promptTokens,
    sampling: {
      temperature: body.temperature ?? 1,
      topP: body.top_p ?? 1,
      topK: Math.max(0, body.top_k ?? 0),
      minP: body.min_p ?? 0,
      seed: BigInt.asUintN(64, body.seed === undefined ? randomBytes(8).readBigUInt64LE() : BigInt(body.seed)),
      repetitionPenalty: body.repetition_penalty ?? 1,
      presencePenalty: body.presence_penalty ?? 0,
      frequencyPenalty: body.frequency_penalty ?? 0,
      logitBias,
      logprobs: route.logprobs,
    },
    n: body.n ?? 1,
    outputTokensMax,
    outputTokensMin,
    stopStrings: stops,
    stopTokenIds: body.stop_token_ids ?? [],
    ignoreEos: body.ignore_eos ?? false,
    promptLogprobs: route.promptLogprobs,
    deadlineAt: context.deadlineAt,
  };
}

/** The client's own deadline (`x-request-timeout-ms`), within the server's. */
export function requestDeadline(header: string | string[] | undefined, now: number): number {
  if (header === undefined) return now + httpLimits.requestTimeoutMs;
  const value = Number(header);
  if (typeof header !== 'string' || !/^\d{1,15}$/.test(header) || value < 1)
    throw new ShardmeshError('invalid_value', 'x-request-timeout-ms must be a whole number of milliseconds, at least 1.', {
      param: 'x-request-timeout-ms',
    });
  return now + Math.min(value, httpLimits.requestTimeoutMs);
}
