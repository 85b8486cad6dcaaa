/**
 * A transport in memory, with faults, for tests of a whole mesh in one process. One `MemoryBus` is the broker; `connect` gives each participant its own
 * transport. Everything random comes from the seed, and time from the clock given, so that a seed is a history.
 */
import { ShardmeshError } from '../../protocol/errors.ts';
import { messageLimits } from '../../protocol/limits.ts';
import type {
  MessageHandler,
  Transport,
  TransportCounters,
  TransportEvent,
  TransportSubscription,
} from '../../protocol/transport.ts';

/** When things happen. Tests give a fake one; `realClock` is the machine's. */
export interface Clock {
  /** Calls back after `delayMs`; 0 = after the current task. */
  after(delayMs: number, callback: () => void): void;
}

export const realClock: Clock = {
  after: (delayMs, callback) => {
    if (delayMs <= 0) setImmediate(callback);
    else setTimeout(callback, delayMs);
  },
};

interface Due {
  at: number;
  order: number;
  callback: () => void;
}

/** Time that stands still until `advance`. Callbacks of one instant run in the order they were asked for. */
export class FakeClock implements Clock {
  #now = 0;
  #order = 0;
  #waiting: Due[] = [];

  get now(): number {
    return this.#now;
  }

  after(delayMs: number, callback: () => void): void {
    this.#waiting.push({ at: this.#now + Math.max(0, delayMs), order: this.#order++, callback });
  }

  /** Runs everything due within the next `ms`, also what that asks for, with time moving along. */
  advance(ms: number): void {
    const end = this.#now + ms;
    for (;;) {
      const next = this.#waiting
        .filter((entry) => entry.at <= end)
        .reduce<Due | null>(
          (best, entry) =>
            best === null || entry.at < best.at || (entry.at === best.at && entry.order < best.order) ? entry : best,
          null,
        );
      if (next === null) break;
      this.#waiting = this.#waiting.filter((entry) => entry !== next);
      this.#now = next.at;
      next.callback();
    }
    this.#now = end;
  }
}

export interface Faults {
  /** Each delivery takes a random time of this range. Equal ends keep order; a range lets messages overtake each other. */
  delayMs: [min: number, max: number];
  /** Share of deliveries lost, 0..1. */
  dropRate: number;
  /** Share of deliveries that arrive twice. */
  duplicateRate: number;
  /** Only subjects for which this holds suffer; all by default. */
  applies: (subject: string) => boolean;
}

const noFaults: Faults = { delayMs: [0, 0], dropRate: 0, duplicateRate: 0, applies: () => true };

export interface MemoryBusOptions {
  seed: number;
  clock?: Clock;
  faults?: Partial<Faults>;
}

interface Listener {
  pattern: string[];
  handler: MessageHandler;
}

export class MemoryBus {
  /** Change them at any time: heal a mesh, break it later. */
  faults: Faults;
  dropped = 0;
  duplicated = 0;
  readonly #clock: Clock;
  readonly #transports = new Set<MemoryTransport>();
  #state: number;
  #up = true;

  constructor(options: MemoryBusOptions) {
    this.#clock = options.clock ?? realClock;
    this.#state = options.seed >>> 0;
    this.faults = { ...noFaults, ...options.faults };
  }

  get up(): boolean {
    return this.#up;
  }

  connect(name: string): MemoryTransport {
    const transport = new MemoryTransport(this, name);
    this.#transports.add(transport);
    return transport;
  }

