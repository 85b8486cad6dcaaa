import { describe, expect, test } from 'vitest';
import {
  errorEntry,
  errorTable,
  FrameError,
  isErrorCode,
  ProtocolError,
  ShardmeshError,
  toShardmeshError,
} from '../../../protocol/errors.ts';

describe('error table', () => {
  test('error table - answers each code with the status and type that clients know', () => {
    const statusOf = (code: string): string => `${errorEntry(code).httpStatus} ${errorEntry(code).type}`;
    expect(statusOf('queue_full')).toBe('429 rate_limit_error');
    expect(statusOf('mesh_unavailable')).toBe('503 server_error');
    expect(statusOf('draining')).toBe('503 server_error');
    expect(statusOf('context_length_exceeded')).toBe('400 invalid_request_error');
    expect(statusOf('invalid_value')).toBe('400 invalid_request_error');
    expect(statusOf('model_not_found')).toBe('404 invalid_request_error');
    expect(statusOf('unauthorized')).toBe('401 authentication_error');
    expect(statusOf('forbidden')).toBe('403 permission_error');
    expect(statusOf('request_timeout')).toBe('408 timeout_error');
    expect(statusOf('payload_too_large')).toBe('413 invalid_request_error');
    expect(statusOf('unsupported_media_type')).toBe('415 invalid_request_error');
    expect(statusOf('worker_lost')).toBe('500 server_error');
    expect(statusOf('internal')).toBe('500 server_error');
  });

  test('error table - says when to come back wherever a client is turned away for now', () => {
    for (const [code, entry] of Object.entries(errorTable))
      if (entry.httpStatus === 429 || entry.httpStatus === 503) expect(entry.retryAfterSeconds, code).toBeGreaterThan(0);
  });

  test('error table - takes unknown codes from the wire for internal errors', () => {
    expect(isErrorCode('worker_lost')).toBe(true);
    expect(isErrorCode('toString')).toBe(false);
    expect(errorEntry('toString')).toBe(errorTable.internal);
  });
});

describe('shardmesh error', () => {
  test('shardmesh error - fills the template of its code when there is no message', () => {
    const error = new ShardmeshError('queue_full', undefined, { details: { limit: 256 } });
    expect(error.message).toBe('The waiting queue is full (256 requests). Try again later.');
    expect(error.retryAfterSeconds).toBe(1);
    expect(error.isRetryable()).toBe(true);
    expect(new ShardmeshError('unknown_field', undefined, { param: 'foo' }).message).toBe('The field foo is not known.');
  });

  test('shardmesh error - keeps its own message, field, cause and delay', () => {
    const cause = new Error('below');
    const error = new ShardmeshError('mesh_unavailable', 'worker abc loads', { retryAfterSeconds: 3, param: 'model', cause });
    expect(error).toMatchObject({ message: 'worker abc loads', retryAfterSeconds: 3, param: 'model', cause, httpStatus: 503 });
    expect(new ShardmeshError('invalid_value', 'x').retryAfterSeconds).toBeUndefined();
  });

  test('shardmesh error - gives nothing of a stranger away', () => {
    const error = toShardmeshError(new TypeError('/home/somebody/secret'));
    expect(error.code).toBe('internal');
    expect(error.message).toBe('Internal error.');
    const own = new ProtocolError('a.b', 'wrong');
    expect(toShardmeshError(own)).toBe(own);
    expect(new FrameError('crc', 'wrong').code).toBe('invalid_frame');
  });
});
