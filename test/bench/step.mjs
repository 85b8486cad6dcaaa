/**
 * `npm run bench:kernels -- --step [options]`: whole steps of a real model through the real executor (all layers, head, greedy sampling; no broker, no HTTP), beside
 * the bench tools of llama.cpp and ik_llama.cpp where their paths are given. All programs take turns in every round, so a noisy minute meets each of them; shown are
 * the best round and the spread. Needs `npm run build` and the default model in the cache (or `--model`).
 */
import { loadAddon } from '../../dist/kernels/index.js';
import { defaultCacheDirectory } from '../../dist/kernels/model-file/cache-directory.js';
import { catalogue } from '../../dist/kernels/model-file/catalogue.js';
import { cachedModel } from '../../dist/kernels/model-file/download.js';
import { openModel } from '../../dist/kernels/model-file/model-file.js';
import { buildProgram, cutModel, unitsOfModel } from '../../dist/kernels/programs/index.js';
import { openSlice } from '../../dist/shard-worker/weights/slice-source.js';
import { llamaBatchedBench, llamaBench } from './peers/llama-cpp.mjs';

const blockTokens = 32;
const sampling = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 0n,
  choice: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
  logprobs: null,
};

/** All ranks of one model in this process, one executor each, with `threads` threads a rank pinned to cores of their own. */
class Engine {
  #executors = [];
  #settle = null;
  #step = 0;
  #left = 0;
  /** Of traced steps of rank 0: microseconds by name of the action. */
  #actions = [];
  /** Slots whose context is in the KV cache. */
  filled = 0;

