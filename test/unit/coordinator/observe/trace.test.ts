import { describe, expect, it } from 'vitest';
import { traceDocument } from '../../../../coordinator/observe/trace-document.ts';
import { takeTrace, type ProcessTrace, type TraceMesh } from '../../../../coordinator/observe/trace-session.ts';
import { summarizeTrace } from '../../../../coordinator/observe/trace-summary.ts';
import { decodeMessage, encodeMessage } from '../../../../protocol/message-codec.ts';
import { traceLimits } from '../../../../protocol/limits.ts';
import type { Trace, TraceClock, TraceSpans } from '../../../../protocol/messages.ts';
import { monotonicUs, TraceRecorder } from '../../../../protocol/trace.ts';
import { WorkerTrace } from '../../../../shard-worker/worker-trace.ts';
import { peer, worker } from '../../protocol/samples.ts';

const noCpu = { loopUs: 0, loopWaitUs: 0, processUs: 0 };
const process = (changes: Partial<ProcessTrace>): ProcessTrace => ({
  name: 'worker 0.0',
  names: [],
  spans: [],
  dropped: 0,
  cpu: noCpu,
  offsetUs: 0,
  roundTripUs: 0,
  ...changes,
});

/** Without what garbage collection left in them. */
const own = ({ names, spans }: Pick<ProcessTrace, 'names' | 'spans'>): (string | number)[][] =>
  Array.from({ length: spans.length / 5 }, (_, i) => [names[spans[i * 5]!]!, ...spans.slice(i * 5 + 1, i * 5 + 5)]).filter(
    ([name]) => name !== 'gc',
  );

/** Real worker traces behind a mesh without a broker; the clock of each is `ahead` microseconds ahead of ours. */
function meshOf(workers: { id: string; recorder: TraceRecorder; ahead: number }[]): TraceMesh & { asked: Trace['action'][] } {
  let listener: ((message: TraceClock | TraceSpans) => void) | null = null;
  const asked: Trace['action'][] = [];
  const traces = new Map(
    workers.map(({ id, recorder, ahead }) => [
      id,
      new WorkerTrace(id, recorder, {
        record: () => undefined,
        send: (message) => {
          const shifted = message.type === 'trace_clock' ? { ...message, atUs: message.atUs + ahead } : message;
          const arrived = decodeMessage(encodeMessage(shifted)) as TraceClock | TraceSpans;
          setImmediate(() => listener?.(arrived));
        },
      }),
    ]),
  );
  return {
    asked,
    traceWorkers: () => workers.map(({ id }, rank) => ({ worker: id, name: `worker 0.${rank}` })),
    sendTrace: (id, message) => {
      asked.push(message.action);
      traces.get(id)?.receive(message);
    },
    onTrace: (next) => (listener = next),
  };
}

