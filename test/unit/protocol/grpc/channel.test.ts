import {
  Metadata,
  status,
  type sendUnaryData,
  type Server,
  type ServerDuplexStream,
  type ServerWritableStream,
} from '@grpc/grpc-js';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import {
  authenticate,
  bindGrpc,
  callMetadata,
  createGrpcClient,
  createGrpcServer,
  linkService,
  openLinkStream,
  openWeightsFetch,
  weightsService,
} from '../../../../protocol/grpc/index.ts';
import { newMeshId } from '../../../../protocol/ids.ts';
import { connectNats } from '../../../../protocol/nats-transport.ts';

const secret = 's'.repeat(43);
let server: Server;
let address: string;

beforeEach(async () => {
  server = createGrpcServer();
  server.addService(linkService, {
    Stream: (call: ServerDuplexStream<Buffer, Buffer>) => {
      const caller = authenticate(call.metadata, secret);
      if (!caller) {
        call.emit('error', { code: status.UNAUTHENTICATED, details: 'no' });
        return;
      }
      call.on('data', (frame: Buffer) => call.write(Buffer.concat([Buffer.from(`${caller.caller}:`), frame])));
      call.on('end', () => call.end());
    },
  });
  server.addService(weightsService, {
    Fetch: (call: ServerWritableStream<Buffer, Buffer>) => {
      for (let i = 0; i < 3; i++) call.write(Buffer.concat([call.request, Buffer.of(i)]));
      call.end();
    },
  } satisfies Record<string, (call: ServerWritableStream<Buffer, Buffer>, done: sendUnaryData<Buffer>) => void>);
  address = await bindGrpc(server);
});
afterEach(() => {
  server.forceShutdown();
});

const codeOf = (stream: NodeJS.EventEmitter): Promise<number> =>
  new Promise((resolve) => stream.once('error', (error: { code: number }) => resolve(error.code)));

describe('grpc channel', () => {
  test('grpc channel - carries raw bytes both ways and names the caller', async () => {
    const client = createGrpcClient(address);
    const stream = openLinkStream(client, secret, 'aaaa');
    const received: Buffer[] = [];
    stream.on('data', (frame: Buffer) => received.push(frame));
    const ended = new Promise((resolve) => stream.on('end', resolve));
    stream.write(Buffer.of(0, 255, 1));
    stream.write(Buffer.alloc(0));
    stream.end();
    await ended;
    expect(received).toEqual([Buffer.from('aaaa:\u0000\u00ff\u0001', 'latin1'), Buffer.from('aaaa:')]);
    client.close();
  });

  test('grpc channel - streams the parts of a slice', async () => {
    const client = createGrpcClient(address);
    const parts: Buffer[] = [];
    for await (const part of openWeightsFetch(client, secret, 'aaaa', Buffer.from('r'), 5_000)) parts.push(part as Buffer);
    expect(parts).toEqual([Buffer.from('r\u0000'), Buffer.from('r\u0001'), Buffer.from('r\u0002')]);
    client.close();
  });

  test('grpc channel - refuses a wrong secret', async () => {
    const client = createGrpcClient(address);
    const stream = openLinkStream(client, 'x'.repeat(43), 'aaaa');
    stream.on('data', () => undefined);
    expect(await codeOf(stream)).toBe(status.UNAUTHENTICATED);
    client.close();
  });

  test('grpc channel - refuses a message over the limit', async () => {
    const client = createGrpcClient(address);
    const stream = openLinkStream(client, secret, 'aaaa');
    stream.on('data', () => undefined);
    const code = codeOf(stream);
    stream.write(Buffer.alloc(64 * 1_024 * 1_024 + 4_097));
    expect(await code).toBe(status.RESOURCE_EXHAUSTED);
    client.close();
  });

  test('grpc channel - listens on loopback, and says when a port is taken', async () => {
    expect(address).toMatch(/^127\.0\.0\.1:\d+$/);
    const second = createGrpcServer();
    await expect(bindGrpc(second, { port: Number(address.split(':')[1]) })).rejects.toMatchObject({ code: 'config_invalid' });
    second.forceShutdown();
  });
});

describe('grpc beyond loopback', () => {
  test('grpc channel - refuses plaintext beyond loopback at both ends', async () => {
    const second = createGrpcServer();
    await expect(bindGrpc(second, { host: '192.0.2.1' })).rejects.toThrow(/192\.0\.2\.1 would leave this host in plaintext/);
    second.forceShutdown();
    expect(() => createGrpcClient('192.0.2.1:7424')).toThrow(/plaintext/);
    expect(() => createGrpcClient('node-1.example:7424')).toThrow(/plaintext/);
    await expect(
      connectNats({
        credentials: {
          url: 'nats://192.0.2.1:4222',
          serverName: null,
          seed: '',
          role: 'worker',
          worker: null,
          mesh: newMeshId(),
          tls: null,
        },
        name: 'worker',
      }),
    ).rejects.toThrow(/192\.0\.2\.1:4222 is beyond loopback.*plaintext is refused there/);
  });
});

describe('grpc token', () => {
  const withTokens = (...tokens: string[]): Metadata => {
    const metadata = new Metadata();
    for (const token of tokens) metadata.add('authorization', token);
    metadata.set('shardmesh-worker', 'aaaa');
    return metadata;
  };

  test('grpc token - is accepted once, whole and exact', () => {
    expect(authenticate(callMetadata(secret, 'aaaa'), secret)).toEqual({ caller: 'aaaa' });
    expect(authenticate(withTokens(), secret)).toBeNull();
    expect(authenticate(withTokens(`Bearer ${secret}x`), secret)).toBeNull();
    expect(authenticate(withTokens(secret), secret)).toBeNull();
    expect(authenticate(withTokens(`Bearer ${secret}`, `Bearer ${secret}`), secret)).toBeNull();
  });

  test('grpc token - an empty secret opens nothing', () => {
    expect(authenticate(callMetadata('', 'aaaa'), '')).toBeNull();
  });
});
