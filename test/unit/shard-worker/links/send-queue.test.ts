import { describe, expect, it } from 'vitest';
import { SendQueue } from '../../../../shard-worker/links/send-queue.ts';

function makeQueue(options: { windowBytes?: number; queueBytesMax?: number } = {}) {
  const out: { bytes: number; written: () => void }[] = [];
  const queue = new SendQueue({
    windowBytes: options.windowBytes ?? 100,
    queueBytesMax: options.queueBytesMax ?? 200,
    write: (bytes, written) => out.push({ bytes: bytes.length, written }),
  });
  return { queue, out, sizes: () => out.map(({ bytes }) => bytes) };
}

describe('send queue', () => {
  it('send queue - keeps frames in order until it is opened', () => {
    const { queue, sizes } = makeQueue();
    expect([queue.push(Buffer.alloc(10)), queue.push(Buffer.alloc(20))]).toEqual([true, true]);
    expect(sizes()).toEqual([]);
    queue.open();
    expect(sizes()).toEqual([10, 20]);
  });

  it('send queue - hands out no more than its window before the transport reports', () => {
    const { queue, out, sizes } = makeQueue();
    queue.open();
    for (const bytes of [60, 40, 1, 30]) queue.push(Buffer.alloc(bytes));
    expect(sizes()).toEqual([60, 40]);
    expect(queue.waitingBytes).toBe(31);
    out[0]?.written();
    expect(sizes()).toEqual([60, 40, 1, 30]);
  });

  it('send queue - lets a frame that is larger than the window go alone', () => {
    const { queue, out, sizes } = makeQueue();
    queue.open();
    for (const bytes of [150, 1]) queue.push(Buffer.alloc(bytes));
    expect(sizes()).toEqual([150]);
    out[0]?.written();
    expect(sizes()).toEqual([150, 1]);
  });

  it('send queue - refuses what exceeds its room and keeps what it has', () => {
    const { queue, sizes } = makeQueue({ queueBytesMax: 50 });
    expect([queue.push(Buffer.alloc(30)), queue.push(Buffer.alloc(21)), queue.push(Buffer.alloc(20))]).toEqual([
      true,
      false,
      true,
    ]);
    queue.open();
    expect(sizes()).toEqual([30, 20]);
  });

  it('send queue - counts a report once, and none of a connection that is gone', () => {
    const { queue, out, sizes } = makeQueue();
    queue.open();
    for (const bytes of [100, 100]) queue.push(Buffer.alloc(bytes));
    expect(queue.close()).toBe(1);
    queue.open();
    for (const bytes of [70, 70]) queue.push(Buffer.alloc(bytes));
    expect(sizes()).toEqual([100, 70]);
    out[0]?.written();
    expect(sizes()).toEqual([100, 70]);
    out[1]?.written();
    out[1]?.written();
    expect(sizes()).toEqual([100, 70, 70]);
  });

  it('send queue - reports at once are no recursion into a closed queue', () => {
    const sent: number[] = [];
    const queue = new SendQueue({
      windowBytes: 10,
      queueBytesMax: 1000,
      write: (bytes, written) => {
        sent.push(bytes.length);
        if (sent.length === 2) queue.close();
        written();
      },
    });
    for (const bytes of [5, 6, 7]) queue.push(Buffer.alloc(bytes));
    queue.open();
    expect(sent).toEqual([5, 6]);
    expect(queue.waitingBytes).toBe(0);
  });
});
