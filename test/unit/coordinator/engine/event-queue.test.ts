import { describe, expect, it } from 'vitest';
import { EventQueue } from '../../../../coordinator/engine/event-queue.ts';

function makeQueue() {
  const calls = { taken: 0, left: 0 };
  const queue = new EventQueue<number>(
    () => calls.taken++,
    () => calls.left++,
  );
  return { queue, calls };
}

describe('event queue', () => {
  it('event queue - gives events in order, those from before the reader came and those after, then ends', async () => {
    const { queue, calls } = makeQueue();
    for (let i = 0; i < 600; i++) queue.push(i);
    expect(queue.pending).toBe(600);
    const seen: number[] = [];
    const reading = (async () => {
      for await (const event of queue) seen.push(event);
    })();
    await Promise.resolve();
    for (let i = 600; i < 700; i++) queue.push(i);
    queue.end();
    queue.push(-1);
    await reading;
    expect(seen).toEqual(Array.from({ length: 700 }, (_, i) => i));
    expect([queue.pending, calls.left]).toEqual([0, 0]);
  });

  it('event queue - wakes a waiting reader without counting the event as pending', async () => {
    const { queue, calls } = makeQueue();
    const iterator = queue[Symbol.asyncIterator]();
    const next = iterator.next();
    queue.push(1);
    expect(queue.pending).toBe(0);
    expect(await next).toEqual({ done: false, value: 1 });
    expect(calls.taken).toBe(0);
    const end = iterator.next();
    queue.end();
    expect(await end).toEqual({ done: true, value: undefined });
    expect(await iterator.next()).toEqual({ done: true, value: undefined });
  });

  it('event queue - tells when its reader leaves before the end, and only then', async () => {
    const { queue, calls } = makeQueue();
    queue.push(1);
    queue.push(2);
    for await (const event of queue) if (event === 1) break;
    expect(calls.left).toBe(1);
    queue.end();
    for await (const event of queue) if (event === 2) break;
    expect(calls.left).toBe(1);
  });

  it('event queue - forgets what was not delivered when it is discarded', async () => {
    const { queue } = makeQueue();
    queue.push(1);
    queue.discard();
    const seen: number[] = [];
    for await (const event of queue) seen.push(event);
    expect(seen).toEqual([]);
  });

  it('event queue - refuses two readers at the same time', async () => {
    const { queue } = makeQueue();
    const first = queue[Symbol.asyncIterator]().next();
    await expect(queue[Symbol.asyncIterator]().next()).rejects.toThrow('read twice');
    queue.end();
    await first;
  });
});