describe('trace', () => {
  it('trace - spans of all processes come back, with CPU times, in as many parts as they need', async () => {
    const ours = new TraceRecorder();
    const recorder = new TraceRecorder();
    const mesh = meshOf([{ id: worker, recorder, ahead: 0 }]);
    const taken = takeTrace(mesh, ours, 30);
    while (!ours.on || !recorder.on) await new Promise((resolve) => setTimeout(resolve, 1));
    ours.add('plan', 1, monotonicUs());
    const count = traceLimits.spansPerMessageMax + 5;
    for (let i = 0; i < count; i++) recorder.add(i % 2 ? 'submit' : 'products', 1, 1_000_000 + i, 1_000_002 + i, 'compute');
    const [coordinator, only] = await taken;
    expect(coordinator).toMatchObject({ name: 'coordinator', offsetUs: 0 });
    expect(own(coordinator!).map(([name, , step]) => [name, step])).toEqual([['plan', 1]]);
    expect(only).toMatchObject({ name: 'worker 0.0', dropped: 0 });
    expect(own(only!).length).toBe(count);
    expect(own(only!).at(-1)).toEqual(['products', 1, 1, 1_000_000 + count - 1, 2]);
    expect(only!.cpu.processUs).toBeGreaterThan(0);
    expect([ours.on, recorder.on]).toEqual([false, false]);
  });

  it('trace - a clock of another host is brought to ours, within half a round trip; one of this host is left alone', async () => {
    const mesh = meshOf([
      { id: worker, recorder: new TraceRecorder(), ahead: 5_000_000 },
      { id: peer, recorder: new TraceRecorder(), ahead: 0 },
    ]);
    const [, far, near] = await takeTrace(mesh, new TraceRecorder(), 1);
    expect(Math.abs(far!.offsetUs + 5_000_000)).toBeLessThanOrEqual(far!.roundTripUs / 2);
    expect(near!.offsetUs).toBe(0);
  });

  it('trace - a second one is refused while one is taken, and one without workers', async () => {
    const recorder = new TraceRecorder();
    const mesh = meshOf([{ id: worker, recorder: new TraceRecorder(), ahead: 0 }]);
    const first = takeTrace(mesh, recorder, 5);
    await expect(takeTrace(mesh, recorder, 5)).rejects.toMatchObject({ code: 'invalid_value' });
    await first;
    await expect(takeTrace(meshOf([]), recorder, 5)).rejects.toMatchObject({ code: 'mesh_unavailable' });
    expect(recorder.on).toBe(false);
  });

  it('trace - a full recorder drops spans and counts them', () => {
    const recorder = new TraceRecorder();
    recorder.start();
    for (let i = 0; i < traceLimits.spansMax + 3; i++) recorder.add('a', 1, i, i);
    const { spans, dropped } = recorder.stop();
    expect([spans.length, dropped]).toEqual([traceLimits.spansMax * 5, 3]);
  });

  it('trace - the document has times since the first span, thread names, and an arrow from each plan to each worker and back', () => {
    const names = ['publish plan', 'commit'];
    const { traceEvents } = traceDocument([
      process({ name: 'coordinator', names, spans: [0, 0, 7, 1_000, 20, 1, 0, 7, 9_000, 30] }),
      process({
        names: ['submit', 'step', 'publish result'],
        spans: [0, 0, 7, 400, 10, 1, 1, 7, 500, 600, 2, 0, 7, 1_200, 5],
        offsetUs: 1_000,
      }),
    ]);
    expect(traceEvents.filter(({ ph }) => ph === 'X')).toEqual([
      { name: 'publish plan', ph: 'X', pid: 1, tid: 1, ts: 0, dur: 20, args: { step: 7 } },
      { name: 'commit', ph: 'X', pid: 1, tid: 1, ts: 8_000, dur: 30, args: { step: 7 } },
      { name: 'submit', ph: 'X', pid: 2, tid: 1, ts: 400, dur: 10, args: { step: 7 } },
      { name: 'step', ph: 'X', pid: 2, tid: 2, ts: 500, dur: 600, args: { step: 7 } },
      { name: 'publish result', ph: 'X', pid: 2, tid: 1, ts: 1_200, dur: 5, args: { step: 7 } },
    ]);
    expect(traceEvents.filter(({ ph }) => ph === 's' || ph === 'f').map(({ ph, id, pid }) => [ph, id, pid])).toEqual([
      ['s', '7.2', 1],
      ['f', '7', 1],
      ['f', '7.2', 2],
      ['s', '7', 2],
    ]);
    expect(traceEvents.filter(({ name }) => name === 'thread_name').length).toBe(4);
  });

  it('trace - the summary says what a step costs, how idle the compute thread was and what gc took', () => {
    const [summary] = summarizeTrace([
      process({
        names: ['submit', 'step', 'gc'],
        // Two steps of 400 and 500 µs with 100 µs between them; 10 µs of gc in 1,000 µs of event loop.
        spans: [0, 0, 1, 0, 30, 0, 0, 2, 990, 10, 1, 1, 1, 0, 400, 1, 1, 2, 500, 500, 2, 0, 0, 600, 10],
        cpu: { loopUs: 200, loopWaitUs: 40, processUs: 2_000 },
      }),
    ]);
    expect(summary).toMatchObject({ steps: 2, loopUsPerStep: 100, loopWaitUsPerStep: 20, processUsPerStep: 1_000 });
    expect(summary!.idleShare).toBeCloseTo(0.1);
    expect(summary!.gcShare).toBeCloseTo(0.01);
    expect(summary!.spans[0]).toEqual({ name: 'submit', lane: 'event loop', count: 2, usPerStep: 20, medianUs: 30, p99Us: 30 });
  });
});
