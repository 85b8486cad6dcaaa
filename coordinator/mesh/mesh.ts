/**
 * Who holds which shard, as a state machine: workers join, take seats (one seat a rank of the placement), load, connect, serve; when one is lost the epoch
 * ends, and a new one begins as soon as every seat is taken again. No I/O and no timers of its own: messages come in by `receive`, time by `tick`.
 *
 *   forming ──all seats taken──► loading ──all shards ready──► (measuring) ──► connecting ──all connected──► serving
 *   measuring: only with --link auto, and only where two ranks share no memory
 *      ▲                            │                              │                            │
 *      └───────────── a seated worker lost, a failure, a deadline, the broker gone ────────────┘
 */
import type {
  Assign,
  Connect,
  CoordinatorMessage,
  Heartbeat,
  Join,
  ProbeResult,
  ShardReady,
  TraceClock,
  TraceSpans,
  WorkerFacts,
  WorkerMessage,
} from '../../protocol/messages.ts';
import type { LinkDriver, Placement, WireType } from '../../protocol/placement.ts';
import type { StepResult } from '../../protocol/step-plan.ts';

/** One rank of the placement, without the worker that fills it. */
export interface Seat {
  stage: number;
  rank: number;
}

export interface MeshOptions {
  model: string;
  /** Link driver for every pair, or `auto`. */
  link: Placement['link'];
  wire: WireType;
  /** Of the programs: `per-kind` seats workers of one kind only. */
  bits: Assign['bits'];
  seats: Seat[];
  /** Stages and ranks with `worker` left empty. */
  placementTemplate: Pick<Placement, 'stages'>;
  protocol: { min: number; max: number };
  /** Everything of `assign` but what the mesh itself decides. */
  assignFor(seat: Seat, facts: WorkerFacts): Omit<Assign, 'type' | 'placement' | 'stage' | 'rank'>;
  /** sha256 each shard must report. */
  sliceSha256For(seat: Seat): string;
  /** The same in every epoch; workers may read the plans of this one only. */
  placementId: string;
  /** A fresh key for the tcp links of an epoch: 32 random bytes in hexadecimal. */
  newLinkKey(): string;
  timers: MeshTimers;
}

export interface MeshTimers {
  /** A worker whose last heartbeat is older is lost. */
  heartbeatTimeoutMs: number;
  /** Longest time without load progress of a worker. */
  loadStallMs: number;
  connectTimeoutMs: number;
  /** Pause before a new epoch after the n-th failure in a row: base * 2^n up to max. */
  backoffBaseMs: number;
  backoffMaxMs: number;
  /** An epoch that served this long ends a row of failures. */
  stableMs: number;
}

export const defaultMeshTimers: MeshTimers = {
  heartbeatTimeoutMs: 3_000,
  loadStallMs: 30_000,
  connectTimeoutMs: 5_000,
  backoffBaseMs: 50,
  backoffMaxMs: 5_000,
  stableMs: 5_000,
};

/** An epoch that serves. */
export interface EpochInfo {
  epoch: number;
  placement: Placement;
  kvBlocks: number;
}

export interface MeshLoss {
  code: 'worker_lost' | 'worker_failed' | 'broker_lost' | 'step_timeout';
  message: string;
}

export interface MeshOutputs {
  send(worker: string, message: CoordinatorMessage): void;
  serving(epoch: EpochInfo): void;
  lost(epoch: number, loss: MeshLoss): void;
  result(result: StepResult): void;
  /** One line for the log. */
  event(name: string, fields: Record<string, unknown>): void;
}

/** What computes alike where bits are per kind. */
const kindOf = ({ device }: WorkerFacts): string => (device ? `a card of sm_${device.sm}` : 'a processor');

/** A heartbeat that shows a lost message counts only this long after the message was sent. */
const repeatAfterMs = 1_500;

/** A worker or a broker that says nothing for this long is worth naming when a step is overdue; heartbeats come twice as often. */
const silentMs = 1_000;

