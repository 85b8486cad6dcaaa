/** What happens on the connection below the routes: broken and odd HTTP, slow and lost clients, what the log says of them. */
import { connect, type Socket } from 'node:net';
import { once } from 'node:events';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { HttpServer } from '../../../../coordinator/http/server.ts';
import type { EngineEvent, EngineRequest } from '../../../../coordinator/engine/engine-types.ts';
import { answer, post, startServer, type FakeEngine } from './fake-engine.ts';

interface Line {
  msg: string;
  [field: string]: unknown;
}

const lines: Line[] = [];
const observed: [string, number][] = [];
/** As much of pino as fastify and the routes use. */
function recorder(bindings: object): never {
  const write = (fields: object | string, msg?: string): void =>
    void lines.push(typeof fields === 'string' ? { ...bindings, msg: fields } : { ...bindings, ...fields, msg: msg ?? '' });
  return {
    level: 'info',
    silent: () => undefined,
    ...Object.fromEntries(['trace', 'debug', 'info', 'warn', 'error', 'fatal'].map((level) => [level, write])),
    child: (more: object) => recorder({ ...bindings, ...more }),
  } as never;
}

let server: HttpServer;
let engine: FakeEngine;
let url: string;
const sockets: Socket[] = [];
beforeEach(async () => {
  lines.length = 0;
  observed.length = 0;
  ({ server, engine, url } = await startServer({
    apiKeys: ['key-one'],
    log: recorder({}),
    limits: { headersTimeoutMs: 300, bodyTimeoutMs: 600, slowReaderTimeoutMs: 400 },
    metrics: {
      contentType: 'text/plain',
      text: async () => '',
      observeRequest: (route, status) => void observed.push([route, status]),
      observeFirstToken: () => undefined,
      observeTokenGap: () => undefined,
    },
  }));
});
afterEach(async () => {
  for (const socket of sockets.splice(0)) socket.destroy();
  await server.close();
});

const key = { authorization: 'Bearer key-one' };
const chat = { model: 'tiny', messages: [{ role: 'user', content: 'Hello' }] };
const completion = { model: 'tiny', prompt: 'abc' };

async function open(text: string): Promise<Socket> {
  const socket = connect({ host: '127.0.0.1', port: Number(new URL(url).port) });
  socket.on('error', () => undefined);
  sockets.push(socket);
  await once(socket, 'connect');
  socket.write(text);
  return socket;
}

/** Everything that comes back until the server closes. */
async function raw(text: string): Promise<string> {
  const socket = await open(text);
  let all = '';
  socket.on('data', (chunk: Buffer) => (all += chunk.toString()));
  await once(socket, 'close');
  return all;
}

const head = (line: string, more = ''): string =>
  `${line} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-one\r\n${more}Connection: close\r\n\r\n`;
const statusOf = (text: string): number => Number(/^HTTP\/1\.1 (\d{3}) /.exec(text)?.[1]);
const errorOf = (text: string): unknown => (JSON.parse(text.slice(text.indexOf('\r\n\r\n') + 4)) as { error: unknown }).error;
const postHead = (body: string, more = ''): string =>
  `POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-one\r\nContent-Type: application/json\r\n${more}Content-Length: ${body.length}\r\n\r\n`;

/** Tokens for ever, each with as much text as the buffer of a stream takes in 16. */
async function* endless(request: EngineRequest): AsyncGenerator<EngineEvent> {
  yield { type: 'prompt', cachedTokens: 0, promptLogprobs: null };
  for (let index = 0; ; index++) {
    taken.set(request.id, index);
    yield { type: 'token', choice: 0, token: 72, text: 'H'.repeat(16_384), logprob: null };
    await new Promise((resolve) => setImmediate(resolve));
  }
}
const taken = new Map<string, number>();

