import { createServer, type Server } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { afterEach, describe, expect, test } from 'vitest';
import { CompletionClient } from '../../../../deploy/bench/completion-client.ts';

let server: Server;
let client: CompletionClient;
afterEach(() => {
  client.close();
  server.close();
});

/** A server that answers each request on a socket as `answers(n)` says: n counts the socket's requests from 1. */
async function start(answers: (request: number, socket: Socket) => boolean): Promise<void> {
  const requests = new Map<Socket, number>();
  server = createServer((request, response) => {
    const count = (requests.get(request.socket) ?? 0) + 1;
    requests.set(request.socket, count);
    if (!answers(count, request.socket)) return;
    response.writeHead(200, { 'content-type': 'text/event-stream' });
    response.end('data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n');
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  client = new CompletionClient({ url, model: 'm', apiKey: null, timeoutMs: 5_000, extraBody: {} });
}

describe('completion client', () => {
  test('completion client - asks again on a new connection when the server ended an idle one', async () => {
    const sockets = new Set<Socket>();
    await start((request, socket) => {
      sockets.add(socket);
      if (request === 2) socket.resetAndDestroy();
      return request === 1;
    });
    for (let i = 0; i < 2; i++) expect(await client.stream('p', 1)).toMatchObject({ text: 'a', error: null });
    expect(sockets.size).toBe(2);
  });

  test('completion client - a new connection that is reset is an error', async () => {
    await start((_, socket) => {
      socket.resetAndDestroy();
      return false;
    });
    expect(await client.stream('p', 1)).toMatchObject({ text: '', error: 'ECONNRESET' });
  });
});
