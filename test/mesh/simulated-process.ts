/**
 * A worker process for tests of a whole mesh in one process: it speaks the protocol on a transport as a real one does (joins, loads, connects, beats, runs
 * plans, fails) and can be killed, frozen and thawed. Its steps run in a `Fabric`, which stands for links and collectives: a step is done when every rank of the
 * placement has its plan, and a rank that waits in vain says for whom.
 */
import type { PlacementId, WorkerId } from '../../protocol/ids.ts';
import { meshTimers } from '../../protocol/limits.ts';
import { decodeCoordinatorMessage, encodeMessage } from '../../protocol/message-codec.ts';
import type { Assign, CoordinatorMessage, Heartbeat, WorkerMessage } from '../../protocol/messages.ts';
import type { StepPlan, StepResult } from '../../protocol/step-plan.ts';
import type { MeshSubjects } from '../../protocol/subjects.ts';
import { SimulatedWorker, type SimulatedWorkerOptions } from '../unit/coordinator/scheduler/simulated-worker.ts';
import type { MemoryBus, MemoryTransport } from './memory-transport.ts';

export const sliceSha256 = 'ab'.repeat(32);
const stepMs = 15;
const loadMs = 40;

/** Which ranks have reached which step, of one mesh. */
export class Fabric {
  readonly #arrived = new Map<string, Map<string, () => void>>();

  /** `run` is called when all of `ranks` have arrived at this step of this epoch. @returns who is missing now */
  arrive(epoch: number, step: number, worker: string, ranks: readonly string[], run: () => void): () => string[] {
    const key = `${epoch}.${step}`;
    const arrived = this.#arrived.get(key) ?? new Map<string, () => void>();
    this.#arrived.set(key, arrived);
    arrived.set(worker, run);
    if (ranks.every((rank) => arrived.has(rank))) for (const one of arrived.values()) one();
    return () => ranks.filter((rank) => !arrived.has(rank));
  }
}

export interface SimulatedProcessOptions {
  worker: WorkerId;
  bus: MemoryBus;
  subjects: MeshSubjects;
  fabric: Fabric;
  limits: SimulatedWorkerOptions;
}

export class SimulatedProcess {
  readonly transport: MemoryTransport;
  readonly #options: SimulatedProcessOptions;
  #state: Heartbeat['state'] = 'idle';
  #epoch = 0;
  #assign: Assign | null = null;
  #runner: SimulatedWorker | null = null;
  #lastStep = 0;
  /** To its plans; the placement's id is the same in all epochs. */
  #subscribed = false;
  #alive = true;
  /** Timers that went off while it was frozen. */
  #held: (() => void)[] | null = null;
  /** Plans of an epoch that is over. */
  stalePlans = 0;

