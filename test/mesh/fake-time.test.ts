import { afterEach, describe, expect, it, vi } from 'vitest';
import { uniform } from '../kernels/tiny-model.ts';
import { FakeTime } from './fake-time.ts';

interface Clock {
  advance(ms: number): void;
  dispose(): void;
}

/** What happens when, for one seed: timers of all kinds, set outside and inside of others, some of them cleared, two for the same moment more often than not. */
function history(seed: number, clock: Clock): string[] {
  const next = uniform(seed);
  const pick = (count: number): number => Math.floor(next() * count);
  const seen: string[] = [];
  const began = Date.now();
  const cancel: (() => void)[] = [];
  let made = 0;
  const make = (): void => {
    const name = made++;
    const went = (): void => {
      seen.push(`${name} at ${performance.now() - start}, ${Date.now() - began}`);
      for (let i = pick(3); i > 0 && made < 300; i--) make();
      if (pick(4) === 0 && cancel.length > 0) cancel[pick(cancel.length)]!();
    };
    const kind = pick(4);
    if (kind === 0) {
      const immediate = setImmediate(went);
      cancel.push(() => clearImmediate(immediate));
    } else if (kind === 1) {
      const interval = setInterval(went, 5 + pick(40));
      cancel.push(() => clearInterval(interval));
    } else {
      const timeout = setTimeout(went, pick(4) === 0 ? 0 : next() * 50);
      cancel.push(() => clearTimeout(timeout));
    }
  };
  const start = performance.now();
  try {
    for (let round = 0; round < 30; round++) {
      for (let i = pick(4); i > 0; i--) make();
      clock.advance(pick(25));
      seen.push(`${performance.now() - start}`);
    }
  } finally {
    clock.dispose();
  }
  return seen;
}

describe('fake time', () => {
  afterEach(() => void vi.useRealTimers());

  it("fake time - seeds 1 to 30: everything happens in the order and at the moments of vitest's fake timers", () => {
    for (let seed = 1; seed <= 30; seed++) {
      vi.useFakeTimers();
      const want = history(seed, { advance: (ms) => void vi.advanceTimersByTime(ms), dispose: () => void vi.useRealTimers() });
      expect(want.length).toBeGreaterThan(30);
      expect(history(seed, new FakeTime()), `seed ${seed}`).toEqual(want);
    }
  });

  it('fake time - gives the machine its time back', () => {
    const before = [globalThis.setTimeout, globalThis.clearTimeout, globalThis.setInterval, globalThis.setImmediate, Date.now];
    const time = new FakeTime();
    expect(globalThis.setTimeout).not.toBe(before[0]);
    const at = performance.now();
    time.advance(1_000);
    expect(performance.now() - at).toBe(1_000);
    time.dispose();
    expect([globalThis.setTimeout, globalThis.clearTimeout, globalThis.setInterval, globalThis.setImmediate, Date.now]).toEqual(
      before,
    );
    expect(Object.hasOwn(performance, 'now')).toBe(false);
  });
});
