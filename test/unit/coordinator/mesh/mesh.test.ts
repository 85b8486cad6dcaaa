import { describe, expect, it } from 'vitest';
import { defaultMeshTimers, Mesh, type EpochInfo, type MeshLoss, type Seat } from '../../../../coordinator/mesh/mesh.ts';
import type { Assign, CoordinatorMessage, Join, PeerMemory, ShardReady, WorkerFacts } from '../../../../protocol/messages.ts';
import type { WireType } from '../../../../protocol/placement.ts';

const facts = (changes: Partial<WorkerFacts> = {}): WorkerFacts => ({
  hostId: 'host-1',
  pid: 100,
  cpuModel: 'test',
  isa: 'avx2',
  cores: 1,
  memoryBytes: 1e9,
  executor: 'auto',
  device: null,
  arithmetic: 'arithmetic-1',
  grpcAddress: '127.0.0.1:1',
  tcpAddress: '',
  weightBytesPerSecond: 1e9,
  ...changes,
});
const deviceOf = (sm: number): NonNullable<WorkerFacts['device']> => ({
  name: 'card',
  sm,
  memoryBytes: 1e9,
  multiprocessors: 2,
  bandwidthBytes: 0,
  powerWatts: 0,
  driver: '',
});
const join = (worker: string, changes: Partial<Join> = {}): Join => ({
  type: 'join',
  worker,
  protocolMin: 1,
  protocolMax: 1,
  epochSeen: 0,
  facts: facts(),
  ...changes,
});
const ready = (worker: string, epoch: number, changes: Partial<ShardReady> = {}): ShardReady => ({
  type: 'shard_ready',
  worker,
  epoch,
  sliceSha256: 'right',
  tablesChecksum: 'tables',
  kvBlocks: 100,
  bytesFetched: 0,
  loadMs: 1,
  segment: { pid: 1, fd: 3, bytes: 4096 },
  peerMemory: null,
  ...changes,
});

/** A mesh of `seats` (default: one stage of two ranks) with everything it says recorded. */
function makeMesh(
  seats: Seat[] = [0, 1].map((rank) => ({ stage: 0, rank })),
  wire: WireType = 'f32',
  bits: Assign['bits'] = 'exact',
) {
  const sent: { worker: string; message: CoordinatorMessage }[] = [];
  const serving: EpochInfo[] = [];
  const lost: { epoch: number; loss: MeshLoss }[] = [];
  const stages = Math.max(...seats.map((seat) => seat.stage)) + 1;
  const range = { from: 0, to: 1 };
  const mesh = new Mesh(
    {
      model: 'm',
      link: 'auto',
      wire,
      bits,
      seats,
      placementTemplate: {
        stages: Array.from({ length: stages }, (_, stage) => ({
          layers: range,
          ranks: seats
            .filter((seat) => seat.stage === stage)
            .map(() => ({ worker: '', attentionUnits: range, feedForwardUnits: range, vocabularyUnits: range })),
        })),
      },
      protocol: { min: 1, max: 1 },
      assignFor: () => ({}) as never,
      sliceSha256For: () => 'right',
      placementId: 'placement',
      newLinkKey: () => '00'.repeat(32),
      timers: { ...defaultMeshTimers, backoffBaseMs: 0 },
    },
    {
      send: (worker, message) => sent.push({ worker, message }),
      serving: (info) => serving.push(info),
      lost: (epoch, loss) => lost.push({ epoch, loss }),
      result: () => {},
      event: () => {},
    },
  );
  const types = (worker: string): string[] => sent.filter((one) => one.worker === worker).map((one) => one.message.type);
  return { mesh, sent, serving, lost, types };
}

/** Workers `a` and `b` joined, loaded and connected in epoch 1. */
function servingMesh() {
  const made = makeMesh();
  for (const worker of ['a', 'b']) made.mesh.receive(worker, join(worker), 0);
  for (const worker of ['a', 'b']) made.mesh.receive(worker, ready(worker, 1), 1);
  for (const worker of ['a', 'b']) made.mesh.receive(worker, { type: 'connected', worker, epoch: 1 }, 2);
  return made;
}

