/**
 * A llama-like model of two layers with random weights, cut any way, run through the real addon; and the same model in plain double precision. Small enough to
 * compute by hand, large enough to have two segments in a product, query heads that share KV heads, and units that do not divide by the ranks.
 */
import {
  loadAddon,
  outputNumbers,
  type Addon,
  type Executor,
  type ExecutorKind,
  type Isa,
  type NativeFrame,
  type OutputResult,
  type PeerLink,
  type PeerMemoryLink,
  type SlotSampling,
  type StepDone,
  type WireType,
} from '../../kernels/index.ts';
import type { Operation, Program, Range, TensorType, UnitCut, WeightSlice } from '../../kernels/programs/program.ts';

export const tiny = {
  hidden: 288,
  layers: 2,
  heads: 9,
  kvHeads: 3,
  headSize: 32,
  feedForward: 160,
  vocabulary: 600,
  context: 1_200,
  epsilon: 1e-5,
  ropeBase: 10_000,
};

/** Deterministic uniform numbers in [0, 1).      mulberry32, Ettinger */
export function uniform(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}

export function gaussian(next: () => number): number {
  return Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
}

/** A tensor as the file has it (`blocks`) and what it means (`values`). */
export interface Tensor {
  type: TensorType;
  rows: number;
  columns: number;
  blocks: Uint8Array;
  values: Float64Array;
}

const blockBytes: Partial<Record<TensorType, number>> = { Q4_0: 18, Q4_1: 20, Q8_0: 34 };

const floatOfWord = new Float32Array(1);
const wordOfFloat = new Uint32Array(floatOfWord.buffer);
/** The 32 bits of `value` as fp32. */
export function floatBits(value: number): number {
  floatOfWord[0] = value;
  return wordOfFloat[0]!;
}

function halfBits(value: number): number {
  const bits = floatBits(value);
  const sign = (bits >>> 16) & 0x8000;
  const exponent = ((bits >>> 23) & 255) - 112;
  if (exponent <= 0) return sign; // small scales do not occur here
  return sign | (exponent << 10) | ((bits >>> 13) & 1023);
}

function halfValue(bits: number): number {
  const magnitude = ((bits & 1023) / 1024 + 1) * 2 ** (((bits >>> 10) & 31) - 15);
  return (bits & 0x7fff) === 0 ? 0 : bits & 0x8000 ? -magnitude : magnitude;
}

/** Random values, quantised to blocks of 32 the plain way; `values` are what the blocks say. */
export function randomTensor(type: TensorType, rows: number, columns: number, scale: number, next: () => number): Tensor {
  const values = new Float64Array(rows * columns);
  if (type === 'F32') {
    const floats = Float32Array.from(values, () => scale * gaussian(next));
    values.set(floats);
    return { type, rows, columns, blocks: new Uint8Array(floats.buffer), values };
  }
  const bytes = blockBytes[type]!;
  const blocks = new Uint8Array((rows * columns * bytes) / 32);
  const view = new DataView(blocks.buffer);
  const x = new Float64Array(32);
  // Integers of a block, least and most, and what is added to them where it keeps them unsigned.
  const [low, high, offset] = type === 'Q8_0' ? [-127, 127, 0] : type === 'Q4_0' ? [-8, 7, 8] : [0, 15, 0];
  for (let b = 0; b < (rows * columns) / 32; b++) {
    for (let j = 0; j < 32; j++) x[j] = scale * gaussian(next);
    const at = b * bytes;
    const least = Math.min(...x);
    const most = Math.max(...x);
    const largest = Math.max(most, -least);
    const d = halfBits(type === 'Q8_0' ? largest / 127 : type === 'Q4_0' ? largest / 7 : (most - least) / 15);
    const m = type === 'Q4_1' ? halfBits(least) : 0;
    view.setUint16(at, d, true);
    if (type === 'Q4_1') view.setUint16(at + 2, m, true);
    const [step, minimum] = [halfValue(d), halfValue(m)];
    for (let j = 0; j < 32; j++) {
      const q = Math.min(high, Math.max(low, Math.round((x[j]! - minimum) / step)));
      values[b * 32 + j] = step * q + minimum;
      if (type === 'Q8_0') {
        view.setInt8(at + 2 + j, q);
      } else {
        const byte = at + (type === 'Q4_0' ? 2 : 4) + (j % 16);
        blocks[byte] = blocks[byte]! | ((q + offset) << (j < 16 ? 0 : 4));
      }
    }
  }
  return { type, rows, columns, blocks, values };
}

