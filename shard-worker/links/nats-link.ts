/**
 * Frames over the broker, where workers reach nothing else: chunks of at most 512 KiB on `mesh.<mesh>.act.<destination>.<source>`. The broker's permissions
 * fix the source token, so a worker cannot speak for another. Give it a connection of its own: tensors must not delay heartbeats.
 */
import { FrameError, ShardmeshError } from '../../protocol/errors.ts';
import { encodeFrameChunks, FrameAssembler } from '../../protocol/frame-chunks.ts';
import { decodeFrame, type Frame, type FrameHeader } from '../../protocol/frame-codec.ts';
import type { MeshId, WorkerId } from '../../protocol/ids.ts';
import { frameLimits, meshLimits } from '../../protocol/limits.ts';
import { meshSubjects, sourceOf, type MeshSubjects } from '../../protocol/subjects.ts';
import type { Transport, TransportSubscription } from '../../protocol/transport.ts';
import { newCounters, type FrameLink, type FrameLinkCounters, type FrameListener, type LinkPeer } from './frame-link.ts';
import { echoOf, probeHeader, RoundTrips } from './probe.ts';
import { SendQueue } from './send-queue.ts';

export interface NatsLinkOptions {
  mesh: MeshId;
  worker: WorkerId;
  transport: Transport;
  onFrame: FrameListener;
  /** Bytes that may wait for the broker, all destinations together. */
  queueBytesMax?: number;
}

/** Un-acknowledged bytes that this worker may have with the broker. */
const windowBytes = 4 * 1024 * 1024;
/** A flush is a round trip to the broker; small frames do not wait for one. */
const flushEveryBytes = 1024 * 1024;
const readyResendMs = 100;

export class NatsLink implements FrameLink {
  readonly driver = 'nats';
  readonly #options: NatsLinkOptions;
  readonly #subjects: MeshSubjects;
  readonly #counters = newCounters();
  readonly #peers = new Set<WorkerId>();
  /** Joins chunks, for each source: one that sends nonsense cannot push out another's. */
  readonly #assemblers = new Map<WorkerId, FrameAssembler>();
  readonly #probing = new Map<WorkerId, RoundTrips>();
  readonly #queues = new Map<WorkerId, SendQueue>();
  readonly #closed = new AbortController();
  #subscription: TransportSubscription | null = null;
  #stopEvents: () => void = () => undefined;
  #unflushedBytes = 0;
  /** Reports of what the broker has not acknowledged yet. */
  #unacknowledged: (() => void)[] = [];
  #flushing = false;

  private constructor(options: NatsLinkOptions) {
    this.#options = options;
    this.#subjects = meshSubjects(options.mesh);
  }