describe('mesh', () => {
  it('mesh - assigns nothing until every seat is taken, and says who is missing', () => {
    const { mesh, types } = makeMesh();
    mesh.receive('a', join('a'), 0);
    expect(types('a')).toEqual([]);
    expect(mesh.reason()).toBe('waiting for 1 of 2 workers (stage 0 rank 1)');
    mesh.receive('b', join('b'), 0);
    expect([types('a'), types('b')]).toEqual([['assign'], ['assign']]);
  });

  it('mesh - serves with the least KV room of any rank once all are connected', () => {
    const { mesh, serving } = makeMesh();
    for (const worker of ['a', 'b']) mesh.receive(worker, join(worker), 0);
    mesh.receive('a', ready('a', 1, { kvBlocks: 70 }), 1);
    mesh.receive('b', ready('b', 1, { kvBlocks: 50 }), 1);
    mesh.receive('a', { type: 'connected', worker: 'a', epoch: 1 }, 2);
    expect(serving).toEqual([]);
    mesh.receive('b', { type: 'connected', worker: 'b', epoch: 1 }, 2);
    expect(serving.map(({ epoch, kvBlocks }) => [epoch, kvBlocks])).toEqual([[1, 50]]);
    expect(mesh.reason()).toBeNull();
  });

  it('mesh - picks shm on one host, and across hosts the faster of the drivers that answer', () => {
    const { mesh, sent } = makeMesh([0, 1, 2].map((rank) => ({ stage: 0, rank })));
    mesh.receive('a', join('a'), 0);
    mesh.receive('b', join('b'), 0);
    mesh.receive('c', join('c', { facts: facts({ hostId: 'host-2' }) }), 0);
    for (const worker of ['a', 'b', 'c']) mesh.receive(worker, ready(worker, 1), 1);
    const probes = sent.flatMap(({ worker, message }) => (message.type === 'probe' ? [{ worker, ...message }] : []));
    expect(probes.map(({ worker, peer, driver }) => [worker, peer, driver])).toEqual([
      ['a', 'c', 'grpc'],
      ['a', 'c', 'nats'],
      ['b', 'c', 'grpc'],
      ['b', 'c', 'nats'],
    ]);
    const roundTrips = [[90, 80, 95], [300, 310, 290], [], [250, 240, 260]];
    probes.forEach(({ worker, id, peer }, index) =>
      mesh.receive(
        worker,
        { type: 'probe_result', id, worker, peer, roundTripUs: roundTrips[index] ?? [], error: index === 2 ? 'no answer' : null },
        2,
      ),
    );
    const drivers = (worker: string): unknown => {
      const connect = sent.find((one) => one.worker === worker && one.message.type === 'connect')?.message;
      return connect?.type === 'connect' && connect.peers.map((peer) => [peer.worker, peer.driver]);
    };
    expect([drivers('a'), drivers('b'), drivers('c')]).toEqual([
      [
        ['b', 'shm'],
        ['c', 'grpc'],
      ],
      [
        ['a', 'shm'],
        ['c', 'nats'],
      ],
      [
        ['a', 'grpc'],
        ['b', 'nats'],
      ],
    ]);
  });

  it('mesh - takes tcp across hosts where both ends listen for it, with one key an epoch, and no measurement', () => {
    const { mesh, sent } = makeMesh([0, 1, 2].map((rank) => ({ stage: 0, rank })));
    const far = facts({ hostId: 'host-2', tcpAddress: '10.0.0.2:4000' });
    mesh.receive('a', join('a', { facts: facts({ tcpAddress: '10.0.0.1:4000' }) }), 0);
    mesh.receive('b', join('b', { facts: far }), 0);
    mesh.receive('c', join('c', { facts: far }), 0);
    for (const worker of ['a', 'b', 'c']) mesh.receive(worker, ready(worker, 1), 1);
    const connects = sent.flatMap(({ message }) => (message.type === 'connect' ? [message] : []));
    expect(connects.map(({ peers }) => peers.map(({ worker, driver }) => `${worker} ${driver}`))).toEqual([
      ['b tcp', 'c tcp'],
      ['a tcp', 'c shm'],
      ['a tcp', 'b shm'],
    ]);
    expect(new Set(connects.map(({ linkKey }) => linkKey)).size).toBe(1);
    expect(connects[0]?.peers[0]?.tcpAddress).toBe('10.0.0.2:4000');
  });

  describe('reductions by cards', () => {
    const memory = (card: number, changes: Partial<PeerMemory> = {}): PeerMemory => ({
      pid: 7,
      bytes: 768,
      handle: 'ab'.repeat(64),
      fd: 5,
      card: String(card).padStart(32, '0'),
      ...changes,
    });
    /** Two ranks in stage 0 and one in stage 1, of which `memories` are given; what each was told of each. */
    const chosen = (
      memories: (PeerMemory | null)[],
      options: { failures?: number; wire?: 'f32' | 'q8'; hosts?: string[]; facts?: Partial<WorkerFacts>[] } = {},
    ) => {
      const seats = [0, 1].map((rank) => ({ stage: 0, rank }));
      const { mesh, sent } = makeMesh([...seats, { stage: 1, rank: 0 }], options.wire);
      const workers = ['a', 'b', 'c'];
      for (const [index, worker] of workers.entries())
        mesh.receive(
          worker,
          join(worker, { facts: facts({ hostId: options.hosts?.[index] ?? 'host-1', ...options.facts?.[index] }) }),
          0,
        );
      const failures = options.failures ?? 0;
      for (let epoch = 1; epoch <= failures + 1; epoch++) {
        sent.length = 0;
        for (const [index, worker] of workers.entries())
          mesh.receive(worker, ready(worker, epoch, { peerMemory: memories[index] ?? null }), epoch * 100);
        if (epoch > failures) break;
        mesh.receive(
          'a',
          { type: 'worker_failed', worker: 'a', epoch, step: 0, code: 'internal', message: 'not reached', peer: null },
          epoch * 100,
        );
        mesh.tick(epoch * 100 + 50);
      }
      return sent.flatMap(({ worker, message }) =>
        message.type === 'connect'
          ? message.peers.map((peer) => [worker, peer.worker, peer.driver, peer.memory?.place ?? null].join(' '))
          : [],
      );
    };
    const peers = (place: string) => [`a b peer ${place}`, 'a c shm ', `b a peer ${place}`, 'b c shm ', 'c a shm ', 'c b shm '];
    const without = ['a b shm ', 'a c shm ', 'b a shm ', 'b c shm ', 'c a shm ', 'c b shm '];

    it('mesh - ranks of a stage whose cards read each other do so, stages use shared memory', () => {
      expect(chosen([memory(1), memory(2), memory(3)])).toEqual(peers('card'));
    });

    it('mesh - cards that do not reach each other read memory of the host, and where that fails too, sums are exchanged', () => {
      const memories = [memory(1), memory(2), null];
      expect(chosen(memories, { failures: 1 })).toEqual(peers('host'));
      expect(chosen(memories, { failures: 2 })).toEqual(without);
      expect(chosen([memory(1), memory(2, { handle: null }), null])).toEqual(peers('host'));
    });

    it('mesh - sums are exchanged where a rank has no such memory, two share a card, or they are rounded on their way', () => {
      expect(chosen([memory(1), null, null])).toEqual(without);
      expect(chosen([memory(1), memory(1), null])).toEqual(without);
      expect(chosen([memory(1), memory(2), null], { wire: 'q8' })).toEqual(without);
      expect(chosen([memory(1, { handle: null }), memory(2, { fd: null }), null])).toEqual(without);
      expect(chosen([memory(1), memory(2), null], { hosts: ['x', 'y', 'x'] }).filter((line) => line.includes('peer'))).toEqual(
        [],
      );
    });

    it('mesh - ranks of a stage that are workers of one process share its card; where one is not, or connecting has failed, they do not', () => {
      const on = (pid: number) => ({ pid, device: deviceOf(90) });
      const one = [on(5), on(5), on(5)];
      const memories = [memory(1), memory(1), memory(1)];
      const together = ['a b card ', 'a c shm ', 'b a card ', 'b c shm ', 'c a shm ', 'c b shm '];
      expect(chosen(memories, { facts: one })).toEqual(together);
      expect(chosen([null, null, null], { facts: one })).toEqual(together);
      expect(chosen(memories, { facts: one, failures: 1 })).toEqual(without);
      expect(chosen(memories, { facts: one, wire: 'q8' })).toEqual(without);
      expect(chosen(memories, { facts: [on(5), on(6), on(5)] })).toEqual(without);
      expect(chosen(memories, { facts: [on(5), { pid: 5 }, on(5)] })).toEqual(without);
      expect(chosen(memories, { facts: one, hosts: ['x', 'y', 'x'] }).filter((line) => line.includes('card'))).toEqual([]);
    });
  });

  it('mesh - gives shared memory up after three connections failed in a row with every worker there', () => {
    const { mesh, sent } = makeMesh();
    for (const worker of ['a', 'b']) mesh.receive(worker, join(worker), 0);
    const drivers = (): string[] =>
      sent.flatMap(({ message }) => (message.type === 'connect' ? message.peers.map((peer) => peer.driver) : []));
    for (let epoch = 1; epoch <= 3; epoch++) {
      for (const worker of ['a', 'b']) mesh.receive(worker, ready(worker, epoch), epoch * 100);
      mesh.receive(
        'a',
        { type: 'worker_failed', worker: 'a', epoch, step: 0, code: 'internal', message: 'cannot attach', peer: null },
        epoch * 100,
      );
      mesh.tick(epoch * 100 + 50);
    }
    expect(drivers()).toEqual(['shm', 'shm', 'shm', 'shm', 'shm', 'shm']);
    for (const worker of ['a', 'b']) mesh.receive(worker, ready(worker, 4), 400);
    for (const { message } of sent)
      if (message.type === 'probe')
        mesh.receive('a', { type: 'probe_result', id: message.id, worker: 'a', peer: 'b', roundTripUs: [100], error: null }, 401);
    expect(drivers().slice(6)).toEqual(['grpc', 'grpc']);
  });

  it('mesh - a silent worker is lost after 3 s, the epoch ends with its name, survivors are released', () => {
    const { mesh, lost, types } = servingMesh();
    mesh.receive('a', { type: 'heartbeat', worker: 'a', epoch: 1 } as never, 2_900);
    mesh.tick(3_000);
    expect(lost).toEqual([]);
    mesh.tick(3_003);
    expect(lost.map(({ epoch, loss }) => [epoch, loss.code])).toEqual([[1, 'worker_lost']]);
    expect(lost[0]?.loss.message).toContain('no heartbeat from worker b');
    expect(types('a').at(-1)).toBe('release');
  });

  it('mesh - a worker that introduces itself twice while it loads keeps its seat and is not assigned twice', () => {
    const { mesh, lost, serving, types } = makeMesh();
    for (const worker of ['a', 'b']) mesh.receive(worker, join(worker), 0);
    mesh.tick(1);
    mesh.receive('b', join('b'), 2);
    mesh.tick(3);
    expect(lost).toEqual([]);
    expect(types('b').filter((type) => type === 'assign')).toHaveLength(1);
    for (const worker of ['a', 'b']) mesh.receive(worker, ready(worker, 1), 4);
    for (const worker of ['a', 'b']) mesh.receive(worker, { type: 'connected', worker, epoch: 1 } as never, 5);
    expect(serving.map(({ epoch }) => epoch)).toEqual([1]);
  });

  it('mesh - another process under the name of a worker that loads, and one that was ready, end the epoch', () => {
    for (const restarted of [true, false]) {
      const { mesh, lost } = makeMesh();
      for (const worker of ['a', 'b']) mesh.receive(worker, join(worker), 0);
      mesh.tick(1);
      if (!restarted) mesh.receive('b', ready('b', 1), 2);
      mesh.receive('b', join('b', { facts: facts({ pid: restarted ? 999 : facts().pid }) }), 3);
      expect(lost.map(({ loss }) => loss.message)).toEqual([expect.stringContaining('b joined again')]);
    }
  });

  it('mesh - a thawed worker is asked to join again and takes its seat under a new epoch', () => {
    const { mesh, types, sent } = servingMesh();
    mesh.workerGone('b', 'gone', 10);
    mesh.receive('b', { type: 'heartbeat', worker: 'b', epoch: 1 } as never, 20);
    expect(types('b').at(-1)).toBe('rejoin');
    mesh.receive('b', join('b', { epochSeen: 1 }), 30);
    mesh.tick(31);
    const assign = sent.filter((one) => one.message.type === 'assign').at(-1)?.message;
    expect(assign?.type === 'assign' && assign.placement.epoch).toBe(2);
  });

  it('mesh - messages of an old epoch change nothing and are counted', () => {
    const { mesh, lost } = servingMesh();
    mesh.receive('a', { type: 'worker_failed', worker: 'a', epoch: 0, step: 3, code: 'internal', message: 'old', peer: null }, 5);
    expect([lost, mesh.staleMessages, mesh.serving?.epoch]).toEqual([[], 1, 1]);
  });

  it('mesh - epochs go on from the highest that any worker has seen', () => {
    const { mesh } = makeMesh([{ stage: 0, rank: 0 }]);
    mesh.receive('a', join('a', { epochSeen: 41 }), 0);
    expect(mesh.epoch).toBe(42);
  });

  it('mesh - a wrong slice digest costs the worker its seat before anything is connected', () => {
    const { mesh, types, lost } = makeMesh([{ stage: 0, rank: 0 }]);
    mesh.receive('a', join('a'), 0);
    mesh.receive('a', ready('a', 1, { sliceSha256: 'wrong' }), 1);
    expect(types('a')).toEqual(['assign', 'release']);
    expect(lost[0]?.loss.message).toContain('sha256 wrong, expected right');
  });

  it('mesh - a worker with other arithmetic or protocol is refused by name', () => {
    const { mesh } = makeMesh();
    mesh.receive('a', join('a'), 0);
    mesh.receive('b', join('b', { facts: facts({ arithmetic: 'arithmetic-2' }) }), 0);
    expect(mesh.reason()).toContain('b: its kernels (arithmetic-2) would give other bits');
    mesh.receive('c', join('c', { protocolMin: 2, protocolMax: 3 }), 0);
    expect(mesh.reason()).toContain('c: protocol 2..3, this coordinator speaks 1..1');
  });

  it('mesh - with bits per kind a worker of another kind is refused by name, with exact and free bits none is', () => {
    const card = (sm: number) => facts({ executor: 'cuda', device: deviceOf(sm) });
    const seats = [0, 1, 2, 3].map((rank) => ({ stage: 0, rank }));
    for (const bits of ['exact', 'per-kind', 'free'] as const) {
      const { mesh } = makeMesh(seats, 'f32', bits);
      mesh.receive('a', join('a', { facts: card(80) }), 0);
      mesh.receive('b', join('b', { facts: card(80) }), 0);
      expect(mesh.reason()).not.toContain('refused');
      mesh.receive('c', join('c', { facts: card(90) }), 0);
      mesh.receive('d', join('d'), 0);
      const reasons = [
        'c: with --bits per-kind a card of sm_90 would give other bits than a card of sm_80',
        'd: with --bits per-kind a processor',
      ];
      for (const reason of reasons) {
        if (bits === 'per-kind') expect(mesh.reason()).toContain(reason);
        else expect(mesh.reason() ?? '').not.toContain(reason);
      }
    }
  });

  it('mesh - a spare takes the seat of a lost worker at once', () => {
    const { mesh, sent } = servingMesh();
    mesh.receive('spare', join('spare'), 5);
    mesh.workerGone('b', 'exit code 1', 10);
    mesh.tick(11);
    expect(sent.filter((one) => one.message.type === 'assign').map((one) => one.worker)).toEqual(['a', 'b', 'a', 'spare']);
  });

  it('mesh - heartbeats that stay out while the broker answers no ping are the loss of the broker, and cost no worker its seat', () => {
    const { mesh, lost } = servingMesh();
    mesh.tick(3_003, 1_500);
    mesh.tick(3_103, 1_600);
    expect(lost.map(({ epoch, loss }) => [epoch, loss.code])).toEqual([[1, 'broker_lost']]);
    mesh.brokerLost();
    mesh.brokerBack(4_000);
    mesh.tick(4_001);
    expect(mesh.epoch).toBeGreaterThan(1);
    expect(lost.filter(({ loss }) => loss.code === 'worker_lost')).toEqual([]);
  });

  it('mesh - heartbeats missed while the broker is away do not cost a worker its seat', () => {
    const { mesh, lost } = servingMesh();
    mesh.brokerLost();
    mesh.tick(60_000);
    mesh.brokerBack(60_000);
    mesh.tick(60_001);
    expect(lost.map(({ loss }) => loss.code)).toEqual(['broker_lost']);
    expect(mesh.epoch).toBe(2);
  });
});
