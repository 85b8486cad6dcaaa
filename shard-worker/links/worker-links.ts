/**
 * All links of one worker that do not run in shared memory. The tcp driver is native; here its connections are only made. For the others frames leave the executor through `send`, and those that arrive are held against the current
 * placement and epoch before they reach `deliver`: what belongs to another changes nothing and is counted.
 */
import type { NativeFrame, NativeTcp, PeerAddress, PeerLink } from '../../kernels/binding-types.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import type { Frame, FrameDtype } from '../../protocol/frame-codec.ts';
import { checkId, type MeshId, type PlacementId, type WorkerId } from '../../protocol/ids.ts';
import type { GrpcListener } from '../../protocol/grpc/index.ts';
import type { Connect } from '../../protocol/messages.ts';
import type { Placement, WireType } from '../../protocol/placement.ts';
import type { Transport } from '../../protocol/transport.ts';
import { framesTravel } from './frame-paths.ts';
import type { FrameLink, LinkPeer } from './frame-link.ts';
import { GrpcLink } from './grpc-link.ts';
import { NatsLink } from './nats-link.ts';

export interface WorkerLinksOptions {
  mesh: MeshId;
  worker: WorkerId;
  secret: string;
  /** Connection of its own for frames; null: the nats driver cannot be used. */
  transport: Transport | null;
  /** Listens for sealed tcp links; null: the tcp driver cannot be used. */
  tcp?: NativeTcp | null;
  /** Of the gRPC server: where peers reach this worker, and its certificate; by default a free port of loopback, in plaintext. */
  listener?: GrpcListener;
}

export interface WorkerLinksStats {
  framesOut: number;
  bytesOut: number;
  framesIn: number;
  bytesIn: number;
  unsentFrames: number;
  staleFrames: number;
  corruptFrames: number;
  refusedStreams: number;
  reconnects: number;
}

/** Peers of the current epoch that frames travel to or from through this process. */
interface Epoch {
  placement: PlacementId;
  epoch: number;
  self: PeerAddress;
  wire: WireType;
  deliver: (frame: NativeFrame) => void;
  peers: { address: PeerAddress; worker: WorkerId; link: FrameLink }[];
}

export class WorkerLinks {
  readonly #mesh: MeshId;
  readonly #grpc: GrpcLink;
  readonly #nats: NatsLink | null;
  readonly #tcp: NativeTcp | null;
  #epoch: Epoch | null = null;
  #staleFrames = 0;
  #unsentFrames = 0;

  private constructor(mesh: MeshId, grpc: GrpcLink, nats: NatsLink | null, tcp: NativeTcp | null) {
    this.#mesh = mesh;
    this.#grpc = grpc;
    this.#nats = nats;
    this.#tcp = tcp;
  }

  /**
   * Listens for gRPC streams, and subscribes to the worker's frames on the broker.
   * @throws {ShardmeshError} `config_invalid`, `permission_denied`, `broker_lost`
   */
  static async open(options: WorkerLinksOptions): Promise<WorkerLinks> {
    const { mesh, worker, secret, transport, tcp = null, listener = {} } = options;
    let links: WorkerLinks | null = null;
    const onFrame = (source: WorkerId, frame: Frame): void => links?.onFrame(source, frame);
    const grpc = await GrpcLink.listen({ mesh, worker, secret, onFrame, listener });
    try {
      const nats = transport ? await NatsLink.subscribe({ mesh, worker, transport, onFrame }) : null;
      links = new WorkerLinks(mesh, grpc, nats, tcp);
      return links;
    } catch (error) {
      await grpc.close();
      throw error;
    }
  }

  /** host:port of the gRPC server, for `WorkerFacts`. */
  get grpcAddress(): string {
    return this.#grpc.address;
  }

