/** The HTTP side: one fastify instance, every route behind the same checks, every failure in OpenAI's error shape. */
import fastify, {
  LogController,
  type FastifyBaseLogger,
  type FastifyInstance,
  type FastifyReply,
  type FastifyRequest,
} from 'fastify';
import type { ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { isLoopback } from '../../protocol/addresses.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { newRequestId } from '../../protocol/ids.ts';
import { httpLimits } from '../../protocol/limits.ts';
import type { Engine } from '../engine/engine-types.ts';
import type { TextModel } from '../text/text-types.ts';
import { Auth } from './auth.ts';
import { answerClientError, OpenResponses } from './client-error.ts';
import { chatCompletions } from './chat-completions.ts';
import { completions } from './completions.ts';
import { onDisconnect } from './disconnect.ts';
import { errorBody, httpError } from './errors.ts';
import { health } from './health.ts';
import { parseJsonBody } from './json-guard.ts';
import { models } from './models.ts';
import { requestDeadline, type RequestContext } from './request-parameters.ts';
import { emptySummary, type RequestSummary } from './run-request.ts';
import { tokenize } from './tokenize.ts';
import { trace } from './trace.ts';
import type { TraceRecorder } from '../../protocol/trace.ts';

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
  /** Records what is written to streams, while it is on. */
  recorder: TraceRecorder;
  /** A timeline of the mesh over the next moments, as an object of JSON. */
  trace(milliseconds: number): Promise<object>;
  /** Shorter waits than those of `httpLimits`, for tests. */
  limits?: Partial<HttpTimeLimits>;
}

export type HttpTimeLimits = Record<'headersTimeoutMs' | 'bodyTimeoutMs' | 'slowReaderTimeoutMs' | 'keepAliveCommentMs', number>;

export const timeLimits = ({ limits }: Pick<HttpServerOptions, 'limits'>): HttpTimeLimits => ({ ...httpLimits, ...limits });

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
    /** `performance.now()` when its headers were read. */
    receivedAt: number;
    summary: RequestSummary;
  }
}

export function requestContext(request: FastifyRequest): RequestContext {
  return {
    requestId: request.id,
    tenant: request.tenant,
    deadlineAt: requestDeadline(request.headers['x-request-timeout-ms'], request.receivedAt),
  };
}

export function checkModel(model: ServedModel, name: string): void {
  if (name === model.id) return;
  const shown = httpLimits.modelNamePattern.test(name) ? name : 'with that name';
  throw new ShardmeshError('model_not_found', `The model ${shown} is not served here; this server has ${model.id}.`, {
    param: 'model',
  });
}

/** Fastify says nothing of its own but warnings and errors: the lines of a request are ours, and whoever starts the server says where it listens. */
class RequestLogController extends LogController {
  constructor() {
    super({ disableRequestLogging: true, requestIdLogLabel: 'requestId' });
  }

  override serviceUnavailable(): void {}
}

const quietLog = (log: FastifyBaseLogger): FastifyBaseLogger => ({
  level: log.level,
  silent: () => undefined,
  trace: () => undefined,
  debug: () => undefined,
  info: () => undefined,
  warn: log.warn.bind(log),
  error: log.error.bind(log),
  fatal: log.fatal.bind(log),
  child: () => quietLog(log),
});

