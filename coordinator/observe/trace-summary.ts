/** What a trace says in numbers: per process and step, how long each kind of span took, and how much of the time the event loop and the compute thread were busy. */
import { lanes, spanNumbers, type CpuUse } from '../../protocol/trace.ts';
import type { ProcessTrace } from './trace-session.ts';

export interface SpanSummary {
  name: string;
  lane: string;
  count: number;
  /** Mean over the process's steps, waits inside included. */
  usPerStep: number;
  medianUs: number;
  p99Us: number;
}

export interface ProcessSummary {
  name: string;
  /** Steps that were seen whole. */
  steps: number;
  /** CPU time of the event loop, and its wait for a core, a step. */
  loopUsPerStep: number;
  loopWaitUsPerStep: number;
  /** CPU time of all threads, a step. */
  processUsPerStep: number;
  /** Of the time from the first compute step to the last: the share in which the compute thread ran no step. */
  idleShare: number;
  /** Share of the time that garbage collection took on the event loop. */
  gcShare: number;
  spans: SpanSummary[];
}

export function summarizeTrace(processes: readonly ProcessTrace[]): ProcessSummary[] {
  return processes.map((process) => summarize(process));
}

function summarize({ name, names, spans, cpu }: ProcessTrace): ProcessSummary {
  const durations = new Map<string, number[]>();
  let first = Number.POSITIVE_INFINITY;
  let last = 0;
  let busyUs = 0;
  let gcUs = 0;
  let loopFirst = Number.POSITIVE_INFINITY;
  let loopLast = 0;
  const steps = new Set<number>();
  for (let i = 0; i < spans.length; i += spanNumbers) {
    const [nameIndex, lane, step, start, duration] = spans.slice(i, i + spanNumbers) as [number, number, number, number, number];
    const span = names[nameIndex]!;
    if (step > 0) steps.add(step);
    const key = `${lane}${span}`;
    const known = durations.get(key);
    if (known) known.push(duration);
    else durations.set(key, [duration]);
    if (lane === 0) {
      loopFirst = Math.min(loopFirst, start);
      loopLast = Math.max(loopLast, start + duration);
      if (span === 'gc') gcUs += duration;
    } else if (span === 'step') {
      busyUs += duration;
      first = Math.min(first, start);
      last = Math.max(last, start + duration);
    }
  }
  const count = Math.max(1, steps.size);
  return {
    name,
    steps: steps.size,
    ...cpuPerStep(cpu, count),
    idleShare: last > first ? 1 - busyUs / (last - first) : 0,
    gcShare: loopLast > loopFirst ? gcUs / (loopLast - loopFirst) : 0,
    spans: [...durations].map(([key, all]) => {
      all.sort((a, b) => a - b);
      return {
        name: key.slice(1),
        lane: lanes[Number(key[0])]!,
        count: all.length,
        usPerStep: all.reduce((sum, one) => sum + one, 0) / count,
        medianUs: all[Math.floor(all.length / 2)]!,
        p99Us: all[Math.min(all.length - 1, Math.floor(all.length * 0.99))]!,
      };
    }),
  };
}

const cpuPerStep = (cpu: CpuUse, steps: number) => ({
  loopUsPerStep: cpu.loopUs / steps,
  loopWaitUsPerStep: cpu.loopWaitUs / steps,
  processUsPerStep: cpu.processUs / steps,
});
