/** The HTTP side: one fastify instance, every route behind the same checks, every failure in OpenAI's error shape. */
import fastify, { type FastifyBaseLogger, type FastifyInstance, type FastifyRequest } from 'fastify';
import type { AddressInfo } from 'node:net';
import { ShardmeshError } from '../../protocol/errors.ts';
import { newRequestId } from '../../protocol/ids.ts';
import { httpLimits } from '../../protocol/limits.ts';
import type { Engine } from '../engine/engine-types.ts';
import type { TextModel } from '../text/text-types.ts';
import { Auth } from './auth.ts';
import { chatCompletions } from './chat-completions.ts';
import { completions } from './completions.ts';
import { errorBody, httpError } from './errors.ts';
import { health } from './health.ts';
import { parseJsonBody } from './json-guard.ts';
import { models } from './models.ts';
import { requestDeadline, type RequestContext } from './request-parameters.ts';
import { tokenize } from './tokenize.ts';

export interface ServedModel {
  /** Name in the API. */
  id: string;
  /** Unix seconds. */
  created: number;
  contextTokensMax: number;
  vocabularySize: number;
}

export interface HttpServerOptions {
  engine: Engine;
  text: TextModel;
  model: ServedModel;
  host: string;
  /** 0: any free port. */
  port: number;
  apiKeys: readonly string[];
  allowedHosts?: readonly string[];
  allowedOrigins?: readonly string[];
  /** Resolves to whether a real decode passed within the last `freshMs` (running one when needed). */
  canary(freshMs: number): Promise<boolean>;
  metrics: {
    contentType: string;
    text(): Promise<string>;
    observeRequest(route: string, status: number, milliseconds: number): void;
    observeFirstToken(milliseconds: number): void;
    observeTokenGap(milliseconds: number): void;
  };
  log: FastifyBaseLogger;
}

export interface HttpServer {
  /** `http://127.0.0.1:8080` */
  readonly url: string;
  /** Refuses new requests, waits for running ones at most `graceMs`, then closes. */
  drain(graceMs: number): Promise<void>;
  close(): Promise<void>;
}

declare module 'fastify' {
  interface FastifyRequest {
    tenant: string;
  }
}

export function requestContext(request: FastifyRequest): RequestContext {
  return {
    requestId: request.id,
    tenant: request.tenant,
    deadlineAt: requestDeadline(request.headers['x-request-timeout-ms'], performance.now()),
  };
}

export function checkModel(model: ServedModel, name: string): void {
  if (name === model.id) return;
  const shown = httpLimits.modelNamePattern.test(name) ? name : 'with that name';
  throw new ShardmeshError('model_not_found', `The model ${shown} is not served here; this server has ${model.id}.`, {
    param: 'model',
  });
}

const isLoopback = (host: string): boolean => host === 'localhost' || host === '::1' || /^127\./.test(host);

function buildApp(options: HttpServerOptions, isDraining: () => boolean): FastifyInstance {
  const auth = new Auth({ apiKeys: options.apiKeys, hosts: options.allowedHosts ?? [], origins: options.allowedOrigins ?? [] });
  const app = fastify({
    loggerInstance: options.log,
    disableRequestLogging: true,
    genReqId: () => newRequestId(),
    bodyLimit: httpLimits.bodyBytesMax,
    requestTimeout: httpLimits.bodyTimeoutMs,
    http: {
      maxHeaderSize: httpLimits.headerBytesMax,
      headersTimeout: httpLimits.headersTimeoutMs,
      requestTimeout: httpLimits.bodyTimeoutMs,
    },
    forceCloseConnections: true,
    routerOptions: { ignoreDuplicateSlashes: false, caseSensitive: true },
  });
  app.decorateRequest('tenant', '');
  app.removeAllContentTypeParsers();
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (_, body, done) => {
    try {
      done(null, parseJsonBody(body as Buffer));
    } catch (error) {
      done(error as Error);
    }
  });

  // The first hook of every request, routes that do not exist included: default deny.
  app.addHook('onRequest', async (request, reply) => {
    reply.header('x-request-id', request.id);
    const path = request.url.split('?', 1)[0] ?? '';
    request.tenant = auth.check(path, request.headers);
    const encoding = request.headers['content-encoding'];
    if (encoding !== undefined && encoding !== 'identity')
      throw new ShardmeshError(
        'unsupported_media_type',
        `Compressed request bodies (${String(encoding).slice(0, 32)}) are not accepted.`,
      );
    if (isDraining() && request.method === 'POST') throw new ShardmeshError('draining');
  });
  app.addHook('onResponse', async (request, reply) => {
    const route = request.routeOptions.url ?? 'unknown';
    options.metrics.observeRequest(route, reply.statusCode, reply.elapsedTime);
    request.log.info(
      {
        requestId: request.id,
        tenant: request.tenant,
        route,
        status: reply.statusCode,
        milliseconds: Math.round(reply.elapsedTime),
      },
      'request',
    );
  });
  app.setErrorHandler(async (thrown, request, reply) => {
    const error = httpError(thrown);
    if (error.code === 'internal') request.log.error({ requestId: request.id, err: thrown }, 'internal error');
    if (error.retryAfterSeconds !== undefined)
      reply.header('retry-after', String(Math.max(1, Math.ceil(error.retryAfterSeconds))));
    if (error.code === 'draining' || error.code === 'payload_too_large') reply.header('connection', 'close');
    return reply.status(error.httpStatus).send(errorBody(error));
  });
  app.setNotFoundHandler(async () => {
    throw new ShardmeshError('not_found');
  });

  chatCompletions(app, options);
  completions(app, options);
  models(app, options);
  tokenize(app, options);
  health(app, options, isDraining);
  return app;
}

/** @throws {ShardmeshError} `config_invalid`: beyond loopback without keys, or the port is taken */
export async function createHttpServer(options: HttpServerOptions): Promise<HttpServer> {
  if (!isLoopback(options.host) && options.apiKeys.length === 0)
    throw new ShardmeshError(
      'config_invalid',
      `Listening on ${options.host} needs API keys (--api-keys FILE); without keys only loopback is served.`,
    );
  let draining = false;
  const app = buildApp(options, () => draining);
  try {
    await app.listen({ host: options.host, port: options.port });
  } catch (cause) {
    await app.close();
    const { code } = cause as { code?: string };
    if (code === 'EADDRINUSE')
      throw new ShardmeshError(
        'config_invalid',
        `Port ${options.port} on ${options.host} is in use. Choose another one with --port, or --port 0 for any free one.`,
        { cause },
      );
    throw cause;
  }
  const { address, port } = app.server.address() as AddressInfo;
  const close = (): Promise<void> => app.close().then(() => undefined);
  return {
    url: `http://${address.includes(':') ? `[${address}]` : address}:${port}`,
    async drain(graceMs) {
      draining = true;
      const until = performance.now() + graceMs;
      const busy = (): boolean => {
        const { running, waiting } = options.engine.status();
        return running + waiting > 0;
      };
      while (busy() && performance.now() < until) await new Promise((resolve) => setTimeout(resolve, 25));
      await close();
    },
    close,
  };
}
