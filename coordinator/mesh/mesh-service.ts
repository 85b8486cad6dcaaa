/**
 * The mesh state machine on a real transport and clock: messages of workers come in, the engine's plans go out, and epochs are announced to the engine.
 */
import { toShardmeshError } from '../../protocol/errors.ts';
import type { MeshId, PlacementId, WorkerId } from '../../protocol/ids.ts';
import { decodeWorkerMessage, encodeMessage } from '../../protocol/message-codec.ts';
import type { CoordinatorMessage, Trace, TraceClock, TraceSpans, WorkerMessage } from '../../protocol/messages.ts';
import type { StepPlan, StepResult } from '../../protocol/step-plan.ts';
import { plansBytesMax, plansMax } from '../../protocol/step-codec.ts';
import { meshSubjects, sourceOf, type MeshSubjects } from '../../protocol/subjects.ts';
import { monotonicUs, TraceRecorder } from '../../protocol/trace.ts';
import type { Transport } from '../../protocol/transport.ts';
import type { MeshEpoch, MeshFault, StepTransport } from '../engine/step-transport.ts';
import type { TraceMesh } from '../observe/trace-session.ts';
import { Mesh, type MeshOptions } from './mesh.ts';

export interface MeshServiceOptions {
  transport: Transport;
  meshId: MeshId;
  mesh: MeshOptions;
  recorder?: TraceRecorder;
  /** Workers whose access was taken away before this start. */
  revoked?: readonly string[];
  onFatal(error: Error): void;
  /** Once for every ping that the broker leaves without an answer for a second. */
  onBrokerSilent?(): void;
  event(name: string, fields: Record<string, unknown>): void;
}

const tickMs = 50;
const pingEveryMs = 500;
/** Of a ping, before whoever runs the broker looks whether it is frozen: well before the connection is given up. */
const pingAnswerMs = 1_000;
/** A worker whose connection ended is lost when it does not show itself for this long (it has two connections, and may be back). */
const goodbyeMs = 700;

export class MeshService implements StepTransport, TraceMesh {
  readonly mesh: Mesh;
  readonly #options: MeshServiceOptions;
  readonly #subjects: MeshSubjects;
  readonly #onResult: ((result: StepResult) => void)[] = [];
  readonly #onEpoch: ((epoch: MeshEpoch) => void)[] = [];
  readonly #onLost: ((fault: MeshFault) => void)[] = [];
  #timer: NodeJS.Timeout | null = null;
  readonly #recorder: TraceRecorder;
  #onTrace: ((message: TraceClock | TraceSpans) => void) | null = null;
  /** When the ping that is under way was sent, and the next may be. */
  #pingSentAt: number | null = null;
  #pingNotBefore = 0;
  #silenceReported = false;
  refusedMessages = 0;
  readonly #revoked: Set<string>;

