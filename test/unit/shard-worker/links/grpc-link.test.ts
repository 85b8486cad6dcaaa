import { once } from 'node:events';
import { connect as connectTcp, createServer, type Server, type Socket } from 'node:net';
import { Client, credentials, status, type ChannelOptions, type ServiceError } from '@grpc/grpc-js';
import { afterEach, describe, expect, it } from 'vitest';
import type { Frame, FrameHeader } from '../../../../protocol/frame-codec.ts';
import { encodeFrame } from '../../../../protocol/frame-codec.ts';
import { callMetadata, channelOptions, linkStream } from '../../../../protocol/grpc/index.ts';
import { newMeshId, newPlacementId, newWorkerId, type WorkerId } from '../../../../protocol/ids.ts';
import { grpcLimits } from '../../../../protocol/limits.ts';
import { GrpcLink } from '../../../../shard-worker/links/grpc-link.ts';

const mesh = newMeshId();
const placement = newPlacementId();
const secret = 'test-secret';
const cleanups: (() => Promise<void> | void)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

const header = (step: number, fields: Partial<FrameHeader> = {}): FrameHeader => ({
  ...{
    mesh,
    placement,
    epoch: 1,
    step,
    operation: 5,
    subtree: 0,
    kind: 'hidden',
    source: { stage: 0, rank: 0 },
    dtype: 'f32',
    rows: 1,
  },
  ...fields,
});

class End {
  readonly worker: WorkerId;
  readonly frames: { source: WorkerId; frame: Frame; payload: Buffer }[] = [];
  link!: GrpcLink;
  #arrived: (() => void)[] = [];

