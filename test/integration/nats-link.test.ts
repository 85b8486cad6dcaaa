import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { encodeFrame, type Frame, type FrameHeader } from '../../protocol/frame-codec.ts';
import { newMeshId, newPlacementId, type WorkerId } from '../../protocol/ids.ts';
import type { NatsTransport } from '../../protocol/nats-transport.ts';
import { NatsLink } from '../../shard-worker/links/nats-link.ts';
import { WorkerLinks } from '../../shard-worker/links/worker-links.ts';
import type { NativeFrame } from '../../kernels/binding-types.ts';
import { startTestBroker, type TestBroker } from './helpers/nats.ts';

const placement = newPlacementId();

interface End {
  worker: WorkerId;
  transport: NatsTransport;
  link: NatsLink;
  frames: { source: WorkerId; frame: Frame; payload: Buffer }[];
}

let broker: TestBroker;
let ends: End[] = [];
const [a, b, c] = [0, 1, 2].map((index) => () => ends[index] as End) as [() => End, () => End, () => End];

beforeEach(async () => {
  broker = await startTestBroker({ workers: 3 });
  ends = await Promise.all(
    broker.workers.map(async (worker, index) => {
      const transport = await broker.connectWorker(index);
      const frames: End['frames'] = [];
      const link = await NatsLink.subscribe({
        mesh: broker.mesh,
        worker,
        transport,
        onFrame: (source, frame) => frames.push({ source, frame, payload: Buffer.from(frame.payload) }),
      });
      return { worker, transport, link, frames };
    }),
  );
});
afterEach(async () => {
  await Promise.all(ends.map((end) => end.link.close()));
  await broker.stop();
});

