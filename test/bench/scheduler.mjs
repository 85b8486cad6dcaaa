/**
 * `npm run bench:scheduler -- [--out FILE] [--json] [--steps 300]`: time to plan a decode step and to commit its result, against the number of running sequences. Writes a plot
 * (one self-contained SVG file); a straight line means that each sequence costs the same however many there are.
 */
import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { BlockPool } from '../../dist/coordinator/kv-cache/block-pool.js';
import { PrefixCache } from '../../dist/coordinator/kv-cache/prefix-cache.js';
import { Scheduler } from '../../dist/coordinator/scheduler/scheduler.js';
import { decodeMessage, encodeMessage } from '../../dist/protocol/message-codec.js';

const { values } = parseArgs({
  options: { out: { type: 'string' }, json: { type: 'boolean', default: false }, steps: { type: 'string', default: '300' } },
});
const placement = 'ccccccccccccccccccccccccci';
const blockTokens = 16;
const promptLength = 64;
const outputTokens = 512;
const warmSteps = 60;
const steps = Number(values.steps);

function makeScheduler(count) {
  let cache = null;
  const pool = new BlockPool(count * Math.ceil((promptLength + outputTokens) / blockTokens) + 64, (block) =>
    cache?.forget(block),
  );
  cache = new PrefixCache({
    pool,
    blockTokens,
    secret: new Uint8Array(32),
    identity: { modelSha256: 'm', activations: 'int8', kvType: 'int8', arithmetic: '1' },
  });
  const scheduler = new Scheduler({
    placement,
    epoch: 1,
    pool,
    cache,
    blockTokens,
    sequencesMax: count,
    stepTokensMax: Math.max(1_024, count),
    prefillChunkMax: 1_024,
    stepOutputsMax: Math.max(1_024, count),
    microBatches: () => 1,
    prefillTokensMax: () => Number.POSITIVE_INFINITY,
    stepsInFlightMax: 2,
    sequenceStepsMax: 2,
    speculation: null,
    waitTimeoutMs: () => 2_000,
  });
  for (let i = 0; i < count; i++)
    scheduler.add({
      tenant: 't',
      promptTokens: Array.from({ length: promptLength }, (_, j) => (i * 97 + j) % 40_000),
      sampling: {
        temperature: 0,
        topP: 1,
        topK: 0,
        minP: 0,
        seed: 1n,
        choice: 0,
        repetitionPenalty: 1,
        presencePenalty: 0,
        frequencyPenalty: 0,
        logitBias: [],
        logprobs: null,
      },
      outputTokensMax: outputTokens,
      outputTokensMin: 0,
      stopTokens: new Set([2]),
      scorePrompt: false,
    });
  return scheduler;
}

const resultOf = ({ epoch, step, sequences }) => ({
  type: 'step_result',
  placement,
  epoch,
  step,
  outputs: sequences.flatMap(({ slot, outputs }) => outputs.map(() => ({ slot, token: 5, logprob: null, top: [] }))),
  totalUs: 1,
  collectiveUs: 0,
  receiveUs: 0,
  sampleUs: 0,
  idleUs: 0,
});
const median = (list) => list.sort((a, b) => a - b)[Math.floor(list.length / 2)];

function measure(count) {
  const scheduler = makeScheduler(count);
  const inFlight = [];
  const times = { plan: [], encode: [], decode: [], commit: [] };
  const timed = (list, work) => {
    const began = performance.now();
    const result = work();
    list.push((performance.now() - began) * 1e3);
    return result;
  };
  for (let step = 0; step < warmSteps + steps + 20; step++) {
    const measured = step >= warmSteps + 20 ? times : { plan: [], encode: [], decode: [], commit: [] };
    const plan = timed(measured.plan, () => scheduler.schedule(step));
    if (plan) {
      timed(measured.encode, () => encodeMessage({ type: 'step_plans', plans: [plan] }));
      inFlight.push(encodeMessage(resultOf(plan)));
    }
    if (inFlight.length === 2 || !plan) {
      const result = timed(measured.decode, () => decodeMessage(inFlight.shift()));
      timed(measured.commit, () => scheduler.complete(result));
    }
  }
  return Object.fromEntries(Object.entries(times).map(([name, list]) => [name, median(list)]));
}

measure(64); // compiles
const points = [1, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1_024].map((sequences) => ({ sequences, ...measure(sequences) }));
const total = ({ plan, encode, decode, commit }) => plan + encode + decode + commit;
if (values.json) console.log(JSON.stringify(points));
else {
  console.log(`sequences   plan  encode  decode  commit   all   a sequence   (microseconds, median of ${steps} steps)`);
  for (const point of points) {
    const numbers = [point.plan, point.encode, point.decode, point.commit, total(point)].map((one) => one.toFixed(0).padStart(7));
    console.log(`${String(point.sequences).padStart(9)}${numbers.join(' ')}   ${(total(point) / point.sequences).toFixed(2)}`);
  }
}

/** Two lines over the number of sequences: planning alone, and all that the coordinator does for a step besides text and HTTP. */
function plot() {
  const [width, height, left, bottom, top] = [720, 420, 70, 50, 40];
  const largest = Math.ceil(Math.max(...points.map(total)) / 500) * 500;
  const x = (sequences) => left + (sequences / 1_024) * (width - left - 20);
  const y = (us) => height - bottom - (us / largest) * (height - bottom - top);
  const line = (of, colour) =>
    `<polyline fill="none" stroke="${colour}" stroke-width="2" points="${points.map((point) => `${x(point.sequences).toFixed(1)},${y(of(point)).toFixed(1)}`).join(' ')}"/>` +
    points
      .map((point) => `<circle cx="${x(point.sequences).toFixed(1)}" cy="${y(of(point)).toFixed(1)}" r="3" fill="${colour}"/>`)
      .join('');
  const grid = Array.from({ length: 6 }, (_, i) => (largest / 5) * i)
    .map(
      (us) =>
        `<line x1="${left}" x2="${width - 20}" y1="${y(us)}" y2="${y(us)}" stroke="#ddd"/><text x="${left - 8}" y="${y(us) + 4}" text-anchor="end">${us.toFixed(0)}</text>`,
    )
    .join('');
  const ticks = [0, 256, 512, 768, 1_024]
    .map((count) => `<text x="${x(count)}" y="${height - bottom + 20}" text-anchor="middle">${count}</text>`)
    .join('');
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>
<text x="${left}" y="20" font-size="14">Microseconds a decode step: scheduler, and scheduler with plan and result as bytes</text>${grid}${ticks}
<text x="${(left + width) / 2}" y="${height - 10}" text-anchor="middle">running sequences</text>
${line((point) => point.plan + point.commit, '#1f77b4')}${line(total, '#d62728')}
<text x="${left + 16}" y="${top + 16}" fill="#d62728">plan + encode + decode + commit</text><text x="${left + 16}" y="${top + 34}" fill="#1f77b4">plan + commit</text></svg>\n`;
}
if (values.out) writeFileSync(values.out, plot());
