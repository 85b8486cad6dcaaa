import { describe, expect, test } from 'vitest';
import { FakeClock, MemoryBus } from '../mesh/memory-transport.ts';
import { transportCases } from './transport-cases.ts';

describe('memory transport', () => {
  transportCases('memory transport', async () => {
    const bus = new MemoryBus({ seed: 1 });
    const [from, to] = [bus.connect('from'), bus.connect('to')];
    return {
      from,
      to,
      subject: 'mesh.m.out.w.result',
      wildcard: 'mesh.m.out.*.result',
      close: async () => {
        await from.close();
        await to.close();
      },
    };
  });

  /** What arrives of 100 messages with faults, as text. */
  const history = async (seed: number): Promise<string> => {
    const clock = new FakeClock();
    const bus = new MemoryBus({ seed, clock, faults: { delayMs: [0, 5], dropRate: 0.2, duplicateRate: 0.2 } });
    const received: number[] = [];
    await bus.connect('to').subscribe('a.>', (bytes) => received.push(bytes[0] ?? -1));
    const from = bus.connect('from');
    for (let i = 0; i < 100; i++) from.publish('a.b', Uint8Array.of(i));
    clock.advance(10);
    expect(bus.dropped).toBeGreaterThan(10);
    expect(bus.duplicated).toBeGreaterThan(10);
    return received.join();
  };

  test('memory transport - the same seed gives the same losses, repeats and order', async () => {
    expect(await history(4_711)).toBe(await history(4_711));
    expect(await history(4_711)).not.toBe(await history(4_712));
  });

  test('memory transport - loses what is under way when the bus goes down, and tells both ends', async () => {
    const clock = new FakeClock();
    const bus = new MemoryBus({ seed: 1, clock, faults: { delayMs: [5, 5] } });
    const [from, to] = [bus.connect('from'), bus.connect('to')];
    const received: number[] = [];
    const events: string[] = [];
    await to.subscribe('a', (bytes) => received.push(bytes[0] ?? -1));
    to.onEvent((event) => events.push(event.type));
    from.publish('a', Uint8Array.of(1));
    bus.setUp(false);
    expect(from.publish('a', Uint8Array.of(2))).toBe(false);
    clock.advance(10);
    bus.setUp(true);
    from.publish('a', Uint8Array.of(3));
    clock.advance(10);
    expect(received).toEqual([3]);
    expect(events).toEqual(['disconnected', 'connected']);
    expect(from.counters.publishWhileDown).toBe(1);
  });

  test('memory transport - cut off alone, or frozen and thawed', async () => {
    const clock = new FakeClock();
    const bus = new MemoryBus({ seed: 1, clock });
    const [from, to] = [bus.connect('from'), bus.connect('to')];
    const received: number[] = [];
    await to.subscribe('a', (bytes) => received.push(bytes[0] ?? -1));
    to.setCut(true);
    from.publish('a', Uint8Array.of(1));
    clock.advance(1);
    to.setCut(false);
    to.setFrozen(true);
    from.publish('a', Uint8Array.of(2));
    clock.advance(1);
    expect(received).toEqual([]);
    to.setFrozen(false);
    expect(received).toEqual([2]);
  });
});
