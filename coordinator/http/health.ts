/** GET /livez, /readyz (no key needed, status word only) and /metrics. */
import type { FastifyInstance } from 'fastify';
import type { HttpServerOptions } from './server.ts';

const canaryFreshMs = 30_000;

export function health(app: FastifyInstance, options: HttpServerOptions, isDraining: () => boolean): void {
  const { engine, metrics } = options;
  app.get('/livez', async () => ({ status: 'ok' }));
  app.get('/readyz', async (_, reply) => {
    const { meshReady, draining } = engine.status();
    const word =
      isDraining() || draining
        ? 'draining'
        : !meshReady
          ? 'not_ready'
          : (await options.canary(canaryFreshMs))
            ? 'ok'
            : 'not_ready';
    return reply.status(word === 'ok' ? 200 : 503).send({ status: word });
  });
  app.get('/metrics', async (_, reply) => reply.type(metrics.contentType).send(await metrics.text()));
}
