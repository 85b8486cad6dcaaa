/**
 * Takes a trace of the whole mesh: every process records spans on its own monotonic clock for a while, then all spans are brought to the coordinator's clock.
 *
 *   clocks   ask each worker for its clock a few times; the quickest round trip says best: offset = middle of the round trip - the worker's clock.
 *            An offset that the round trip cannot tell from zero is zero: the same host has one clock.
 */
import { ShardmeshError } from '../../protocol/errors.ts';
import { traceLimits } from '../../protocol/limits.ts';
import type { Trace, TraceClock, TraceSpans } from '../../protocol/messages.ts';
import { cpuUse, cpuUsedSince, monotonicUs, spanNumbers, type CpuUse, type TraceRecorder } from '../../protocol/trace.ts';

/** What one process recorded, on its own clock. */
export interface ProcessTrace {
  name: string;
  names: string[];
  spans: number[];
  dropped: number;
  cpu: CpuUse;
  /** Add this to bring its clock to the coordinator's. */
  offsetUs: number;
  /** The offset is not surer than half of this; 0 for the coordinator. */
  roundTripUs: number;
}

export interface TraceMesh {
  /** Seated workers, in the order of their seats. */
  traceWorkers(): { worker: string; name: string }[];
  sendTrace(worker: string, message: Trace): void;
  /** One listener at a time; null takes it back. */
  onTrace(listener: ((message: TraceClock | TraceSpans) => void) | null): void;
}

/**
 * @param milliseconds  1 to `traceLimits.millisecondsMax`
 * @returns the coordinator first, then the workers
 * @throws {ShardmeshError} `mesh_unavailable`: no worker has a seat, or one did not answer
 */
export async function takeTrace(mesh: TraceMesh, recorder: TraceRecorder, milliseconds: number): Promise<ProcessTrace[]> {
  if (recorder.on) throw new ShardmeshError('invalid_value', 'A trace is being taken already. Try again when it is done.');
  const workers = mesh.traceWorkers();
  if (workers.length === 0)
    throw new ShardmeshError('mesh_unavailable', undefined, { details: { reason: 'no worker has a seat yet' } });
  const cpuBefore = cpuUse();
  // From here on another trace is refused, also while clocks are compared.
  recorder.start();
  const answers = new Answers(mesh);
  try {
    const clocks = new Map<string, Clock>();
    for (const { worker } of workers) clocks.set(worker, await clockOf(worker, answers));
    await Promise.all(workers.map(({ worker }) => answers.clock(worker, 'start')));
    await new Promise((resolve) => setTimeout(resolve, milliseconds));
    const own = { ...recorder.stop(), cpu: cpuUsedSince(cpuBefore) };
    const recorded = await Promise.all(workers.map(({ worker }) => answers.spans(worker)));
    return [
      { name: 'coordinator', ...own, offsetUs: 0, roundTripUs: 0 },
      ...workers.map(({ worker, name }, index) => ({ name, ...recorded[index]!, ...clocks.get(worker)! })),
    ];
  } finally {
    answers.close();
    if (recorder.on) recorder.stop();
  }
}

interface Clock {
  offsetUs: number;
  roundTripUs: number;
}

async function clockOf(worker: string, answers: Answers): Promise<Clock> {
  let best: Clock = { offsetUs: 0, roundTripUs: Number.POSITIVE_INFINITY };
  for (let round = 0; round < traceLimits.clockRounds; round++) {
    const sentUs = monotonicUs();
    const { atUs } = await answers.clock(worker, 'clock');
    const backUs = monotonicUs();
    if (backUs - sentUs < best.roundTripUs) best = { offsetUs: (sentUs + backUs) / 2 - atUs, roundTripUs: backUs - sentUs };
  }
  return Math.abs(best.offsetUs) <= best.roundTripUs / 2 ? { ...best, offsetUs: 0 } : best;
}

type Recorded = Pick<ProcessTrace, 'names' | 'spans' | 'dropped' | 'cpu'>;

/** Questions by number, and the answers that came. */
class Answers {
  readonly #mesh: TraceMesh;
  readonly #waiting = new Map<number, { worker: string; take: (message: TraceClock | TraceSpans) => void }>();
  #lastId = 0;

  constructor(mesh: TraceMesh) {
    this.#mesh = mesh;
    mesh.onTrace((message) => {
      const waiting = this.#waiting.get(message.id);
      if (waiting?.worker === message.worker) waiting.take(message);
    });
  }

  close(): void {
    this.#mesh.onTrace(null);
  }

  clock(worker: string, action: 'clock' | 'start'): Promise<TraceClock> {
    return this.#ask(worker, action, (message) => (message.type === 'trace_clock' ? message : null));
  }

  spans(worker: string): Promise<Recorded> {
    const all: Recorded = { names: [], spans: [], dropped: 0, cpu: { loopUs: 0, loopWaitUs: 0, processUs: 0 } };
    return this.#ask(worker, 'stop', (message) => {
      if (message.type !== 'trace_spans') return null;
      const { names, spans, baseUs, dropped, cpu } = message;
      for (let i = 3; i < spans.length; i += spanNumbers) spans[i]! += baseUs;
      for (const number of spans) all.spans.push(number);
      return cpu === null ? null : Object.assign(all, { names, dropped, cpu });
    });
  }

  #ask<T>(worker: string, action: Trace['action'], answer: (message: TraceClock | TraceSpans) => T | null): Promise<T> {
    const id = ++this.#lastId;
    return new Promise<T>((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#waiting.delete(id);
        const reason = `worker ${worker} did not answer a trace within ${traceLimits.answerTimeoutMs} ms`;
        reject(new ShardmeshError('mesh_unavailable', undefined, { details: { reason } }));
      }, traceLimits.answerTimeoutMs);
      this.#waiting.set(id, {
        worker,
        take: (message) => {
          const result = answer(message);
          if (result === null) return;
          clearTimeout(timer);
          this.#waiting.delete(id);
          resolve(result);
        },
      });
      this.#mesh.sendTrace(worker, { type: 'trace', id, action });
    });
  }
}
