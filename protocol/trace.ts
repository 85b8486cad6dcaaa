/**
 * What one process did when: spans on its monotonic clock, kept in memory while a trace is being taken. Off (as it almost always is) a span costs its caller
 * one look at `on`. The trace of a whole mesh is put together by `coordinator/observe/trace-session.ts`.
 */
import { readFileSync } from 'node:fs';
import { PerformanceObserver } from 'node:perf_hooks';
import { traceLimits } from './limits.ts';

/** Where a span lies: JavaScript on the event loop, or the compute thread of a worker. */
export const lanes = ['event loop', 'compute'] as const;
export type Lane = (typeof lanes)[number];

/** Numbers of one span in `TraceSpans.spans`: index into `names`, index into `lanes`, step (0: of none), start, duration (µs). */
export const spanNumbers = 5;

export interface RecordedSpans {
  names: string[];
  spans: number[];
  /** Spans that found no room. */
  dropped: number;
}

/** CPU time of a process up to now, microseconds. `loopWait`: the event loop wanted a core and had none. */
export interface CpuUse {
  loopUs: number;
  loopWaitUs: number;
  processUs: number;
}

// performance.now() is this clock with another origin, and much cheaper to read.
const originUs = Number(process.hrtime.bigint()) / 1e3 - performance.now() * 1e3;

/** CLOCK_MONOTONIC in microseconds: one clock for all processes of a host, the addon's threads included. */
export const monotonicUs = (): number => originUs + performance.now() * 1e3;

export class TraceRecorder {
  /** Whether a trace is being taken. */
  on = false;
  readonly #indexOf = new Map<string, number>();
  #spans: number[] = [];
  #dropped = 0;
  /** Pauses of the event loop that are nobody's own. Hears of each some time after it was over. */
  readonly #garbage = new PerformanceObserver((list) => {
    if (!this.on) return;
    for (const { startTime, duration } of list.getEntries()) {
      const startUs = originUs + startTime * 1e3;
      this.add('gc', 0, startUs, startUs + duration * 1e3);
    }
  });

  start(): void {
    this.#indexOf.clear();
    this.#spans = [];
    this.#dropped = 0;
    this.#garbage.observe({ entryTypes: ['gc'] });
    this.on = true;
  }

  /** Call only while `on`. `endUs` is now unless it is given. */
  add(name: string, step: number, startUs: number, endUs = monotonicUs(), lane: Lane = 'event loop'): void {
    if (this.#spans.length >= traceLimits.spansMax * spanNumbers) {
      this.#dropped++;
      return;
    }
    let index = this.#indexOf.get(name);
    if (index === undefined) this.#indexOf.set(name, (index = this.#indexOf.size));
    this.#spans.push(index, lane === 'compute' ? 1 : 0, step, startUs, Math.max(0, endUs - startUs));
  }

  stop(): RecordedSpans {
    this.on = false;
    this.#garbage.disconnect();
    const recorded = { names: [...this.#indexOf.keys()], spans: this.#spans, dropped: this.#dropped };
    this.#spans = [];
    return recorded;
  }
}

/** Of Linux: the event loop runs on the process's first thread. */
export function cpuUse(): CpuUse {
  const { user, system } = process.cpuUsage();
  const [ran = 0, waited = 0] = readFileSync(`/proc/self/task/${process.pid}/schedstat`, 'latin1').split(' ').map(Number);
  return { loopUs: ran / 1e3, loopWaitUs: waited / 1e3, processUs: user + system };
}

export const cpuUsedSince = (before: CpuUse, now = cpuUse()): CpuUse => ({
  loopUs: now.loopUs - before.loopUs,
  loopWaitUs: now.loopWaitUs - before.loopWaitUs,
  processUs: now.processUs - before.processUs,
});