  private constructor(options: MeshServiceOptions) {
    this.#options = options;
    this.#revoked = new Set(options.revoked);
    this.#recorder = options.recorder ?? new TraceRecorder();
    this.#subjects = meshSubjects(options.meshId);
    this.mesh = new Mesh(options.mesh, {
      send: (worker, message) => this.#send(worker, message),
      serving: (info) => {
        const arithmetic = this.mesh.members().find((member) => member.seat)?.facts.arithmetic ?? '';
        for (const listener of this.#onEpoch) listener({ ...info, arithmetic });
      },
      lost: (_, fault) => {
        for (const listener of this.#onLost) listener(fault);
      },
      result: (result) => {
        for (const listener of this.#onResult) listener(result);
      },
      event: (name, fields) => options.event(name, fields),
    });
  }

  /** Subscribes to all that workers say. Listeners of the engine must be attached before workers join, i.e. synchronously after this resolves. */
  static async start(options: MeshServiceOptions): Promise<MeshService> {
    const service = new MeshService(options);
    const { transport } = options;
    const subjects = service.#subjects;
    transport.onEvent((event) => {
      if (event.type === 'disconnected' || event.type === 'closed') service.mesh.brokerLost();
      else if (event.type === 'connected') service.mesh.brokerBack(performance.now());
      else if (event.type === 'permission_denied')
        options.onFatal(new Error(`the NATS server denied ${event.operation} on ${event.subject}`));
      if (event.type === 'closed' && event.error) options.onFatal(event.error);
      if (event.type !== 'permission_denied') options.event(`broker_${event.type}`, { ...event, type: undefined });
    });
    for (const subject of [subjects.heartbeats(), subjects.registers(), subjects.results(), subjects.events()])
      await transport.subscribe(subject, (bytes, from) => service.#receive(bytes, from));
    service.#timer = setInterval(() => {
      const now = performance.now();
      service.#ping(now);
      service.mesh.tick(now, service.#brokerSilentMs(now));
    }, tickMs);
    return service;
  }

  #brokerSilentMs(now: number): number {
    return this.#pingSentAt === null ? 0 : now - this.#pingSentAt;
  }

  get ready(): boolean {
    return this.mesh.serving !== null && this.#options.transport.connected;
  }

  publishPlans(plans: StepPlan[]): void {
    // Nearly always one message. Chunks of long prompts and what penalties need are large, and travel alone.
    let from = 0;
    let bytes = 0;
    plans.forEach((plan, index) => {
      const size = plan.sequences.reduce((sum, { tokens }) => sum + 64 + 4 * (tokens?.length ?? 0), 0);
      if (index > from && (bytes + size > plansBytesMax || plan.opened.length > 0 || index - from === plansMax)) {
        this.#publish(plans.slice(from, index));
        from = index;
        bytes = 0;
      }
      bytes += size;
    });
    this.#publish(plans.slice(from));
  }

  #publish(plans: StepPlan[]): void {
    const [{ step, placement }] = plans as [StepPlan];
    const recorder = this.#recorder;
    try {
      let startUs = recorder.on ? monotonicUs() : 0;
      const bytes = encodeMessage({ type: 'step_plans', plans });
      if (recorder.on) recorder.add('encode plan', step, startUs, (startUs = monotonicUs()));
      const sent = this.#options.transport.publish(this.#subjects.plan(placement as PlacementId), bytes);
      if (recorder.on) recorder.add('publish plan', step, startUs);
      if (!sent) this.mesh.brokerLost();
    } catch (error) {
      // Larger than the broker takes: the engine's limits keep plans far below that.
      this.reportFault({ code: 'internal', message: `step plan ${step} was not sent: ${toShardmeshError(error).message}` });
    }
  }

  onResult(listener: (result: StepResult) => void): void {
    this.#onResult.push(listener);
  }
  onEpoch(listener: (epoch: MeshEpoch) => void): void {
    this.#onEpoch.push(listener);
  }
  onLost(listener: (fault: MeshFault) => void): void {
    this.#onLost.push(listener);
  }

  explain(fault: MeshFault): MeshFault {
    const now = performance.now();
    return this.mesh.explain(fault, this.#brokerSilentMs(now), now);
  }

  reportFault(fault: MeshFault): void {
    this.mesh.stepFailed(fault, performance.now());
  }

  traceWorkers(): { worker: string; name: string }[] {
    return this.mesh
      .members()
      .flatMap(({ worker, seat }) => (seat ? [{ worker, name: `worker ${seat.stage}.${seat.rank}` }] : []));
  }

  sendTrace(worker: string, message: Trace): void {
    this.#send(worker, message);
  }

  onTrace(listener: ((message: TraceClock | TraceSpans) => void) | null): void {
    this.#onTrace = listener;
  }

  /** Takes a worker out of the mesh for good: the epoch ends where it has a seat, and no other worker keeps or takes a stream with it. */
  revoke(worker: string): void {
    this.#revoked.add(worker);
    this.mesh.workerGone(worker, `worker ${worker} was revoked`, performance.now());
    for (const member of this.mesh.members()) this.#send(member.worker, { type: 'revoked', workers: [worker] });
  }

  /** The broker says that a connection of a worker ended. */
  connectionEnded(worker: WorkerId, reason: string): void {
    const seenAt = this.mesh.members().find((member) => member.worker === worker)?.seenAt;
    setTimeout(() => {
      const member = this.mesh.members().find((one) => one.worker === worker);
      if (member && member.seenAt === seenAt)
        this.mesh.workerGone(worker, `the connection of worker ${worker} ended: ${reason}`, performance.now());
    }, goodbyeMs).unref();
  }

  stop(): void {
    if (this.#timer) clearInterval(this.#timer);
  }

  /** Asks the broker for a sign of life, one at a time: tells a frozen broker from a step that is late for another reason. */
  #ping(now: number): void {
    const { transport } = this.#options;
    if (!this.#silenceReported && this.#brokerSilentMs(now) > pingAnswerMs) {
      this.#silenceReported = true;
      this.#options.onBrokerSilent?.();
    }
    if (this.#pingSentAt !== null || now < this.#pingNotBefore || !transport.connected) return;
    this.#pingSentAt = now;
    this.#silenceReported = false;
    this.#pingNotBefore = now + pingEveryMs;
    void transport
      .flush()
      .catch(() => undefined)
      .then(() => (this.#pingSentAt = null));
  }

  #receive(bytes: Uint8Array, subject: string): void {
    const recorder = this.#recorder;
    const startUs = recorder.on ? monotonicUs() : 0;
    let message: WorkerMessage;
    try {
      message = decodeWorkerMessage(bytes);
    } catch (error) {
      this.refusedMessages++;
      this.#options.event('message_refused', { subject, message: (error as Error).message });
      return;
    }
    const worker = sourceOf(subject);
    if (worker === null || ('worker' in message && message.worker !== worker)) {
      this.refusedMessages++;
      return;
    }
    if (this.#revoked.has(worker)) return void this.refusedMessages++;
    if (message.type === 'join' && this.#revoked.size > 0) this.#send(worker, { type: 'revoked', workers: [...this.#revoked] });
    if (message.type === 'trace_clock' || message.type === 'trace_spans') return this.#onTrace?.(message);
    const step = message.type === 'step_result' ? message.step : 0;
    if (step > 0 && recorder.on) recorder.add('decode result', step, startUs);
    this.mesh.receive(worker, message, performance.now());
    if (step > 0 && recorder.on) recorder.add('receive result', step, startUs);
  }

  #send(worker: string, message: CoordinatorMessage): void {
    this.#options.transport.publish(this.#subjects.control(worker as WorkerId), encodeMessage(message));
  }
}