  constructor(options: SimulatedProcessOptions) {
    this.#options = options;
    this.transport = options.bus.connect(options.worker);
    void this.transport.subscribe(options.subjects.controls(options.worker), (bytes) => this.#receive(bytes));
    this.transport.onEvent((event) => {
      if (event.type === 'connected') this.#now(() => this.#join());
    });
    this.#after(5, () => {
      this.#join();
      this.#beat();
    });
  }

  /** SIGKILL. */
  kill(): void {
    this.#alive = false;
    void this.transport.close();
  }

  freeze(): void {
    this.#held ??= [];
    this.transport.setFrozen(true);
  }

  thaw(): void {
    const held = this.#held ?? [];
    this.#held = null;
    for (const callback of held) callback();
    if (this.#alive) this.transport.setFrozen(false);
  }

  #now(callback: () => void): void {
    if (!this.#alive) return;
    if (this.#held) this.#held.push(callback);
    else callback();
  }

  #after(ms: number, callback: () => void): NodeJS.Timeout {
    return setTimeout(() => this.#now(callback), ms);
  }

  #receive(bytes: Uint8Array): void {
    const message: CoordinatorMessage = decodeCoordinatorMessage(bytes);
    switch (message.type) {
      case 'step_plans':
        return message.plans.forEach((plan) => this.#plan(plan));
      case 'assign':
        return this.#load(message);
      case 'connect':
        if (message.epoch !== this.#epoch || this.#state === 'loading') return;
        if (this.#state !== 'connected') {
          this.#runner = new SimulatedWorker(this.#options.limits);
          this.#lastStep = 0;
          this.#state = 'connected';
        }
        return this.#send({ type: 'connected', worker: this.#options.worker, epoch: this.#epoch });
      case 'release':
        if (message.epoch < this.#epoch) return;
        this.#epoch = message.epoch;
        this.#end('ready');
        return;
      case 'rejoin':
        return this.#join();
      case 'probe': {
        const { id, peer, driver } = message;
        const roundTripUs = [driver === 'grpc' ? 100 : 300];
        return this.#send({ type: 'probe_result', id, worker: this.#options.worker, peer, roundTripUs, error: null });
      }
      default:
        return;
    }
  }

  #end(state: Heartbeat['state']): void {
    this.#runner = null;
    if (this.#state !== 'idle' && this.#state !== 'loading') this.#state = state;
  }

  #load(assign: Assign): void {
    const { epoch, id } = assign.placement;
    if (epoch < this.#epoch || (epoch === this.#epoch && this.#state === 'connected')) return;
    this.#epoch = epoch;
    this.#assign = assign;
    this.#runner = null;
    if (!this.#subscribed)
      void this.transport.subscribe(this.#options.subjects.plan(id as PlacementId), (bytes) => this.#receive(bytes));
    this.#subscribed = true;
    // Weights that are here stay.
    const wait = this.#state === 'idle' ? loadMs : 1;
    this.#state = 'loading';
    this.#after(wait, () => {
      if (this.#epoch !== epoch) return;
      this.#state = 'ready';
      this.#send({
        type: 'shard_ready',
        worker: this.#options.worker,
        epoch,
        sliceSha256,
        tablesChecksum: 'tables',
        kvBlocks: this.#options.limits.blocks,
        bytesFetched: 0,
        loadMs: wait,
        segment: null,
        peerMemory: null,
      });
    });
  }

  #plan(plan: StepPlan): void {
    const runner = this.#runner;
    const assign = this.#assign;
    if (plan.epoch !== this.#epoch || !runner || !assign) {
      this.stalePlans++;
      return;
    }
    if (plan.step !== this.#lastStep + 1)
      return this.#fail(plan.step, 'plan_error', `plan ${plan.step} came after ${this.#lastStep}`, null);
    this.#lastStep = plan.step;
    runner.publish(plan);
    const result = runner.take();
    const { epoch } = plan;
    const ranks = assign.placement.stages.flatMap((stage) => stage.ranks.map((rank) => rank.worker));
    let missing: () => string[] = () => [];
    const deadline = this.#after(plan.waitTimeoutMs, () => {
      if (this.#epoch !== epoch || !this.#runner) return;
      const [peer] = missing();
      this.#fail(plan.step, 'wait_timeout', `waited ${plan.waitTimeoutMs} ms`, peer ?? null);
    });
    missing = this.#options.fabric.arrive(epoch, plan.step, this.#options.worker, ranks, () => {
      clearTimeout(deadline);
      this.#after(stepMs, () => this.#stepDone(epoch, result));
    });
  }

  #stepDone(epoch: number, result: StepResult): void {
    const assign = this.#assign;
    // What a frozen worker had computed is still sent when it thaws, as from a socket's buffer: the coordinator must not believe it.
    if (!assign || epoch !== assign.placement.epoch) return;
    if (assign.rank === 0 && assign.stage === assign.placement.stages.length - 1) this.#send(result);
  }

  #fail(step: number, code: string, message: string, peer: string | null): void {
    this.#end('failed');
    this.#send({ type: 'worker_failed', worker: this.#options.worker, epoch: this.#epoch, step, code, message, peer });
  }

  #join(): void {
    this.#send({
      type: 'join',
      worker: this.#options.worker,
      protocolMin: 1,
      protocolMax: 1,
      epochSeen: this.#epoch,
      facts: {
        hostId: 'host',
        pid: 1,
        cpuModel: 'simulated',
        isa: 'avx2',
        cores: 1,
        memoryBytes: 1e9,
        executor: 'auto',
        device: null,
        arithmetic: '1',
        grpcAddress: '127.0.0.1:1',
        tcpAddress: '',
        weightBytesPerSecond: 0,
      },
    });
  }

  #beat(): void {
    const stats = {
      steps: 0,
      busyUs: 0,
      idleUs: 0,
      collectiveUs: 0,
      receiveUs: 0,
      framesOut: 0,
      bytesOut: 0,
      staleFrames: 0,
      corruptFrames: 0,
    };
    this.#send({
      type: 'heartbeat',
      worker: this.#options.worker,
      state: this.#state,
      epoch: this.#epoch,
      stepDone: 0,
      plansQueued: 0,
      rssBytes: 1,
      stats,
    });
    this.#after(meshTimers.heartbeatMs, () => this.#beat());
  }

  #send(message: WorkerMessage): void {
    const { subjects, worker } = this.#options;
    const subject =
      message.type === 'heartbeat'
        ? subjects.heartbeat(worker)
        : message.type === 'join'
          ? subjects.register(worker)
          : message.type === 'step_result'
            ? subjects.result(worker)
            : subjects.event(worker);
    this.transport.publish(subject, encodeMessage(message));
  }
}
