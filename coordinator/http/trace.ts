/** POST /trace: a timeline of the whole mesh over the next moments. Times and step numbers only, nothing of any request's text. */
import type { FastifyInstance } from 'fastify';
import { z } from 'zod';
import { traceLimits } from '../../protocol/limits.ts';
import { checkBody } from './errors.ts';
import type { HttpServerOptions } from './server.ts';

const traceSchema = z.strictObject({
  milliseconds: z.int().min(1).max(traceLimits.millisecondsMax).default(1_000),
});

export function trace(app: FastifyInstance, options: HttpServerOptions): void {
  app.post('/trace', async (request) => options.trace(checkBody(traceSchema, request.body ?? {}).milliseconds));
}
