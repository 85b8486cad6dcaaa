/**
 * A shard worker: receives assignments and plans, runs steps, replies. Messages of the coordinator are handled one after the other; plans go straight to the
 * executor, which runs them without coming back to JavaScript in between.
 */
import type { ExecutorCallbacks, NativeAddon, NativeTcp, PeerAddress, StepDone } from '../kernels/binding-types.ts';
import { addressText, listenHost } from '../protocol/addresses.ts';
import type { Credentials } from '../protocol/credentials.ts';
import { ShardmeshError, toShardmeshError } from '../protocol/errors.ts';
import { frameHeaderBytes } from '../protocol/frame-codec.ts';
import type { GrpcListener } from '../protocol/grpc/index.ts';
import type { PlacementId, WorkerId } from '../protocol/ids.ts';
import { meshTimers, protocolVersionMax, protocolVersionMin } from '../protocol/limits.ts';
import { decodeCoordinatorMessage, encodeMessage } from '../protocol/message-codec.ts';
import type {
  Assign,
  Connect,
  CoordinatorMessage,
  Heartbeat,
  Probe,
  Release,
  Trace,
  WorkerFacts,
  WorkerMessage,
  WorkerStats,
} from '../protocol/messages.ts';
import type { StepPlan, StepPlans } from '../protocol/step-plan.ts';
import { meshSubjects, type MeshSubjects } from '../protocol/subjects.ts';
import { TraceRecorder, monotonicUs } from '../protocol/trace.ts';
import type { Transport, TransportSubscription } from '../protocol/transport.ts';
import { WorkerLinks } from './links/worker-links.ts';
import { ModelRunner, PlanError } from './model-runner.ts';
import { loadShard, sendsResults, shardKey, type LoadShardOptions, type Shard } from './shard.ts';
import { WorkerTrace } from './worker-trace.ts';

export interface WorkerOptions {
  credentials: Credentials;
  addon: NativeAddon;
  /** Control messages. */
  transport: Transport;
  /** Frames of the nats driver, on a connection of their own. */
  frameTransport: Transport;
  facts: Omit<WorkerFacts, 'grpcAddress' | 'tcpAddress'>;
  /** Pinned to, one compute thread each; empty: `threads` threads, not pinned. */
  cores: number[];
  threads: number;
  /** What `shardmesh tune` wrote on this host (kernels/cuda/tuning.ts); absent or null: nothing. */
  cudaTuning?: string | null;
  openSlice: LoadShardOptions['openSlice'];
  /** Where peers reach this worker by gRPC and tcp, and its certificate. */
  listener: GrpcListener;
  /** The worker cannot go on at all (credentials, permissions). */
  onFatal(error: Error): void;
  log(level: 'debug' | 'info' | 'warn' | 'error', event: string, fields: Record<string, unknown>): void;
  /** Every step is logged, and so reported by the executor, also on ranks that have no result to send. */
  logSteps: boolean;
}

type State = Heartbeat['state'];

/** Frames that cross between this worker and a peer must come within the wait of a step; connecting has its own limit. */
const connectTimeoutMs = 4_000;
const progressEveryMs = 200;

/**
 * Sealed links listen where gRPC does, at the next port if that has a fixed one: their keys come with each epoch over the broker, which is TLS wherever this is not
 * loopback. Null where this Node has no OpenSSL or the port is taken: the mesh then takes another driver.
 */
function openTcp(options: WorkerOptions): { native: NativeTcp; address: string } | null {
  const { host = '127.0.0.1', port = 0 } = options.listener;
  try {
    const native = options.addon.openTcp(listenHost(host), port === 0 ? 0 : port + 1);
    return { native, address: addressText({ host, port: native.port }) };
  } catch (error) {
    options.log('warn', 'tcp_links_unavailable', { message: (error as Error).message });
    return null;
  }
}

