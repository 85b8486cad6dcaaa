/**
 * Models as a machine without Node runs them: a file with shapes, a seed and the programs of every rank of some cuts, one JSON value a line, whose weights the reader
 * (exported_model.h) generates from the seed. A file has a few hundred KB at most.
 */
import { kQuantShape, qwen2Shape, smallModel, typesOf, type SmallShape } from '../kernels/small-model.ts';
import type { KvType } from '../../kernels/programs/index.ts';

/** How a model is cut: shares of the ranks of a stage, and stages. */
export interface ExportedCut {
  name: string;
  tp: number | number[];
  pp: number;
}

export interface ExportedModel {
  name: string;
  shape: SmallShape;
  seed: number;
  cuts: ExportedCut[];
  kvType?: KvType;
  /** Tokens of the longest prompt that tests give it. */
  promptTokens: number;
}

const one: ExportedCut = { name: '1 rank', tp: 1, pp: 1 };
const allCuts: ExportedCut[] = [
  one,
  { name: '2 ranks', tp: 2, pp: 1 },
  { name: '3 uneven ranks', tp: [3, 2, 1], pp: 1 },
  { name: '2 ranks by 2 stages', tp: 2, pp: 2 },
];

const llama = { architecture: 'llama', layers: 2, window: null, vocabulary: 2_100 } as const;

/** Every format, size of head, style of rope and kind of head; of a size that the reference computes in a moment. */
export const testModels: readonly ExportedModel[] = [
  {
    name: 'llama-k-quants-d64',
    shape: kQuantShape,
    seed: 11,
    cuts: allCuts,
    promptTokens: 270,
  },
  {
    name: 'qwen2-blocks-of-32-d32-window',
    shape: qwen2Shape,
    seed: 12,
    cuts: allCuts,
    promptTokens: 270,
  },
  {
    name: 'llama-q4_0-d128',
    shape: {
      ...llama,
      hidden: 256,
      heads: 6,
      kvHeads: 3,
      headSize: 128,
      feedForward: 192,
      types: { ...typesOf('Q4_0'), v: 'Q4_1', down: 'Q4_1', o: 'Q8_0' },
    },
    seed: 13,
    cuts: allCuts,
    promptTokens: 300,
  },
  {
    name: 'llama-q8_0-d256',
    shape: {
      ...llama,
      hidden: 256,
      heads: 3,
      kvHeads: 3,
      headSize: 256,
      feedForward: 192,
      types: { ...typesOf('Q4_1'), q: 'Q8_0', k: 'Q5_1', v: 'Q5_0', gate: 'Q8_0', down: 'Q8_0' },
    },
    seed: 14,
    cuts: [one, allCuts[2]!],
    promptTokens: 260,
  },
  {
    name: 'llama-floats-d32',
    shape: {
      ...llama,
      hidden: 128,
      heads: 4,
      kvHeads: 2,
      headSize: 32,
      feedForward: 96,
      types: { ...typesOf('BF16'), q: 'F16', v: 'F32', gate: 'Q4_0', down: 'F16' },
    },
    seed: 16,
    cuts: [one, allCuts[1]!],
    promptTokens: 60,
  },
  {
    name: 'llama-135m-4-layers',
    shape: {
      ...llama,
      layers: 4,
      hidden: 576,
      heads: 9,
      kvHeads: 3,
      headSize: 64,
      feedForward: 1_536,
      vocabulary: 49_152,
      types: { ...typesOf('Q4_1'), embedding: 'Q8_0' },
    },
    seed: 15,
    cuts: allCuts.slice(0, 3),
    promptTokens: 150,
  },
];

const deep = { architecture: 'llama', window: null, contextTokensMax: 4_096 } as const;

/** Shapes of real models, for the benchmark of whole decode steps. */
export const benchModels: readonly ExportedModel[] = [
  {
    name: 'step-135m',
    shape: {
      ...deep,
      layers: 30,
      hidden: 576,
      heads: 9,
      kvHeads: 3,
      headSize: 64,
      feedForward: 1_536,
      vocabulary: 49_152,
      types: { ...typesOf('Q4_1'), embedding: 'Q8_0' },
    },
    seed: 21,
    cuts: [one],
    promptTokens: 128,
  },
  {
    name: 'step-1.5b',
    shape: {
      ...deep,
      architecture: 'qwen2',
      layers: 28,
      hidden: 1_536,
      heads: 12,
      kvHeads: 2,
      headSize: 128,
      feedForward: 8_960,
      vocabulary: 151_936,
      types: { ...typesOf('Q4_K'), v: 'Q6_K', down: 'Q6_K', embedding: 'Q6_K' },
    },
    seed: 22,
    cuts: [one],
    promptTokens: 128,
  },
  {
    name: 'step-8b',
    shape: {
      ...deep,
      layers: 32,
      hidden: 4_096,
      heads: 32,
      kvHeads: 8,
      headSize: 128,
      feedForward: 14_336,
      vocabulary: 128_256,
      types: { ...typesOf('Q4_K'), head: 'Q6_K' },
    },
    seed: 23,
    cuts: [one],
    promptTokens: 128,
  },
];

/** The file of a model: a header, then the programs of its cuts in order, each a line. */
export function exportModel({ name, shape, seed, cuts, kvType, promptTokens }: ExportedModel): string {
  const model = smallModel(shape);
  const programs = cuts.map(({ tp, pp }) => model.programs(tp, pp, kvType));
  const header = {
    version: 1,
    name,
    seed,
    promptTokens,
    tensors: model.facts.tensors.map((t) => ({ name: t.name, type: t.type, columns: t.shape[0]!, rows: t.shape[1] ?? 1 })),
    cuts: cuts.map((cut, i) => ({ name: cut.name, programs: programs[i]!.length })),
  };
  return [header, ...programs.flat()].map((value) => `${JSON.stringify(value)}\n`).join('');
}
