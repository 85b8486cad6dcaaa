import type { FastifyReply, FastifyRequest } from 'fastify';
import { httpError, errorBody } from './errors.ts';
import { SseWriter } from './sse-writer.ts';

/**
 * Answers with server-sent events. What fails before the first event is answered with a status code; what fails later is an error event, and the stream
 * ends without `[DONE]`.
 */
export async function streamReply(
  request: FastifyRequest,
  reply: FastifyReply,
  write: (sse: Pick<SseWriter, 'send'>) => Promise<void>,
): Promise<FastifyReply> {
  let writer: SseWriter | null = null;
  const open = (): SseWriter => {
    if (!writer) {
      reply.hijack();
      writer = new SseWriter(reply.raw, { 'x-request-id': request.id });
    }
    return writer;
  };
  try {
    await write({ send: (data) => open().send(data) });
    await open().done();
  } catch (error) {
    const failure = httpError(error);
    if (!writer) throw failure;
    request.log.warn({ requestId: request.id, code: failure.code }, 'stream ended with an error');
    await (writer as SseWriter).send(errorBody(failure)).catch(() => undefined);
  } finally {
    (writer as SseWriter | null)?.end();
  }
  return reply;
}
