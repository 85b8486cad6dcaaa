/**
 * Frames over gRPC: one bidirectional stream of raw bytes for each pair of workers, dialled by the one whose id sorts first, so that a pair never has two.
 * Streams live as long as both ends name each other as peers, whatever the epoch, and are dialled again with backoff when they break.
 */
import {
  Metadata,
  status,
  type Client,
  type ClientDuplexStream,
  type Server,
  type ServerDuplexStream,
  type ServiceError,
} from '@grpc/grpc-js';
import { FrameError, ShardmeshError } from '../../protocol/errors.ts';
import { decodeFrame, encodeFrame, type Frame, type FrameHeader } from '../../protocol/frame-codec.ts';
import {
  bindGrpc,
  callMetadata,
  callingWorker,
  createGrpcClient,
  createGrpcServer,
  linkService,
  linkStream,
  type GrpcListener,
} from '../../protocol/grpc/index.ts';
import { isId, type MeshId, type WorkerId } from '../../protocol/ids.ts';
import { frameLimits } from '../../protocol/limits.ts';
import { workerName } from '../../protocol/tls.ts';
import { newCounters, type FrameLink, type FrameLinkCounters, type FrameListener, type LinkPeer } from './frame-link.ts';
import { echoOf, probeHeader, RoundTrips } from './probe.ts';
import { SendQueue } from './send-queue.ts';

export interface GrpcLinkOptions {
  mesh: MeshId;
  worker: WorkerId;
  /** Shared by the processes of the mesh; a stream without it is refused. */
  secret: string;
  onFrame: FrameListener;
  /** Where peers reach this worker, and its certificate. */
  listener?: GrpcListener;
  /** Bytes that may wait for one peer. */
  queueBytesMax?: number;
}

/** In the first metadata of both ends: who answers, and whether the stream carries frames of steps or only probes. */
const answererKey = 'shardmesh-answerer';
const purposeKey = 'shardmesh-purpose';

const windowBytes = 4 * 1024 * 1024;
const backoffMinMs = 50;
const backoffMaxMs = 1_000;
/** Streams of measuring workers that may be open at a time; they are short. */
const probeStreamsMax = 16;

type FrameStream = ClientDuplexStream<Buffer, Buffer> | ServerDuplexStream<Buffer, Buffer>;

/** One peer. `stream` is null while nobody is connected. */
interface Pair {
  readonly peer: LinkPeer;
  readonly queue: SendQueue;
  client: Client | null;
  stream: FrameStream | null;
  redial: NodeJS.Timeout | null;
  backoffMs: number;
  openedOnce: boolean;
  trouble: string;
}

export class GrpcLink implements FrameLink {
  readonly driver = 'grpc';
  readonly #options: GrpcLinkOptions;
  readonly #server: Server;
  readonly #counters = newCounters();
  readonly #pairs = new Map<WorkerId, Pair>();
  readonly #probeStreams = new Map<FrameStream, string>();
  readonly #refusedWorkers = new Set<string>();
  readonly #closed = new AbortController();
  /** Called whenever a stream opens or a pair goes. */
  #changed: (() => void)[] = [];
  #address = '';

  private constructor(options: GrpcLinkOptions) {
    this.#options = options;
    this.#server = createGrpcServer();
    this.#server.addService(linkService, { Stream: (stream: ServerDuplexStream<Buffer, Buffer>) => this.#accept(stream) });
  }

  /** @throws {ShardmeshError} `config_invalid`: the port is taken, or plaintext beyond loopback */
  static async listen(options: GrpcLinkOptions): Promise<GrpcLink> {
    const link = new GrpcLink(options);
    try {
      link.#address = await bindGrpc(link.#server, options.listener);
    } catch (error) {
      link.#server.forceShutdown();
      throw error;
    }
    return link;
  }

  /** host:port for the peers. */
  get address(): string {
    return this.#address;
  }

  get counters(): Readonly<FrameLinkCounters> {
    return this.#counters;
  }