function buildApp(options: HttpServerOptions, isDraining: () => boolean): FastifyInstance {
  const hosts = isLoopback(options.host) ? (options.allowedHosts ?? []) : null;
  const auth = new Auth({ apiKeys: options.apiKeys, hosts, origins: options.allowedOrigins ?? [] });
  const limits = timeLimits(options);
  const responses = new OpenResponses();
  const observe = (request: FastifyRequest, status: number): void => {
    const { summary, tenant, receivedAt } = request;
    const route = request.routeOptions.url ?? 'unknown';
    const milliseconds = performance.now() - receivedAt;
    options.metrics.observeRequest(route, status, milliseconds);
    request.log.info(
      {
        tenant,
        route,
        status,
        milliseconds: Math.round(milliseconds),
        ...(summary.promptTokens === 0
          ? {}
          : { promptTokens: summary.promptTokens, cachedTokens: summary.cachedTokens, outputTokens: summary.outputTokens }),
        ...(summary.firstTokenMs === null ? {} : { firstTokenMs: Math.round(summary.firstTokenMs) }),
        ...(summary.error === null ? {} : { error: summary.error }),
      },
      'request',
    );
  };
  /** First thing of every request. Its one log line is written when the answer is out, or the client gone. */
  const begin = (request: FastifyRequest, reply: FastifyReply): void => {
    request.receivedAt = performance.now();
    request.summary = emptySummary();
    reply.header('x-request-id', request.id);
    responses.add(reply.raw);
    let observed = false;
    const once = (status: () => number): void => {
      if (observed) return;
      observed = true;
      unwatch();
      observe(request, status());
    };
    let unwatch = (): void => undefined;
    unwatch = onDisconnect(request.raw.socket, () => once(() => (reply.raw.writableFinished ? reply.statusCode : 499)));
    // Node says 'finish' also of an answer that was dropped because its connection was.
    reply.raw.once('finish', () => once(() => (request.raw.socket.destroyed ? 499 : reply.raw.statusCode)));
  };
  const fail = (thrown: unknown, request: FastifyRequest, reply: FastifyReply): FastifyReply => {
    const error = httpError(thrown);
    request.summary.error = error.code;
    if (error.code === 'internal') request.log.error({ err: thrown }, 'internal error');
    if (error.retryAfterSeconds !== undefined)
      reply.header('retry-after', String(Math.max(1, Math.ceil(error.retryAfterSeconds))));
    if (error.code === 'draining' || error.code === 'payload_too_large') reply.header('connection', 'close');
    return reply.status(error.httpStatus).send(errorBody(error));
  };
  const app = fastify({
    loggerInstance: quietLog(options.log),
    childLoggerFactory: (_, bindings) => options.log.child(bindings),
    logController: new RequestLogController(),
    genReqId: () => newRequestId(),
    bodyLimit: httpLimits.bodyBytesMax,
    requestTimeout: limits.bodyTimeoutMs,
    http: {
      maxHeaderSize: httpLimits.headerBytesMax,
      headersTimeout: limits.headersTimeoutMs,
      requestTimeout: limits.bodyTimeoutMs,
      connectionsCheckingInterval: Math.max(50, Math.min(1_000, limits.headersTimeoutMs / 4)),
    },
    clientErrorHandler: (error, socket) => {
      const status = answerClientError(error, socket, responses);
      if (status === null) return;
      options.metrics.observeRequest('malformed', status, 0);
      options.log.info({ status, cause: (error as NodeJS.ErrnoException).code }, 'malformed request');
    },
    // Paths that the router cannot read do not come by the hooks: the same checks here.
    frameworkErrors: (error, request, reply) => {
      begin(request, reply);
      try {
        request.tenant = auth.check(undefined, request.headers);
      } catch (refused) {
        fail(refused, request, reply);
        return;
      }
      fail(error, request, reply);
    },
    forceCloseConnections: true,
    routerOptions: { ignoreDuplicateSlashes: false, caseSensitive: true, maxParamLength: 256 },
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
    begin(request, reply);
    request.tenant = auth.check(request.is404 ? undefined : request.routeOptions.url, request.headers);
    if (!request.raw.url?.startsWith('/'))
      throw new ShardmeshError('invalid_value', 'The request target must be a path that begins with "/".');
    const encoding = request.headers['content-encoding'];
    if (encoding !== undefined && encoding !== 'identity')
      throw new ShardmeshError(
        'unsupported_media_type',
        `Compressed request bodies (${String(encoding).slice(0, 32)}) are not accepted.`,
      );
    if (isDraining() && request.method === 'POST') throw new ShardmeshError('draining');
  });
  // A client that takes nothing of an answer that is ready is cut off: its bytes would stay here for good. Streams watch themselves.
  app.addHook('onSend', async (_, reply) => {
    reply.raw.setTimeout(limits.slowReaderTimeoutMs, () => reply.raw.destroy());
  });
  app.setErrorHandler(async (thrown, request, reply) => fail(thrown, request, reply));

  const methods = new Map<string, Set<string>>();
  app.addHook('onRoute', ({ url, method }) => {
    const known = methods.get(url) ?? new Set();
    for (const one of [method].flat()) known.add(one);
    methods.set(url, known);
  });
  app.setNotFoundHandler(async (request, reply) => {
    const path = request.url.split('?', 1)[0] ?? '';
    const known = methods.get(path) ?? (/^\/v1\/models\/[^/]+$/.test(path) ? methods.get('/v1/models/:id') : undefined);
    if (!known) throw new ShardmeshError('not_found');
    reply.header('allow', [...known].join(', '));
    throw new ShardmeshError('method_not_allowed');
  });

  chatCompletions(app, options);
  completions(app, options);
  models(app, options);
  tokenize(app, options);
  trace(app, options);
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
  let unanswered = 0;
  app.server.on('request', (_, response: ServerResponse) => {
    unanswered++;
    response.once('close', () => unanswered--);
  });
  const { address, port } = app.server.address() as AddressInfo;
  const close = (): Promise<void> => app.close().then(() => undefined);
  return {
    url: `http://${address.includes(':') ? `[${address}]` : address}:${port}`,
    async drain(graceMs) {
      draining = true;
      const until = performance.now() + graceMs;
      const busy = (): boolean => {
        const { running, waiting } = options.engine.status();
        return running + waiting + unanswered > 0;
      };
      while (busy() && performance.now() < until) await new Promise((resolve) => setTimeout(resolve, 25));
      await close();
    },
    close,
  };
}
