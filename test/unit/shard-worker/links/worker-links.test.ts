import { afterEach, describe, expect, it } from 'vitest';
import type { NativeFrame, PeerAddress } from '../../../../kernels/binding-types.ts';
import { newMeshId, newPlacementId, newWorkerId, type WorkerId } from '../../../../protocol/ids.ts';
import type { LinkDriver } from '../../../../protocol/placement.ts';
import { WorkerLinks } from '../../../../shard-worker/links/worker-links.ts';

const mesh = newMeshId();
const placement = newPlacementId();
const open: WorkerLinks[] = [];
afterEach(async () => {
  await Promise.all(open.splice(0).map((links) => links.close()));
});

interface Rank {
  worker: WorkerId;
  address: PeerAddress;
  links: WorkerLinks;
  frames: NativeFrame[];
}

type ConnectLinks = Parameters<WorkerLinks['connect']>[0];

/** One worker for each rank, all in this process. */
async function makeRanks(ranksPerStage: number[]): Promise<Rank[]> {
  const addresses = ranksPerStage.flatMap((ranks, stage) => Array.from({ length: ranks }, (_, rank) => ({ stage, rank })));
  return Promise.all(
    addresses.map(async (address) => {
      const worker = newWorkerId();
      const links = await WorkerLinks.open({ mesh, worker, secret: 'secret', transport: null });
      open.push(links);
      return { worker, address, links, frames: [] };
    }),
  );
}

const connectMessage = (ranks: Rank[], epoch: number, driverOf: (a: PeerAddress) => LinkDriver = () => 'grpc'): ConnectLinks => ({
  placement,
  epoch,
  linkKey: '00'.repeat(32),
  wire: 'f32',
  peers: ranks.map(({ worker, address, links }) => ({
    ...address,
    worker,
    hostId: 'host',
    grpcAddress: links.grpcAddress,
    tcpAddress: '',
    segment: { pid: 1, fd: 9, bytes: 4096 },
    driver: driverOf(address),
    memory: null,
  })),
});

const enter = (rank: Rank, message: ConnectLinks, timeoutMs = 5_000) =>
  rank.links.connect(
    message,
    rank.address,
    (frame) => rank.frames.push({ ...frame, payload: Uint8Array.from(frame.payload) }),
    timeoutMs,
  );

const makeFrame = (step: number, source: PeerAddress, fields: Partial<NativeFrame> = {}): NativeFrame => ({
  ...{ kind: 'reduce', step, operation: 3, subtree: 0, source, rows: 1, payload: Uint8Array.of(step, 0, 0, 0) },
  ...fields,
});

