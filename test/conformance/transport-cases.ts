/** What every `Transport` must do. Each implementation runs this suite from a test file of its own. */
import { expect, test } from 'vitest';
import type { Transport } from '../../protocol/transport.ts';

export interface TransportPair {
  from: Transport;
  to: Transport;
  /** A subject `from` may publish and `to` may subscribe to, and a wildcard that covers it. */
  subject: string;
  wildcard: string;
  close(): Promise<void>;
}

export function transportCases(name: string, open: () => Promise<TransportPair>): void {
  /** Everything published before has been handled. */
  const settle = async (pair: TransportPair): Promise<void> => {
    await pair.from.flush();
    await pair.to.flush();
    await new Promise((resolve) => setTimeout(resolve, 10));
  };
  const withPair = async (body: (pair: TransportPair) => Promise<void>): Promise<void> => {
    const pair = await open();
    try {
      await body(pair);
    } finally {
      await pair.close();
    }
  };

  test(`${name} - delivers bytes unchanged, in order, with their subject`, () =>
    withPair(async (pair) => {
      const received: string[] = [];
      await pair.to.subscribe(pair.wildcard, (bytes, subject) =>
        received.push(`${subject} ${Buffer.from(bytes).toString('hex')}`),
      );
      for (const byte of [1, 2, 255]) expect(pair.from.publish(pair.subject, Uint8Array.of(0, byte))).toBe(true);
      await settle(pair);
      expect(received).toEqual([`${pair.subject} 0001`, `${pair.subject} 0002`, `${pair.subject} 00ff`]);
      expect(pair.from.counters).toMatchObject({ published: 3, bytesOut: 6, publishWhileDown: 0 });
      expect(pair.to.counters).toMatchObject({ received: 3, bytesIn: 6 });
    }));

  test(`${name} - delivers nothing to an ended subscription`, () =>
    withPair(async (pair) => {
      let count = 0;
      const subscription = await pair.to.subscribe(pair.subject, () => count++);
      pair.from.publish(pair.subject, Uint8Array.of(1));
      await settle(pair);
      subscription.unsubscribe();
      await pair.to.flush();
      pair.from.publish(pair.subject, Uint8Array.of(2));
      await settle(pair);
      expect(count).toBe(1);
    }));

  test(`${name} - refuses an oversize payload and stays connected`, () =>
    withPair(async (pair) => {
      expect(() => pair.from.publish(pair.subject, new Uint8Array(pair.from.payloadBytesMax + 1))).toThrow(/is over/);
      expect(pair.from.counters).toMatchObject({ oversize: 1, published: 0 });
      expect(pair.from.connected).toBe(true);
    }));

  test(`${name} - closed, publishes nothing, tells once`, () =>
    withPair(async (pair) => {
      const events: unknown[] = [];
      pair.from.onEvent((event) => events.push(event));
      await pair.from.close();
      await pair.from.close();
      expect(pair.from.connected).toBe(false);
      expect(pair.from.publish(pair.subject, Uint8Array.of(1))).toBe(false);
      expect(pair.from.counters.publishWhileDown).toBe(1);
      await expect(pair.from.subscribe(pair.subject, () => undefined)).rejects.toMatchObject({ code: 'broker_lost' });
      await expect(pair.from.flush()).rejects.toMatchObject({ code: 'broker_lost' });
      expect(events).toEqual([{ type: 'closed', error: null }]);
    }));

  test(`${name} - an ended listener hears no more events`, () =>
    withPair(async (pair) => {
      let count = 0;
      pair.from.onEvent(() => count++)();
      await pair.from.close();
      expect(count).toBe(0);
    }));
}
