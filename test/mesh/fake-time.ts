/**
 * Timers and clocks of this process for tests that run for hours of them: as `vi.useFakeTimers`, which looks at every timer whenever the clock moves, but with the
 * timers in a heap. Time stands still until `advance`. As there, delays are whole milliseconds, and what is asked for while time moves on is a millisecond away at
 * least, so that nothing can stop the clock.
 */

interface Timer {
  at: number;
  /** Immediates go before timeouts of the same moment. */
  immediate: boolean;
  order: number;
  callback: () => void;
  intervalMs: number | null;
  waiting: boolean;
}

const comesBefore = (a: Timer, b: Timer): boolean =>
  a.at !== b.at ? a.at < b.at : a.immediate !== b.immediate ? a.immediate : a.order < b.order;

type Callback = (...args: unknown[]) => void;

export class FakeTime {
  #nowMs = 0;
  #order = 0;
  #advancing = false;
  /** A binary heap: the timer at `i` comes before those at `2i + 1` and `2i + 2`. Cleared timers stay until they come up. */
  #heap: Timer[] = [];
  #restore: () => void;

  /** From now on the process has this time, which begins at that of the machine. */
  constructor() {
    const began = Date.now();
    const dateNow = Object.getOwnPropertyDescriptor(Date, 'now')!;
    const names = ['setTimeout', 'clearTimeout', 'setInterval', 'clearInterval', 'setImmediate', 'clearImmediate'] as const;
    const timers = names.map((name) => [name, Object.getOwnPropertyDescriptor(globalThis, name)!] as const);
    const clear = (timer: unknown): void => {
      if (timer) (timer as { waiting: boolean }).waiting = false;
    };
    const fakes: Record<(typeof names)[number], unknown> = {
      setTimeout: (callback: Callback, ms?: number, ...args: unknown[]) => this.#add(() => callback(...args), { ms }),
      setInterval: (callback: Callback, ms?: number, ...args: unknown[]) =>
        this.#add(() => callback(...args), { ms, isInterval: true }),
      setImmediate: (callback: Callback, ...args: unknown[]) => this.#add(() => callback(...args), { isImmediate: true }),
      clearTimeout: clear,
      clearInterval: clear,
      clearImmediate: clear,
    };
    for (const name of names)
      Object.defineProperty(globalThis, name, { value: fakes[name], configurable: true, writable: true, enumerable: true });
    Object.defineProperty(performance, 'now', { value: () => this.#nowMs, configurable: true, writable: true });
    Object.defineProperty(Date, 'now', { value: () => began + Math.floor(this.#nowMs), configurable: true, writable: true });
    this.#restore = () => {
      for (const [name, descriptor] of timers) Object.defineProperty(globalThis, name, descriptor);
      delete (performance as { now?: unknown }).now; // what is below is that of its prototype
      Object.defineProperty(Date, 'now', dateNow);
    };
  }

  /** Gives the process the machine's time back. */
  dispose(): void {
    this.#restore();
  }

  /** Forgets all timers. */
  clearTimers(): void {
    for (const timer of this.#heap) timer.waiting = false;
    this.#heap = [];
  }

  /** Runs what is due within the next `ms`, also what that asks for, with time moving along. */
  advance(ms: number): void {
    const end = this.#nowMs + ms;
    this.#advancing = true;
    try {
      for (let next = this.#heap[0]; next && next.at <= end; next = this.#heap[0]) {
        this.#takeFirst();
        if (!next.waiting) continue;
        this.#nowMs = Math.max(this.#nowMs, next.at);
        if (next.intervalMs === null) next.waiting = false;
        else {
          next.at += Math.max(1, next.intervalMs);
          this.#insert(next);
        }
        next.callback();
      }
    } finally {
      this.#advancing = false;
    }
    this.#nowMs = end;
  }

  #add(
    callback: () => void,
    { ms = 0, isInterval = false, isImmediate = false }: { ms?: number | undefined; isInterval?: boolean; isImmediate?: boolean },
  ): object {
    const delayMs = Math.max(0, Math.trunc(ms));
    const due = (): number => Math.floor(this.#nowMs) + (delayMs || (this.#advancing ? 1 : 0));
    const timer: Timer & object = {
      at: due(),
      immediate: isImmediate,
      order: this.#order++,
      callback,
      intervalMs: isInterval ? delayMs : null,
      waiting: true,
    };
    this.#insert(timer);
    return Object.assign(timer, { ref: () => timer, unref: () => timer, hasRef: () => true });
  }

  #insert(timer: Timer): void {
    const heap = this.#heap;
    let at = heap.length;
    while (at > 0) {
      const above = (at - 1) >> 1;
      if (comesBefore(heap[above]!, timer)) break;
      heap[at] = heap[above]!;
      at = above;
    }
    heap[at] = timer;
  }

  #takeFirst(): void {
    const heap = this.#heap;
    const last = heap.pop()!;
    if (heap.length === 0) return;
    let at = 0;
    for (;;) {
      let below = 2 * at + 1;
      if (below >= heap.length) break;
      if (below + 1 < heap.length && comesBefore(heap[below + 1]!, heap[below]!)) below++;
      if (comesBefore(last, heap[below]!)) break;
      heap[at] = heap[below]!;
      at = below;
    }
    heap[at] = last;
  }
}