export type TinyWeights = Map<string, Tensor>;

export function tinyWeights(seed = 1): TinyWeights {
  const next = uniform(seed);
  const { hidden, kvHeads, headSize, feedForward, vocabulary } = tiny;
  const weights: TinyWeights = new Map();
  const norm = (name: string) => {
    const tensor = randomTensor('F32', 1, hidden, 0.2, next);
    const floats = Float32Array.from(tensor.values, (v) => 1 + v);
    weights.set(name, { ...tensor, values: Float64Array.from(floats), blocks: new Uint8Array(floats.buffer) });
  };
  weights.set('token_embd', randomTensor('Q8_0', vocabulary, hidden, 0.12, next));
  for (let l = 0; l < tiny.layers; l++) {
    norm(`${l}.attn_norm`);
    weights.set(`${l}.q`, randomTensor('Q4_1', hidden, hidden, 0.12, next));
    weights.set(`${l}.k`, randomTensor('Q4_1', kvHeads * headSize, hidden, 0.12, next));
    weights.set(`${l}.v`, randomTensor('Q8_0', kvHeads * headSize, hidden, 0.06, next));
    weights.set(`${l}.o`, randomTensor('Q4_0', hidden, hidden, 0.06, next));
    norm(`${l}.ffn_norm`);
    weights.set(`${l}.gate`, randomTensor('Q4_1', feedForward, hidden, 0.06, next));
    weights.set(`${l}.up`, randomTensor('Q4_1', feedForward, hidden, 0.06, next));
    weights.set(`${l}.down`, randomTensor('Q8_0', hidden, feedForward, 0.08, next));
  }
  norm('output_norm');
  return weights;
}

/** Of meshes that name none; nobody changes them. */
let defaultWeights: TinyWeights | null = null;

export interface TinyCut {
  /** Layers of each stage. */
  stages: Range[];
  /** Attention units (one query head each), feed-forward units (32 wide) and vocabulary ids of each rank. */
  heads: Range[];
  feedForward: Range[];
  vocabulary: Range[];
}

const range = (from: number, to: number): Range => ({ from, to });

export const wholeCut: TinyCut = {
  stages: [range(0, 2)],
  heads: [range(0, 9)],
  feedForward: [range(0, 5)],
  vocabulary: [range(0, 600)],
};

export const twoRankCut: TinyCut = {
  stages: [range(0, 2)],
  heads: [range(0, 5), range(5, 9)],
  feedForward: [range(0, 3), range(3, 5)],
  vocabulary: [range(0, 320), range(320, 600)],
};

export const threeRankTwoStageCut: TinyCut = {
  stages: [range(0, 1), range(1, 2)],
  heads: [range(0, 4), range(4, 8), range(8, 9)],
  feedForward: [range(0, 1), range(1, 3), range(3, 5)],
  vocabulary: [range(0, 100), range(100, 350), range(350, 600)],
};

/** Ends of the segments of a column-parallel product over `columns`. */
function segmentsOf(columns: number): number[] {
  const groups = columns / 32;
  const count = Math.min(8, Math.ceil(groups / 8));
  const ends: number[] = [];
  for (let i = 0, end = 0; i < count; i++) {
    end += Math.floor(groups / count) + (i < groups % count ? 1 : 0);
    ends.push(end);
  }
  return ends;
}

/** Number types; int8 where nothing is said. */
export interface TinyTypes {
  activations?: 'int8' | 'int16';
  key?: 'int8' | 'f16';
  value?: 'int8' | 'f16';
}

