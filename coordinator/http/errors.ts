/** Every failure as OpenAI's error JSON: no stack, no path, no text of another request. */
import type { output, ZodError, ZodType } from 'zod';
import { ShardmeshError, toShardmeshError } from '../../protocol/errors.ts';

export interface ErrorBody {
  error: { message: string; type: string; param: string | null; code: string };
}

export function errorBody(error: ShardmeshError): ErrorBody {
  return { error: { message: error.message, type: error.type, param: error.param ?? null, code: error.code } };
}

/** Fastify's and Node's own errors by their code; anything unknown is `internal` and says nothing. */
export function httpError(error: unknown): ShardmeshError {
  if (error instanceof ShardmeshError) return error;
  const { code, statusCode } = error as { code?: string; statusCode?: number };
  switch (code) {
    case 'FST_ERR_CTP_BODY_TOO_LARGE':
      return new ShardmeshError('payload_too_large', 'The request body is larger than 4 MiB.');
    case 'FST_ERR_CTP_INVALID_MEDIA_TYPE':
    case 'FST_ERR_CTP_EMPTY_TYPE':
      return new ShardmeshError('unsupported_media_type');
    case 'FST_ERR_CTP_INVALID_CONTENT_LENGTH':
    case 'FST_ERR_CTP_EMPTY_JSON_BODY':
      return new ShardmeshError('invalid_json', 'The request body is empty or does not have the length that its header says.');
    case 'FST_ERR_MAX_PARAM_LENGTH':
      return new ShardmeshError('not_found');
    default:
      if (statusCode === 400) return new ShardmeshError('invalid_value', 'The request is malformed.');
      return toShardmeshError(error);
  }
}

/** A body that has passed its schema. @throws {ShardmeshError} the first problem, naming the field */
export function checkBody<T extends ZodType>(schema: T, body: unknown): output<T> {
  const parsed = schema.safeParse(body, { reportInput: true });
  if (!parsed.success) throw zodError(parsed.error);
  return parsed.data;
}

/** First problem of a zod check, with the field as the client wrote it: `messages[0].content`. */
function zodError(error: ZodError): ShardmeshError {
  const issue = error.issues[0];
  if (!issue) return new ShardmeshError('invalid_value');
  const path = issue.path.reduce<string>(
    (text, key) => (typeof key === 'number' ? `${text}[${key}]` : text ? `${text}.${String(key)}` : String(key)),
    '',
  );
  if (issue.code === 'unrecognized_keys') {
    const key = issue.keys[0] ?? '';
    const param = path ? `${path}.${key}` : key;
    return new ShardmeshError('unknown_field', `Unknown field: ${param.slice(0, 128)}.`, { param: param.slice(0, 128) });
  }
  const missing = issue.code === 'invalid_type' && issue.input === undefined;
  const code = missing
    ? 'missing_field'
    : issue.code === 'invalid_type' || issue.code === 'invalid_union'
      ? 'invalid_type'
      : 'invalid_value';
  return new ShardmeshError(code, path ? `${path}: ${issue.message}` : issue.message, { param: path });
}
