/**
 * How steady the machine itself is: every core repeats the same arithmetic, nothing else, and the slowest hundredth of the repetitions is held against the median. Where
 * a machine lends its cores to others as well, this says what no program on it can be better than.
 */
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';

/** In a thread: pieces of arithmetic that take `ms` where nobody disturbs them, for `seconds`. Answers with what each piece took. */
const repeating = `
const { parentPort, workerData } = require('node:worker_threads');
const { ms, seconds } = workerData;
let x = 1;
const piece = (count) => {
  const began = performance.now();
  for (let i = 0; i < count; i++) x = x * 1.0000001 + 1e-9;
  return performance.now() - began;
};
const trial = 1e6;
let least = Infinity;
for (let i = 0; i < 100; i++) least = Math.min(least, piece(trial));
const count = Math.round((trial * ms) / least);
const took = [];
for (const end = performance.now() + 1000 * seconds; performance.now() < end; ) took.push(piece(count));
parentPort.postMessage({ took, x });
`;

/** p99 over median of pieces of `ms` on all cores at once: { ratio, p50Ms, p99Ms }. */
export async function steadiness(ms, seconds = 6) {
  const pieces = await Promise.all(
    Array.from(
      { length: availableParallelism() },
      () =>
        new Promise((resolve, reject) => {
          const worker = new Worker(repeating, { eval: true, workerData: { ms, seconds } });
          worker.once('message', ({ took }) => resolve(took));
          worker.once('error', reject);
        }),
    ),
  );
  const all = pieces.flat().sort((a, b) => a - b);
  const p50Ms = all[all.length >> 1];
  const p99Ms = all[Math.min(all.length - 1, Math.floor(all.length * 0.99))];
  return { ratio: p99Ms / p50Ms, p50Ms, p99Ms };
}
