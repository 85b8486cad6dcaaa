/** Stand-ins for the engine and the text side of a model, so that HTTP is tested alone: the answer of `echo` is the prompt itself, token by token. */
import type {
  Engine,
  EngineEvent,
  EngineRequest,
  EngineStatus,
  RequestHandle,
} from '../../../../coordinator/engine/engine-types.ts';
import { createHttpServer, type HttpServer, type HttpServerOptions } from '../../../../coordinator/http/server.ts';
import { createLog } from '../../../../coordinator/observe/log.ts';
import type { TextModel } from '../../../../coordinator/text/text-types.ts';
import type { ShardmeshError } from '../../../../protocol/errors.ts';
import { TraceRecorder } from '../../../../protocol/trace.ts';

/** One byte a token, 256 is the only special token. */
export const byteText: TextModel = {
  vocabularySize: 257,
  bosToken: null,
  endTokens: [256],
  hasChatTemplate: true,
  encode: async (text) => [...Buffer.from(text)],
  decode: (tokens) => Buffer.from(tokens.filter((token) => token < 256)).toString(),
  tokenBytes: (token) => (token < 256 ? Uint8Array.of(token) : new Uint8Array()),
  isSpecial: (token) => token === 256,
  encodeChat: async (messages) => {
    const prompt = messages.map((message) => `${message.role}:${message.content}\n`).join('');
    return { tokens: [...Buffer.from(prompt)], prompt };
  },
  detokenizer: () => ({ push: (token) => String.fromCharCode(token), flush: () => '' }),
};

export class FakeEngine implements Engine {
  readonly requests: EngineRequest[] = [];
  readonly cancelled: string[] = [];
  state: EngineStatus = {
    meshReady: true,
    reason: null,
    draining: false,
    waiting: 0,
    running: 0,
    kvBlocksTotal: 10,
    kvBlocksUsed: 0,
    lastStepAt: null,
  };
  /** Events of the next requests; the default answers with "Hi!" and exact fp32 log-probabilities. */
  script: (request: EngineRequest) => AsyncIterable<EngineEvent> = answer;
  refuse: ShardmeshError | null = null;

  submit(request: EngineRequest): RequestHandle {
    if (this.refuse) throw this.refuse;
    this.requests.push(request);
    let cancel = (): void => undefined;
    const cancelledPromise = new Promise<void>((resolve) => (cancel = resolve));
    const source = this.script(request)[Symbol.asyncIterator]();
    const events = (async function* () {
      for (;;) {
        const next = await Promise.race([source.next(), cancelledPromise.then(() => null)]);
        if (next === null || next.done) return;
        yield next.value;
      }
    })();
    return {
      id: request.id,
      events,
      cancel: () => {
        this.cancelled.push(request.id);
        cancel();
      },
    };
  }

  status(): EngineStatus {
    return this.state;
  }
}

export const exactLogprob = Math.fround(-0.1);

export async function* answer(request: EngineRequest): AsyncGenerator<EngineEvent> {
  const { promptTokens, promptLogprobs, n, sampling } = request;
  yield {
    type: 'prompt',
    cachedTokens: 2,
    promptLogprobs:
      promptLogprobs === null
        ? null
        : promptTokens.map((token, index) => (index === 0 ? null : { token, logprob: exactLogprob, top: [] })),
  };
  for (let choice = 0; choice < n; choice++) {
    const tokens = [...Buffer.from('Hi!')].slice(0, request.outputTokensMax);
    for (const token of tokens)
      yield {
        type: 'token',
        choice,
        token,
        text: String.fromCharCode(token),
        logprob:
          sampling.logprobs === null
            ? null
            : { token, logprob: exactLogprob, top: [{ token, logprob: exactLogprob }].slice(0, sampling.logprobs) },
      };
    yield { type: 'finished', choice, reason: tokens.length < 3 ? 'length' : 'stop', text: '', outputTokens: tokens.length };
  }
}

/** A server on a free port with a fake engine behind it. */
export async function startServer(
  changes: Partial<HttpServerOptions> = {},
): Promise<{ server: HttpServer; engine: FakeEngine; url: string }> {
  const engine = new FakeEngine();
  const server = await createHttpServer({
    engine,
    text: byteText,
    model: { id: 'tiny', created: 1_700_000_000, contextTokensMax: 64, vocabularySize: 257 },
    host: '127.0.0.1',
    port: 0,
    apiKeys: [],
    canary: async () => true,
    metrics: {
      contentType: 'text/plain',
      text: async () => 'shardmesh_up 1\n',
      observeRequest: () => undefined,
      observeFirstToken: () => undefined,
      observeTokenGap: () => undefined,
    },
    recorder: new TraceRecorder(),
    trace: async (milliseconds) => ({ milliseconds }),
    log: createLog({ level: 'silent', name: 'test', terminal: false }),
    ...changes,
  });
  return { server, engine, url: server.url };
}

export const post = (url: string, path: string, body: unknown, headers: Record<string, string> = {}): Promise<Response> =>
  fetch(`${url}${path}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: typeof body === 'string' || body instanceof Uint8Array ? (body as string) : JSON.stringify(body),
  });