export function tinyProgram(
  weights: TinyWeights,
  cut: TinyCut,
  stage: number,
  rank: number,
  { activations = 'int8', key = 'int8', value = 'int8' }: TinyTypes = {},
): Program {
  const { hidden, kvHeads, headSize, feedForward, vocabulary, heads, epsilon } = tiny;
  const layers = cut.stages[stage]!;
  const first = stage === 0;
  const last = stage === cut.stages.length - 1;
  const ranks = cut.heads.length;
  const own = cut.heads[rank]!;
  const ffn = cut.feedForward[rank]!;
  const vocab = cut.vocabulary[rank]!;
  const perKv = heads / kvHeads;
  const kv = range(Math.floor(own.from / perKv), Math.floor((own.to - 1) / perKv) + 1);
  const slices: WeightSlice[] = [];
  const weight = (tensor: string, use: WeightSlice['use'], rows?: Range, columns?: Range) => {
    const t = weights.get(tensor)!;
    slices.push({ tensor, type: t.type, rows: rows ?? range(0, t.rows), columns: columns ?? range(0, t.columns), use });
    return slices.length - 1;
  };
  const scaled = (r: Range, by: number) => range(r.from * by, r.to * by);
  const segments = segmentsOf(hidden);
  const unitSegments = (units: Range) => Array.from({ length: units.to - units.from }, (_, i) => i + 1);
  const headCut: UnitCut = { units: heads, ranks: cut.heads };
  const ffnCut: UnitCut = { units: feedForward / 32, ranks: cut.feedForward };
  const operations: Operation[] = [];
  const embedding = first || last ? weight('token_embd', 'matrix', vocab) : -1;
  if (first) {
    operations.push({ op: 'embed', weight: embedding, out: 'x', vocabulary: cut.vocabulary, rank });
    if (ranks > 1) operations.push({ op: 'gather_rows', buffer: 'x', vocabulary: cut.vocabulary });
  } else {
    operations.push({ op: 'receive_hidden', buffer: 'x' });
  }
  for (let l = layers.from; l < layers.to; l++) {
    const layer = l - layers.from;
    const linear = (name: string, input: string, out: string, rows: Range) =>
      operations.push({ op: 'linear', in: input, weight: weight(`${l}.${name}`, 'matrix', rows), bias: null, segments, out });
    operations.push({ op: 'rms_norm', in: 'x', weight: weight(`${l}.attn_norm`, 'vector'), epsilon, out: 'n' });
    linear('q', 'n', 'q', scaled(own, headSize));
    linear('k', 'n', 'k', scaled(kv, headSize));
    linear('v', 'n', 'v', scaled(kv, headSize));
    for (const [buffer, count] of [
      ['q', own.to - own.from],
      ['k', kv.to - kv.from],
    ] as const)
      operations.push({
        op: 'rope',
        buffer,
        heads: count,
        headSize,
        dimensions: headSize,
        style: 'adjacent',
        base: tiny.ropeBase,
        scale: 1,
        factors: null,
      });
    operations.push({ op: 'store_kv', k: 'k', v: 'v', layer });
    const kvHead = Array.from({ length: own.to - own.from }, (_, i) => Math.floor((own.from + i) / perKv) - kv.from);
    operations.push({
      op: 'attention',
      q: 'q',
      out: 'a',
      layer,
      heads: own.to - own.from,
      headSize,
      kvHead,
      scale: 1 / Math.sqrt(headSize),
      window: null,
    });
    const o = weight(`${l}.o`, 'matrix', undefined, scaled(own, headSize));
    operations.push({ op: 'linear_partial', in: 'a', weight: o, segments: unitSegments(own), cut: headCut, rank, width: hidden });
    operations.push({ op: 'all_reduce', cut: headCut, rank, bias: null, residual: 'x' });
    operations.push({ op: 'rms_norm', in: 'x', weight: weight(`${l}.ffn_norm`, 'vector'), epsilon, out: 'n' });
    linear('gate', 'n', 'g', scaled(ffn, 32));
    linear('up', 'n', 'u', scaled(ffn, 32));
    operations.push({ op: 'gated_activation', gate: 'g', up: 'u', out: 'f', activation: 'silu' });
    const down = weight(`${l}.down`, 'matrix', undefined, scaled(ffn, 32));
    operations.push({
      op: 'linear_partial',
      in: 'f',
      weight: down,
      segments: unitSegments(ffn),
      cut: ffnCut,
      rank,
      width: hidden,
    });
    operations.push({ op: 'all_reduce', cut: ffnCut, rank, bias: null, residual: 'x' });
  }
  if (last) {
    operations.push({ op: 'select_rows', in: 'x', out: 'r' });
    operations.push({ op: 'rms_norm', in: 'r', weight: weight('output_norm', 'vector'), epsilon, out: 's' });
    operations.push({ op: 'linear', in: 's', weight: embedding, bias: null, segments, out: 'own_logits' });
    operations.push({ op: 'gather_logits', in: 'own_logits', out: 'logits', vocabulary: cut.vocabulary, rank });
    operations.push({ op: 'sample', logits: 'logits' });
  } else {
    operations.push({ op: 'send_hidden', buffer: 'x' });
  }
  const token = (name: string, width: number) => ({ name, width, per: 'token' as const });
  const output = (name: string, width: number) => ({ name, width, per: 'output' as const });
  return {
    architecture: 'tiny',
    bits: 'exact',
    activations,
    stage,
    stages: cut.stages.length,
    rank,
    ranks,
    layers,
    hiddenSize: hidden,
    vocabularySize: vocabulary,
    contextTokensMax: tiny.context,
    buffers: [
      token('x', hidden),
      token('n', hidden),
      token('q', (own.to - own.from) * headSize),
      token('k', (kv.to - kv.from) * headSize),
      token('v', (kv.to - kv.from) * headSize),
      token('a', (own.to - own.from) * headSize),
      token('g', (ffn.to - ffn.from) * 32),
      token('u', (ffn.to - ffn.from) * 32),
      token('f', (ffn.to - ffn.from) * 32),
      output('r', hidden),
      output('s', hidden),
      output('own_logits', vocab.to - vocab.from),
      output('logits', vocabulary),
    ],
    weights: slices,
    kv: { layers: layers.to - layers.from, heads: kv.to - kv.from, headSize, key, value },
    operations,
  };
}

