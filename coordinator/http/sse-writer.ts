/**
 * Server-sent events on a hijacked reply. A write that fills the socket's buffer makes the next one wait (so a client that stops reading stops its own
 * request only); a comment every 10 s keeps an idle connection alive.
 */
import type { ServerResponse } from 'node:http';
import { httpLimits } from '../../protocol/limits.ts';
import { ShardmeshError } from '../../protocol/errors.ts';

export class SseWriter {
  readonly #response: ServerResponse;
  readonly #comment: NodeJS.Timeout;

  constructor(response: ServerResponse, headers: Record<string, string>) {
    this.#response = response;
    response.writeHead(200, {
      'content-type': 'text/event-stream; charset=utf-8',
      'cache-control': 'no-cache',
      connection: 'keep-alive',
      'x-accel-buffering': 'no',
      ...headers,
    });
    this.#comment = setInterval(() => {
      if (!response.writableNeedDrain) response.write(': still working\n\n');
    }, httpLimits.keepAliveCommentMs);
    this.#comment.unref();
  }

  /** @throws {ShardmeshError} `slow_reader` when the client took nothing for 30 s, `request_cancelled` when it is gone */
  async send(data: object): Promise<void> {
    await this.#write(`data: ${JSON.stringify(data)}\n\n`);
  }

  async done(): Promise<void> {
    await this.#write('data: [DONE]\n\n');
  }

  end(): void {
    clearInterval(this.#comment);
    this.#response.end();
  }

  async #write(text: string): Promise<void> {
    const response = this.#response;
    if (response.destroyed || response.closed) throw new ShardmeshError('request_cancelled');
    this.#comment.refresh();
    if (response.write(text)) return;
    await new Promise<void>((resolve, reject) => {
      const settle = (error?: ShardmeshError): void => {
        clearTimeout(timer);
        response.off('drain', onDrain);
        response.off('close', onClose);
        if (error) reject(error);
        else resolve();
      };
      const onDrain = (): void => settle();
      const onClose = (): void => settle(new ShardmeshError('request_cancelled'));
      const timer = setTimeout(() => settle(new ShardmeshError('slow_reader')), httpLimits.slowReaderTimeoutMs);
      response.once('drain', onDrain);
      response.once('close', onClose);
    });
  }
}
