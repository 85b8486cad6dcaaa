/**
 * Models of real architectures with generated weights, small enough for the emulated machine: any tensor type, size of head, window and bias, cut and built by the
 * project's own programs.
 */
import type { ModelFacts, TensorFacts } from '../../kernels/model-file/model-facts.ts';
import { quantType, rowBytes } from '../../kernels/model-file/quant-types.ts';
import { buildProgram, cutModel, unitsOfModel, type CutShares, type KvType } from '../../kernels/programs/index.ts';
import type { ActivationType, Program, TensorType, WeightSlice } from '../../kernels/programs/program.ts';
import { floatBits, gaussian, uniform } from './tiny-model.ts';

export interface SmallShape {
  architecture: 'llama' | 'qwen2';
  layers: number;
  hidden: number;
  heads: number;
  kvHeads: number;
  headSize: number;
  feedForward: number;
  vocabulary: number;
  window: number | null;
  /** Longest context; 1,024 where nothing is said. */
  contextTokensMax?: number;
  /** int8 where nothing is said. */
  activations?: ActivationType;
  /** exact where nothing is said. */
  bits?: Program['bits'];
  kvType?: KvType;
  /** Of `q`, `k`, `v`, `o`, `gate`, `up`, `down`, `embedding`, and `head` where the head is not the embedding. */
  types: Record<'q' | 'k' | 'v' | 'o' | 'gate' | 'up' | 'down' | 'embedding', TensorType> & { head?: TensorType };
}

export const typesOf = (type: TensorType): SmallShape['types'] => ({
  q: type,
  k: type,
  v: type,
  o: type,
  gate: type,
  up: type,
  down: type,
  embedding: type,
});

/** Scale and minimum of each type's blocks of random integers: values of about 0.08, around zero. */
const scales: Partial<Record<TensorType, readonly number[]>> = {
  Q4_0: [0.017],
  Q4_1: [0.017, -0.128],
  Q5_0: [0.0087],
  Q5_1: [0.0087, -0.135],
  Q8_0: [0.0011],
  Q4_K: [0.0005, 0.0037],
  Q5_K: [0.00025, 0.0037],
  Q6_K: [0.00007],
};

/** Rounded down; 0 where a half is subnormal. */
function halfBits(value: number): number {
  const bits = floatBits(value);
  if (((bits >>> 23) & 255) < 113) return 0;
  return ((bits >>> 16) & 0x8000) | ((((bits >>> 23) & 255) - 112) << 10) | ((bits >>> 13) & 1023);
}

function generate({ name, type, bytes }: TensorFacts, seed: number): Uint8Array {
  const next = uniform(seed);
  if (type === 'F32') {
    const [mean, spread] = name.endsWith('norm.weight') ? [1, 0.2] : [0, 0.1];
    const floats = new Float32Array(bytes / 4);
    for (let i = 0; i < floats.length; i++) floats[i] = mean + spread * gaussian(next);
    return new Uint8Array(floats.buffer);
  }
  if (type === 'F16' || type === 'BF16') {
    const words = new Uint16Array(bytes / 2);
    for (let i = 0; i < words.length; i++) {
      const value = 0.08 * gaussian(next);
      words[i] = type === 'F16' ? halfBits(value) : floatBits(value) >>> 16;
    }
    return new Uint8Array(words.buffer);
  }
  const data = new Uint8Array(bytes);
  for (let i = 0; i < bytes; i++) data[i] = next() * 256;
  const view = new DataView(data.buffer);
  const { blockBytes, scaleOffsets } = quantType(type);
  for (let block = 0; block < bytes; block += blockBytes)
    scaleOffsets.forEach((offset, i) => view.setUint16(block + offset, halfBits(scales[type]![i]! * (0.75 + next() / 2)), true));
  return data;
}

/** K-quants, heads of 64, a tied head. */
export const kQuantShape: SmallShape = {
  architecture: 'llama',
  layers: 2,
  hidden: 256,
  heads: 4,
  kvHeads: 2,
  headSize: 64,
  feedForward: 768,
  vocabulary: 2_100,
  window: null,
  types: { q: 'Q4_K', k: 'Q5_K', v: 'Q6_K', o: 'Q4_K', gate: 'Q4_K', up: 'Q5_K', down: 'Q6_K', embedding: 'Q6_K' },
};

/** Biases, every format of blocks of 32, heads of 32, a window, a head of its own. */
export const qwen2Shape: SmallShape = {
  architecture: 'qwen2',
  layers: 2,
  hidden: 128,
  heads: 4,
  kvHeads: 1,
  headSize: 32,
  feedForward: 96,
  vocabulary: 2_100,
  window: 70,
  types: {
    q: 'Q5_0',
    k: 'Q5_1',
    v: 'Q8_0',
    o: 'Q4_0',
    gate: 'Q5_1',
    up: 'Q4_1',
    down: 'Q5_0',
    embedding: 'Q4_1',
    head: 'Q8_0',
  },
};