/** Raw blocks of a slice, rows in order. */
export function sliceBlocks(tensor: Tensor, slice: WeightSlice): Uint8Array {
  const bytesOf = (values: number) => (tensor.type === 'F32' ? values * 4 : (values / 32) * blockBytes[tensor.type]!);
  const rowBytes = bytesOf(tensor.columns);
  const from = bytesOf(slice.columns.from);
  const width = bytesOf(slice.columns.to) - from;
  const result = new Uint8Array((slice.rows.to - slice.rows.from) * width);
  for (let r = slice.rows.from; r < slice.rows.to; r++)
    result.set(tensor.blocks.subarray(r * rowBytes + from, r * rowBytes + from + width), (r - slice.rows.from) * width);
  return result;
}

/** Logits [tokens][vocabulary] of the whole model in double precision: the textbook forward pass over the dequantised weights. */
export function plainForward(weights: TinyWeights, tokens: number[]): Float64Array[] {
  const { hidden, heads, kvHeads, headSize, feedForward, epsilon } = tiny;
  const product = (name: string, x: Float64Array) => {
    const { rows, columns, values } = weights.get(name)!;
    return Float64Array.from({ length: rows }, (_, r) => {
      let sum = 0;
      for (let k = 0; k < columns; k++) sum += values[r * columns + k]! * x[k]!;
      return sum;
    });
  };
  const norm = (name: string, x: Float64Array) => {
    const mean = x.reduce((sum, v) => sum + v * v, 0) / x.length;
    const w = weights.get(name)!.values;
    return x.map((v, i) => (v / Math.sqrt(mean + epsilon)) * w[i]!);
  };
  const rotate = (x: Float64Array, position: number) => {
    for (let head = 0; head < x.length; head += headSize)
      for (let i = 0; i < headSize / 2; i++) {
        const angle = position * tiny.ropeBase ** ((-2 * i) / headSize);
        const a = x[head + 2 * i]!;
        const b = x[head + 2 * i + 1]!;
        x[head + 2 * i] = a * Math.cos(angle) - b * Math.sin(angle);
        x[head + 2 * i + 1] = a * Math.sin(angle) + b * Math.cos(angle);
      }
  };
  const embedding = weights.get('token_embd')!.values;
  const rows = tokens.map((t) => embedding.slice(t * hidden, (t + 1) * hidden));
  for (let l = 0; l < tiny.layers; l++) {
    const keys: Float64Array[] = [];
    const valuesOf: Float64Array[] = [];
    rows.forEach((x, position) => {
      const n = norm(`${l}.attn_norm`, x);
      const q = product(`${l}.q`, n);
      const k = product(`${l}.k`, n);
      rotate(q, position);
      rotate(k, position);
      keys.push(k);
      valuesOf.push(product(`${l}.v`, n));
      const out = new Float64Array(hidden);
      for (let h = 0; h < heads; h++) {
        const g = Math.floor(h / (heads / kvHeads)) * headSize;
        const scores = keys.map((key) => {
          let s = 0;
          for (let d = 0; d < headSize; d++) s += q[h * headSize + d]! * key[g + d]!;
          return s / Math.sqrt(headSize);
        });
        const largest = Math.max(...scores);
        const w = scores.map((s) => Math.exp(s - largest));
        const total = w.reduce((a, b) => a + b, 0);
        for (let d = 0; d < headSize; d++)
          out[h * headSize + d] = w.reduce((sum, wj, j) => sum + (wj / total) * valuesOf[j]![g + d]!, 0);
      }
      product(`${l}.o`, out).forEach((v, i) => (x[i] = x[i]! + v));
      const m = norm(`${l}.ffn_norm`, x);
      const gate = product(`${l}.gate`, m);
      const up = product(`${l}.up`, m);
      const f = Float64Array.from({ length: feedForward }, (_, i) => (gate[i]! / (1 + Math.exp(-gate[i]!))) * up[i]!);
      product(`${l}.down`, f).forEach((v, i) => (x[i] = x[i]! + v));
    });
  }
  return rows.map((x) => product('token_embd', norm('output_norm', x)));
}

