/**
 * The error table: one stable code for each way something can fail that a client, an operator or another part of the mesh has to tell apart.
 * `httpStatus` and `type` are what the HTTP side answers (OpenAI's error shape: `{ error: { message, type, code, param } }`).
 */

export type OpenAiErrorType =
  'invalid_request_error' | 'authentication_error' | 'permission_error' | 'rate_limit_error' | 'server_error' | 'timeout_error';

export interface ErrorEntry {
  httpStatus: number;
  type: OpenAiErrorType;
  /** The same request may succeed when it is sent again later. */
  retryable: boolean;
  /** `Retry-After` where the thrower knows no better; null = header left out. */
  retryAfterSeconds: number | null;
  /** Template: `{name}` is filled from the error's details. Used when the thrower gives no message of its own. */
  message: string;
}

const invalid = { httpStatus: 400, type: 'invalid_request_error', retryable: false, retryAfterSeconds: null } as const;
const unavailable = { httpStatus: 503, type: 'server_error', retryable: true } as const;
const failed = { httpStatus: 500, type: 'server_error', retryable: true, retryAfterSeconds: null } as const;

export const errorTable = {
  // What the client sent.
  invalid_value: { ...invalid, message: 'The value of {param} is not allowed.' },
  invalid_type: { ...invalid, message: 'The value of {param} has the wrong type.' },
  missing_field: { ...invalid, message: 'The field {param} is required.' },
  unknown_field: { ...invalid, message: 'The field {param} is not known.' },
  unsupported_value: { ...invalid, message: 'The value of {param} is not supported.' },
  invalid_json: { ...invalid, message: 'The request body is not valid JSON.' },
  context_length_exceeded: {
    ...invalid,
    message:
      'The prompt has {promptTokens} tokens and the context holds {contextTokensMax}. Shorten the prompt or lower max_tokens.',
  },
  template_missing: { ...invalid, message: 'The model has no chat template. Use /v1/completions.' },
  template_failed: { ...invalid, message: 'The chat template of the model refused these messages.' },
  model_not_found: { ...invalid, httpStatus: 404, message: 'The model {model} is not served here. See GET /v1/models.' },
  not_found: { ...invalid, httpStatus: 404, message: 'No such route.' },
  method_not_allowed: { ...invalid, httpStatus: 405, message: 'This route does not take that method.' },
  request_timeout: {
    ...invalid,
    httpStatus: 408,
    type: 'timeout_error',
    retryable: true,
    message: 'The request did not arrive in full within {limitMs} ms.',
  },
  payload_too_large: { ...invalid, httpStatus: 413, message: 'The request body is larger than {limitBytes} bytes.' },
  unsupported_media_type: { ...invalid, httpStatus: 415, message: 'The request body must be application/json, not compressed.' },
  headers_too_large: { ...invalid, httpStatus: 431, message: 'The request headers are larger than {limitBytes} bytes.' },
  unauthorized: { ...invalid, httpStatus: 401, type: 'authentication_error', message: 'No valid API key was given.' },
  forbidden: { ...invalid, httpStatus: 403, type: 'permission_error', message: 'This is not allowed here.' },

  // What the mesh can take now.
  queue_full: {
    httpStatus: 429,
    type: 'rate_limit_error',
    retryable: true,
    retryAfterSeconds: 1,
    message: 'The waiting queue is full ({limit} requests). Try again later.',
  },
  mesh_unavailable: { ...unavailable, retryAfterSeconds: 5, message: 'The mesh cannot serve now: {reason}.' },
  draining: { ...unavailable, retryAfterSeconds: 10, message: 'The server is shutting down and takes no new requests.' },

  // What ended a request that was accepted.
  worker_lost: { ...failed, message: 'Worker {worker} was lost while the request was running.' },
  worker_failed: { ...failed, message: 'Worker {worker} failed while the request was running.' },
  step_failed: { ...failed, message: 'A step failed on worker {worker}.' },
  step_timeout: { ...failed, message: 'A step did not finish within {limitMs} ms; worker {worker} was waited for.' },
  broker_lost: { ...failed, message: 'The connection to the message broker was lost while the request was running.' },
  non_finite: { ...failed, retryable: false, message: 'Worker {worker} computed a value that is not finite.' },
  kv_exhausted: { ...failed, message: 'The KV cache is too small for this request.' },
  deadline_exceeded: {
    ...failed,
    httpStatus: 504,
    type: 'timeout_error',
    message: 'The request did not finish before its deadline.',
  },
  request_cancelled: { ...failed, httpStatus: 499, retryable: false, message: 'The client cancelled the request.' },
  slow_reader: { ...failed, httpStatus: 499, retryable: false, message: 'The client stopped reading its stream.' },
  internal: { ...failed, retryable: false, message: 'Internal error.' },

  // What stops a mesh from forming. Not meant for clients; they see mesh_unavailable.
  broker_missing: { ...failed, retryable: false, message: 'No nats-server was found.' },
  broker_failed: { ...failed, message: 'The message broker could not be started.' },
  broker_refused: { ...failed, retryable: false, message: 'The message broker refused the credentials.' },
  permission_denied: { ...failed, retryable: false, message: 'The message broker denied {operation} on {subject}.' },
  protocol_mismatch: { ...failed, retryable: false, message: 'The two ends speak no common protocol version.' },
  arithmetic_mismatch: { ...failed, retryable: false, message: 'Worker {worker} computes with another arithmetic version.' },
  digest_mismatch: { ...failed, retryable: false, message: 'A weight slice does not have the sha256 it must have.' },
  model_invalid: { ...failed, retryable: false, message: 'The model file is broken or not supported.' },
  placement_impossible: { ...failed, retryable: false, message: 'The model cannot be cut this way.' },
  load_failed: { ...failed, message: 'Worker {worker} could not load its shard.' },
  card_absent: { ...failed, retryable: false, message: 'There is no card that this worker can use.' },
  card_lost: { ...failed, message: 'The card of worker {worker} answers no more.' },
  config_invalid: { ...failed, retryable: false, message: 'The configuration is not valid.' },
  invalid_message: { ...failed, retryable: false, message: 'A message does not follow the protocol.' },
  invalid_frame: { ...failed, retryable: false, message: 'A frame does not follow the protocol.' },
} as const satisfies Record<string, ErrorEntry>;

