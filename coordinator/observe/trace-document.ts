/**
 * A trace as the browser's trace viewer reads it (chrome://tracing, ui.perfetto.dev): the Trace Event Format, one process of the mesh a process, its event loop and
 * its compute thread as threads, arrows from a plan to the steps it became and from the last step back to the coordinator.
 */
import { lanes, spanNumbers } from '../../protocol/trace.ts';
import type { ProcessTrace } from './trace-session.ts';

export interface TraceEvent {
  name: string;
  /** X: a span; M: a name; s, f: begin and end of an arrow. */
  ph: 'X' | 'M' | 's' | 'f';
  pid: number;
  tid: number;
  /** Microseconds since the first span. */
  ts?: number;
  dur?: number;
  id?: string;
  bp?: 'e';
  cat?: string;
  args?: Record<string, unknown>;
}

export interface TraceDocument {
  displayTimeUnit: 'ms';
  traceEvents: TraceEvent[];
  otherData: { processes: Pick<ProcessTrace, 'name' | 'dropped' | 'cpu' | 'offsetUs' | 'roundTripUs'>[] };
}

/** Where arrows begin and end. The span an arrow hangs on is the one around its time on that thread. */
const arrows = [
  { from: 'publish plan', to: 'submit', back: false },
  { from: 'publish result', to: 'commit', back: true },
] as const;

export function traceDocument(processes: readonly ProcessTrace[]): TraceDocument {
  const startUs = firstStart(processes);
  const traceEvents: TraceEvent[] = [];
  processes.forEach(({ name, names, spans, offsetUs }, index) => {
    const pid = index + 1;
    traceEvents.push({ name: 'process_name', ph: 'M', pid, tid: 0, args: { name } });
    lanes.forEach((lane, tid) => traceEvents.push({ name: 'thread_name', ph: 'M', pid, tid: tid + 1, args: { name: lane } }));
    for (let i = 0; i < spans.length; i += spanNumbers) {
      const [nameIndex, lane, step, start, dur] = spans.slice(i, i + spanNumbers) as [number, number, number, number, number];
      const ts = start + offsetUs - startUs;
      const span = names[nameIndex]!;
      traceEvents.push({ name: span, ph: 'X', pid, tid: lane + 1, ts, dur, ...(step > 0 && { args: { step } }) });
      for (const { from, to, back } of arrows) {
        // A plan goes to every worker: an arrow each. A result comes from one.
        const cat = back ? 'result' : 'plan';
        if (span === from) {
          const ends = back ? [`${step}`] : processes.slice(1).map((_, worker) => `${step}.${worker + 2}`);
          for (const id of ends) traceEvents.push({ name: cat, ph: 's', cat, id, pid, tid: lane + 1, ts });
        } else if (span === to) {
          const id = back ? `${step}` : `${step}.${pid}`;
          traceEvents.push({ name: cat, ph: 'f', bp: 'e', cat, id, pid, tid: lane + 1, ts });
        }
      }
    }
  });
  return {
    displayTimeUnit: 'ms',
    traceEvents,
    otherData: {
      processes: processes.map(({ name, dropped, cpu, offsetUs, roundTripUs }) => ({
        name,
        dropped,
        cpu,
        offsetUs,
        roundTripUs,
      })),
    },
  };
}

function firstStart(processes: readonly ProcessTrace[]): number {
  let first = Number.POSITIVE_INFINITY;
  for (const { spans, offsetUs } of processes)
    for (let i = 3; i < spans.length; i += spanNumbers) first = Math.min(first, spans[i]! + offsetUs);
  return Number.isFinite(first) ? first : 0;
}