/** Log-probability of `token` under logits. */
export function plainLogprob(logits: Float64Array, token: number): number {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  return logits[token]! - largest - Math.log(logits.reduce((sum, x) => sum + Math.exp(x - largest), 0));
}

export const greedy: SlotSampling = {
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
  logprobs: 3,
};

/** What computes a rank. */
export interface RankExecutor {
  /** An addon of another build; otherwise the project's own. */
  addon?: Addon;
  kind?: ExecutorKind;
  isa?: Isa | null;
}

export type Peers = 'card' | 'host' | 'together';

export interface MeshOptions extends RankExecutor {
  /** Where ranks have different executors: that of one of them, in place of the fields above. */
  executorOf?: (stage: number, rank: number) => RankExecutor;
  threads?: number;
  blockTokens?: number;
  kvBlocks?: number;
  stepTokensMax?: number;
  /** Every pair of workers talks through the host driver instead of shared memory. */
  host?: boolean;
  /** Ranks of a stage read each other's sums, in memory of that place; `together`: they do each step together, on one card. */
  peers?: Peers;
  wire?: WireType;
  /** Of CUDA executors: what `shardmesh tune` would have written. */
  cudaTuning?: string;
  /** Room in front of each frame that leaves; it is written full. */
  frameGap?: number;
}

export interface TinyMeshOptions extends TinyTypes, MeshOptions {
  cut?: TinyCut;
  weights?: TinyWeights;
}

/** Rows of one sequence in a step. `tokens: null`: one row, the token that step `after` sampled. */
export interface TinyRows {
  slot: number;
  position: number;
  tokens: number[] | null;
  after?: number;
  blocks: number[];
  /** Row within the sequence, and the id to score; null samples. */
  outputs: { row: number; score: number | null; banned?: number[] }[];
}

export class StepFailedError extends Error {
  readonly code: string;
  readonly peer: { stage: number; rank: number } | null;
  constructor(code: string, message: string, peer: { stage: number; rank: number } | null) {
    super(message);
    this.code = code;
    this.peer = peer;
  }
}

interface Member {
  stage: number;
  rank: number;
  executor: Executor;
  pending: Map<number, { resolve: (done: StepDone) => void; reject: (error: Error) => void }>;
}

type FrameBytes = Map<NativeFrame['kind'], number>;