  /** Peers with a stream. */
  get peersConnected(): number {
    return [...this.#pairs.values()].filter((pair) => pair.stream !== null).length;
  }

  setPeers(peers: readonly LinkPeer[]): void {
    const wanted = new Map(peers.map((peer) => [peer.worker, peer]));
    for (const pair of [...this.#pairs.values()])
      if (wanted.get(pair.peer.worker)?.grpcAddress !== pair.peer.grpcAddress) this.#drop(pair);
    if (this.#closed.signal.aborted) return;
    for (const peer of wanted.values()) {
      if (peer.worker === this.#options.worker || this.#pairs.has(peer.worker) || this.#refusedWorkers.has(peer.worker)) continue;
      const pair = this.#makePair(peer);
      this.#pairs.set(peer.worker, pair);
      if (this.#dials(peer.worker)) this.#dial(pair);
    }
    this.#notify();
  }

  /** A revoked worker: its streams end now, and no other is taken from it. */
  refuseWorker(worker: string): void {
    this.#refusedWorkers.add(worker);
    const pair = this.#pairs.get(worker as WorkerId);
    if (pair) this.#drop(pair);
    for (const [stream, caller] of this.#probeStreams) if (caller === worker) end(stream);
    this.#notify();
  }

  async ready(timeoutMs: number): Promise<void> {
    const end = performance.now() + timeoutMs;
    for (;;) {
      const missing = [...this.#pairs.values()].filter((pair) => pair.stream === null);
      if (missing.length === 0) return;
      const left = end - performance.now();
      if (left <= 0 || this.#closed.signal.aborted) {
        const names = missing.map((pair) => `${pair.peer.worker} at ${pair.peer.grpcAddress} (${pair.trouble})`);
        throw new ShardmeshError('worker_lost', `no gRPC stream within ${timeoutMs} ms with ${names.join(', ')}`);
      }
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, left);
        this.#changed.push(() => {
          clearTimeout(timer);
          resolve();
        });
      });
    }
  }

  send(destination: WorkerId, header: FrameHeader, payload: Uint8Array, gap = 0): boolean {
    const pair = this.#pairs.get(destination);
    if (!pair?.queue.push(encodeFrame(header, payload, gap))) {
      this.#counters.unsentFrames++;
      return false;
    }
    return true;
  }

  async probe(peer: LinkPeer, bytes: number, rounds: number, timeoutMs: number): Promise<number[]> {
    const trips = new RoundTrips(`worker ${peer.worker} at ${peer.grpcAddress} over grpc`);
    const client = this.#clientOf(peer);
    const failed = new AbortController();
    const payload = new Uint8Array(bytes);
    const stream = this.#call(client, 'probe');
    stream.on('error', (error) => failed.abort(error));
    stream.on('end', () => failed.abort(new Error('the stream ended')));
    stream.on('metadata', (metadata: Metadata) => {
      const stranger = strangerBehind(metadata, peer.worker);
      if (stranger) failed.abort(stranger);
    });
    stream.on('data', (data: Buffer) => {
      const frame = this.#decode(data);
      if (frame?.kind === 'echo') trips.onEcho(frame);
    });
    try {
      return await trips.run({
        rounds,
        bytes,
        timeoutMs,
        send: (round) => stream.write(encodeFrame(probeHeader(this.#options.mesh, 'probe', round), payload)),
        signal: AbortSignal.any([failed.signal, this.#closed.signal]),
      });
    } finally {
      stream.cancel();
      client.close();
    }
  }

  async close(): Promise<void> {
    if (this.#closed.signal.aborted) return;
    this.#closed.abort(new Error('the link was closed'));
    for (const pair of [...this.#pairs.values()]) this.#drop(pair);
    this.#notify();
    this.#server.forceShutdown();
  }

  #makePair(peer: LinkPeer): Pair {
    const pair: Pair = {
      peer,
      queue: new SendQueue({
        windowBytes,
        queueBytesMax: this.#options.queueBytesMax ?? 2 * frameLimits.payloadBytesMax,
        write: (bytes, written) => this.#write(pair, bytes, written),
      }),
      client: null,
      stream: null,
      redial: null,
      backoffMs: backoffMinMs,
      openedOnce: false,
      trouble: this.#dials(peer.worker) ? 'not answered yet' : 'it has not called yet',
    };
    return pair;
  }

  #clientOf({ worker, grpcAddress }: LinkPeer): Client {
    return createGrpcClient(grpcAddress, this.#options.listener?.tls, workerName(this.#options.mesh, worker));
  }

  #dials(worker: WorkerId): boolean {
    return this.#options.worker < worker;
  }

  #call(client: Client, purpose: 'link' | 'probe'): ClientDuplexStream<Buffer, Buffer> {
    const metadata = callMetadata(this.#options.secret, this.#options.worker);
    metadata.set(purposeKey, purpose);
    return client.makeBidiStreamRequest(linkStream.path, linkStream.requestSerialize, linkStream.responseDeserialize, metadata);
  }

  #dial(pair: Pair): void {
    pair.client ??= this.#clientOf(pair.peer);
    const stream = this.#call(pair.client, 'link');
    let over = false;
    const again = (trouble: string): void => {
      if (over) return;
      over = true;
      this.#detach(pair, stream);
      if (this.#pairs.get(pair.peer.worker) !== pair) return;
      pair.trouble = trouble;
      // Half fixed, half random: two workers that lost each other do not come back in step.
      pair.redial = setTimeout(() => this.#dial(pair), pair.backoffMs * (0.5 + Math.random() / 2));
      pair.backoffMs = Math.min(backoffMaxMs, pair.backoffMs * 2);
    };
    stream.on('metadata', (metadata: Metadata) => {
      const stranger = strangerBehind(metadata, pair.peer.worker);
      if (!stranger && this.#pairs.get(pair.peer.worker) === pair) return this.#attach(pair, stream);
      again(stranger?.message ?? 'no peer any more');
      stream.cancel();
    });
    stream.on('data', (bytes: Buffer) => this.#receive(pair, stream, bytes));
    stream.on('error', (error: ServiceError) => again(error.details || error.message));
    stream.on('end', () => {
      again('it ended the stream');
      stream.cancel();
    });
  }

  #accept(stream: ServerDuplexStream<Buffer, Buffer>): void {
    stream.on('error', () => undefined);
    const refuse = (code: status, details: string): void => {
      this.#counters.refusedStreams++;
      stream.emit('error', Object.assign(new Error(details), { code, details }));
    };
    const { secret, mesh, listener } = this.#options;
    const caller = callingWorker(stream, { secret, mesh, tls: listener?.tls ?? null });
    if (caller === null)
      return refuse(
        status.UNAUTHENTICATED,
        'this caller does not know the secret of the mesh, or its certificate is not that of the worker it says to be',
      );
    if (this.#refusedWorkers.has(caller)) return refuse(status.PERMISSION_DENIED, `worker ${caller} was revoked`);
    if (!isId(caller) || caller === (this.#options.worker as string))
      return refuse(status.INVALID_ARGUMENT, 'the caller is not the id of another worker');
    const answer = new Metadata();
    answer.set(answererKey, this.#options.worker);
    const leave = (): void => {
      stream.end();
    };
    if (stream.metadata.get(purposeKey)[0] === 'probe') {
      if (this.#probeStreams.size >= probeStreamsMax)
        return refuse(status.RESOURCE_EXHAUSTED, `${probeStreamsMax} workers measure this one already`);
      this.#probeStreams.set(stream, caller);
      const over = (): void => void this.#probeStreams.delete(stream);
      stream.on('data', (bytes: Buffer) => this.#answerProbe(stream, bytes));
      stream.on('end', leave).on('end', over).on('cancelled', over).on('close', over);
      stream.sendMetadata(answer);
      return;
    }
    const pair = this.#pairs.get(caller as WorkerId);
    if (!pair) return refuse(status.PERMISSION_DENIED, `worker ${caller} is no peer of this one now`);
    if (this.#dials(pair.peer.worker)) return refuse(status.FAILED_PRECONDITION, 'this worker dials, its id sorts first');
    const over = (): void => this.#detach(pair, stream);
    stream.on('data', (bytes: Buffer) => this.#receive(pair, stream, bytes));
    stream.on('end', leave).on('end', over).on('cancelled', over).on('close', over).on('error', over);
    stream.sendMetadata(answer);
    // A worker that calls again knows better than we do that its last stream is dead.
    if (pair.stream) {
      const last = pair.stream;
      this.#detach(pair, last);
      end(last);
    }
    this.#attach(pair, stream);
  }

  #attach(pair: Pair, stream: FrameStream): void {
    pair.stream = stream;
    pair.backoffMs = backoffMinMs;
    if (pair.openedOnce) this.#counters.reconnects++;
    pair.openedOnce = true;
    pair.queue.open();
    this.#notify();
  }

  #detach(pair: Pair, stream: FrameStream): void {
    if (pair.stream !== stream) return;
    pair.stream = null;
    pair.trouble = 'the stream broke';
    // A frame of this step is lost in the wire, so the step is; what waits belongs to it.
    this.#counters.unsentFrames += pair.queue.close();
  }

  #drop(pair: Pair): void {
    this.#pairs.delete(pair.peer.worker);
    if (pair.redial) clearTimeout(pair.redial);
    const { stream, client } = pair;
    pair.stream = null;
    this.#counters.unsentFrames += pair.queue.close();
    if (stream) end(stream);
    client?.close();
  }

  #write(pair: Pair, bytes: Buffer, written: () => void): void {
    if (!pair.stream) return;
    this.#counters.framesOut++;
    this.#counters.bytesOut += bytes.length;
    (pair.stream as ClientDuplexStream<Buffer, Buffer>).write(bytes, written);
  }

  #receive(pair: Pair, stream: FrameStream, bytes: Buffer): void {
    if (pair.stream !== stream) return void this.#counters.staleFrames++;
    const frame = this.#decode(bytes);
    if (!frame) return;
    if (frame.kind === 'probe' || frame.kind === 'echo') return void this.#counters.staleFrames++;
    this.#options.onFrame(pair.peer.worker, frame);
  }

  #answerProbe(stream: ServerDuplexStream<Buffer, Buffer>, bytes: Buffer): void {
    const frame = this.#decode(bytes);
    if (!frame) return;
    const echo = frame.kind === 'probe' ? echoOf(frame) : null;
    if (!echo) return void this.#counters.staleFrames++;
    stream.write(encodeFrame(echo, frame.payload));
  }

  /** Null: dropped and counted. */
  #decode(bytes: Buffer): Frame | null {
    this.#counters.framesIn++;
    this.#counters.bytesIn += bytes.length;
    try {
      const frame = decodeFrame(bytes, this.#options.mesh);
      if (frame.payload.length === frame.total) return frame;
      // Streams carry whole frames only.
    } catch (error) {
      if (!(error instanceof FrameError)) throw error;
      if (error.reason === 'mesh') {
        this.#counters.staleFrames++;
        return null;
      }
    }
    this.#counters.corruptFrames++;
    return null;
  }

  #notify(): void {
    const listeners = this.#changed;
    this.#changed = [];
    for (const listener of listeners) listener();
  }
}

function end(stream: FrameStream): void {
  if ('cancel' in stream) stream.cancel();
  else stream.end();
}

/** An error when another process than the one meant answers at the address (its port was taken over). */
function strangerBehind(metadata: Metadata, worker: WorkerId): Error | null {
  const answerer = String(metadata.get(answererKey)[0] ?? '');
  return answerer === worker ? null : new Error(`another process answers there${isId(answerer) ? `, worker ${answerer}` : ''}`);
}
