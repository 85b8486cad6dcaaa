import type { FastifyReply, FastifyRequest } from 'fastify';
import { httpError, errorBody } from './errors.ts';
import { timeLimits, type HttpServerOptions } from './server.ts';
import { SseWriter } from './sse-writer.ts';

/**
 * Answers with server-sent events. What fails before the first event is answered with a status code; what fails later is an error event, and the stream
 * ends without `[DONE]`. A client that stopped reading is cut off.
 */
export async function streamReply(
  request: FastifyRequest,
  reply: FastifyReply,
  options: Pick<HttpServerOptions, 'limits' | 'recorder'>,
  write: (sse: Pick<SseWriter, 'send'>) => Promise<void>,
): Promise<FastifyReply> {
  let writer: SseWriter | null = null;
  const open = (): SseWriter => {
    if (!writer) {
      reply.hijack();
      writer = new SseWriter(reply.raw, { 'x-request-id': request.id }, options.recorder, timeLimits(options));
    }
    return writer;
  };
  try {
    await write({ send: (data) => open().send(data) });
    await open().done();
  } catch (error) {
    const failure = httpError(error);
    const opened = writer as SseWriter | null;
    if (!opened) throw failure;
    request.summary.error = failure.code;
    if (failure.code === 'internal') request.log.error({ err: error }, 'internal error');
    if (failure.code === 'slow_reader' || failure.code === 'request_cancelled') opened.destroy();
    else await opened.send(errorBody(failure)).catch(() => opened.destroy());
  } finally {
    (writer as SseWriter | null)?.end();
  }
  return reply;
}