/** BF16 throughout, with biases. */
export const bf16Shape: SmallShape = {
  architecture: 'qwen2', // q, k and v have biases
  layers: 2,
  hidden: 128,
  heads: 4,
  kvHeads: 2,
  headSize: 32,
  feedForward: 192,
  vocabulary: 1_100,
  window: null,
  types: typesOf('BF16'),
};

export interface SmallModel {
  facts: ModelFacts;
  /** Of all ranks of all stages. */
  programs(tp: number | number[], pp?: number, kvType?: KvType): Program[];
  blocksOf(slice: WeightSlice): Uint8Array;
}

export function smallModel(shape: SmallShape): SmallModel {
  const { hidden: H, headSize: D, heads: N, kvHeads: G, feedForward: F, vocabulary: V, types } = shape;
  const tensors: TensorFacts[] = [];
  let offset = 0;
  const add = (name: string, type: TensorType, ...dimensions: number[]): void => {
    const bytes = rowBytes(type, dimensions[0]!) * (dimensions[1] ?? 1);
    tensors.push({ name, type, shape: dimensions, offset, bytes });
    offset += bytes;
  };
  add('token_embd.weight', types.embedding, H, V);
  for (let layer = 0; layer < shape.layers; layer++) {
    const at = `blk.${layer}.`;
    add(`${at}attn_norm.weight`, 'F32', H);
    add(`${at}attn_q.weight`, types.q, H, N * D);
    add(`${at}attn_k.weight`, types.k, H, G * D);
    add(`${at}attn_v.weight`, types.v, H, G * D);
    add(`${at}attn_output.weight`, types.o, N * D, H);
    if (shape.architecture === 'qwen2')
      for (const [name, heads] of [
        ['q', N],
        ['k', G],
        ['v', G],
      ] as const)
        add(`${at}attn_${name}.bias`, 'F32', heads * D);
    add(`${at}ffn_norm.weight`, 'F32', H);
    add(`${at}ffn_gate.weight`, types.gate, H, F);
    add(`${at}ffn_up.weight`, types.up, H, F);
    add(`${at}ffn_down.weight`, types.down, F, H);
  }
  add('output_norm.weight', 'F32', H);
  if (types.head) add('output.weight', types.head, H, V);
  const facts: ModelFacts = {
    version: 1,
    architecture: shape.architecture,
    name: 'small',
    sourceSha256: '0'.repeat(64),
    sourceBytes: offset,
    layers: shape.layers,
    hiddenSize: H,
    heads: N,
    kvHeads: G,
    headSize: D,
    feedForwardSize: F,
    vocabularySize: V,
    contextTokensMax: shape.contextTokensMax ?? 1_024,
    normEpsilon: 1e-5,
    rope: { base: 10_000, dimensions: D, scale: 1 },
    slidingWindow: shape.window,
    tensors,
  };
  const data = new Map<string, Uint8Array>(); // made when it is asked for: a program alone needs no weights
  return {
    facts,
    programs(tp, pp = 1, kvType = 'int8') {
      const shares = (wanted: number | number[]): CutShares =>
        typeof wanted === 'number' ? { count: wanted, parts: null } : { count: wanted.length, parts: wanted };
      const cut = cutModel(unitsOfModel(facts), shares(tp), shares(pp));
      return cut.stages.flatMap(({ ranks }, stage) =>
        ranks.map((_, rank) =>
          buildProgram(facts, cut, {
            stage,
            rank,
            bits: shape.bits ?? 'exact',
            activations: shape.activations ?? 'int8',
            kvType: shape.kvType ?? kvType,
            contextTokensMax: null,
          }),
        ),
      );
    },
    blocksOf({ tensor: name, type, rows, columns }) {
      const index = tensors.findIndex((tensor) => tensor.name === name);
      const { shape: dimensions } = tensors[index]!;
      if (!data.has(name)) data.set(name, generate(tensors[index]!, index + 1));
      const { blockValues, blockBytes } = quantType(type);
      const first = Math.floor(columns.from / blockValues) * blockBytes;
      const width = Math.ceil(columns.to / blockValues) * blockBytes - first;
      const stride = rowBytes(type, dimensions[0]!);
      const blocks = new Uint8Array((rows.to - rows.from) * width);
      for (let row = rows.from; row < rows.to; row++)
        blocks.set(data.get(name)!.subarray(row * stride + first, row * stride + first + width), (row - rows.from) * width);
      return blocks;
    },
  };
}
