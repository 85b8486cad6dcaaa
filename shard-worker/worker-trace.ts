/** A worker's part of a trace: answers the coordinator's clock questions, records while it is told to, and sends what it recorded in parts. */
import type { StepDone } from '../kernels/binding-types.ts';
import { traceLimits } from '../protocol/limits.ts';
import type { Trace, TraceClock, TraceSpans } from '../protocol/messages.ts';
import { cpuUse, cpuUsedSince, monotonicUs, spanNumbers, type CpuUse, type TraceRecorder } from '../protocol/trace.ts';

export interface WorkerTraceOutlets {
  /** Spans of the compute thread, or none any more. */
  record(on: boolean): void;
  send(message: TraceClock | TraceSpans): void;
}

export class WorkerTrace {
  readonly #worker: string;
  readonly #recorder: TraceRecorder;
  readonly #outlets: WorkerTraceOutlets;
  #cpuBefore: CpuUse | null = null;
  /** A coordinator that went away asks for no stop. */
  #forgotten: NodeJS.Timeout | null = null;

  constructor(worker: string, recorder: TraceRecorder, outlets: WorkerTraceOutlets) {
    this.#worker = worker;
    this.#recorder = recorder;
    this.#outlets = outlets;
  }

  receive({ id, action }: Trace): void {
    if (action === 'stop') return this.#stop(id);
    if (action === 'start') this.#start();
    this.#outlets.send({ type: 'trace_clock', id, worker: this.#worker, atUs: monotonicUs() });
  }

  /** A step came back from the executor; its callback began at `callbackUs` and ends now. */
  step({ step, beganUs, endedUs, spans }: StepDone, callbackUs: number): void {
    const recorder = this.#recorder;
    recorder.add('step done', step, callbackUs);
    recorder.add('step', step, beganUs, endedUs, 'compute');
    if (spans === null) return;
    const { names, values } = spans;
    for (let i = 0; i < values.length; i += 3) recorder.add(names[values[i]!]!, step, values[i + 1]!, values[i + 2], 'compute');
  }

  #start(): void {
    if (this.#forgotten) clearTimeout(this.#forgotten);
    this.#forgotten = setTimeout(() => this.#end(), 2 * traceLimits.millisecondsMax);
    this.#forgotten.unref();
    this.#cpuBefore = cpuUse();
    this.#recorder.start();
    this.#outlets.record(true);
  }

  #end(): ReturnType<TraceRecorder['stop']> {
    if (this.#forgotten) clearTimeout(this.#forgotten);
    this.#forgotten = null;
    this.#outlets.record(false);
    return this.#recorder.stop();
  }

  #stop(id: number): void {
    const cpu = this.#cpuBefore ? cpuUsedSince(this.#cpuBefore) : null;
    const { names, spans, dropped } = this.#end();
    const numbers = traceLimits.spansPerMessageMax * spanNumbers;
    for (let from = 0; from === 0 || from < spans.length; from += numbers) {
      const part = spans.slice(from, from + numbers);
      let baseUs = Number.POSITIVE_INFINITY;
      for (let i = 3; i < part.length; i += spanNumbers) baseUs = Math.min(baseUs, part[i]!);
      if (part.length === 0) baseUs = 0;
      for (let i = 3; i < part.length; i += spanNumbers) part[i]! -= baseUs;
      const last = from + numbers >= spans.length;
      this.#outlets.send({
        type: 'trace_spans',
        id,
        worker: this.#worker,
        baseUs,
        names,
        spans: part,
        dropped: last ? dropped : 0,
        cpu: last ? (cpu ?? { loopUs: 0, loopWaitUs: 0, processUs: 0 }) : null,
      });
    }
  }
}