/** What a peer needs to read the memory of `executor`. */
export function memoryLink(executor: Executor, place: 'card' | 'host'): PeerMemoryLink {
  return { ...executor.peerMemory()!, place };
}

/** How the step under way on each of `members` fails; rejects where it is done instead. */
export function failuresOf(members: Member[]): Promise<StepFailedError[]> {
  return Promise.all(
    members.map(({ pending }) => {
      const [step] = pending.values();
      return new Promise<StepFailedError>((resolve, reject) => {
        step!.reject = (error) => resolve(error as StepFailedError);
        step!.resolve = () => reject(new Error('the step was done'));
      });
    }),
  );
}

/** All ranks of the tiny model, or of another one, in this process. */
export class TinyMesh {
  readonly members: Member[];
  /** Payload that went over the host driver. */
  readonly frameBytes: Readonly<FrameBytes>;
  #step = 0;
  #epoch = 0;

  private constructor(members: Member[], frameBytes: FrameBytes) {
    this.members = members;
    this.frameBytes = frameBytes;
  }

  static async start(options: TinyMeshOptions = {}): Promise<TinyMesh> {
    const cut = options.cut ?? wholeCut;
    const weights = options.weights ?? (defaultWeights ??= tinyWeights());
    const programs = cut.stages.flatMap((_, stage) =>
      cut.heads.map((_h, rank) => tinyProgram(weights, cut, stage, rank, options)),
    );
    return TinyMesh.ofPrograms(programs, (slice) => sliceBlocks(weights.get(slice.tensor)!, slice), options);
  }

  /** @param programs  of all ranks of all stages. @param blocksOf  raw blocks of a slice of one of them */
  static async ofPrograms(
    programs: Program[],
    blocksOf: (slice: WeightSlice) => Uint8Array,
    options: MeshOptions = {},
  ): Promise<TinyMesh> {
    const members: Member[] = [];
    const frameBytes: FrameBytes = new Map();
    const onFrame = ({ kind, payload }: NativeFrame): void => {
      frameBytes.set(kind, (frameBytes.get(kind) ?? 0) + payload.length);
    };
    try {
      for (const program of programs) {
        const { stage, rank } = program;
        const pending: Member['pending'] = new Map();
        const { addon, kind, isa } = options.executorOf?.(stage, rank) ?? options;
        const executor = (addon ?? loadAddon()).createExecutor(
          {
            kind: kind ?? 'reference',
            isa: isa ?? null,
            program,
            cores: [],
            threads: options.threads ?? 1,
            spin: false,
            blockTokens: options.blockTokens ?? 16,
            kvBlocks: options.kvBlocks ?? 96,
            stepTokensMax: options.stepTokensMax ?? 256,
            sequencesMax: 16,
            ...(options.wire ? { wire: options.wire } : {}),
            ...(options.cudaTuning ? { cudaTuning: options.cudaTuning } : {}),
            frameGap: options.frameGap ?? 0,
          },
          {
            onStep: (done) => {
              pending.get(done.step)?.resolve(done);
              pending.delete(done.step);
            },
            onFrame: (destination, frame) => {
              onFrame(frame);
              const { buffer, byteOffset } = frame.payload;
              const gap = options.frameGap ?? 0;
              new Uint8Array(buffer, byteOffset - gap, gap).fill(0xff);
              const to = members.find((m) => m.stage === destination.stage && m.rank === destination.rank);
              to?.executor.deliver(frame);
            },
            onStepFailed: (step, code, message, peer) => {
              pending.get(step)?.reject(new StepFailedError(code, message, peer));
              pending.delete(step);
            },
          },
        );
        members.push({ stage, rank, executor, pending });
        await Promise.all(program.weights.map((slice, i) => executor.loadWeight(i, blocksOf(slice))));
      }
    } catch (error) {
      await Promise.all(members.map((m) => m.executor.dispose()));
      throw error;
    }
    const mesh = new TinyMesh(members, frameBytes);
    mesh.connect(options.host ?? false, options.peers);
    return mesh;
  }

