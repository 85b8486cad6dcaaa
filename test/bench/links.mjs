/**
 * `npm run bench:links -- [--rounds 3] [--links shm,tcp,grpc,nats] [--json]`: what one reduction between two workers costs over each link driver, as a step of the real
 * model meets it: publishing, waiting (for the peer as well) and joining. The sizes are those of 1, 7 and 28 sequences that decode: 2.3, 16 and 64 KB from each worker.
 * All meshes are up at once and take turns in every round; spans are those of `shardmesh trace`.
 */
import { cpus } from 'node:os';
import { parseArgs } from 'node:util';
import { startServe } from './peers/serve.mjs';

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '3' },
    links: { type: 'string', default: 'shm,tcp,grpc,nats' },
    json: { type: 'boolean', default: false },
  },
});
const streamCounts = [1, 7, 28];
const hiddenBytes = 576 * 4;
const reductionsOfStep = 60;
const seconds = 1.5;
const settleMs = 1_500;

const meshes = [];
for (const link of values.links.split(',')) meshes.push({ link, ...(await startServe(['--tp', '2', '--link', link])) });
const model = (await (await fetch(`${meshes[0].url}/v1/models`)).json()).data[0].id;

/** Streams that decode until aborted. */
function decoding(url, streams) {
  const abort = new AbortController();
  const body = { model, max_tokens: 1_500, ignore_eos: true, temperature: 0, stream: true };
  const ended = Array.from({ length: streams }, async (_, i) => {
    const request = { method: 'POST', signal: abort.signal, headers: { 'content-type': 'application/json' } };
    const response = await fetch(`${url}/v1/completions`, {
      ...request,
      body: JSON.stringify({ ...body, prompt: `Count from ${i}:` }),
    });
    for await (const part of response.body) void part;
  });
  return async () => {
    abort.abort();
    await Promise.allSettled(ended);
  };
}

/** Durations of every reduction of both workers, their processes' CPU time and the steps, while `streams` streams decode. */
async function measure({ url }, streams) {
  const stop = decoding(url, streams);
  await new Promise((resolve) => setTimeout(resolve, settleMs));
  const response = await fetch(`${url}/trace`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ milliseconds: seconds * 1_000 }),
  });
  const { summary, traceEvents } = await response.json();
  await stop();
  const workers = summary.filter(({ name }) => name.startsWith('worker'));
  return {
    durations: traceEvents.filter(({ ph, name }) => ph === 'X' && name === 'reduce').map(({ dur }) => dur),
    loopUs: workers.reduce((sum, { loopUsPerStep }) => sum + loopUsPerStep, 0) / workers.length,
    stepsPerSecond: workers[0].steps / seconds,
  };
}

/** `link streams` -> measurements */
const measured = new Map();
for (let round = 0; round < Number(values.rounds); round++)
  for (const streams of streamCounts)
    for (const mesh of meshes) {
      const key = `${mesh.link} ${streams}`;
      measured.set(key, [...(measured.get(key) ?? []), await measure(mesh, streams)]);
    }
for (const { stop } of meshes) await stop();

const at = (sorted, share) => sorted[Math.floor(share * (sorted.length - 1))];
const rows = [...measured].map(([key, list]) => {
  const [link, streams] = key.split(' ');
  const durations = list.flatMap((one) => one.durations).sort((a, b) => a - b);
  return {
    link,
    bytes: hiddenBytes * Number(streams),
    reductions: durations.length,
    p50Us: at(durations, 0.5),
    p99Us: at(durations, 0.99),
    loopUsPerReduction: Math.min(...list.map(({ loopUs }) => loopUs)) / reductionsOfStep,
    tokensPerSecond: Math.max(...list.map(({ stepsPerSecond }) => stepsPerSecond)) * Number(streams),
  };
});
if (values.json) console.log(JSON.stringify({ cpu: cpus()[0]?.model, rows }));
else {
  console.log(
    '| link | KB from each | p50 µs | p99 µs | CPU of an event loop, µs a reduction | tokens/s, best |\n|---|---|---|---|---|---|',
  );
  for (const { link, bytes, p50Us, p99Us, loopUsPerReduction, tokensPerSecond } of rows)
    console.log(
      `| ${link} | ${(bytes / 1_000).toFixed(1)} | ${p50Us.toFixed(0)} | ${p99Us.toFixed(0)} | ${loopUsPerReduction.toFixed(1)} | ${tokensPerSecond.toFixed(0)} |`,
    );
}