async function until(what: string, condition: () => boolean): Promise<void> {
  const end = performance.now() + 5_000;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`${what} did not come about`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

describe('worker links', () => {
  it('worker links - carry frames of the epoch between the ranks that need each other', async () => {
    const ranks = await makeRanks([2, 1]);
    const [a, b, c] = ranks as [Rank, Rank, Rank];
    const native = await Promise.all(ranks.map((rank) => enter(rank, connectMessage(ranks, 4))));
    // Stage 1 rank 0 gets hidden states from rank 0 mod 2 and sends sampled ids to both ranks of stage 0.
    expect(native).toEqual([
      [
        { peer: b.address, driver: 'host' },
        { peer: c.address, driver: 'host' },
      ],
      [
        { peer: a.address, driver: 'host' },
        { peer: c.address, driver: 'host' },
      ],
      [
        { peer: a.address, driver: 'host' },
        { peer: b.address, driver: 'host' },
      ],
    ]);
    expect(a.links.send(b.address, makeFrame(1, a.address))).toBe(true);
    expect(c.links.send(b.address, makeFrame(1, c.address, { kind: 'tokens', payload: Uint8Array.of(1, 2, 3) }))).toBe(true);
    await until('both frames', () => b.frames.length === 2);
    expect(b.frames.toSorted((x, y) => x.source.stage - y.source.stage)).toEqual([
      makeFrame(1, a.address),
      makeFrame(1, c.address, { kind: 'tokens', payload: Uint8Array.of(1, 2, 3) }),
    ]);
    expect(b.links.stats).toMatchObject({ framesIn: 2, staleFrames: 0, corruptFrames: 0 });
  });

  it('worker links - frames of an older epoch change nothing and are counted', async () => {
    const [a, b] = (await makeRanks([2])) as [Rank, Rank];
    await Promise.all([a, b].map((rank) => enter(rank, connectMessage([a, b], 7))));
    await enter(b, connectMessage([a, b], 8));
    // a was frozen and does not know yet.
    a.links.send(b.address, makeFrame(1, a.address));
    await until('a stale frame', () => b.links.stats.staleFrames === 1);
    await enter(a, connectMessage([a, b], 8));
    a.links.send(b.address, makeFrame(2, a.address));
    await until('the frame of epoch 8', () => b.frames.length === 1);
    expect(b.frames[0]?.step).toBe(2);
    b.links.disconnect();
    a.links.send(b.address, makeFrame(3, a.address));
    await until('another stale frame', () => b.links.stats.staleFrames === 2);
    expect(b.frames).toHaveLength(1);
  });

  it('worker links - a worker cannot speak for another rank', async () => {
    const ranks = await makeRanks([3]);
    const [a, b, c] = ranks as [Rank, Rank, Rank];
    await Promise.all(ranks.map((rank) => enter(rank, connectMessage(ranks, 1))));
    // In a's view of the placement it holds c's rank.
    const swapped = connectMessage(
      [{ ...c, worker: a.worker, links: a.links }, b, { ...a, worker: c.worker, links: c.links }],
      1,
    );
    await enter({ ...a, address: c.address }, swapped);
    a.links.send(b.address, makeFrame(1, c.address));
    await until('a stale frame', () => b.links.stats.staleFrames === 1);
    expect(b.frames).toHaveLength(0);
  });

  it('worker links - name the workers that do not answer', async () => {
    const [a, b] = (await makeRanks([2])) as [Rank, Rank];
    await expect(enter(a, connectMessage([a, b], 1), 200)).rejects.toMatchObject({ code: 'worker_lost' });
    await expect(enter(a, connectMessage([a, b], 1), 100)).rejects.toThrow(b.worker);
  });

  it('worker links - leave shared-memory peers to the executor', async () => {
    const ranks = await makeRanks([1, 1]);
    const [a, b] = ranks as [Rank, Rank];
    const message = connectMessage(ranks, 1, () => 'shm');
    expect(await enter(a, message)).toEqual([{ peer: b.address, driver: 'shm', pid: 1, fd: 9, bytes: 4096 }]);
    expect(a.links.send(b.address, makeFrame(1, a.address))).toBe(false);
    expect(a.links.stats.unsentFrames).toBe(1);
    const bare = { ...message, peers: message.peers.map((peer) => ({ ...peer, segment: null })) };
    await expect(enter(a, bare)).rejects.toThrow(`worker ${b.worker} is to be reached by shared memory but gave no segment`);
    const memory = { place: 'host' as const, pid: 1, bytes: 768, handle: null, fd: 5, card: '00'.repeat(16) };
    const reading = connectMessage(ranks, 6, () => 'peer');
    await expect(enter(a, reading)).rejects.toThrow(
      `the sums of worker ${b.worker} are to be read where it wrote them, but it gave no memory`,
    );
    expect(await enter(a, { ...reading, peers: reading.peers.map((peer) => ({ ...peer, memory })) })).toEqual([
      { peer: b.address, driver: 'peer', pid: 1, fd: 9, bytes: 4096, memory, epoch: 6 },
    ]);
    const together = connectMessage(ranks, 7, () => 'card');
    expect(await enter(a, together)).toEqual([{ peer: b.address, driver: 'card', pid: 1, fd: 9, bytes: 4096, epoch: 7 }]);
    await expect(
      enter(
        a,
        connectMessage(ranks, 1, () => 'nats'),
      ),
    ).rejects.toThrow('over nats, which is not open here');
  });

  it('worker links - measure a worker before anybody is connected', async () => {
    const [a, b] = (await makeRanks([1, 1])) as [Rank, Rank];
    const peer = { worker: b.worker, grpcAddress: b.links.grpcAddress };
    expect(await a.links.probe('grpc', peer, { bytes: 2_304, rounds: 5, timeoutMs: 5_000 })).toHaveLength(5);
    await expect(a.links.probe('nats', peer, { bytes: 1, rounds: 1, timeoutMs: 100 })).rejects.toMatchObject({
      code: 'worker_lost',
    });
  });
});