  constructor(worker: WorkerId) {
    this.worker = worker;
  }
  get peer() {
    return { worker: this.worker, grpcAddress: this.link.address };
  }
  onFrame(source: WorkerId, frame: Frame): void {
    this.frames.push({ source, frame, payload: Buffer.from(frame.payload) });
    for (const wake of this.#arrived.splice(0)) wake();
  }
  async received(count: number, timeoutMs = 5_000): Promise<void> {
    const end = performance.now() + timeoutMs;
    while (this.frames.length < count) {
      if (performance.now() > end) throw new Error(`${this.frames.length} of ${count} frames arrived`);
      await Promise.race([new Promise<void>((resolve) => this.#arrived.push(resolve)), sleep(20)]);
    }
  }
}

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
async function until(what: string, condition: () => boolean, timeoutMs = 5_000): Promise<void> {
  const end = performance.now() + timeoutMs;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`${what} did not come about within ${timeoutMs} ms`);
    await sleep(10);
  }
}

async function makeEnd(
  options: { worker?: WorkerId; secret?: string; port?: number; queueBytesMax?: number } = {},
): Promise<End> {
  const end = new End(options.worker ?? newWorkerId());
  end.link = await GrpcLink.listen({
    mesh,
    secret,
    ...options,
    worker: end.worker,
    onFrame: (source, frame) => end.onFrame(source, frame),
  });
  cleanups.push(() => end.link.close());
  return end;
}

/** Two ends that name each other; `a` dials. */
async function makePair(options: { queueBytesMax?: number } = {}): Promise<{ a: End; b: End }> {
  const ends = [await makeEnd(options), await makeEnd(options)].sort((x, y) => (x.worker < y.worker ? -1 : 1));
  const [a, b] = ends as [End, End];
  a.link.setPeers([b.peer]);
  b.link.setPeers([a.peer]);
  await Promise.all([a.link.ready(5_000), b.link.ready(5_000)]);
  return { a, b };
}

/** A TCP relay that can be cut, so that streams break without either end being told. */
async function makeRelay(target: string): Promise<{ address: string; cut: () => void }> {
  const sockets = new Set<Socket>();
  const [host, port] = target.split(':') as [string, string];
  const server: Server = createServer((near) => {
    const far = connectTcp(Number(port), host);
    for (const socket of [near, far]) {
      sockets.add(socket);
      socket.on('error', () => undefined).on('close', () => sockets.delete(socket));
    }
    near.pipe(far).pipe(near);
    near.on('close', () => far.destroy());
    far.on('close', () => near.destroy());
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const cut = (): void => sockets.forEach((socket) => socket.destroy());
  cleanups.push(() => {
    cut();
    server.close();
  });
  const bound = server.address();
  if (bound === null || typeof bound === 'string') throw new Error('no port');
  return { address: `127.0.0.1:${bound.port}`, cut };
}

/** A stream opened by hand, for what the link itself would not send. */
function openStream(
  address: string,
  options: { secret?: string; caller?: string; purpose?: string; channelOptions?: ChannelOptions },
) {
  const client = new Client(address, credentials.createInsecure(), { ...channelOptions, ...options.channelOptions });
  const metadata = callMetadata(options.secret ?? secret, options.caller ?? newWorkerId());
  metadata.set('shardmesh-purpose', options.purpose ?? 'link');
  const stream = client.makeBidiStreamRequest(
    linkStream.path,
    linkStream.requestSerialize,
    linkStream.responseDeserialize,
    metadata,
  );
  const failed = new Promise<ServiceError>((resolve) => stream.on('error', resolve));
  stream.on('data', () => undefined);
  cleanups.push(() => {
    stream.cancel();
    client.close();
  });
  return { stream, failed };
}

describe('grpc link', () => {
  it('grpc link - carries frames both ways over one stream, whole and in order', async () => {
    const { a, b } = await makePair();
    const large = Buffer.alloc(1_500_000, 7);
    expect(a.link.send(b.worker, header(1), Buffer.from([1, 2, 3, 4]))).toBe(true);
    expect(a.link.send(b.worker, header(2), large)).toBe(true);
    expect(a.link.send(b.worker, header(3), Buffer.alloc(0))).toBe(true);
    expect(b.link.send(a.worker, header(1, { kind: 'tokens', dtype: 'bytes' }), Buffer.from([9]))).toBe(true);
    await Promise.all([b.received(3), a.received(1)]);
    expect(b.frames.map(({ frame }) => [frame.step, frame.kind])).toEqual([
      [1, 'hidden'],
      [2, 'hidden'],
      [3, 'hidden'],
    ]);
    expect(b.frames.map(({ source }) => source)).toEqual([a.worker, a.worker, a.worker]);
    expect(b.frames[0]?.payload).toEqual(Buffer.from([1, 2, 3, 4]));
    expect(b.frames[1]?.payload.equals(large)).toBe(true);
    expect(a.frames[0]?.frame.kind).toBe('tokens');
    expect(a.link.counters).toMatchObject({ framesOut: 3, framesIn: 1, unsentFrames: 0, corruptFrames: 0, refusedStreams: 0 });
  });

  it('grpc link - refuses a stream with the wrong secret', async () => {
    const b = await makeEnd();
    const { failed } = openStream(b.link.address, { secret: 'wrong' });
    expect((await failed).code).toBe(status.UNAUTHENTICATED);
    expect((await openStream(b.link.address, { secret: '' }).failed).code).toBe(status.UNAUTHENTICATED);
    expect(b.link.counters.refusedStreams).toBe(2);
  });

  it('grpc link - refuses a stream of a worker that is no peer, or no worker', async () => {
    const b = await makeEnd();
    expect((await openStream(b.link.address, {}).failed).code).toBe(status.PERMISSION_DENIED);
    expect((await openStream(b.link.address, { caller: 'somebody' }).failed).code).toBe(status.INVALID_ARGUMENT);
    expect((await openStream(b.link.address, { caller: b.worker }).failed).code).toBe(status.INVALID_ARGUMENT);
    expect(b.link.counters.refusedStreams).toBe(3);
  });

  it('grpc link - counts corrupt frames and frames of another mesh, and goes on', async () => {
    const low = `${'2'.repeat(25)}a` as WorkerId;
    const b = await makeEnd();
    b.link.setPeers([{ worker: low, grpcAddress: '127.0.0.1:1' }]);
    const { stream } = openStream(b.link.address, { caller: low });
    const good = encodeFrame(header(1), Buffer.alloc(8));
    const flipped = Buffer.from(good);
    flipped[84] = 1;
    stream.write(Buffer.from('nonsense'));
    stream.write(flipped);
    stream.write(good.subarray(0, good.length - 1));
    stream.write(encodeFrame(header(1, { mesh: newMeshId() }), Buffer.alloc(8)));
    stream.write(good);
    await b.received(1);
    expect(b.link.counters).toMatchObject({ corruptFrames: 3, staleFrames: 1, framesIn: 5 });
    expect(b.frames).toHaveLength(1);
  });

  it('grpc link - a message over the limit ends its stream and nothing else', async () => {
    const low = `${'2'.repeat(25)}a` as WorkerId;
    const b = await makeEnd();
    b.link.setPeers([{ worker: low, grpcAddress: '127.0.0.1:1' }]);
    const unlimited = { 'grpc.max_send_message_length': -1 };
    const { stream: large, failed } = openStream(b.link.address, { caller: low, channelOptions: unlimited });
    large.write(Buffer.alloc(grpcLimits.messageBytesMax + 1));
    expect((await failed).code).toBe(status.RESOURCE_EXHAUSTED);
    const { stream } = openStream(b.link.address, { caller: low });
    stream.write(encodeFrame(header(1), Buffer.alloc(8)));
    await b.received(1);
    expect(b.link.counters.framesIn).toBe(1);
  });

  it('grpc link - bytes that are no HTTP/2 do not disturb it', async () => {
    const { a, b } = await makePair();
    const raw = connectTcp(Number(b.link.address.split(':')[1]), '127.0.0.1');
    raw.on('error', () => undefined);
    cleanups.push(() => void raw.destroy());
    raw.write(Buffer.alloc(4096, 0x41));
    a.link.send(b.worker, header(1), Buffer.alloc(4));
    await b.received(1);
    expect(b.link.counters.corruptFrames).toBe(0);
  });

  it('grpc link - dials again when the stream breaks, and counts what was lost', async () => {
    const ends = [await makeEnd(), await makeEnd()].sort((x, y) => (x.worker < y.worker ? -1 : 1));
    const [a, b] = ends as [End, End];
    const relay = await makeRelay(b.link.address);
    a.link.setPeers([{ worker: b.worker, grpcAddress: relay.address }]);
    b.link.setPeers([a.peer]);
    await Promise.all([a.link.ready(5_000), b.link.ready(5_000)]);
    for (let round = 1; round <= 3; round++) {
      relay.cut();
      await until('a reconnect', () => a.link.counters.reconnects === round && b.link.counters.reconnects === round);
      a.link.send(b.worker, header(round), Buffer.alloc(4));
      b.link.send(a.worker, header(round), Buffer.alloc(4));
      await Promise.all([b.received(round), a.received(round)]);
    }
    expect(b.frames.map(({ frame }) => frame.step)).toEqual([1, 2, 3]);
  });

  it('grpc link - a peer that comes back at another address is found there', async () => {
    const { a, b } = await makePair();
    await b.link.close();
    const again = await makeEnd({ worker: b.worker });
    again.link.setPeers([a.peer]);
    a.link.setPeers([again.peer]);
    await Promise.all([a.link.ready(5_000), again.link.ready(5_000)]);
    a.link.send(b.worker, header(1), Buffer.alloc(4));
    await again.received(1);
    expect(b.frames).toHaveLength(0);
  });

  it('grpc link - keeps frames for a peer that has not answered yet, up to a limit', async () => {
    const [low, high] = [`${'2'.repeat(25)}a` as WorkerId, `${'b'.repeat(25)}a` as WorkerId];
    const b = await makeEnd({ worker: high });
    const a = await makeEnd({ worker: low, queueBytesMax: 300 });
    a.link.setPeers([b.peer]);
    // b does not know a yet, so the stream is refused, again and again.
    const taken = [1, 2, 3, 4].map((step) => a.link.send(high, header(step), Buffer.alloc(20)));
    expect(taken).toEqual([true, true, true, false]);
    await expect(a.link.ready(150)).rejects.toThrow(`with ${high} at ${b.link.address}`);
    expect(a.link.counters.unsentFrames).toBe(1);
    b.link.setPeers([a.peer]);
    await b.received(3);
    expect(b.frames.map(({ frame }) => frame.step)).toEqual([1, 2, 3]);
  });

  it('grpc link - sends nothing to a worker that is no peer any more', async () => {
    const { a, b } = await makePair();
    a.link.setPeers([]);
    expect(a.link.send(b.worker, header(1), Buffer.alloc(4))).toBe(false);
    await until('the end of the stream', () => b.link.peersConnected === 0);
    await expect(b.link.ready(20)).rejects.toThrow(/the stream broke/);
    expect(a.link.counters.unsentFrames).toBe(1);
  });

  it('grpc link - another process at the address is not taken for the peer', async () => {
    const [low, high] = [`${'2'.repeat(25)}a` as WorkerId, `${'b'.repeat(25)}a` as WorkerId];
    const a = await makeEnd({ worker: low });
    const stranger = await makeEnd({ worker: `${'c'.repeat(25)}a` as WorkerId });
    stranger.link.setPeers([a.peer]);
    a.link.setPeers([{ worker: high, grpcAddress: stranger.link.address }]);
    await expect(a.link.ready(300)).rejects.toThrow(/another process answers there, worker c{25}a/);
  });

  it('grpc link - measures round trips to a worker that is no peer', async () => {
    const [a, b] = [await makeEnd(), await makeEnd()];
    const times = await a.link.probe(b.peer, 16_384, 20, 5_000);
    expect(times).toHaveLength(20);
    expect(times.every((time) => time > 1 && time < 5_000_000)).toBe(true);
    expect(b.frames).toHaveLength(0);
  });

  it('grpc link - a probe of nobody fails by its deadline and says whom it asked', async () => {
    const [a, b] = [await makeEnd(), await makeEnd()];
    await b.link.close();
    const begin = performance.now();
    await expect(a.link.probe(b.peer, 16, 5, 2_000)).rejects.toMatchObject({ code: 'worker_lost' });
    expect(performance.now() - begin).toBeLessThan(2_500);
    const wrong = await makeEnd({ secret: 'other' });
    await expect(a.link.probe(wrong.peer, 16, 5, 2_000)).rejects.toThrow(/does not know the secret of the mesh/);
  });

  it('grpc link - frames of steps do not pass on a stream for probes', async () => {
    const b = await makeEnd();
    const { stream } = openStream(b.link.address, { purpose: 'probe' });
    stream.write(encodeFrame(header(1), Buffer.alloc(8)));
    await until('a stale frame', () => b.link.counters.staleFrames === 1);
    expect(b.frames).toHaveLength(0);
  });

  it.each(['dials', 'answers'])(
    'grpc link - holds back a sender that %s once its window and its queue are full, and loses nothing it took',
    async (side) => {
      const { a, b } = await makePair({ queueBytesMax: 8 * 1024 * 1024 });
      const [from, to] = side === 'dials' ? [a, b] : [b, a];
      const payload = Buffer.alloc(65_536);
      let taken = 0;
      for (let step = 1; step <= 300; step++) taken += from.link.send(to.worker, header(step), payload) ? 1 : 0;
      // 63 frames fill the 4 MiB that the transport may hold, 127 the 8 MiB of the queue; nothing is written before the loop ends.
      expect(taken).toBe(190);
      await to.received(190);
      expect(to.frames.map(({ frame }) => frame.step)).toEqual(Array.from({ length: 190 }, (_, index) => index + 1));
      expect(from.link.counters).toMatchObject({ framesOut: 190, unsentFrames: 110 });
    },
  );
});