export type ErrorCode = keyof typeof errorTable;

export const isErrorCode = (code: string): code is ErrorCode => Object.hasOwn(errorTable, code);

/** Row of a code; codes that came over the wire and are not in the table count as `internal`. */
export const errorEntry = (code: string): ErrorEntry => errorTable[isErrorCode(code) ? code : 'internal'];

export interface ErrorOptions {
  /** Field of the request that is wrong, as the client wrote it: `messages[0].content`. */
  param?: string;
  retryAfterSeconds?: number;
  /** Values of the template's `{names}`, when no message is given. */
  details?: Record<string, string | number>;
  cause?: unknown;
}

/** Expected trouble with a stable code. `message` says what, the value, the limit, what to try; without one the table's template is filled. */
export class ShardmeshError extends Error {
  readonly code: ErrorCode;
  readonly httpStatus: number;
  readonly type: OpenAiErrorType;
  readonly retryAfterSeconds?: number;
  readonly param?: string;

  constructor(code: ErrorCode, message?: string, options: ErrorOptions = {}) {
    const entry: ErrorEntry = errorTable[code];
    super(message ?? fillTemplate(entry.message, options), options.cause === undefined ? undefined : { cause: options.cause });
    this.name = 'ShardmeshError';
    this.code = code;
    this.httpStatus = entry.httpStatus;
    this.type = entry.type;
    const retryAfterSeconds = options.retryAfterSeconds ?? entry.retryAfterSeconds;
    if (retryAfterSeconds !== null) this.retryAfterSeconds = retryAfterSeconds;
    if (options.param !== undefined) this.param = options.param;
  }

  isRetryable(): boolean {
    return errorTable[this.code].retryable;
  }
}

/** A message that does not follow the protocol: `path` is the field, `join.facts.cores`. Thrown by `decodeMessage`, and by nothing it calls. */
export class ProtocolError extends ShardmeshError {
  readonly path: string;

  constructor(path: string, message: string, options: ErrorOptions = {}) {
    super('invalid_message', message, options);
    this.name = 'ProtocolError';
    this.path = path;
  }
}

export type FrameErrorReason =
  'short' | 'magic' | 'version' | 'kind' | 'dtype' | 'length' | 'range' | 'crc' | 'mesh' | 'chunk' | 'reserved';

/** A frame that does not follow the protocol. Dropped and counted by `reason`, never answered. */
export class FrameError extends ShardmeshError {
  readonly reason: FrameErrorReason;

  constructor(reason: FrameErrorReason, message: string) {
    super('invalid_frame', message);
    this.name = 'FrameError';
    this.reason = reason;
  }
}

/** Any thrown value as a ShardmeshError; what is not one becomes `internal` with the original as `cause` and a message that gives nothing away. */
export const toShardmeshError = (error: unknown): ShardmeshError =>
  error instanceof ShardmeshError ? error : new ShardmeshError('internal', undefined, { cause: error });

function fillTemplate(template: string, options: ErrorOptions): string {
  return template.replace(/\{(\w+)\}/g, (_, name: string) => {
    if (name === 'param' && options.param !== undefined) return options.param;
    return String(options.details?.[name] ?? 'unknown');
  });
}