describe('odd HTTP', () => {
  const refused: [string, string, number, string][] = [
    ['a method in lower case', 'get /livez HTTP/1.1\r\nHost: localhost\r\n\r\n', 400, 'invalid_value'],
    ['a method that does not exist', head('BREW /livez'), 400, 'invalid_value'],
    ['noise', 'hello\r\n\r\n', 400, 'invalid_value'],
    [
      'Transfer-Encoding beside Content-Length',
      `${postHead('{}', 'Transfer-Encoding: chunked\r\n')}0\r\n\r\n`,
      400,
      'invalid_value',
    ],
    ['a bare line feed in a header', 'GET /livez HTTP/1.1\nHost: localhost\nX: a\rb\n\n', 400, 'invalid_value'],
    ['headers over 16 KiB', head('GET /livez', `X: ${'a'.repeat(17 * 1024)}\r\n`), 431, 'headers_too_large'],
    ['an absolute target', head('GET http://localhost/v1/models'), 400, 'invalid_value'],
    ['a target that is *', head('OPTIONS *'), 400, 'invalid_value'],
    ['a path that does not decode', head('GET /v1/%zz'), 400, 'invalid_value'],
    ['a doubled slash', head('GET //v1/models'), 404, 'not_found'],
    ['an encoded parent', head('GET /v1/%2e%2e/v1/models'), 404, 'not_found'],
    ['a parent', head('GET /livez/../v1/models'), 404, 'not_found'],
    ['an encoded slash', head('GET /v1%2fmodels'), 404, 'not_found'],
    ['a path in upper case', head('GET /V1/models'), 404, 'not_found'],
    ['an endless model name', head(`GET /v1/models/${'a'.repeat(300)}`), 404, 'not_found'],
  ];
  it.each(refused)('http - answers %s in the shape of every error', async (_, text, status, code) => {
    const got = await raw(text);
    expect([statusOf(got), errorOf(got)]).toMatchObject([status, { code, type: 'invalid_request_error' }]);
  });

  it('http - asks for a key before it says anything of a path', async () => {
    for (const target of ['/v1/%zz', '//v1/models', '/nowhere', `/v1/models/${'a'.repeat(300)}`, 'http://localhost/livez', '*']) {
      const got = await raw(`OPTIONS ${target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n`);
      expect([target, statusOf(got)]).toEqual([target, 401]);
    }
  });

  it('http - every method on every route is served, or 405 with Allow, and 401 first without a key', async () => {
    const routes: Record<string, string[]> = {
      '/v1/chat/completions': ['POST'],
      '/v1/completions': ['POST'],
      '/tokenize': ['POST'],
      '/detokenize': ['POST'],
      '/v1/models': ['GET', 'HEAD'],
      '/v1/models/tiny': ['GET', 'HEAD'],
      '/metrics': ['GET', 'HEAD'],
    };
    for (const [path, allowed] of Object.entries(routes))
      for (const method of ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS']) {
        expect([path, method, (await fetch(`${url}${path}`, { method })).status]).toEqual([path, method, 401]);
        const response = await fetch(`${url}${path}`, { method, headers: key });
        if (!allowed.includes(method)) {
          expect([path, method, response.status]).toEqual([path, method, 405]);
          expect(response.headers.get('allow')?.split(', ').sort()).toEqual(allowed);
        } else expect([path, method, response.status]).toEqual([path, method, method === 'POST' ? 400 : 200]);
      }
    for (const method of ['POST', 'PUT', 'DELETE', 'OPTIONS']) expect((await fetch(`${url}/livez`, { method })).status).toBe(401);
  });

  it('http - pipelined requests are answered in their order, and a broken one behind them ends the connection', async () => {
    const one = (path: string): string => `GET ${path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-one\r\n\r\n`;
    const got = await raw(`${one('/livez')}${one('/v1/models')}${one('/nowhere')}${head('GET /livez')}`);
    expect([...got.matchAll(/HTTP\/1\.1 (\d+)/g)].map((match) => match[1])).toEqual(['200', '200', '404', '200']);
    const broken = await raw(`${one('/v1/models')}nonsense\r\n\r\n`);
    expect([...broken.matchAll(/HTTP\/1\.1 (\d+)/g)].map((match) => match[1])).not.toContain('400');
  });

  it('http - the metric label of a route is its pattern', async () => {
    for (const path of ['/v1/models/tiny', '/v1/models/other', '/nowhere/1', '/nowhere/2?x=1'])
      await fetch(`${url}${path}`, { headers: key });
    await raw('noise\r\n\r\n');
    expect(observed).toEqual([
      ['/v1/models/:id', 200],
      ['/v1/models/:id', 404],
      ['unknown', 404],
      ['unknown', 404],
      ['malformed', 400],
    ]);
  });
});