  /** A mesh for the time of `use`. */
  static async with<T>(options: TinyMeshOptions, use: (mesh: TinyMesh) => Promise<T>): Promise<T> {
    const mesh = await TinyMesh.start(options);
    try {
      return await use(mesh);
    } finally {
      await mesh.stop();
    }
  }

  /** Ends the epoch, then connects for the next one: the last result is here a moment before the step has ended. */
  async nextEpoch(peers?: Peers): Promise<void> {
    await Promise.all(this.members.map(({ executor }) => executor.abort('a new epoch begins')));
    this.connect(false, peers);
  }

  /** A new epoch. */
  connect(host: boolean, peers?: Peers): void {
    const segments = this.members.map((m) => m.executor.openSegment());
    const epoch = ++this.#epoch;
    for (const self of this.members)
      self.executor.connect(
        this.members.flatMap((m, i): PeerLink[] => {
          if (m === self) return [];
          const peer = { stage: m.stage, rank: m.rank };
          if (peers === 'together' && m.stage === self.stage) return [{ peer, driver: 'card', ...segments[i]!, epoch }];
          if (peers && peers !== 'together' && m.stage === self.stage)
            return [{ peer, driver: 'peer', ...segments[i]!, memory: memoryLink(m.executor, peers), epoch }];
          return [host ? { peer, driver: 'host' } : { peer, driver: 'shm', ...segments[i]! }];
        }),
      );
    this.#step = 0;
  }

  open(slot: number, sampling: Partial<SlotSampling> = {}, promptTokens: number[] = [], outputTokens: number[] = []): void {
    for (const { executor } of this.members)
      executor.openSlots([
        {
          slot,
          sampling: { ...greedy, ...sampling },
          promptTokens: Int32Array.from(promptTokens),
          outputTokens: Int32Array.from(outputTokens),
        },
      ]);
  }

  close(slot: number): void {
    for (const { executor } of this.members) executor.closeSlots([slot]);
  }

  /** Submits a step to every rank. */
  submit(
    sequences: TinyRows[],
    waitTimeoutMs = 10_000,
    members = this.members,
    resultWaits = false,
  ): { step: number; done: Promise<OutputResult[]> } {
    const step = ++this.#step;
    const tokenIds = sequences.flatMap((s) => s.tokens ?? [-1]);
    const rowsOf = (s: TinyRows) => s.tokens?.length ?? 1;
    let row = 0;
    const outputs = sequences.flatMap((s) => {
      const first = row;
      row += rowsOf(s);
      return s.outputs.map((o) => ({ row: first + o.row, score: o.score, banned: o.banned ?? [] }));
    });
    const offsets = [0];
    for (const s of sequences) offsets.push(offsets.at(-1)! + s.blocks.length);
    const input = {
      step,
      tokenIds: Int32Array.from(tokenIds),
      tokenSteps: Int32Array.from(sequences.flatMap((s) => Array.from({ length: rowsOf(s) }, () => s.after ?? 0))),
      positions: Int32Array.from(sequences.flatMap((s) => Array.from({ length: rowsOf(s) }, (_, i) => s.position + i))),
      rowSequence: Int32Array.from(sequences.flatMap((s, index) => Array.from({ length: rowsOf(s) }, () => index))),
      slots: Int32Array.from(sequences, (s) => s.slot),
      blockTableOffsets: Int32Array.from(offsets),
      blockTables: Int32Array.from(sequences.flatMap((s) => s.blocks)),
      outputs: outputNumbers(outputs),
      waitTimeoutMs,
      resultWaits,
    };
    const results = members.map(
      (m) =>
        new Promise<StepDone>((resolve, reject) => {
          m.pending.set(step, { resolve, reject });
          m.executor.submit(input);
        }),
    );
    const sampler = members.findIndex((m) => m.stage === this.members.at(-1)!.stage && m.rank === 0);
    const done = Promise.all(results).then((all) => all[sampler]?.outputs ?? []);
    done.catch(() => undefined); // looked at by whoever awaits it
    return { step, done };
  }

  run(sequences: TinyRows[], waitTimeoutMs?: number): Promise<OutputResult[]> {
    return this.submit(sequences, waitTimeoutMs).done;
  }