interface Member {
  facts: WorkerFacts;
  epochSeen: number;
  seenAt: number;
  heartbeat: Heartbeat | null;
  /** Why it may not take a seat; null when it may. */
  refused: string | null;
}

type MeasuredDriver = 'grpc' | 'nats';

/** Of two workers, the same whichever is named first. */
const pairOf = (a: string, b: string): string => (a < b ? `${a} ${b}` : `${b} ${a}`);

const connectFailuresMax = 3;
const probeBytes = 4_096;
const probeRounds = 20;
/** Drivers that have not answered by then are not taken. */
const measureTimeoutMs = 4_000;

type Phase =
  | { name: 'forming' }
  | {
      name: 'loading';
      ready: Map<string, ShardReady>;
      progressAt: Map<string, number>;
      bytes: Map<string, [done: number, total: number]>;
    }
  | {
      name: 'measuring';
      ready: Map<string, ShardReady>;
      since: number;
      pending: Map<number, { pair: string; driver: MeasuredDriver }>;
    }
  | { name: 'connecting'; ready: Map<string, ShardReady>; connected: Set<string>; since: number }
  | { name: 'serving'; info: EpochInfo; since: number };

export class Mesh {
  readonly #options: MeshOptions;
  readonly #out: MeshOutputs;
  readonly #members = new Map<string, Member>();
  /** Worker of each seat. */
  readonly #seated: (string | null)[];
  #phase: Phase = { name: 'forming' };
  #placement: Placement | null = null;
  #linkKey = '';
  #epoch = 0;
  #failures = 0;
  #formNotBefore = 0;
  #repeatNotBefore = 0;
  #now = 0;
  #brokerUp = true;
  #probes = 0;
  /** Median round trip in microseconds of each driver between two workers, measured in this epoch. */
  readonly #roundTripUs = new Map<string, Partial<Record<MeasuredDriver, number>>>();
  /** Connections in a row that failed while every worker was there: then it is not the workers, and shared memory is given up. */
  #connectFailures = 0;
  /** Frames, results and failures of an epoch that is over. */
  staleMessages = 0;

  constructor(options: MeshOptions, outputs: MeshOutputs) {
    this.#options = options;
    this.#out = outputs;
    this.#seated = options.seats.map(() => null);
  }

  get epoch(): number {
    return this.#epoch;
  }

  get serving(): EpochInfo | null {
    return this.#phase.name === 'serving' ? this.#phase.info : null;
  }