describe('slow clients', () => {
  it('http - headers that do not arrive in time are answered 408', async () => {
    const started = performance.now();
    const got = await raw('GET /livez HTTP/1.1\r\nHost: loc');
    expect([statusOf(got), errorOf(got)]).toMatchObject([408, { code: 'request_timeout', type: 'timeout_error' }]);
    expect(performance.now() - started).toBeGreaterThan(280);
  });

  it('http - a body that does not arrive in time is answered 408', async () => {
    const got = await raw(`${postHead('x'.repeat(100))}{"model":`);
    expect([statusOf(got), errorOf(got)]).toMatchObject([408, { code: 'request_timeout' }]);
    expect(engine.requests).toEqual([]);
  });

  it('stream - a client that stops reading is bounded, cut off and cancelled, and nobody else notices', async () => {
    engine.script = (request) => (request.promptTokens[0] === 115 ? endless(request) : answer(request));
    const body = JSON.stringify({ model: 'tiny', prompt: 'slow', stream: true });
    const socket = await open(postHead(body) + body);
    socket.pause();
    await expect.poll(() => engine.requests.length).toBe(1);
    const id = engine.requests[0]?.id ?? '';
    let last = -1;
    await expect
      .poll(() => {
        const before = last;
        last = taken.get(id) ?? 0;
        return last > 0 && last === before;
      })
      .toBe(true);
    // What the kernel's socket buffers take is not ours; beyond it no more than a stream's buffer is made.
    expect(last * 16_384).toBeLessThan(12 * 1024 * 1024);
    const other = await post(url, '/v1/completions', completion, key);
    expect(((await other.json()) as { choices: { text: string }[] }).choices[0]?.text).toBe('Hi!');
    await expect.poll(() => engine.cancelled, { timeout: 3_000 }).toContain(id);
    await expect.poll(() => lines.filter((line) => line.msg === 'request').map((line) => line['error'])).toContain('slow_reader');
  });

  it('completions - an answer that nobody takes is let go of', async () => {
    const body = JSON.stringify({ model: 'tiny', prompt: 'abc' });
    engine.script = async function* () {
      yield { type: 'token', choice: 0, token: 72, text: 'H'.repeat(32 * 1024 * 1024), logprob: null };
      yield { type: 'finished', choice: 0, reason: 'stop', text: '', outputTokens: 1 };
    };
    const socket = await open(postHead(body) + body);
    socket.pause();
    await expect
      .poll(() => lines.filter((line) => line.msg === 'request').map((line) => line['status']), { timeout: 4_000 })
      .toEqual([499]);
  });
});

describe('clients that leave', () => {
  it('completions - a client that leaves before the answer cancels its request, pipelined ones too', async () => {
    engine.script = endless;
    const body = JSON.stringify(completion);
    const socket = await open((postHead(body) + body).repeat(3));
    await expect.poll(() => engine.requests.length).toBe(3);
    socket.destroy();
    await expect.poll(() => new Set(engine.cancelled).size).toBe(3);
    await expect.poll(() => observed).toEqual(Array.from({ length: 3 }, () => ['/v1/completions', 499]));
  });

  it('completions - one prompt of several that fails cancels the others and is one error', async () => {
    engine.script = async function* (request) {
      if (request.promptTokens[0] === 97) yield { type: 'error', code: 'worker_lost', message: 'gone', retryAfterSeconds: 1 };
      else yield* endless(request);
    };
    const response = await post(url, '/v1/completions', { model: 'tiny', prompt: ['b', 'a', 'c'] }, key);
    expect([response.status, ((await response.json()) as { error: { code: string } }).error.code]).toEqual([500, 'worker_lost']);
    expect(new Set(engine.cancelled).size).toBe(3);
  });
});

describe('the log', () => {
  it('log - says one line a request with ids, counts and times, and never a text', async () => {
    const response = await post(url, '/v1/chat/completions', { ...chat, stream: true, user: 'somebody' }, key);
    await response.text();
    await expect.poll(() => lines.length).toBe(1);
    const [line] = lines;
    expect(line).toMatchObject({
      msg: 'request',
      requestId: response.headers.get('x-request-id'),
      route: '/v1/chat/completions',
      status: 200,
      promptTokens: 11,
      cachedTokens: 2,
      outputTokens: 3,
    });
    expect(line?.['firstTokenMs']).toBeTypeOf('number');
    expect(Object.keys(line ?? {}).sort()).toEqual(
      [
        'msg',
        'requestId',
        'tenant',
        'route',
        'status',
        'milliseconds',
        'promptTokens',
        'cachedTokens',
        'outputTokens',
        'firstTokenMs',
      ].sort(),
    );
    expect(JSON.stringify(lines)).not.toMatch(/Hello|Hi!|somebody|key-one/);
  });

  it('log - says the code of an error', async () => {
    await post(url, '/v1/chat/completions', { ...chat, n: 99 }, key);
    await expect.poll(() => lines).toMatchObject([{ msg: 'request', status: 400, error: 'invalid_value' }]);
  });
});
