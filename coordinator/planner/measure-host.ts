/** Measures, in a few tens of milliseconds, what the speed model needs to know of this host besides its kernels: how soon a sleeping thread runs, and what an event loop pays for a message. */
import { once } from 'node:events';
import { connect, createServer, type AddressInfo, type Socket } from 'node:net';
import { Worker } from 'node:worker_threads';
import type { ServiceCost } from './speed-model.ts';

const wakeRounds = 200;
const messageRounds = 600;
const messageBytes = 256;

// Woken by a change of word 0, answers by a change of word 1; a negative word ends it.
const sleeper = `
const { workerData } = require('node:worker_threads');
const words = new Int32Array(workerData);
for (let round = 0; ; round++) {
  Atomics.wait(words, 0, round);
  if (Atomics.load(words, 0) < 0) break;
  Atomics.store(words, 1, round + 1);
  Atomics.notify(words, 1);
}`;

/** From a wake-up to the moment the sleeping thread runs, seconds: half a round between two threads that sleep for each other, the median. */
export async function measureWake(): Promise<number> {
  const words = new Int32Array(new SharedArrayBuffer(8));
  const thread = new Worker(sleeper, { eval: true, workerData: words.buffer });
  const rounds: number[] = [];
  try {
    await once(thread, 'online');
    for (let round = 0; round < wakeRounds; round++) {
      const began = performance.now();
      Atomics.store(words, 0, round + 1);
      Atomics.notify(words, 0);
      if (Atomics.wait(words, 1, round, 1_000) === 'timed-out') break;
      rounds.push((performance.now() - began) / 1_000);
    }
  } finally {
    Atomics.store(words, 0, -1);
    Atomics.notify(words, 0);
    await thread.terminate();
  }
  return median(rounds) / 2;
}

/** CPU of this process, in user and kernel mode, for one small message from a socket to another over loopback: one write, one read, one turn of the event loop. Seconds. */
export async function measureMessage(): Promise<number> {
  const server = createServer((socket) => socket.on('data', (bytes: Buffer) => socket.write(bytes)));
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const socket = connect((server.address() as AddressInfo).port, '127.0.0.1').setNoDelay(true);
  try {
    await once(socket, 'connect');
    await echo(socket, messageRounds / 4);
    const before = process.cpuUsage();
    await echo(socket, messageRounds);
    const { user, system } = process.cpuUsage(before);
    return (user + system) / 1e6 / (2 * messageRounds);
  } finally {
    socket.destroy();
    server.close();
  }
}

async function echo(socket: Socket, rounds: number): Promise<void> {
  const message = Buffer.alloc(messageBytes);
  await new Promise<void>((resolve, reject) => {
    let left = rounds;
    socket.on('data', () => (left-- > 0 ? socket.write(message) : resolve()));
    socket.on('error', reject);
    socket.write(message);
  });
  socket.removeAllListeners('data');
}

/**
 * What serving costs, from what a message costs: a step is some messages (plan to the broker and from it to each worker, result to the broker and from it to the
 * coordinator, an event to the client), each with the work that comes with it. The numbers of messages are fitted to CPU times of whole meshes (ARCHITECTURE.md).
 */
export const serviceCost = (messageSeconds: number): ServiceCost => ({
  stepSeconds: 24 * messageSeconds,
  workerSeconds: 4 * messageSeconds,
  sequenceSeconds: 8 * messageSeconds,
});

/** The middle one (sorts `values`); 0 of none. */
export const median = (values: number[]): number => values.sort((a, b) => a - b)[values.length >> 1] ?? 0;
