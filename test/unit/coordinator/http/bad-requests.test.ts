import { createConnection } from 'node:net';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createHttpServer, type HttpServer } from '../../../../coordinator/http/server.ts';
import { byteText, FakeEngine, post, startServer } from './fake-engine.ts';

let server: HttpServer;
let engine: FakeEngine;
let url: string;
beforeAll(async () => {
  ({ server, engine, url } = await startServer({ apiKeys: ['key-one', 'key-two'] }));
});
afterAll(() => server.close());

const key = { authorization: 'Bearer key-two' };
const chat = { model: 'tiny', messages: [{ role: 'user', content: 'Hello' }] };
const completion = { model: 'tiny', prompt: 'abc' };
const nested = (depth: number): string =>
  `{"model":"tiny","messages":[{"role":"user","content":"a"}],"metadata":${'['.repeat(depth)}${']'.repeat(depth)}}`;

interface Answer {
  error: { message: string; type: string; param: string | null; code: string };
}

/** name, route, body, expected status, expected code, expected param (null: any) */
const rows: [string, string, unknown, number, string, string | null][] = [
  ['n of a billion', '/v1/chat/completions', { ...chat, n: 1e9 }, 400, 'invalid_value', 'n'],
  ['best_of', '/v1/completions', { ...completion, best_of: 5 }, 400, 'invalid_value', 'best_of'],
  [
    'a million prompts',
    '/v1/completions',
    { ...completion, prompt: Array.from({ length: 1e6 }, () => 'a') },
    400,
    'invalid_type',
    'prompt',
  ],
  [
    '17 prompts',
    '/v1/completions',
    { ...completion, prompt: Array.from({ length: 17 }, () => 'a') },
    400,
    'invalid_type',
    'prompt',
  ],
  [
    'min_tokens over max_tokens',
    '/v1/completions',
    { ...completion, min_tokens: 9, max_tokens: 3 },
    400,
    'invalid_value',
    'min_tokens',
  ],
  [
    '21 top_logprobs',
    '/v1/chat/completions',
    { ...chat, logprobs: true, top_logprobs: 21 },
    400,
    'invalid_value',
    'top_logprobs',
  ],
  ['top_logprobs without logprobs', '/v1/chat/completions', { ...chat, top_logprobs: 2 }, 400, 'invalid_value', 'top_logprobs'],
  ['21 logprobs', '/v1/completions', { ...completion, logprobs: 21 }, 400, 'invalid_value', 'logprobs'],
  ['a negative token id in logit_bias', '/v1/chat/completions', { ...chat, logit_bias: { '-1': 1 } }, 400, 'invalid_value', null],
  [
    'a token id beyond the vocabulary in logit_bias',
    '/v1/chat/completions',
    { ...chat, logit_bias: { 257: 1 } },
    400,
    'invalid_value',
    'logit_bias',
  ],
  ['a negative token id in the prompt', '/v1/completions', { ...completion, prompt: [-1] }, 400, 'invalid_value', 'prompt[0]'],
  [
    'a token id beyond the vocabulary in the prompt',
    '/v1/completions',
    { ...completion, prompt: [257] },
    400,
    'invalid_value',
    'prompt',
  ],
  [
    'a token id beyond the vocabulary in stop_token_ids',
    '/v1/completions',
    { ...completion, stop_token_ids: [999] },
    400,
    'invalid_value',
    'stop_token_ids',
  ],
  ['a token id beyond the vocabulary to detokenize', '/detokenize', { tokens: [300] }, 400, 'invalid_value', 'tokens'],
  [
    'a chat template of the client',
    '/v1/chat/completions',
    { ...chat, chat_template: '{{ 1 }}' },
    400,
    'invalid_value',
    'chat_template',
  ],
  [
    'chat_template_kwargs',
    '/v1/chat/completions',
    { ...chat, chat_template_kwargs: { x: 1 } },
    400,
    'invalid_value',
    'chat_template_kwargs',
  ],
  ['prompt_embeds', '/v1/completions', { ...completion, prompt_embeds: 'AA==' }, 400, 'invalid_value', 'prompt_embeds'],
  [
    'a response_format that is not text',
    '/v1/chat/completions',
    { ...chat, response_format: { type: 'json_object' } },
    400,
    'invalid_value',
    'response_format',
  ],
  ['tools', '/v1/chat/completions', { ...chat, tools: [{ type: 'function' }] }, 400, 'invalid_value', 'tools'],
  [
    'an image url',
    '/v1/chat/completions',
    { ...chat, messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'http://x' } }] }] },
    400,
    'invalid_type',
    'messages[0].content',
  ],
  ['no messages', '/v1/chat/completions', { ...chat, messages: [] }, 400, 'invalid_value', 'messages'],
  [
    'a message without content',
    '/v1/chat/completions',
    { ...chat, messages: [{ role: 'user' }] },
    400,
    'missing_field',
    'messages[0].content',
  ],
  [
    'an unknown role',
    '/v1/chat/completions',
    { ...chat, messages: [{ role: 'root', content: '' }] },
    400,
    'invalid_value',
    'messages[0].role',
  ],
  ['an empty prompt', '/v1/completions', { ...completion, prompt: '' }, 400, 'invalid_value', 'prompt'],
  [
    'a prompt longer than the context',
    '/v1/completions',
    { ...completion, prompt: 'a'.repeat(65) },
    400,
    'context_length_exceeded',
    null,
  ],
  [
    'prompt and max_tokens over the context',
    '/v1/completions',
    { ...completion, max_tokens: 62 },
    400,
    'context_length_exceeded',
    null,
  ],
  ['an unknown model', '/v1/chat/completions', { ...chat, model: 'other' }, 404, 'model_not_found', 'model'],
  ['a path as model name', '/v1/chat/completions', { ...chat, model: '../../etc/passwd' }, 404, 'model_not_found', 'model'],
  ['an unknown field', '/v1/chat/completions', { ...chat, temprature: 1 }, 400, 'unknown_field', 'temprature'],
  ['a wrong type', '/v1/chat/completions', { ...chat, temperature: 'hot' }, 400, 'invalid_type', 'temperature'],
  ['a missing model', '/v1/chat/completions', { messages: chat.messages }, 400, 'missing_field', 'model'],
  ['a negative temperature', '/v1/chat/completions', { ...chat, temperature: -1 }, 400, 'invalid_value', 'temperature'],
  [
    '17 stop strings',
    '/v1/chat/completions',
    { ...chat, stop: Array.from({ length: 17 }, () => 'x') },
    400,
    'invalid_value',
    'stop',
  ],
  [
    'NaN',
    '/v1/chat/completions',
    '{"model":"tiny","messages":[{"role":"user","content":"a"}],"temperature":NaN}',
    400,
    'invalid_json',
    null,
  ],
  [
    'a number beyond 2^53',
    '/v1/chat/completions',
    '{"model":"tiny","messages":[{"role":"user","content":"a"}],"seed":9007199254740993}',
    400,
    'invalid_json',
    null,
  ],
  ['nesting deeper than 64', '/v1/chat/completions', nested(64), 400, 'invalid_json', null],
  ['nesting a million deep', '/v1/chat/completions', nested(1e6), 400, 'invalid_json', null],
  ['a duplicate key', '/v1/chat/completions', '{"model":"tiny","model":"tiny"}', 400, 'invalid_json', null],
  ['a __proto__ key', '/v1/chat/completions', '{"model":"tiny","__proto__":{}}', 400, 'invalid_json', null],
  ['an escaped __proto__ key', '/v1/chat/completions', '{"model":"tiny","\\u005f_proto__":{}}', 400, 'invalid_json', null],
  ['half a body', '/v1/chat/completions', '{"model":"tiny"', 400, 'invalid_json', null],
  ['an empty body', '/v1/chat/completions', '', 400, 'invalid_json', null],
  ['bad UTF-8', '/v1/chat/completions', Uint8Array.of(0x7b, 0x22, 0xff, 0x22, 0x7d), 400, 'invalid_json', null],
  ['a list as body', '/v1/chat/completions', '[]', 400, 'invalid_type', null],
  [
    'a body over 4 MiB',
    '/v1/completions',
    { ...completion, prompt: 'a'.repeat(4 * 1024 * 1024) },
    413,
    'payload_too_large',
    null,
  ],
];

