/** A whole real model in one executor, without mesh or broker: for figures that come from outside. */
import type { ActivationType } from '../../kernels/programs/program.ts';
import { loadAddon, outputNumbers, type Addon, type ExecutorKind, type Isa, type StepDone } from '../../kernels/index.ts';
import { catalogue } from '../../kernels/model-file/catalogue.ts';
import { cachedModel } from '../../kernels/model-file/download.ts';
import { openModel } from '../../kernels/model-file/model-file.ts';
import { buildProgram, cutModel, unitsOfModel } from '../../kernels/programs/index.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import { openSlice } from '../../shard-worker/weights/slice-source.ts';

/** Path of a model of the catalogue when it is in the cache, else null. */
export async function cachedModelPath(name: string): Promise<string | null> {
  const entry = catalogue.find((one) => one.name === name);
  return (entry && (await cachedModel(entry))?.path) ?? null;
}

const one = { count: 1, parts: null };
const stepTokens = 128;

export interface ScoringModel {
  /** Log-probability of each next token of `ids`, ids.length - 1 values. */
  score(ids: readonly number[]): Promise<number[]>;
  /** Greedy continuation, with the 20 best of its first token. */
  generate(ids: readonly number[], count: number): Promise<{ tokens: number[]; firstTop: { token: number; logprob: number }[] }>;
  close(): Promise<void>;
}

export async function loadScoringModel(
  path: string,
  kind: ExecutorKind,
  {
    isa = null,
    threads = 2,
    activations = 'int8',
    addon = loadAddon(),
  }: { isa?: Isa | null; threads?: number; activations?: ActivationType; addon?: Addon } = {},
): Promise<ScoringModel> {
  const { facts } = await openModel(path);
  const cut = cutModel(unitsOfModel(facts), one, one);
  const program = buildProgram(facts, cut, { stage: 0, rank: 0, activations, kvType: 'auto', contextTokensMax: 512 });
  let settle: { resolve: (done: StepDone) => void; reject: (error: Error) => void } | null = null;
  const blockTokens = 16;
  const kvBlocks = 512 / blockTokens;
  const executor = addon.createExecutor(
    { kind, isa, program, cores: [], threads, spin: true, blockTokens, kvBlocks, stepTokensMax: stepTokens, sequencesMax: 1 },
    {
      onStep: (done) => settle?.resolve(done),
      onFrame: () => undefined,
      onStepFailed: (step, code, message) => settle?.reject(new Error(`step ${step}: ${code}: ${message}`)),
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
  executor.openSegment();
  executor.connect([]);
  let step = 0;
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
  };
  const none = new Int32Array();

  const run = (ids: readonly number[], position: number, scores: (number | null)[]): Promise<StepDone> =>
    new Promise<StepDone>((resolve, reject) => {
      settle = { resolve, reject };
      executor.submit({
        step: ++step,
        tokenIds: Int32Array.from(ids),
        tokenSteps: new Int32Array(ids.length),
        positions: Int32Array.from(ids, (_, index) => position + index),
        rowSequence: new Int32Array(ids.length),
        slots: Int32Array.of(0),
        blockTableOffsets: Int32Array.of(0, kvBlocks),
        blockTables: Int32Array.from({ length: kvBlocks }, (_, block) => block),
        outputs: outputNumbers(scores.map((score, index) => ({ row: ids.length - scores.length + index, score, banned: [] }))),
        waitTimeoutMs: 60_000,
      });
    });

  return {
    async score(ids) {
      executor.openSlots([{ slot: 0, sampling: { ...sampling, logprobs: 0 }, promptTokens: none, outputTokens: none }]);
      const logprobs: number[] = [];
      for (let from = 0; from < ids.length - 1; from += stepTokens) {
        const rows = ids.slice(from, Math.min(from + stepTokens, ids.length - 1));
        const { outputs } = await run(
          rows,
          from,
          rows.map((_, index) => ids[from + index + 1] ?? 0),
        );
        for (const { logprob } of outputs) logprobs.push(logprob ?? Number.NaN);
      }
      executor.closeSlots([0]);
      return logprobs;
    },
    async generate(ids, count) {
      executor.openSlots([{ slot: 0, sampling: { ...sampling, logprobs: 20 }, promptTokens: none, outputTokens: none }]);
      const tokens: number[] = [];
      let firstTop: { token: number; logprob: number }[] = [];
      let pending = [...ids];
      let position = 0;
      while (tokens.length < count) {
        const rows = pending.splice(0, stepTokens);
        const { outputs } = await run(rows, position, pending.length ? [] : [null]);
        position += rows.length;
        const [output] = outputs;
        if (!output) continue;
        if (tokens.length === 0) firstTop = output.top;
        tokens.push(output.token);
        pending = [output.token];
      }
      executor.closeSlots([0]);
      return { tokens, firstTop };
    },
    close: () => executor.dispose(),
  };
}

export interface ReferenceFigures {
  chat: { ids: number[]; top: [number, number][]; greedy: number[]; margin: number[] }[];
  text: { ids: number[]; logprobs: number[] }[];
  samples: { ids: number[]; logprobs: number[] }[];
}

export interface Deviation {
  tokens: number;
  /** Of a token's log-probability, natural logarithm. */
  meanAbsolute: number;
  maxAbsolute: number;
  /** Perplexity over the reference's perplexity on the same tokens. */
  perplexityRatio: number;
}

/** Scores texts and compares with the figures. */
export async function deviationOf(model: ScoringModel, texts: { ids: number[]; logprobs: number[] }[]): Promise<Deviation> {
  let tokens = 0;
  let absolute = 0;
  let maxAbsolute = 0;
  let difference = 0;
  for (const { ids, logprobs } of texts)
    for (const [index, logprob] of (await model.score(ids)).entries()) {
      const expected = logprobs[index] ?? Number.NaN;
      tokens++;
      absolute += Math.abs(logprob - expected);
      maxAbsolute = Math.max(maxAbsolute, Math.abs(logprob - expected));
      difference += expected - logprob;
    }
  return { tokens, meanAbsolute: absolute / tokens, maxAbsolute, perplexityRatio: Math.exp(difference / tokens) };
}
