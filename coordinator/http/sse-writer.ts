/**
 * Server-sent events on a hijacked reply. A write that fills the socket's buffer makes the next one wait (so a client that stops reading stops its own
 * request only); a comment every 10 s keeps an idle connection alive.
 */
import type { ServerResponse } from 'node:http';
import { httpLimits } from '../../protocol/limits.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { monotonicUs, type TraceRecorder } from '../../protocol/trace.ts';
import { onDisconnect } from './disconnect.ts';

export interface SseLimits {
  slowReaderTimeoutMs: number;
  keepAliveCommentMs: number;
}

export class SseWriter {
  readonly #response: ServerResponse;
  readonly #limits: SseLimits;
  readonly #recorder: TraceRecorder;
  readonly #comment: NodeJS.Timeout;
  #ended = false;

  constructor(
    response: ServerResponse,
    headers: Record<string, string>,
    recorder: TraceRecorder,
    limits: SseLimits = httpLimits,
  ) {
    this.#response = response;
    this.#recorder = recorder;
    this.#limits = limits;
    response.writeHead(200, {
      'content-type': 'text/event-stream; charset=utf-8',
      'cache-control': 'no-cache',
      connection: 'keep-alive',
      'x-accel-buffering': 'no',
      ...headers,
    });
    this.#comment = setInterval(() => {
      if (!response.writableNeedDrain) response.write(': still working\n\n');
    }, limits.keepAliveCommentMs);
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
    if (this.#ended) return;
    this.#ended = true;
    clearInterval(this.#comment);
    this.#response.end();
  }

  /** Ends without waiting for the client to take what is left. */
  destroy(): void {
    this.#ended = true;
    clearInterval(this.#comment);
    this.#response.req.socket.destroy();
  }

  async #write(text: string): Promise<void> {
    const response = this.#response;
    // A single event may be larger than the bound (it is not cut), but nothing is added behind one that has not left.
    while (response.writableLength + text.length > httpLimits.streamBufferBytesMax && response.writableNeedDrain)
      await this.#drained();
    if (this.#ended || response.destroyed || response.req.socket.destroyed) throw new ShardmeshError('request_cancelled');
    this.#comment.refresh();
    const startUs = this.#recorder.on ? monotonicUs() : 0;
    const flows = response.write(text);
    if (this.#recorder.on) this.#recorder.add('sse write', 0, startUs);
    if (!flows) await this.#drained();
  }

  #drained(): Promise<void> {
    const response = this.#response;
    return new Promise<void>((resolve, reject) => {
      const settle = (error?: ShardmeshError): void => {
        clearTimeout(timer);
        response.off('drain', onDrain);
        unwatch();
        if (error) reject(error);
        else resolve();
      };
      const onDrain = (): void => settle();
      const timer = setTimeout(() => settle(new ShardmeshError('slow_reader')), this.#limits.slowReaderTimeoutMs);
      response.once('drain', onDrain);
      let unwatch = (): void => undefined;
      unwatch = onDisconnect(response.req.socket, () => settle(new ShardmeshError('request_cancelled')));
    });
  }
}
