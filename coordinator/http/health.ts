/** GET /livez, /readyz and its other name /health (no key needed, status word only), and /metrics. */
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { HttpServerOptions } from './server.ts';

const canaryFreshMs = 30_000;

export function health(app: FastifyInstance, options: HttpServerOptions, isDraining: () => boolean): void {
  const { engine, metrics } = options;
  app.get('/livez', async () => ({ status: 'ok' }));
  const ready = async (_: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> => {
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
  };
  app.get('/readyz', ready);
  // Where load tools and balancers made for vLLM and llama-server look.
  app.get('/health', ready);
  app.get('/metrics', async (_, reply) => reply.type(metrics.contentType).send(await metrics.text()));
}