describe('bad requests', () => {
  it.each(rows)('http - refuses %s', async (_, path, body, status, code, param) => {
    const before = engine.requests.length;
    const response = await post(url, path, body, key);
    const { error } = (await response.json()) as Answer;
    expect([response.status, error.code]).toEqual([status, code]);
    if (param !== null) expect(error.param).toBe(param);
    expect(error.message).not.toMatch(/\n\s+at |\.ts|node_modules/);
    expect(engine.requests.length).toBe(before);
  });

  it.each([
    ['prompt[1]', '/v1/completions', `{"model":"tiny","prompt":[1,${'"",'.repeat(1e6)}1]}`],
    ['prompt', '/v1/completions', `{"model":"tiny","prompt":[[1],${'1,'.repeat(2e6)}1]}`],
    ['messages', '/v1/chat/completions', `{"model":"tiny","messages":[${'1,'.repeat(2e6)}1]}`],
    [
      'messages[].content',
      '/v1/chat/completions',
      `{"model":"tiny","messages":[{"role":"user","content":[${'1,'.repeat(2e6)}1]}]}`,
    ],
    ['stop', '/v1/chat/completions', `{"model":"tiny","messages":[],"stop":[${'1,'.repeat(2e6)}1]}`],
    ['stop_token_ids', '/v1/completions', `{"model":"tiny","prompt":"a","stop_token_ids":[${'"",'.repeat(1e6)}1]}`],
    [
      'logit_bias',
      '/v1/completions',
      `{"model":"tiny","prompt":"a","logit_bias":{${Array.from({ length: 3e5 }, (_, index) => `"${index}":""`).join(',')}}}`,
    ],
    ['tokens[0]', '/detokenize', `{"tokens":[${'"",'.repeat(1e6)}1]}`],
  ])('http - a million wrong entries are as quickly refused as one (%s of %s)', async (param, path, body) => {
    const started = performance.now();
    const response = await post(url, path, body, key);
    expect([response.status, ((await response.json()) as Answer).error.param]).toEqual([400, param]);
    // A check of every entry took 10 s. The bound leaves room for a busy machine.
    expect(performance.now() - started).toBeLessThan(3_000);
  });

  it('http - a request without a body, a prompt or a content type is told what is missing', async () => {
    const none = await fetch(`${url}/v1/completions`, { method: 'POST', headers: key });
    expect([none.status, ((await none.json()) as Answer).error.type]).toEqual([400, 'invalid_request_error']);
    for (const [path, body, param] of [
      ['/v1/completions', { model: 'tiny' }, 'prompt'],
      ['/v1/chat/completions', { model: 'tiny' }, 'messages'],
      ['/detokenize', {}, 'tokens'],
    ] as const) {
      const { error } = (await (await post(url, path, body, key)).json()) as Answer;
      expect([error.code, error.param]).toEqual(['missing_field', param]);
    }
    for (const value of ['', '0', '-1', '1.5', '1e3', 'soon', '0x10']) {
      const response = await post(url, '/v1/completions', completion, { ...key, 'x-request-timeout-ms': value });
      expect([value, response.status, ((await response.json()) as Answer).error.param]).toEqual([
        value,
        400,
        'x-request-timeout-ms',
      ]);
    }
  });

  it('http - accepts nesting of exactly 64 levels and a number of exactly 2^53 - 1', async () => {
    expect((await post(url, '/v1/chat/completions', nested(63), key)).status).toBe(200);
    expect((await post(url, '/v1/chat/completions', { ...chat, seed: 2 ** 53 - 1 }, key)).status).toBe(200);
  });

  it('http - refuses compressed bodies and other content types', async () => {
    const packed = gzipSync(JSON.stringify(chat));
    expect((await post(url, '/v1/chat/completions', packed, { ...key, 'content-encoding': 'gzip' })).status).toBe(415);
    expect(
      (await post(url, '/v1/chat/completions', 'a=b', { ...key, 'content-type': 'application/x-www-form-urlencoded' })).status,
    ).toBe(415);
  });

  it('http - asks for a key on every route but /livez, /readyz and /health', async () => {
    const open = ['/livez', '/readyz', '/health'];
    for (const path of [
      ...open,
      '/v1/models',
      '/metrics',
      '/tokenize',
      '/unknown',
      '//v1/models',
      '/v1%2fmodels',
      '/livez/',
      '/livez/../v1/models',
    ])
      expect([path, (await fetch(`${url}${path}`)).status]).toEqual([path, open.includes(path) ? 200 : 401]);
    for (const wrong of ['Bearer key-on', 'Bearer key-onee', 'Basic key-one', 'key-one', 'Bearer ', 'Bearer key-one key-two'])
      expect([wrong, (await fetch(`${url}/v1/models`, { headers: { authorization: wrong } })).status]).toEqual([
        wrong,
        wrong === 'Bearer key-one key-two' ? 200 : 401,
      ]);
    expect((await fetch(`${url}/v1/models`, { headers: key })).status).toBe(200);
  });

  it('http - refuses a foreign Host and an Origin', async () => {
    const raw = await rawRequest(
      'GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nAuthorization: Bearer key-one\r\nConnection: close\r\n\r\n',
    );
    expect(raw).toMatch(/^HTTP\/1\.1 403 /);
    expect((await fetch(`${url}/v1/models`, { headers: { ...key, origin: 'http://evil.example' } })).status).toBe(403);
  });

  it('http - refuses headers over 16 KiB', async () => {
    const raw = await rawRequest(`GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: ${'a'.repeat(17 * 1024)}\r\n\r\n`);
    expect(raw).toMatch(/^HTTP\/1\.1 431 /);
  });

  it('http - refuses to listen beyond loopback without keys', async () => {
    const options = {
      engine: new FakeEngine(),
      text: byteText,
      model: { id: 'tiny', created: 0, contextTokensMax: 64, vocabularySize: 257 },
      host: '0.0.0.0',
      port: 0,
      apiKeys: [],
    };
    await expect(createHttpServer(options as never)).rejects.toMatchObject({ code: 'config_invalid' });
  });

  function rawRequest(text: string): Promise<string> {
    return new Promise((resolve, reject) => {
      const socket = createConnection({ host: '127.0.0.1', port: Number(new URL(url).port) }, () => socket.write(text));
      let answer = '';
      socket.on('data', (chunk) => (answer += chunk.toString()));
      socket.on('end', () => resolve(answer));
      socket.on('error', reject);
    });
  }
});