  /** The broker dies, or comes back. Messages under way when it dies are lost. */
  setUp(up: boolean): void {
    if (up === this.#up) return;
    this.#up = up;
    for (const transport of this.#transports) transport.changed();
  }

  /** @internal */
  remove(transport: MemoryTransport): void {
    this.#transports.delete(transport);
  }

  /** @internal */
  route(subject: string, bytes: Uint8Array): void {
    for (const transport of this.#transports) this.#send(transport, subject, bytes);
  }

  #send(transport: MemoryTransport, subject: string, bytes: Uint8Array): void {
    const { delayMs, dropRate, duplicateRate } = this.faults.applies(subject) ? this.faults : noFaults;
    if (this.#random() < dropRate) {
      this.dropped++;
      return;
    }
    const twice = this.#random() < duplicateRate;
    if (twice) this.duplicated++;
    for (let i = 0; i < (twice ? 2 : 1); i++) {
      const wait = delayMs[0] + this.#random() * (delayMs[1] - delayMs[0]);
      // A copy for each receiver: nobody sees what another does to its bytes.
      const copy = Uint8Array.from(bytes);
      this.#clock.after(wait, () => {
        if (this.#up) transport.deliver(subject, copy);
      });
    }
  }

  /** mulberry32 */
  #random(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  }
}

export class MemoryTransport implements Transport {
  readonly name: string;
  readonly payloadBytesMax = messageLimits.payloadBytesMax;
  readonly counters: TransportCounters = {
    published: 0,
    received: 0,
    bytesOut: 0,
    bytesIn: 0,
    publishWhileDown: 0,
    oversize: 0,
    reconnects: 0,
  };
  readonly #bus: MemoryBus;
  readonly #listeners = new Set<Listener>();
  readonly #watchers = new Set<(event: TransportEvent) => void>();
  #cut = false;
  #frozen: { subject: string; bytes: Uint8Array }[] | null = null;
  #closed = false;
  #wasConnected = true;

  constructor(bus: MemoryBus, name: string) {
    this.#bus = bus;
    this.name = name;
  }

  get connected(): boolean {
    return !this.#closed && !this.#cut && this.#bus.up;
  }

  publish(subject: string, bytes: Uint8Array): boolean {
    if (bytes.length > this.payloadBytesMax) {
      this.counters.oversize++;
      throw new ShardmeshError(
        'invalid_message',
        `message of ${bytes.length} bytes on ${subject} is over ${this.payloadBytesMax}`,
      );
    }
    if (!this.connected) {
      this.counters.publishWhileDown++;
      return false;
    }
    this.counters.published++;
    this.counters.bytesOut += bytes.length;
    this.#bus.route(subject, bytes);
    return true;
  }

  async subscribe(subject: string, handler: MessageHandler): Promise<TransportSubscription> {
    this.#checkOpen();
    const listener: Listener = { pattern: subject.split('.'), handler };
    this.#listeners.add(listener);
    return { unsubscribe: () => void this.#listeners.delete(listener) };
  }

  async flush(): Promise<void> {
    this.#checkOpen();
    if (!this.connected) throw new ShardmeshError('broker_lost', `${this.name} is disconnected`);
  }

  onEvent(listener: (event: TransportEvent) => void): () => void {
    this.#watchers.add(listener);
    return () => this.#watchers.delete(listener);
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#bus.remove(this);
    this.#listeners.clear();
    this.#emit({ type: 'closed', error: null });
  }

  /** Partition of this participant alone. */
  setCut(cut: boolean): void {
    this.#cut = cut;
    this.changed();
  }

  /** SIGSTOP: nothing is received until it thaws, then everything at once. */
  setFrozen(frozen: boolean): void {
    const held = this.#frozen;
    this.#frozen = frozen ? (held ?? []) : null;
    if (!frozen) for (const { subject, bytes } of held ?? []) this.deliver(subject, bytes);
  }

  /** @internal */
  changed(): void {
    const { connected } = this;
    if (connected === this.#wasConnected || this.#closed) return;
    this.#wasConnected = connected;
    if (connected) {
      this.counters.reconnects++;
      this.#emit({ type: 'connected', server: 'memory', version: '0.0.0' });
    } else this.#emit({ type: 'disconnected', reason: 'the bus is down' });
  }

  /** @internal */
  deliver(subject: string, bytes: Uint8Array): void {
    if (this.#frozen) {
      this.#frozen.push({ subject, bytes });
      return;
    }
    if (!this.connected) return;
    const parts = subject.split('.');
    for (const { pattern, handler } of [...this.#listeners]) {
      if (!matches(pattern, parts)) continue;
      this.counters.received++;
      this.counters.bytesIn += bytes.length;
      handler(bytes, subject);
    }
  }

  #checkOpen(): void {
    if (this.#closed) throw new ShardmeshError('broker_lost', `${this.name} is closed`);
  }

  #emit(event: TransportEvent): void {
    for (const watcher of [...this.#watchers]) watcher(event);
  }
}

/** NATS wildcards: `*` is one token, `>` at the end is one or more. */
function matches(pattern: string[], subject: string[]): boolean {
  for (let i = 0; i < pattern.length; i++) {
    if (pattern[i] === '>') return subject.length > i;
    if (subject[i] === undefined || (pattern[i] !== '*' && pattern[i] !== subject[i])) return false;
  }
  return pattern.length === subject.length;
}