  /**
   * Log-probability of every next token of `tokens`, the prompt cut into chunks of at most `chunk` tokens, and the greedy token after the last one with its own.
   */
  async score(tokens: number[], options: { slot?: number; chunk?: number; blocks?: number[] } = {}): Promise<number[]> {
    const { slot = 0, chunk = tokens.length } = options;
    const blocks = options.blocks ?? Array.from({ length: Math.ceil(tokens.length / 16) }, (_, i) => i);
    const logprobs: number[] = [];
    for (let from = 0; from < tokens.length; from += chunk) {
      const part = tokens.slice(from, from + chunk);
      const outputs = part.map((_, row) => ({ row, score: tokens[from + row + 1] ?? null }));
      const results = await this.run([{ slot, position: from, tokens: part, blocks, outputs }]);
      for (const result of results) logprobs.push(result.logprob!, ...result.top.flatMap((t) => [t.token, t.logprob]));
      if (from + chunk >= tokens.length) logprobs.push(results.at(-1)!.token);
    }
    return logprobs;
  }

  /** Token and log-probability of `count` tokens after a prompt of at most 40; each step is submitted before the one before it has come back. */
  async generate(prompt: number[], sampling: Partial<SlotSampling>, count: number): Promise<[number, number | null][]> {
    this.open(0, sampling, prompt);
    const blocks = Array.from({ length: Math.ceil((prompt.length + count) / 16) }, (_, i) => (i * 5 + 4) % 96);
    const last = [{ row: prompt.length - 1, score: null }];
    let previous = this.submit([{ slot: 0, position: 0, tokens: prompt, blocks, outputs: last }]);
    const all = [previous];
    for (let position = prompt.length; all.length < count; position++) {
      previous = this.submit([
        { slot: 0, position, tokens: null, after: previous.step, blocks, outputs: [{ row: 0, score: null }] },
      ]);
      all.push(previous);
    }
    const outputs = await Promise.all(all.map(({ done }) => done));
    return outputs.map(([output]) => [output!.token, output!.logprob]);
  }

  /**
   * As `generate`, but with up to `drafts` right tokens behind each row, then a wrong one; the result of one step is known before the next is made.
   * @param want  the tokens that are expected
   * @throws when a step gives another number of tokens than it has right drafts, and one
   */
  async generateWithDrafts(
    prompt: number[],
    sampling: Partial<SlotSampling>,
    want: number[],
    drafts: number,
  ): Promise<[number, number | null][]> {
    this.open(0, sampling, prompt);
    const blocks = Array.from({ length: Math.ceil((prompt.length + 1 + want.length + drafts) / 16) }, (_, i) => (i * 5 + 4) % 96);
    const first = { slot: 0, position: 0, tokens: prompt, blocks, outputs: [{ row: prompt.length - 1, score: null }] };
    const outputs = await this.run([first]);
    let last = 0;
    while (outputs.length < want.length - 1) {
      const right = want.slice(outputs.length, outputs.length + drafts);
      const tokens = [outputs.at(-1)!.token, ...right, (want[outputs.length + right.length] ?? 0) ^ 1];
      const { step, done } = this.submit([
        {
          slot: 0,
          position: prompt.length - 1 + outputs.length,
          tokens,
          blocks,
          outputs: tokens.map((_, row) => ({ row, score: null })),
        },
      ]);
      const got = await done;
      if (got.length !== right.length + 1) throw new Error(`${got.length} tokens from ${right.length} right drafts`);
      outputs.push(...got);
      last = step;
    }
    // A row that asks for the token of a step with drafts gets the last that was sampled there.
    const position = prompt.length - 1 + outputs.length;
    outputs.push(
      ...(await this.run([{ slot: 0, position, tokens: null, after: last, blocks, outputs: [{ row: 0, score: null }] }])),
    );
    return outputs.slice(0, want.length).map(({ token, logprob }) => [token, logprob]);
  }

  async stop(): Promise<void> {
    await Promise.all(this.members.map((m) => m.executor.dispose()));
  }
}

/** `count` random token ids. */
export function randomTokens(count: number, seed = 7): number[] {
  const next = uniform(seed);
  return Array.from({ length: count }, () => Math.floor(next() * tiny.vocabulary));
}
