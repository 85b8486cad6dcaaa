/** What Node refuses before there is a request: slow or too large headers, slow bodies, broken HTTP. Answered in the same shape as every other error. */
import { STATUS_CODES, type IncomingMessage, type ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import { ShardmeshError } from '../../protocol/errors.ts';
import { httpLimits } from '../../protocol/limits.ts';
import { errorBody } from './errors.ts';

function connectionError(code: string | undefined): ShardmeshError {
  switch (code) {
    case 'ERR_HTTP_REQUEST_TIMEOUT':
      return new ShardmeshError(
        'request_timeout',
        'The request did not arrive in full in time. Send headers and body without pauses.',
      );
    case 'HPE_HEADER_OVERFLOW':
      return new ShardmeshError('headers_too_large', undefined, { details: { limitBytes: httpLimits.headerBytesMax } });
    case 'HPE_CHUNK_EXTENSIONS_OVERFLOW':
      return new ShardmeshError('payload_too_large', 'The chunk extensions of the request body are too large.');
    default:
      return new ShardmeshError('invalid_value', 'The request is not valid HTTP/1.1.');
  }
}

/** Requests of each connection whose answer is not finished: an error must not be written into, or before, the answer of another request. */
export class OpenResponses {
  readonly #open = new WeakMap<Socket, Set<ServerResponse<IncomingMessage>>>();

  add(response: ServerResponse<IncomingMessage>): void {
    const { socket } = response.req;
    const open = this.#open.get(socket) ?? new Set();
    this.#open.set(socket, open.add(response));
    const forget = (): void => void open.delete(response);
    response.once('finish', forget);
    response.once('close', forget);
  }

  /** Nothing was answered yet, and nothing that arrived in full waits for its answer. */
  mayAnswer(socket: Socket): boolean {
    for (const response of this.#open.get(socket) ?? []) if (response.headersSent || response.req.complete) return false;
    return true;
  }
}

/** Answers and closes the connection. @returns the HTTP status; null when nothing could be said */
export function answerClientError(error: NodeJS.ErrnoException, socket: Socket, responses: OpenResponses): number | null {
  if (error.code === 'ECONNRESET' || !socket.writable || !responses.mayAnswer(socket)) {
    socket.destroy();
    return null;
  }
  const failure = connectionError(error.code);
  const body = JSON.stringify(errorBody(failure));
  const status = failure.httpStatus;
  socket.end(
    `HTTP/1.1 ${status} ${STATUS_CODES[status] ?? ''}\r\ncontent-type: application/json; charset=utf-8\r\n` +
      `content-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`,
    () => socket.destroy(),
  );
  return status;
}