const header = (step: number, fields: Partial<FrameHeader> = {}): FrameHeader => ({
  ...{ mesh: broker.mesh, placement, epoch: 1, step, operation: 5, subtree: 0, kind: 'hidden' },
  ...{ source: { stage: 0, rank: 0 }, dtype: 'bytes', rows: 1 },
  ...fields,
});
const peer = (end: End) => ({ worker: end.worker, grpcAddress: '' });
function introduce(): void {
  a().link.setPeers([peer(b())]);
  b().link.setPeers([peer(a())]);
}
async function until(what: string, condition: () => boolean, timeoutMs = 10_000): Promise<void> {
  const end = performance.now() + timeoutMs;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`${what} did not come about within ${timeoutMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

describe('nats link', () => {
  it('nats link - carries small frames whole and large ones in chunks', async () => {
    introduce();
    await Promise.all([a().link.ready(5_000), b().link.ready(5_000)]);
    const large = Buffer.alloc(3_000_000);
    for (let i = 0; i < large.length; i += 4) large.writeUInt32LE(i, i);
    expect(a().link.send(b().worker, header(1), Buffer.from('small'))).toBe(true);
    expect(a().link.send(b().worker, header(2), large)).toBe(true);
    expect(a().link.send(b().worker, header(3), Buffer.alloc(0))).toBe(true);
    await until('three frames', () => b().frames.length === 3);
    expect(b().frames.map(({ frame }) => frame.step)).toEqual([1, 2, 3]);
    expect(b().frames.map(({ source }) => source)).toEqual([a().worker, a().worker, a().worker]);
    expect(b().frames[0]?.payload.toString()).toBe('small');
    expect(b().frames[1]?.payload.equals(large)).toBe(true);
    expect(b().link.counters).toMatchObject({ corruptFrames: 0, staleFrames: 0 });
    expect(a().transport.counters.oversize).toBe(0);
  });

  it('nats link - 40 MB go through without a lost frame or an oversized message', async () => {
    introduce();
    await b().link.ready(5_000);
    for (let step = 1; step <= 40; step++) a().link.send(b().worker, header(step), Buffer.alloc(1_000_000, step));
    await until('40 frames', () => b().frames.length === 40);
    expect(b().frames.map(({ payload }) => [payload.length, payload[0], payload.at(-1)])).toEqual(
      Array.from({ length: 40 }, (_, index) => [1_000_000, index + 1, index + 1]),
    );
    expect(a().link.counters.unsentFrames).toBe(0);
  });

  it('nats link - frames of strangers, of another mesh, and corrupt ones change nothing and are counted', async () => {
    introduce();
    const subject = broker.subjects.activation(b().worker, c().worker);
    const good = encodeFrame(header(1), Buffer.from('good'));
    c().transport.publish(subject, good);
    await until('a stranger', () => b().link.counters.staleFrames === 1);
    const fromPeer = broker.subjects.activation(b().worker, a().worker);
    a().transport.publish(fromPeer, encodeFrame(header(1, { mesh: newMeshId() }), Buffer.from('mesh')));
    const flipped = Buffer.from(good);
    flipped[82] = (flipped[82] ?? 0) ^ 1;
    a().transport.publish(fromPeer, flipped);
    a().transport.publish(fromPeer, good.subarray(0, 50));
    a().transport.publish(fromPeer, good);
    await until('the good frame', () => b().frames.length === 1);
    expect(b().link.counters).toMatchObject({ staleFrames: 2, corruptFrames: 2 });
    expect(b().frames[0]?.payload.toString()).toBe('good');
  });

  it('nats link - the broker does not let a worker speak for another', async () => {
    introduce();
    let denied = '';
    c().transport.onEvent((event) => {
      if (event.type === 'permission_denied') denied = event.subject;
    });
    const forged = broker.subjects.activation(b().worker, a().worker);
    c().transport.publish(forged, encodeFrame(header(1), Buffer.from('forged')));
    await until('the refusal', () => denied === forged);
    expect(b().frames).toHaveLength(0);
  });

  it('nats link - measures round trips, also with payloads above one message', async () => {
    expect(await a().link.probe(peer(b()), 2_304, 10, 5_000)).toHaveLength(10);
    expect(await a().link.probe(peer(b()), 2_000_000, 2, 5_000)).toHaveLength(2);
    await b().link.close();
    await expect(a().link.probe(peer(b()), 16, 1, 200)).rejects.toThrow(`worker ${b().worker} over nats did not answer a probe`);
  });

  it('nats link - says who is missing, and refuses frames while the broker is away', async () => {
    introduce();
    await c().link.close();
    a().link.setPeers([peer(b()), peer(c())]);
    await expect(a().link.ready(300)).rejects.toThrow(c().worker);
    process.kill(broker.broker.pid ?? 0, 'SIGKILL');
    await until('the loss', () => !a().transport.connected);
    expect(a().link.send(b().worker, header(1), Buffer.from('lost'))).toBe(false);
    await until('the reconnects', () => a().transport.connected && b().transport.connected, 20_000);
    // A connection is up before the broker has its subscriptions again: what is sent in between is lost, so asked until answered.
    a().link.setPeers([peer(b())]);
    await a().link.ready(20_000);
    expect(a().link.send(b().worker, header(2), Buffer.from('after'))).toBe(true);
    await until('the frame', () => b().frames.length === 1);
    expect(b().frames[0]?.frame.step).toBe(2);
    expect(a().link.counters.unsentFrames).toBeGreaterThanOrEqual(1);
  });

  it('worker links - serve a group over nats and grpc at once', async () => {
    await Promise.all(ends.map((end) => end.link.close()));
    const secret = broker.broker.secret;
    const links = await Promise.all(
      ends.map(({ worker, transport }) => WorkerLinks.open({ mesh: broker.mesh, worker, secret, transport })),
    );
    try {
      const received = links.map(() => [] as NativeFrame[]);
      const peersSeenBy = (self: number) =>
        links.map((link, rank) => ({
          ...{
            stage: 0,
            rank,
            worker: ends[rank]?.worker ?? '',
            hostId: 'h',
            grpcAddress: link.grpcAddress,
            tcpAddress: '',
            segment: null,
            memory: null,
          },
          driver: self === 2 || rank === 2 ? ('nats' as const) : ('grpc' as const),
        }));
      await Promise.all(
        links.map((link, rank) =>
          link.connect(
            { placement, epoch: 3, linkKey: '00'.repeat(32), wire: 'f32', peers: peersSeenBy(rank) },
            { stage: 0, rank },
            (frame) => received[rank]?.push({ ...frame, payload: Uint8Array.from(frame.payload) }),
            5_000,
          ),
        ),
      );
      for (const [from, link] of links.entries())
        for (const to of links.keys())
          if (to !== from)
            link.send(
              { stage: 0, rank: to },
              {
                ...{ kind: 'reduce', step: 1, operation: 2, subtree: 0, source: { stage: 0, rank: from }, rows: 1 },
                payload: Uint8Array.of(from, to, 0, 0),
              },
            );
      await until('all frames', () => received.every((frames) => frames.length === 2));
      const payloads = received.map((frames) => frames.map(({ payload }) => [...payload].slice(0, 2)).sort());
      expect(payloads).toEqual([
        [
          [1, 0],
          [2, 0],
        ],
        [
          [0, 1],
          [2, 1],
        ],
        [
          [0, 2],
          [1, 2],
        ],
      ]);
    } finally {
      await Promise.all(links.map((link) => link.close()));
    }
  });
});