  /**
   * Subscribes to the frames for this worker. The transport stays its giver's: `close()` does not end it.
   * @throws {ShardmeshError} `permission_denied`, `broker_lost`
   */
  static async subscribe(options: NatsLinkOptions): Promise<NatsLink> {
    const link = new NatsLink(options);
    link.#subscription = await options.transport.subscribe(link.#subjects.activationsTo(options.worker), (bytes, subject) =>
      link.#receive(bytes, subject),
    );
    link.#stopEvents = options.transport.onEvent((event) => {
      if (event.type !== 'disconnected') return;
      // What the broker had not acknowledged may be lost; what waits belongs to the same steps.
      for (const queue of link.#queues.values()) link.#counters.unsentFrames += queue.close();
      link.#queues.clear();
    });
    return link;
  }

  get counters(): Readonly<FrameLinkCounters> {
    return { ...this.#counters, reconnects: this.#options.transport.counters.reconnects };
  }

  setPeers(peers: readonly LinkPeer[]): void {
    this.#peers.clear();
    for (const { worker } of peers) if (worker !== this.#options.worker) this.#peers.add(worker);
    for (const [worker, queue] of this.#queues) {
      if (this.#peers.has(worker)) continue;
      this.#counters.unsentFrames += queue.close();
      this.#queues.delete(worker);
    }
    for (const worker of this.#assemblers.keys()) if (!this.#peers.has(worker)) this.#assemblers.delete(worker);
  }

  async ready(timeoutMs: number): Promise<void> {
    // Nothing tells whether somebody subscribes to a subject, so every peer is asked, again and again until it listens.
    const answers = [...this.#peers].map((worker) => this.#measure(worker, 0, 1, timeoutMs, readyResendMs));
    const failed = (await Promise.allSettled(answers)).find((answer) => answer.status === 'rejected');
    if (failed) throw failed.reason;
  }

  send(destination: WorkerId, header: FrameHeader, payload: Uint8Array): boolean {
    if (!this.#peers.has(destination)) return this.#unsent();
    return this.#push(destination, header, payload);
  }

  probe(peer: LinkPeer, bytes: number, rounds: number, timeoutMs: number): Promise<number[]> {
    return this.#measure(peer.worker, bytes, rounds, timeoutMs);
  }

  async close(): Promise<void> {
    this.#closed.abort(new Error('the link was closed'));
    this.#stopEvents();
    this.#subscription?.unsubscribe();
    this.#subscription = null;
    this.setPeers([]);
  }

  async #measure(worker: WorkerId, bytes: number, rounds: number, timeoutMs: number, resendMs?: number): Promise<number[]> {
    if (this.#probing.has(worker))
      throw new ShardmeshError(
        'worker_lost',
        `worker ${worker} is being measured over nats already; ask again when that has ended`,
      );
    const trips = new RoundTrips(`worker ${worker} over nats`);
    const payload = new Uint8Array(bytes);
    this.#probing.set(worker, trips);
    try {
      return await trips.run({
        rounds,
        bytes,
        timeoutMs,
        ...(resendMs === undefined ? {} : { resendMs }),
        send: (round) => void this.#push(worker, probeHeader(this.#options.mesh, 'probe', round), payload),
        signal: this.#closed.signal,
      });
    } finally {
      this.#probing.delete(worker);
    }
  }

  #push(destination: WorkerId, header: FrameHeader, payload: Uint8Array): boolean {
    const { transport } = this.#options;
    if (this.#closed.signal.aborted || !transport.connected) return this.#unsent();
    const queue = this.#queueFor(destination);
    if (queue.waitingBytes + payload.length > this.#queueBytesMax) return this.#unsent();
    for (const chunk of encodeFrameChunks(header, payload, transport.payloadBytesMax)) queue.push(chunk);
    this.#counters.framesOut++;
    return true;
  }

  get #queueBytesMax(): number {
    return this.#options.queueBytesMax ?? 2 * frameLimits.payloadBytesMax;
  }

  #queueFor(destination: WorkerId): SendQueue {
    const known = this.#queues.get(destination);
    if (known) return known;
    // Queues of measured strangers go first, so that the number stays bounded.
    if (this.#queues.size >= meshLimits.workersMax)
      for (const [worker, queue] of this.#queues)
        if (!this.#peers.has(worker) && queue.waitingBytes === 0) this.#queues.delete(worker);
    const subject = this.#subjects.activation(destination, this.#options.worker);
    const queue = new SendQueue({
      windowBytes,
      // Whole frames are let in by #push; their headers may exceed the limit by a little.
      queueBytesMax: this.#queueBytesMax + frameLimits.payloadBytesMax,
      write: (bytes, written) => this.#publish(subject, bytes, written),
    });
    queue.open();
    this.#queues.set(destination, queue);
    return queue;
  }

  #publish(subject: string, bytes: Buffer, written: () => void): void {
    if (!this.#options.transport.publish(subject, bytes)) {
      this.#counters.unsentFrames++;
      return written();
    }
    this.#counters.bytesOut += bytes.length;
    this.#unflushedBytes += bytes.length;
    if (this.#unflushedBytes < flushEveryBytes) return written();
    this.#unacknowledged.push(written);
    if (!this.#flushing) void this.#flush();
  }

  /** Until the broker has everything, reporting in turns. */
  async #flush(): Promise<void> {
    this.#flushing = true;
    while (this.#unacknowledged.length > 0) {
      const covered = this.#unacknowledged;
      const coveredBytes = this.#unflushedBytes;
      this.#unacknowledged = [];
      // A connection that breaks says so by its own event; nothing more is to be done here.
      await this.#options.transport.flush().catch(() => undefined);
      this.#unflushedBytes = Math.max(0, this.#unflushedBytes - coveredBytes);
      for (const written of covered) written();
    }
    this.#flushing = false;
  }

  #receive(bytes: Uint8Array, subject: string): void {
    const source = sourceOf(subject);
    if (source === null || source === this.#options.worker) return void this.#counters.staleFrames++;
    this.#counters.bytesIn += bytes.length;
    try {
      const chunk = decodeFrame(bytes, this.#options.mesh);
      const probing = chunk.kind === 'probe' || chunk.kind === 'echo';
      if (!probing && !this.#peers.has(source)) return void this.#counters.staleFrames++;
      const frame = this.#assemblerFor(source).add(chunk);
      if (!frame) return;
      this.#counters.framesIn++;
      if (probing) this.#onProbe(source, frame);
      else this.#options.onFrame(source, frame);
    } catch (error) {
      if (!(error instanceof FrameError)) throw error;
      if (error.reason === 'mesh') this.#counters.staleFrames++;
      else this.#counters.corruptFrames++;
    }
  }

  #assemblerFor(source: WorkerId): FrameAssembler {
    const known = this.#assemblers.get(source);
    if (known) return known;
    if (this.#assemblers.size >= meshLimits.workersMax)
      for (const worker of this.#assemblers.keys()) if (!this.#peers.has(worker)) this.#assemblers.delete(worker);
    const assembler = new FrameAssembler();
    this.#assemblers.set(source, assembler);
    return assembler;
  }

  #onProbe(source: WorkerId, frame: Frame): void {
    if (frame.kind === 'echo') {
      this.#probing.get(source)?.onEcho(frame);
      return;
    }
    const echo = echoOf(frame);
    if (!echo) return void this.#counters.staleFrames++;
    this.#push(source, echo, frame.payload);
  }

  #unsent(): false {
    this.#counters.unsentFrames++;
    return false;
  }
}