  get stats(): WorkerLinksStats {
    const sum = { ...this.#grpc.counters };
    if (this.#nats) for (const [name, value] of Object.entries(this.#nats.counters)) sum[name as keyof typeof sum] += value;
    const tcp = this.#tcp?.counters();
    if (tcp) {
      sum.framesOut += tcp.framesOut;
      sum.bytesOut += tcp.bytesOut;
      sum.framesIn += tcp.framesIn;
      sum.bytesIn += tcp.bytesIn;
      sum.corruptFrames += tcp.corrupt;
      sum.refusedStreams += tcp.refused;
    }
    return { ...sum, staleFrames: sum.staleFrames + this.#staleFrames, unsentFrames: sum.unsentFrames + this.#unsentFrames };
  }

  /** A revoked worker: its streams end now, and no other is taken from it. */
  refuseWorker(worker: string): void {
    this.#grpc.refuseWorker(worker);
  }

  /**
   * Enters an epoch: frames of it go to `deliver` from now on, all others are stale. Resolves when every peer that is not in shared memory has answered.
   * @returns what `NativeExecutor.connect` takes: the peers that frames travel to or from
   * @throws {ShardmeshError} `worker_lost`: a peer did not answer within `timeoutMs`; `invalid_message`: a driver that cannot be used here
   */
  async connect(
    connect: Pick<Connect, 'placement' | 'epoch' | 'linkKey' | 'peers'> & Pick<Placement, 'wire'>,
    self: PeerAddress,
    deliver: (frame: NativeFrame) => void,
    timeoutMs: number,
  ): Promise<PeerLink[]> {
    const ranksPerStage = countRanks(connect.peers, self);
    const native: PeerLink[] = [];
    const peers: Epoch['peers'] = [];
    const tcpPeers: { peer: PeerAddress; address: string }[] = [];
    const linkPeers = { grpc: [] as LinkPeer[], nats: [] as LinkPeer[] };
    for (const { stage, rank, worker, grpcAddress, tcpAddress, segment, driver, memory } of connect.peers) {
      const peer = { stage, rank };
      if (!framesTravel(self, peer, ranksPerStage)) continue;
      if (driver === 'shm' || driver === 'peer' || driver === 'card') {
        if (!segment)
          throw new ShardmeshError('invalid_message', `worker ${worker} is to be reached by shared memory but gave no segment`);
        if (driver === 'peer' && !memory)
          throw new ShardmeshError(
            'invalid_message',
            `the sums of worker ${worker} are to be read where it wrote them, but it gave no memory`,
          );
        if (driver === 'peer' && memory) native.push({ peer, driver, ...segment, memory, epoch: connect.epoch });
        else if (driver === 'card') native.push({ peer, driver, ...segment, epoch: connect.epoch });
        else native.push({ peer, driver: 'shm', ...segment });
        continue;
      }
      if (driver === 'tcp') {
        if (!this.#tcp || !tcpAddress)
          throw new ShardmeshError(
            'invalid_message',
            `worker ${worker} is to be reached over tcp, which is not open here and there`,
          );
        native.push({ peer, driver: 'tcp' });
        tcpPeers.push({ peer, address: tcpAddress });
        continue;
      }
      const link = driver === 'grpc' ? this.#grpc : this.#nats;
      if (!link)
        throw new ShardmeshError('invalid_message', `worker ${worker} is to be reached over nats, which is not open here`);
      const id = checkId<WorkerId>('worker', worker);
      native.push({ peer, driver: 'host' });
      peers.push({ address: peer, worker: id, link });
      linkPeers[driver].push({ worker: id, grpcAddress });
    }
    const placement = checkId<PlacementId>('placement', connect.placement);
    this.#epoch = { placement, epoch: connect.epoch, self, wire: connect.wire, deliver, peers };
    this.#grpc.setPeers(linkPeers.grpc);
    this.#nats?.setPeers(linkPeers.nats);
    const key = Buffer.from(connect.linkKey, 'hex');
    await Promise.all([
      this.#grpc.ready(timeoutMs),
      this.#nats?.ready(timeoutMs),
      tcpPeers.length > 0 ? this.#tcp?.meet({ self, epoch: connect.epoch, key, peers: tcpPeers, timeoutMs }).catch(asLost) : null,
    ]);
    return native;
  }

  /** Leaves the epoch: every frame that still comes is stale. Streams stay open, the next epoch mostly has the same peers. */
  disconnect(): void {
    this.#epoch = null;
  }

  /**
   * For `ExecutorCallbacks.onFrame`.
   * @param gap  bytes in front of the payload, as `FrameLink.send` takes them
   * @returns false when the frame was not taken; whoever waits for it meets its deadline
   */
  send(destination: PeerAddress, frame: NativeFrame, gap = 0): boolean {
    const epoch = this.#epoch;
    const peer = epoch?.peers.find(({ address }) => address.stage === destination.stage && address.rank === destination.rank);
    if (!epoch || !peer) {
      this.#unsentFrames++;
      return false;
    }
    const { kind, step, operation, subtree, rows, payload } = frame;
    const { placement, self } = epoch;
    const header = { mesh: this.#mesh, placement, epoch: epoch.epoch, step, operation, subtree, kind, source: self, rows };
    return peer.link.send(peer.worker, { ...header, dtype: dtypeOf(kind, epoch.wire) }, payload, gap);
  }

  /**
   * Measures the round trip to a worker, for the choice of drivers.
   * @returns microseconds of each round
   * @throws {ShardmeshError} `worker_lost`
   */
  async probe(
    driver: 'grpc' | 'nats',
    peer: LinkPeer,
    options: { bytes: number; rounds: number; timeoutMs: number },
  ): Promise<number[]> {
    const link = driver === 'grpc' ? this.#grpc : this.#nats;
    if (!link)
      throw new ShardmeshError('worker_lost', `worker ${peer.worker} cannot be measured over nats, which is not open here`);
    return link.probe(peer, options.bytes, options.rounds, options.timeoutMs);
  }

  async close(): Promise<void> {
    this.disconnect();
    this.#tcp?.close();
    await Promise.all([this.#grpc.close(), this.#nats?.close()]);
  }

  /** A frame that a driver took in. */
  onFrame(source: WorkerId, frame: Frame): void {
    const { kind, step, operation, subtree, rows, payload } = frame;
    const epoch = this.#epoch;
    const known =
      epoch?.placement === frame.placement &&
      epoch.epoch === frame.epoch &&
      epoch.peers.some(
        ({ address, worker }) => worker === source && address.stage === frame.source.stage && address.rank === frame.source.rank,
      );
    if (!epoch || !known || kind === 'probe' || kind === 'echo' || frame.dtype !== dtypeOf(kind, epoch.wire)) {
      this.#staleFrames++;
      return;
    }
    epoch.deliver({ kind, step, operation, subtree, source: frame.source, rows, payload });
  }
}

/** Sampled ids are integers of two sizes; rows of the embedding and logits are always fp32. */
function dtypeOf(kind: NativeFrame['kind'], wire: WireType): FrameDtype {
  if (kind === 'tokens') return 'bytes';
  return kind === 'reduce' || kind === 'hidden' ? wire : 'f32';
}

function asLost(cause: Error): never {
  throw new ShardmeshError('worker_lost', cause.message, { cause });
}

function countRanks(peers: Connect['peers'], self: PeerAddress): number[] {
  const counts: number[] = [];
  for (const { stage, rank } of [...peers, self]) counts[stage] = Math.max(counts[stage] ?? 0, rank + 1);
  return Array.from(counts, (count) => count ?? 0);
}
