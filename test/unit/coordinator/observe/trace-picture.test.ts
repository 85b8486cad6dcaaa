import { describe, expect, it } from 'vitest';
import type { TraceDocument, TraceEvent } from '../../../../coordinator/observe/trace-document.ts';
import { tracePicture } from '../../../../coordinator/observe/trace-picture.ts';

const named = (name: string, pid: number, tid: number, label: string): TraceEvent => ({
  name,
  ph: 'M',
  pid,
  tid,
  args: { name: label },
});
const span = (name: string, pid: number, tid: number, ts: number, dur: number, step = 1): TraceEvent => ({
  name,
  ph: 'X',
  pid,
  tid,
  ts,
  dur,
  args: { step },
});

/** Steps of 1,000 us: a worker computes for 900 of them, and publishes its result at the end. */
const recorded = (steps: number): TraceDocument => ({
  displayTimeUnit: 'ms',
  traceEvents: [
    named('process_name', 1, 0, 'coordinator'),
    named('thread_name', 1, 1, 'event loop'),
    named('thread_name', 1, 2, 'compute'),
    named('process_name', 2, 0, 'worker <a>'),
    named('thread_name', 2, 2, 'compute'),
    ...Array.from({ length: steps }, (_, step) => [
      span('native call', 2, 2, step * 1_000, 900, step + 1),
      span('products', 2, 2, step * 1_000 + 100, 300, step + 1),
      span('publish result', 1, 1, step * 1_000 + 950, 20, step + 1),
    ]).flat(),
  ],
  otherData: { processes: [] },
});

describe('trace picture', () => {
  it('trace picture - shows two steps of the middle, a lane for each thread that did something', () => {
    const svg = tracePicture(recorded(9));
    expect(svg.startsWith('<svg xmlns="http://www.w3.org/2000/svg"')).toBe(true);
    expect(svg).toContain('coordinator, event loop');
    expect(svg).not.toContain('coordinator, compute');
    expect(svg).toContain('worker &lt;a>, compute');
    // From the result of step 4 (at 3,950) to that of step 6: steps 5 and 6, and nothing of 4 or 7.
    expect([...svg.matchAll(/native call, step (\d+)/g)].map(([, step]) => step)).toEqual(['5', '6']);
    expect(svg).toContain('>1 ms<');
  });

  it('trace picture - a span inside another is drawn after it, and lower', () => {
    const svg = tracePicture(recorded(9));
    const [outer, inner] = ['native call, step 5', 'products, step 5'].map((what) => {
      const end = svg.indexOf(what);
      const box = svg.slice(svg.lastIndexOf('<rect', end), end);
      return { at: end, y: Number(/ y="(\d+)"/.exec(box)?.[1]) };
    });
    expect(inner!.at).toBeGreaterThan(outer!.at);
    expect(inner!.y).toBe(outer!.y + 7);
  });

  it('trace picture - says that there is no whole step to show', () => {
    expect(() => tracePicture(recorded(1))).toThrow('the trace holds no whole step');
  });
});