  static async load(path, { ranks, threads, isa, activations, sequences, context, stepTokens }) {
    const engine = new Engine();
    const { facts } = await openModel(path);
    const cut = cutModel(unitsOfModel(facts), { count: ranks, parts: null }, { count: 1, parts: null });
    engine.blocks = Math.ceil(context / blockTokens);
    for (let rank = 0; rank < ranks; rank++) {
      const program = buildProgram(facts, cut, {
        stage: 0,
        rank,
        kvType: 'auto',
        activations,
        contextTokensMax: context,
      });
      const cores = Array.from({ length: threads }, (_, thread) => rank * threads + thread);
      const executor = loadAddon().createExecutor(
        {
          kind: 'cpu',
          isa,
          program,
          cores,
          threads,
          spin: true,
          blockTokens,
          kvBlocks: engine.blocks * sequences,
          stepTokensMax: stepTokens,
          sequencesMax: sequences,
        },
        {
          onStep: (done) => engine.#done(rank, done),
          onFrame: () => undefined,
          onStepFailed: (step, code, message) => engine.#settle?.reject(new Error(`step ${step}: ${code}: ${message}`)),
        },
      );
      const slice = await openSlice({
        facts,
        program,
        sliceSha256: '',
        modelPath: path,
        cacheDirectory: defaultCacheDirectory(),
        fetch: null,
      });
      for await (const { index, data } of slice.weights()) await executor.loadWeight(index, data);
      await slice.close();
      engine.#executors.push(executor);
    }
    const segments = engine.#executors.map((executor) => executor.openSegment());
    for (const [rank, executor] of engine.#executors.entries())
      executor.connect(
        segments.flatMap((segment, peer) =>
          peer === rank ? [] : [{ peer: { stage: 0, rank: peer }, driver: 'shm', ...segment }],
        ),
      );
    const none = new Int32Array();
    for (const executor of engine.#executors)
      executor.openSlots(
        Array.from({ length: sequences }, (_, slot) => ({ slot, sampling, promptTokens: none, outputTokens: none })),
      );
    return engine;
  }

  #done(rank, { spans }) {
    if (rank === 0 && spans) this.#actions.push(microsecondsByAction(spans));
    if (--this.#left === 0) this.#settle.resolve();
  }

  /** Median microseconds of each action of rank 0 in the steps of `work`; waits for the other ranks are within the action that waits, and apart as `wait`. */
  async profile(work) {
    for (const executor of this.#executors) executor.trace(true);
    this.#actions = [];
    await work();
    for (const executor of this.#executors) executor.trace(false);
    const names = new Set(this.#actions.flatMap((actions) => [...actions.keys()]));
    return new Map([...names].map((name) => [name, median(this.#actions.map((actions) => actions.get(name) ?? 0))]));
  }

  /** Queues steps; resolves when all ranks have done them. `rows`: slot, first position and token ids (-1: sampled by the step before) of each sequence. */
  run(steps) {
    this.#left = steps.length * this.#executors.length;
    const finished = new Promise((resolve, reject) => (this.#settle = { resolve, reject }));
    for (const { rows, output } of steps) {
      const before = this.#step++;
      const step = {
        step: this.#step,
        tokenIds: Int32Array.from(rows.flatMap(({ ids }) => ids)),
        tokenSteps: Int32Array.from(rows.flatMap(({ ids }) => ids.map(() => before))),
        positions: Int32Array.from(rows.flatMap(({ position, ids }) => ids.map((_, i) => position + i))),
        rowSequence: Int32Array.from(rows.flatMap(({ ids }, sequence) => ids.map(() => sequence))),
        slots: Int32Array.from(rows, ({ slot }) => slot),
        blockTableOffsets: Int32Array.from({ length: rows.length + 1 }, (_, i) => i * this.blocks),
        blockTables: Int32Array.from(
          rows.flatMap(({ slot }) => Array.from({ length: this.blocks }, (_, i) => slot * this.blocks + i)),
        ),
        outputs: null,
        waitTimeoutMs: 60_000,
      };
      let row = -1;
      const last = rows.map(({ ids }) => (row += ids.length));
      step.outputs = Int32Array.from(output ? last.flatMap((at) => [at, -1, 0]) : []);
      for (const executor of this.#executors) executor.submit(step);
    }
    return finished;
  }

  close() {
    return Promise.all(this.#executors.map((executor) => executor.dispose()));
  }
}

function microsecondsByAction({ names, values }) {
  const sums = new Map();
  for (let i = 0; i < values.length; i += 3) {
    const name = names[values[i]];
    sums.set(name, (sums.get(name) ?? 0) + values[i + 2] - values[i + 1]);
  }
  return sums;
}

const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

const prompt = (seed, count) => Array.from({ length: count }, (_, i) => 300 + ((seed * 7919 + i * 104729) % 20000));

/** Prompt tokens per second of one prompt, in steps of at most `stepTokens`. */
async function prefill(engine, tokens, stepTokens) {
  const ids = prompt(1, tokens);
  const steps = [];
  for (let from = 0; from < tokens; from += stepTokens)
    steps.push({
      rows: [{ slot: 0, position: from, ids: ids.slice(from, from + stepTokens) }],
      output: from + stepTokens >= tokens,
    });
  const began = performance.now();
  await engine.run(steps);
  return (tokens * 1000) / (performance.now() - began);
}

/** Tokens per second of `sequences` together over `steps` steps behind prompts of `context` tokens. */
async function decode(engine, sequences, context, steps) {
  for (; engine.filled < sequences; engine.filled++) {
    const slot = engine.filled;
    await engine.run([{ rows: [{ slot, position: 0, ids: prompt(slot, context) }], output: true }]);
  }
  const at = (position, token) => ({
    rows: Array.from({ length: sequences }, (_, slot) => ({ slot, position, ids: [token === null ? 1000 + slot : -1] })),
    output: true,
  });
  await engine.run([at(context, null)]);
  const began = performance.now();
  await engine.run(Array.from({ length: steps }, (_, i) => at(context + 1 + i, -1)));
  return (sequences * steps * 1000) / (performance.now() - began);
}

/** [work, tokens per second] of the tools of a rival: prefill and decode of one sequence, then decode of several. */
function rivalFigures(directory, model, threads, { prefillTokens, context, steps, sequences }) {
  const one = llamaBench(directory, model, { threads: [threads], prefillTokens, decodeTokens: steps });
  const several = llamaBatchedBench(directory, model, {
    threads,
    promptTokens: context,
    decodeTokens: steps,
    sequences: sequences.filter((count) => count > 1),
  });
  return [
    ...one.map(({ prefill: tokens, value }) => [tokens ? `prefill ${tokens}` : 'decode 1', value]),
    ...[...several].map(([count, value]) => [`decode ${count}`, value]),
  ];
}

/** The arguments after `--step`. */
export async function benchSteps(argv) {
  const options = {
    sequences: '1,4,8,16,32',
    context: '128',
    steps: '48',
    prefill: '512',
    rounds: '5',
    engines: '1x1,1x2,2x1',
    threads: '2',
  };
  const rivals = [];
  let json = false;
  let profile = false;
  for (let i = 0; i < argv.length; i++) {
    const key = argv[i].replace(/^--/, '');
    if (key === 'json') json = true;
    else if (key === 'profile') profile = true;
    else if (key === 'rival') rivals.push(argv[++i]);
    else if (key in options || key === 'model') options[key] = argv[++i];
    else throw new Error(`unknown option ${argv[i]}`);
  }
  const numbers = (text) => (text === '' ? [] : text.split(',').map(Number));
  const sequences = numbers(options.sequences);
  const [context, steps, prefillTokens, rounds] = [options.context, options.steps, options.prefill, options.rounds].map(Number);
  const model = options.model ?? (await cachedModel(catalogue[0]))?.path;
  if (!model) throw new Error('the default model is not in the cache: run npm start once, or name a file with --model');
  const stepTokens = Math.max(512, ...sequences);
  const engines = [];
  for (const name of options.engines.split(',').filter(Boolean)) {
    const [, ranks, threads, activations = 'int8', isa = null] = /^(\d+)x(\d+)(?:\/(int8|int16))?(?:@(\w+))?$/.exec(name) ?? [];
    if (!ranks) throw new Error(`--engines ${name}: ranks x threads, such as 1x2, 2x1/int16 or 1x1@avx2`);
    const size = {
      ranks: Number(ranks),
      threads: Number(threads),
      isa,
      activations,
      sequences: Math.max(1, ...sequences),
      context: Math.max(context + steps + 2, prefillTokens + 1),
      stepTokens,
    };
    engines.push({
      name: `shardmesh tp ${ranks}, ${threads} thread${size.threads > 1 ? 's' : ''} a rank${activations === 'int8' ? '' : `, ${activations}`}${isa ? `, ${isa}` : ''}`,
      engine: await Engine.load(model, size),
    });
  }
  /** work -> program -> figures */
  const figures = new Map();
  const note = (program, work, value) => {
    if (!figures.has(work)) figures.set(work, new Map());
    const row = figures.get(work);
    row.set(program, [...(row.get(program) ?? []), value]);
  };
  for (let round = 0; round < rounds; round++) {
    for (const { name, engine } of engines) {
      if (prefillTokens) note(name, `prefill ${prefillTokens}`, await prefill(engine, prefillTokens, stepTokens));
      for (const count of sequences) note(name, `decode ${count}`, await decode(engine, count, context, steps));
    }
    for (const directory of rivals) {
      const name = directory.replace(/\/+$/, '');
      for (const threads of numbers(options.threads)) {
        const size = { prefillTokens, context, steps, sequences };
        for (const [work, value] of rivalFigures(directory, model, threads, size)) note(`${name} -t ${threads}`, work, value);
      }
    }
  }
  const profiles = [];
  if (profile)
    for (const { name, engine } of engines) {
      const add = async (work, run) => profiles.push({ name, work, actions: await engine.profile(run) });
      const prompts = async () => {
        for (let i = 0; i < 8; i++) await prefill(engine, prefillTokens, stepTokens);
      };
      if (prefillTokens) await add(`prefill ${prefillTokens}`, prompts);
      for (const count of sequences) await add(`decode ${count}`, () => decode(engine, count, context, steps));
    }
  await Promise.all(engines.map(({ engine }) => engine.close()));
  const rows = [...figures].flatMap(([work, programs]) =>
    [...programs].map(([program, values]) => ({
      work,
      program,
      best: Math.max(...values),
      worst: Math.min(...values),
      rounds: values.length,
    })),
  );
  if (json) {
    const asObjects = profiles.map((one) => ({ ...one, actions: Object.fromEntries(one.actions) }));
    console.log(
      JSON.stringify({ cpu: loadAddon().cpuFeatures().model, model, context, steps, rows, profiles: asObjects }, null, 2),
    );
    return;
  }
  console.log(`${loadAddon().cpuFeatures().model}; tokens/s, best of ${rounds} rounds (worst)`);
  for (const { work, program, best, worst } of rows)
    console.log(`${work.padEnd(12)} ${program.padEnd(44)} ${best.toFixed(1).padStart(8)} (${worst.toFixed(1)})`);
  for (const { name } of engines) {
    const own = profiles.filter((one) => one.name === name);
    if (own.length === 0) continue;
    console.log(`\n${name}, µs a step by action (rank 0, medians)`.padEnd(34) + `: ${own.map(({ work }) => work).join(', ')}`);
    for (const action of new Set(own.flatMap(({ actions }) => [...actions.keys()])))
      console.log(`${action.padEnd(20)}${own.map(({ actions }) => (actions.get(action) ?? 0).toFixed(0).padStart(9)).join('')}`);
  }
}