  /** Why the mesh does not serve, for an operator; null when it serves. */
  reason(): string | null {
    if (!this.#brokerUp) return 'the connection to the NATS server is down';
    switch (this.#phase.name) {
      case 'forming': {
        const missing = this.missingSeats();
        if (missing.length === 0) return 'a new epoch is about to begin';
        const refused = [...this.#members]
          .filter(([, member]) => member.refused)
          .map(([worker, member]) => `${worker}: ${member.refused}`);
        const waits = `waiting for ${missing.length} of ${this.#options.seats.length} workers (${missing.map((seat) => `stage ${seat.stage} rank ${seat.rank}`).join(', ')})`;
        return refused.length ? `${waits}; refused: ${refused.join('; ')}` : waits;
      }
      case 'loading': {
        const { ready } = this.#phase;
        const waiting = this.#workers().filter((worker) => !ready.has(worker));
        return `loading weights: ${waiting.join(', ')}`;
      }
      case 'measuring':
        return 'measuring links between workers';
      case 'connecting': {
        const { connected } = this.#phase;
        return `connecting ranks: ${this.#workers()
          .filter((worker) => !connected.has(worker))
          .join(', ')}`;
      }
      case 'serving':
        return null;
    }
  }

  missingSeats(): Seat[] {
    return this.#options.seats.filter((_, index) => this.#seated[index] === null);
  }

  /** Bytes loaded and to load over all workers; null when not loading. */
  loadProgress(): { bytesDone: number; bytesTotal: number } | null {
    if (this.#phase.name !== 'loading') return null;
    let bytesDone = 0;
    let bytesTotal = 0;
    for (const [done, total] of this.#phase.bytes.values()) {
      bytesDone += done;
      bytesTotal += total;
    }
    return { bytesDone, bytesTotal };
  }

  /** Members for status pages and metrics: seat, facts, last heartbeat. */
  members(): { worker: string; seat: Seat | null; facts: WorkerFacts; heartbeat: Heartbeat | null; seenAt: number }[] {
    return [...this.#members].map(([worker, member]) => ({
      worker,
      seat: this.#options.seats[this.#seated.indexOf(worker)] ?? null,
      facts: member.facts,
      heartbeat: member.heartbeat,
      seenAt: member.seenAt,
    }));
  }

  /**
   * Time goes on: deadlines, and the start of a new epoch. Call it at least every 100 ms.
   * @param brokerSilentMs  for how long a ping of the broker has been without an answer: heartbeats that do not come through it are not their worker's fault
   */
  tick(now: number, brokerSilentMs = 0): void {
    this.#now = now;
    const { timers } = this.#options;
    if (brokerSilentMs > silentMs) {
      const overdue = [...this.#members.values()].some(({ seenAt }) => now - seenAt > timers.heartbeatTimeoutMs);
      if (overdue && this.#phase.name === 'serving')
        this.#endEpoch({
          code: 'broker_lost',
          message: `the NATS server has not answered a ping for ${Math.round(brokerSilentMs)} ms, and no heartbeat came through it for ${timers.heartbeatTimeoutMs} ms`,
        });
    } else if (this.#brokerUp)
      for (const [worker, member] of this.#members)
        if (now - member.seenAt > timers.heartbeatTimeoutMs)
          this.#lose(
            worker,
            `no heartbeat from worker ${worker} for ${Math.round(now - member.seenAt)} ms, limit ${timers.heartbeatTimeoutMs}`,
          );
    if (this.#phase.name === 'loading') {
      for (const [worker, at] of this.#phase.progressAt)
        if (!this.#phase.ready.has(worker) && now - at > timers.loadStallMs) {
          this.#lose(worker, `worker ${worker} made no progress in loading for ${timers.loadStallMs} ms`);
          return;
        }
    } else if (this.#phase.name === 'measuring' && now - this.#phase.since > measureTimeoutMs) {
      this.#connectAll(this.#phase.ready);
    } else if (this.#phase.name === 'connecting' && now - this.#phase.since > timers.connectTimeoutMs) {
      const { connected } = this.#phase;
      const late = this.#workers().filter((worker) => !connected.has(worker));
      this.#endEpoch({ code: 'worker_lost', message: `not connected within ${timers.connectTimeoutMs} ms: ${late.join(', ')}` });
    }
    this.#form();
  }

  /** A message of `worker`; the sender is known from the subject, so it cannot be somebody else. */
  receive(worker: string, message: Exclude<WorkerMessage, TraceClock | TraceSpans>, now: number): void {
    this.#now = Math.max(this.#now, now);
    const member = this.#members.get(worker);
    if (message.type === 'join') return this.#join(message);
    if (!member) {
      // Lost (it froze and thawed, or this coordinator is new): it has to join again.
      if (message.type === 'heartbeat') this.#out.send(worker, { type: 'rejoin' });
      else this.staleMessages++;
      return;
    }
    member.seenAt = this.#now;
    if ('epoch' in message && message.type !== 'heartbeat' && message.epoch !== this.#epoch) {
      this.staleMessages++;
      return;
    }
    switch (message.type) {
      case 'heartbeat':
        member.heartbeat = message;
        member.epochSeen = Math.max(member.epochSeen, message.epoch);
        return this.#repeat(worker, message);
      case 'load_progress':
        if (this.#phase.name === 'loading') {
          const before = this.#phase.bytes.get(worker);
          if (!before || before[0] !== message.bytesDone) this.#phase.progressAt.set(worker, this.#now);
          this.#phase.bytes.set(worker, [message.bytesDone, message.bytesTotal]);
        }
        return;
      case 'shard_ready':
        return this.#shardReady(worker, message);
      case 'connected':
        return this.#connected(worker);
      case 'worker_failed': {
        if (this.#phase.name === 'connecting') this.#connectFailures++;
        const blamed = message.peer ? ` (waiting for ${message.peer})` : '';
        this.#out.event('worker_failed', {
          worker,
          code: message.code,
          step: message.step,
          peer: message.peer,
          message: message.message,
        });
        const code = message.code === 'wait_timeout' ? 'step_timeout' : 'worker_failed';
        this.#endEpoch({ code, message: `worker ${worker} failed in step ${message.step}${blamed}: ${message.message}` });
        return;
      }
      case 'leaving':
        return this.#lose(worker, `worker ${worker} left`);
      case 'step_result':
        if (this.#phase.name === 'serving' && message.placement === this.#phase.info.placement.id) this.#out.result(message);
        else this.staleMessages++;
        return;
      case 'probe_result':
        return this.#measured(message);
      default:
        message satisfies never;
    }
  }

  /** The process behind a worker is gone (exit of a local child, `$SYS` disconnect). */
  workerGone(worker: string, why: string, now: number): void {
    this.#now = Math.max(this.#now, now);
    this.#lose(worker, why);
  }

  /**
   * A fault that the engine saw, as it looks from here: a step that is overdue while the broker answers no ping is the broker's fault; workers that have been
   * silent are named.
   * @param brokerSilentMs  for how long a ping of the broker has been without an answer
   */
  explain<F extends { code: string; message: string }>(
    fault: F,
    brokerSilentMs: number,
    now: number,
  ): { code: string; message: string } {
    if (fault.code !== 'step_timeout') return fault;
    if (brokerSilentMs > silentMs)
      return {
        code: 'broker_lost',
        message: `${fault.message} The NATS server has not answered a ping for ${Math.round(brokerSilentMs)} ms.`,
      };
    const silent = this.#workers().filter((worker) => now - (this.#members.get(worker)?.seenAt ?? 0) > silentMs);
    return silent.length ? { ...fault, message: `${fault.message} Silent: ${silent.join(', ')}.` } : fault;
  }

  /** The engine gave the epoch up (a step is overdue, a result that does not fit). */
  stepFailed(fault: { code: string; message: string }, now: number): void {
    this.#now = Math.max(this.#now, now);
    const code = fault.code === 'step_timeout' || fault.code === 'broker_lost' ? fault.code : 'worker_failed';
    this.#endEpoch({ code, message: fault.message });
  }

  brokerLost(): void {
    if (!this.#brokerUp) return;
    this.#brokerUp = false;
    this.#endEpoch({ code: 'broker_lost', message: 'the connection to the NATS server was lost' });
  }

  /** Heartbeats missed while the broker was away do not count. */
  brokerBack(now: number): void {
    this.#brokerUp = true;
    this.#now = Math.max(this.#now, now);
    for (const member of this.#members.values()) member.seenAt = this.#now;
  }

  /** A message to or from a worker was lost (the broker was away): what it still waits for is sent again, what it has reached is taken as said. */
  #repeat(worker: string, { epoch, state }: Heartbeat): void {
    const index = this.#seated.indexOf(worker);
    const seat = this.#options.seats[index];
    if (!seat || !this.#placement || this.#now < this.#repeatNotBefore) return;
    const phase = this.#phase;
    if (phase.name === 'loading' && !phase.ready.has(worker) && (epoch !== this.#epoch || state === 'ready'))
      this.#assign(worker, seat);
    else if (phase.name === 'connecting' && !phase.connected.has(worker) && epoch === this.#epoch) {
      if (state === 'connected') this.#connected(worker);
      else if (state === 'ready') this.#out.send(worker, this.#connectMessage(this.#placement, seat, worker, phase.ready));
    }
  }

  #assign(worker: string, seat: Seat): void {
    const facts = this.#members.get(worker)?.facts;
    if (!facts || !this.#placement) return;
    this.#out.send(worker, {
      type: 'assign',
      placement: this.#placement,
      stage: seat.stage,
      rank: seat.rank,
      ...this.#options.assignFor(seat, facts),
    });
  }

  #workers(): string[] {
    return this.#seated.filter((worker): worker is string => worker !== null);
  }

  /**
   * The same process says twice who it is, before it has loaded anything of this epoch: a heartbeat had overtaken its first word and was answered with `rejoin`, or
   * its connection came back. Nothing is lost; an assignment that it missed is repeated when its heartbeat shows that.
   */
  #isSameIntroduction(worker: string, before: Join['facts'], now: Join['facts']): boolean {
    const phase = this.#phase;
    return phase.name === 'loading' && !phase.ready.has(worker) && before.pid === now.pid && before.hostId === now.hostId;
  }

  #join(message: Join): void {
    const { worker, facts } = message;
    if (this.#seated.includes(worker)) {
      const before = this.#members.get(worker);
      if (before && this.#isSameIntroduction(worker, before.facts, facts)) {
        before.seenAt = this.#now;
        return;
      }
      // It restarted, or lost its state: what it held of this epoch is gone.
      this.#lose(worker, `worker ${worker} joined again`);
    }
    const { min, max } = this.#options.protocol;
    const overlaps = message.protocolMin <= max && message.protocolMax >= min;
    const other = [...this.#members.values()].find(
      (member) => member.refused === null && member.facts.arithmetic !== facts.arithmetic,
    );
    const kind = kindOf(facts);
    const ofOtherKind =
      this.#options.bits === 'per-kind' &&
      [...this.#members.values()].find((member) => member.refused === null && kindOf(member.facts) !== kind);
    const refused = !overlaps
      ? `protocol ${message.protocolMin}..${message.protocolMax}, this coordinator speaks ${min}..${max}`
      : other
        ? `its kernels (${facts.arithmetic}) would give other bits than those of the workers here (${other.facts.arithmetic})`
        : ofOtherKind
          ? `with --bits per-kind ${kind} would give other bits than ${kindOf(ofOtherKind.facts)} of the workers here; --bits exact and free take both`
          : null;
    this.#members.set(worker, { facts, epochSeen: message.epochSeen, seenAt: this.#now, heartbeat: null, refused });
    const { hostId: host, pid, isa, cores, device } = facts;
    const computes = device ? { device: `${device.name}, sm_${device.sm}` } : { isa };
    this.#out.event('worker_joined', { worker, host, pid, ...computes, cores, refused });
    this.#form();
  }

  #lose(worker: string, message: string): void {
    if (!this.#members.delete(worker)) return;
    this.#connectFailures = 0;
    const seat = this.#seated.indexOf(worker);
    this.#out.event('worker_lost', { worker, message });
    if (seat >= 0) {
      this.#seated[seat] = null;
      this.#endEpoch({ code: 'worker_lost', message });
    }
  }

  /** Ends the epoch, if one has begun. Workers forget its steps; their weights stay. */
  #endEpoch(loss: MeshLoss): void {
    if (this.#phase.name === 'forming') return;
    const { backoffBaseMs, backoffMaxMs, stableMs } = this.#options.timers;
    const wasStable = this.#phase.name === 'serving' && this.#now - this.#phase.since >= stableMs;
    this.#failures = wasStable ? 0 : this.#failures + 1;
    this.#phase = { name: 'forming' };
    this.#formNotBefore = this.#now + Math.min(backoffMaxMs, backoffBaseMs * 2 ** this.#failures);
    this.#out.event('epoch_ended', { epoch: this.#epoch, code: loss.code, message: loss.message });
    for (const worker of this.#workers()) this.#out.send(worker, { type: 'release', epoch: this.#epoch });
    this.#out.lost(this.#epoch, loss);
  }

  /** Begins an epoch when every seat is taken. */
  #form(): void {
    if (this.#phase.name !== 'forming' || !this.#brokerUp || this.#now < this.#formNotBefore) return;
    for (const [worker, member] of this.#members) {
      if (member.refused !== null || this.#seated.includes(worker)) continue;
      const free = this.#seated.indexOf(null);
      if (free >= 0) this.#seated[free] = worker;
    }
    if (this.missingSeats().length > 0) return;
    this.#epoch = Math.max(this.#epoch, ...this.#workers().map((worker) => this.#members.get(worker)?.epochSeen ?? 0)) + 1;
    const workerOf = (stage: number, rank: number): string => {
      const seat = this.#options.seats.findIndex((one) => one.stage === stage && one.rank === rank);
      return this.#seated[seat] ?? '';
    };
    const placement: Placement = {
      id: this.#options.placementId,
      epoch: this.#epoch,
      model: this.#options.model,
      link: this.#options.link,
      wire: this.#options.wire,
      stages: this.#options.placementTemplate.stages.map((stage, index) => ({
        layers: stage.layers,
        ranks: stage.ranks.map((rank, position) => ({ ...rank, worker: workerOf(index, position) })),
      })),
    };
    this.#placement = placement;
    this.#linkKey = this.#options.newLinkKey();
    const workers = this.#workers();
    this.#phase = {
      name: 'loading',
      ready: new Map(),
      progressAt: new Map(workers.map((worker) => [worker, this.#now])),
      bytes: new Map(),
    };
    this.#out.event('epoch_began', { epoch: this.#epoch, placement: placement.id, workers });
    this.#repeatNotBefore = this.#now + repeatAfterMs;
    this.#options.seats.forEach((seat, index) => {
      const worker = this.#seated[index];
      if (worker) this.#assign(worker, seat);
    });
  }

  #shardReady(worker: string, message: ShardReady): void {
    const index = this.#seated.indexOf(worker);
    const seat = this.#options.seats[index];
    if (this.#phase.name !== 'loading' || !seat || !this.#placement) return;
    const expected = this.#options.sliceSha256For(seat);
    if (message.sliceSha256 !== expected) {
      this.#out.send(worker, { type: 'release', epoch: this.#epoch });
      return this.#lose(worker, `worker ${worker} holds a slice with sha256 ${message.sliceSha256}, expected ${expected}`);
    }
    this.#phase.ready.set(worker, message);
    this.#out.event('shard_ready', {
      worker,
      stage: seat.stage,
      rank: seat.rank,
      bytesFetched: message.bytesFetched,
      loadMs: message.loadMs,
      kvBlocks: message.kvBlocks,
    });
    if (this.#phase.ready.size < this.#options.seats.length) return;
    const { ready } = this.#phase;
    const checksums = new Set([...ready.values()].map((one) => one.tablesChecksum));
    if (checksums.size > 1) {
      this.#endEpoch({
        code: 'worker_failed',
        message: `rope tables differ between workers: ${[...ready].map(([name, one]) => `${name} ${one.tablesChecksum}`).join(', ')}`,
      });
      return;
    }
    this.#measure(ready);
  }

  /** Round trips over gRPC and NATS between ranks that have neither shared memory nor tcp; straight on where there is nothing to choose. */
  #measure(ready: Map<string, ShardReady>): void {
    this.#roundTripUs.clear();
    const pending = new Map<number, { pair: string; driver: MeasuredDriver }>();
    if (this.#options.link === 'auto')
      for (const [a, b] of this.#peerWorkers()) {
        const facts = this.#members.get(b)?.facts;
        if (!facts || this.#shareMemory(a, b, ready) || this.#speakTcp(a, b)) continue;
        for (const driver of ['grpc', 'nats'] as const) {
          const id = ++this.#probes;
          pending.set(id, { pair: pairOf(a, b), driver });
          this.#out.send(a, {
            type: 'probe',
            id,
            peer: b,
            grpcAddress: facts.grpcAddress,
            driver,
            bytes: probeBytes,
            rounds: probeRounds,
          });
        }
      }
    if (pending.size === 0) return this.#connectAll(ready);
    this.#phase = { name: 'measuring', ready, since: this.#now, pending };
  }

  #measured({ id, roundTripUs, error }: ProbeResult): void {
    if (this.#phase.name !== 'measuring') return;
    const probe = this.#phase.pending.get(id);
    if (!probe) return;
    this.#phase.pending.delete(id);
    const median = [...roundTripUs].sort((a, b) => a - b)[Math.floor(roundTripUs.length / 2)];
    if (error === null && median !== undefined)
      this.#roundTripUs.set(probe.pair, { ...this.#roundTripUs.get(probe.pair), [probe.driver]: median });
    if (this.#phase.pending.size === 0) this.#connectAll(this.#phase.ready);
  }

  #connectAll(ready: Map<string, ShardReady>): void {
    if (!this.#placement) return;
    this.#phase = { name: 'connecting', ready, connected: new Set(), since: this.#now };
    this.#repeatNotBefore = this.#now + repeatAfterMs;
    for (const [a, b] of this.#peerWorkers())
      this.#out.event('link_chosen', {
        a,
        b,
        driver: this.#driver(a, b, ready),
        memory: this.#sumsPlaceOf(a, b, ready),
        forced: this.#options.link !== 'auto',
        roundTripUs: this.#roundTripUs.get(pairOf(a, b)) ?? null,
      });
    for (const [index, self] of this.#options.seats.entries()) {
      const own = this.#seated[index];
      if (own) this.#out.send(own, this.#connectMessage(this.#placement, self, own, ready));
    }
  }

  /** Pairs of seated workers between which frames may travel. */
  #peerWorkers(): [string, string][] {
    const pairs: [string, string][] = [];
    this.#options.seats.forEach((seat, index) =>
      this.#options.seats.slice(0, index).forEach((other, before) => {
        const [a, b] = [this.#seated[before], this.#seated[index]];
        if (a && b && this.#arePeers(other, seat)) pairs.push([a, b]);
      }),
    );
    return pairs;
  }

  /** Ranks of one stage, of neighbouring stages, and of the last and the first (sampled ids). */
  #arePeers(a: Seat, b: Seat): boolean {
    const last = Math.max(...this.#options.seats.map((seat) => seat.stage));
    const distance = Math.abs(a.stage - b.stage);
    return distance <= 1 || distance === last;
  }

  #shareMemory(a: string, b: string, ready: Map<string, ShardReady>): boolean {
    if (this.#connectFailures >= connectFailuresMax) return false;
    const host = this.#members.get(a)?.facts.hostId;
    return (
      host !== undefined && host === this.#members.get(b)?.facts.hostId && Boolean(ready.get(a)?.segment && ready.get(b)?.segment)
    );
  }

  /**
   * Where all ranks of a stage read each other's sums: each has a card of its own and gave such memory, and none must round or forward them. Whether cards reach each other is
   * found out by connecting: where they do not, the next try is through memory of the host, and then without.
   */
  #sumsPlace(stage: number, ready: Map<string, ShardReady>): 'card' | 'host' | null {
    if (this.#options.link !== 'auto' || this.#options.wire !== 'f32') return null;
    const workers = this.#options.seats.flatMap((seat, index) => (seat.stage === stage ? [this.#seated[index] ?? ''] : []));
    const [first, ...others] = workers;
    if (first === undefined || others.length === 0 || !others.every((other) => this.#shareMemory(first, other, ready)))
      return null;
    const memories = workers.map((worker) => ready.get(worker)?.peerMemory);
    const cards = new Set(memories.map((memory) => memory?.card));
    if (cards.has(undefined) || cards.size < workers.length) return null;
    if (this.#connectFailures === 0 && memories.every((memory) => memory?.handle)) return 'card';
    return this.#connectFailures <= 1 && memories.every((memory) => memory?.fd != null) ? 'host' : null;
  }

  /** Of the stage that both workers are ranks of. */
  #sumsPlaceOf(a: string, b: string, ready: Map<string, ShardReady>): 'card' | 'host' | null {
    const [stage, other] = [a, b].map((worker) => this.#options.seats[this.#seated.indexOf(worker)]?.stage);
    return stage !== undefined && stage === other ? this.#sumsPlace(stage, ready) : null;
  }

  /** Whether both are ranks of a stage whose ranks are all workers of one process: they do each step together on its card. A try that fails is followed by one through shared memory. */
  #shareCard(a: string, b: string, ready: Map<string, ShardReady>): boolean {
    if (this.#options.link !== 'auto' || this.#options.wire !== 'f32' || this.#connectFailures > 0) return false;
    const [stage, other] = [a, b].map((worker) => this.#options.seats[this.#seated.indexOf(worker)]?.stage);
    if (stage === undefined || stage !== other) return false;
    const pid = this.#members.get(a)?.facts.pid;
    return this.#options.seats.every((seat, index) => {
      const worker = this.#seated[index] ?? '';
      const facts = this.#members.get(worker)?.facts;
      return seat.stage !== stage || (facts?.device != null && facts.pid === pid && this.#shareMemory(a, worker, ready));
    });
  }

  /** Both listen for it; when connecting failed again and again, something between them lets it not through. */
  #speakTcp(a: string, b: string): boolean {
    if (this.#connectFailures >= 2 * connectFailuresMax) return false;
    return [a, b].every((worker) => Boolean(this.#members.get(worker)?.facts.tcpAddress));
  }

  /** The forced driver, else one card, else memory of cards, else shared memory, else tcp, else the faster of those that answered. */
  #driver(a: string, b: string, ready: Map<string, ShardReady>): LinkDriver {
    if (this.#options.link !== 'auto') return this.#options.link;
    if (this.#shareCard(a, b, ready)) return 'card';
    if (this.#sumsPlaceOf(a, b, ready)) return 'peer';
    if (this.#shareMemory(a, b, ready)) return 'shm';
    if (this.#speakTcp(a, b)) return 'tcp';
    const { grpc = Number.POSITIVE_INFINITY, nats = Number.POSITIVE_INFINITY } = this.#roundTripUs.get(pairOf(a, b)) ?? {};
    return nats < grpc ? 'nats' : 'grpc';
  }

  #connectMessage(placement: Placement, self: Seat, own: string, ready: Map<string, ShardReady>): Connect {
    const kvBlocks = Math.min(...[...ready.values()].map((one) => one.kvBlocks));
    const peers: Connect['peers'] = [];
    this.#options.seats.forEach((seat, index) => {
      const worker = this.#seated[index];
      const facts = worker ? this.#members.get(worker)?.facts : undefined;
      if (!worker || worker === own || !facts || !this.#arePeers(self, seat)) return;
      const { hostId, grpcAddress, tcpAddress } = facts;
      const { segment = null, peerMemory = null } = ready.get(worker) ?? {};
      const place = this.#sumsPlaceOf(own, worker, ready);
      peers.push({
        stage: seat.stage,
        rank: seat.rank,
        worker,
        hostId,
        grpcAddress,
        tcpAddress,
        segment,
        driver: this.#driver(own, worker, ready),
        memory: place && peerMemory ? { ...peerMemory, place } : null,
      });
    });
    return { type: 'connect', placement: placement.id, epoch: this.#epoch, kvBlocks, linkKey: this.#linkKey, peers };
  }

  #connected(worker: string): void {
    if (this.#phase.name !== 'connecting' || !this.#placement) return;
    this.#phase.connected.add(worker);
    if (this.#phase.connected.size < this.#options.seats.length) return;
    const kvBlocks = Math.min(...[...this.#phase.ready.values()].map((one) => one.kvBlocks));
    const info: EpochInfo = { epoch: this.#epoch, placement: this.#placement, kvBlocks };
    this.#phase = { name: 'serving', info, since: this.#now };
    this.#out.event('epoch_serving', { epoch: this.#epoch, kvBlocks });
    this.#out.serving(info);
  }
}