export class ShardWorker {
  readonly #options: WorkerOptions;
  readonly #worker: WorkerId;
  readonly #subjects: MeshSubjects;
  readonly #links: WorkerLinks;
  /** Null where there is no tcp driver; so is its address then "". */
  readonly #tcp: NativeTcp | null;
  readonly #tcpAddress: string;
  #state: State = 'idle';
  #epoch = 0;
  #assign: Assign | null = null;
  #loading: { key: string; shard: Promise<Shard>; abort: AbortController } | null = null;
  #shard: Shard | null = null;
  #runner: ModelRunner | null = null;
  /** Worker of each peer of the epoch, to name it in a failure. */
  #peers: Connect['peers'] = [];
  #plans: { placement: string; subscription: TransportSubscription } | null = null;
  #stalePlans = 0;
  readonly #recorder = new TraceRecorder();
  readonly #trace: WorkerTrace;
  #queue: Promise<void> = Promise.resolve();
  #heartbeat: NodeJS.Timeout | null = null;
  #closed = false;

  private constructor(options: WorkerOptions, worker: WorkerId, links: WorkerLinks, tcp: ReturnType<typeof openTcp>) {
    this.#options = options;
    this.#worker = worker;
    this.#subjects = meshSubjects(options.credentials.mesh);
    this.#links = links;
    this.#tcp = tcp?.native ?? null;
    this.#tcpAddress = tcp?.address ?? '';
    this.#trace = new WorkerTrace(worker, this.#recorder, {
      record: (on) => this.#shard?.executor.trace(on),
      send: (message) => this.#send(message),
    });
  }

  /** Listens, joins, and goes on until `close`. */
  static async start(options: WorkerOptions): Promise<ShardWorker> {
    const { mesh, secret, worker: id } = options.credentials;
    if (id === null) throw new ShardmeshError('config_invalid', 'these credentials are not those of a worker');
    const tcp = openTcp(options);
    const links = await WorkerLinks.open({
      mesh,
      worker: id,
      secret,
      transport: options.frameTransport,
      listener: options.listener,
      tcp: tcp?.native ?? null,
    });
    const worker = new ShardWorker(options, id, links, tcp);
    await options.transport.subscribe(worker.#subjects.controls(id), (bytes) => worker.#receive(bytes));
    options.transport.onEvent((event) => {
      if (event.type === 'connected') worker.#join();
      else if (event.type === 'permission_denied')
        options.onFatal(new ShardmeshError('permission_denied', `${event.operation} on ${event.subject} was denied`));
      else if (event.type === 'closed' && event.error) options.onFatal(event.error);
    });
    worker.#join();
    worker.#heartbeat = setInterval(() => worker.#beat(), meshTimers.heartbeatMs);
    return worker;
  }

  get grpcAddress(): string {
    return this.#links.grpcAddress;
  }

  /** Says good-bye, fails what is running, frees everything. */
  async close(): Promise<void> {
    this.#closed = true;
    if (this.#heartbeat) clearInterval(this.#heartbeat);
    this.#state = 'draining';
    this.#send({ type: 'leaving', worker: this.#worker });
    await this.#options.transport.flush().catch(() => undefined);
    this.#loading?.abort.abort();
    await this.#links.close();
    await this.#shard?.executor.dispose();
    this.#shard = null;
    await Promise.all([this.#options.transport.close(), this.#options.frameTransport.close()]);
  }

  #receive(bytes: Uint8Array): void {
    if (this.#closed) return;
    const receivedUs = this.#recorder.on ? monotonicUs() : 0;
    let message: CoordinatorMessage;
    try {
      message = decodeCoordinatorMessage(bytes);
    } catch (error) {
      this.#options.log('warn', 'message_refused', { message: (error as Error).message });
      return;
    }
    if (message.type === 'step_plans') {
      const step = message.plans[0]!.step;
      if (this.#recorder.on) this.#recorder.add('decode plan', step, receivedUs);
      for (const plan of message.plans) this.#plan(plan);
      if (this.#recorder.on) this.#recorder.add('receive plan', step, receivedUs);
      return;
    }
    if (message.type === 'trace') return this.#trace.receive(message);
    // A newer epoch ends the running one at once, even while an older message is still being worked on.
    if (message.type === 'assign' || message.type === 'release')
      this.#endEpoch(message.type === 'assign' ? message.placement.epoch : message.epoch + 1);
    const handled = message;
    this.#queue = this.#queue
      .then(() => this.#handle(handled))
      .catch((error: unknown) => this.#fail(toShardmeshError(error), 0, null));
  }

  async #handle(message: Exclude<CoordinatorMessage, StepPlans | Trace>): Promise<void> {
    switch (message.type) {
      case 'assign':
        return this.#load(message);
      case 'connect':
        return this.#connect(message);
      case 'release':
        return this.#release(message);
      case 'revoked':
        for (const worker of message.workers) this.#links.refuseWorker(worker);
        return;
      case 'rejoin':
        return this.#join();
      case 'drain':
        this.#state = 'draining';
        return;
      case 'probe':
        return this.#probe(message);
      default:
        message satisfies never;
    }
  }

  #join(): void {
    const { facts } = this.#options;
    this.#send({
      type: 'join',
      worker: this.#worker,
      protocolMin: protocolVersionMin,
      protocolMax: protocolVersionMax,
      epochSeen: this.#epoch,
      facts: { ...facts, grpcAddress: this.#links.grpcAddress, tcpAddress: this.#tcpAddress },
    });
  }

  #beat(): void {
    const links = this.#links.stats;
    const totals = this.#shard?.executor.totals();
    const timings = totals?.timings ?? { totalUs: 0, receiveUs: 0, idleUs: 0, collectiveUs: 0 };
    const stepDone = totals?.lastStep ?? 0;
    const stats: WorkerStats = {
      steps: totals?.steps ?? 0,
      busyUs: Math.max(0, timings.totalUs - timings.receiveUs),
      idleUs: timings.idleUs + timings.receiveUs,
      collectiveUs: timings.collectiveUs,
      receiveUs: timings.receiveUs,
      framesOut: links.framesOut,
      bytesOut: links.bytesOut,
      staleFrames: links.staleFrames + this.#stalePlans,
      corruptFrames: links.corruptFrames,
    };
    const lastStep = this.#runner?.lastStep ?? 0;
    this.#send({
      type: 'heartbeat',
      worker: this.#worker,
      state: this.#state,
      epoch: this.#epoch,
      stepDone: Math.min(stepDone, lastStep),
      plansQueued: Math.max(0, lastStep - stepDone),
      rssBytes: process.memoryUsage.rss(),
      stats,
    });
  }

  /** Steps of epochs before `epoch` are over: their frames and plans change nothing from now on. */
  #endEpoch(epoch: number): void {
    if (epoch <= this.#epoch || this.#state !== 'connected') return;
    this.#links.disconnect();
    this.#runner = null;
    this.#state = 'ready';
    void this.#shard?.executor.abort(`epoch ${this.#epoch} is over`);
  }

  async #release(message: Release): Promise<void> {
    if (message.epoch < this.#epoch) return;
    this.#epoch = Math.max(this.#epoch, message.epoch);
    await this.#shard?.executor.abort(`epoch ${message.epoch} was released`);
  }

  async #load(assign: Assign): Promise<void> {
    const { epoch } = assign.placement;
    if (epoch < this.#epoch) return;
    const repeated = epoch === this.#epoch && this.#assign?.placement.epoch === epoch;
    if (repeated && this.#state === 'connected') return;
    this.#epoch = epoch;
    this.#assign = assign;
    await this.#subscribePlans(assign.placement.id as PlacementId);
    const key = shardKey(assign);
    if (this.#shard && this.#shard.key !== key) {
      const { executor } = this.#shard;
      this.#shard = null;
      await executor.dispose();
    }
    if (!this.#shard) {
      this.#state = 'loading';
      this.#shard = await this.#loadShard(assign, key);
      this.#options.log('info', 'shard_loaded', {
        stage: assign.stage,
        rank: assign.rank,
        executor: this.#shard.executor.isa,
        bytesFetched: this.#shard.bytesFetched,
        kvBlocks: this.#shard.kvBlocks,
        milliseconds: this.#shard.loadMs,
      });
      const { note } = this.#shard.executor;
      if (note) this.#options.log('info', 'executor_note', { message: note });
    } else {
      await this.#shard.executor.abort('a new epoch begins');
      this.#shard = { ...this.#shard, bytesFetched: 0, loadMs: 0 };
    }
    if (this.#epoch !== epoch) return;
    const { sliceSha256, tablesChecksum, kvBlocks, bytesFetched, loadMs, executor } = this.#shard;
    this.#state = 'ready';
    this.#send({
      type: 'shard_ready',
      worker: this.#worker,
      epoch,
      sliceSha256,
      tablesChecksum,
      kvBlocks,
      bytesFetched,
      loadMs,
      segment: executor.openSegment(),
      peerMemory: executor.peerMemory(),
    });
  }

  #loadShard(assign: Assign, key: string): Promise<Shard> {
    const { addon, cores, threads, cudaTuning = null, openSlice } = this.#options;
    const abort = new AbortController();
    let reportedAt = 0;
    const onProgress: LoadShardOptions['onProgress'] = (bytesDone, bytesTotal, source) => {
      const now = performance.now();
      if (now - reportedAt < progressEveryMs && bytesDone < bytesTotal) return;
      reportedAt = now;
      this.#send({ type: 'load_progress', worker: this.#worker, epoch: this.#epoch, bytesDone, bytesTotal, source });
    };
    const shard = loadShard({
      assign,
      addon,
      cores,
      threads,
      cudaTuning,
      callbacks: this.#callbacks(),
      openSlice,
      quietSteps: !this.#options.logSteps,
      onProgress,
      signal: abort.signal,
    });
    this.#loading = { key, shard, abort };
    return shard.finally(() => (this.#loading = null));
  }

  async #subscribePlans(placement: PlacementId): Promise<void> {
    if (this.#plans?.placement === placement) return;
    this.#plans?.subscription.unsubscribe();
    const subscription = await this.#options.transport.subscribe(this.#subjects.plan(placement), (bytes) => this.#receive(bytes));
    this.#plans = { placement, subscription };
  }

  async #connect(message: Connect): Promise<void> {
    const shard = this.#shard;
    const assign = this.#assign;
    if (!shard || !assign || message.epoch !== this.#epoch) return;
    if (this.#state !== 'connected') {
      const self: PeerAddress = { stage: assign.stage, rank: assign.rank };
      const { wire } = assign.placement;
      const peers = await this.#links.connect(
        { ...message, wire },
        self,
        (frame) => shard.executor.deliver(frame),
        connectTimeoutMs,
      );
      if (message.epoch !== this.#epoch) return;
      try {
        shard.executor.connect(peers, this.#tcp ?? undefined);
      } catch (error) {
        // A segment, or memory of a card, that cannot be had from here: the coordinator's log says which and why.
        throw new ShardmeshError('worker_lost', (error as Error).message, { cause: error });
      }
      const { stepTokensMax, sequencesMax } = assign;
      this.#runner = new ModelRunner(shard.executor, { kvBlocks: message.kvBlocks, stepTokensMax, sequencesMax });
      this.#peers = message.peers;
      this.#state = 'connected';
      this.#options.log('info', 'connected', {
        epoch: message.epoch,
        peers: message.peers.map((peer) => `${peer.stage}.${peer.rank}:${peer.driver}`).join(' '),
      });
    }
    this.#send({ type: 'connected', worker: this.#worker, epoch: message.epoch });
  }

  #plan(plan: StepPlan): void {
    if (plan.epoch !== this.#epoch || plan.placement !== this.#plans?.placement || !this.#runner) {
      this.#stalePlans++;
      return;
    }
    try {
      if (this.#options.logSteps)
        this.#options.log('debug', 'step', { step: plan.step, epoch: plan.epoch, sequences: plan.sequences.length });
      const startUs = this.#recorder.on ? monotonicUs() : 0;
      this.#runner.submit(plan);
      if (this.#recorder.on) this.#recorder.add('submit', plan.step, startUs);
    } catch (error) {
      const code = error instanceof PlanError ? 'plan_error' : 'internal';
      this.#failed(code, plan.step, (error as Error).message, null);
    }
  }

  #callbacks(): ExecutorCallbacks {
    return {
      onStep: (done) => this.#stepDoneBy(done),
      onFrame: (destination, frame) => void this.#links.send(destination, frame, frameHeaderBytes),
      onStepFailed: (step, code, message, peer) => {
        if (code === 'aborted' && this.#state !== 'connected') return;
        this.#failed(code, step, message, peer);
      },
    };
  }

  #stepDoneBy(done: StepDone): void {
    const startUs = this.#recorder.on ? monotonicUs() : 0;
    this.#report(done);
    if (this.#recorder.on) this.#trace.step(done, startUs);
  }

  #report(done: StepDone): void {
    const { step, outputs, timings } = done;
    if (this.#options.logSteps)
      this.#options.log('debug', 'step_done', { step, epoch: this.#epoch, outputs: outputs.length, ...timings });
    const assign = this.#assign;
    if (!assign || !this.#runner || !sendsResults(assign)) return;
    const startUs = this.#recorder.on ? monotonicUs() : 0;
    this.#send({ type: 'step_result', placement: assign.placement.id, epoch: this.#epoch, step, outputs, ...timings });
    if (this.#recorder.on) this.#recorder.add('publish result', step, startUs);
  }

  #fail(error: ShardmeshError, step: number, peer: PeerAddress | null): void {
    this.#failed(error.code, step, error.message, peer);
    if (error.code === 'internal')
      this.#options.log('error', 'internal_error', { stack: (error.cause as Error | undefined)?.stack ?? error.stack });
  }

  /** This epoch cannot go on; the coordinator begins another. */
  #failed(code: string, step: number, message: string, peer: PeerAddress | null): void {
    const name = this.#peers.find((one) => one.stage === peer?.stage && one.rank === peer.rank)?.worker ?? null;
    this.#state = 'failed';
    this.#runner = null;
    this.#links.disconnect();
    this.#options.log('warn', 'step_failed', { epoch: this.#epoch, step, code, message, peer: name });
    this.#send({ type: 'worker_failed', worker: this.#worker, epoch: this.#epoch, step, code, message, peer: name });
    // Only another process has the device again, if any.
    if (code === 'device_lost') this.#options.onFatal(new ShardmeshError('card_lost', message));
  }

  async #probe({ id, peer, grpcAddress, driver, bytes, rounds }: Probe): Promise<void> {
    const answer = { type: 'probe_result', id, worker: this.#worker, peer } as const;
    try {
      const roundTripUs = await this.#links.probe(
        driver,
        { worker: peer as WorkerId, grpcAddress },
        { bytes, rounds, timeoutMs: 5_000 },
      );
      this.#send({ ...answer, roundTripUs, error: null });
    } catch (error) {
      this.#send({ ...answer, roundTripUs: [], error: (error as Error).message });
    }
  }

  #send(message: WorkerMessage): void {
    const subject =
      message.type === 'heartbeat'
        ? this.#subjects.heartbeat(this.#worker)
        : message.type === 'join'
          ? this.#subjects.register(this.#worker)
          : message.type === 'step_result'
            ? this.#subjects.result(this.#worker)
            : this.#subjects.event(this.#worker);
    this.#options.transport.publish(subject, encodeMessage(message));
  }
}
