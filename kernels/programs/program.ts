/**
 * A **program** is one model architecture for one stage and one rank: a flat list of operations over named buffers. It is built in
 * TypeScript from the model file's hyper-parameters (`llama.ts`, `qwen2.ts`) and run by an executor (reference, cpu, cuda). It is sent to the
 * native addon once, as JSON; C++ mirrors these records in `kernels/include/program.h`.
 *
 * Letters: T tokens of a step, R output rows of a step (rows whose logits are needed), H hidden size.
 */

/** Block and scalar types of a GGUF tensor that a program may name. */
export type TensorType = 'F32' | 'F16' | 'BF16' | 'Q4_0' | 'Q4_1' | 'Q5_0' | 'Q5_1' | 'Q8_0' | 'Q4_K' | 'Q5_K' | 'Q6_K';

/** Half-open range [from, to). */
export interface Range {
  from: number;
  to: number;
}

/**
 * One weight slice of this rank: `rows` x `columns` of a tensor in the model file. Rows are output features, columns are input features
 * (the contiguous direction of the file). A vector (norm weight, bias) has one row.
 */
export interface WeightSlice {
  /** Tensor name in the model file, e.g. `blk.3.attn_q.weight`. */
  tensor: string;
  type: TensorType;
  rows: Range;
  /** In elements; a multiple of the type's block size unless it is a border inside a 256-wide super-block, which then is read whole. */
  columns: Range;
  /** `matrix` is repacked for products; `vector` becomes fp32; `embedding` is only looked up by row. A tied embedding is one `matrix`. */
  use: 'matrix' | 'vector' | 'embedding';
}

/** Buffers hold fp32, `width` values a row; rows are the step's tokens or its output rows. */
export interface BufferSpec {
  name: string;
  width: number;
  per: 'token' | 'output';
}

/** Units of a row-parallel product, who owns them, and thereby the tree that joins their sums (ARCHITECTURE.md, "Segments and the tree"). */
export interface UnitCut {
  /** Number of units of the whole product, fixed by the model (<= 16). Unit u is segment u of the product. */
  units: number;
  /** Units of each rank of the stage, ascending and contiguous, covering [0, units). */
  ranks: Range[];
}

/** Fields named `weight`, `bias`, `factors` are indexes into `Program.weights`; `in`, `out` are buffer names. */
export type Operation =
  /** out[t] = embedding row of token t when this rank owns it, else untouched. `vocabulary`: token ids of each rank. */
  | { op: 'embed'; weight: number; out: string; vocabulary: Range[]; rank: number }
  /** Each row of `buffer` is copied from the rank that owns its token id (never summed with zeros). Absent when one rank owns all. */
  | { op: 'gather_rows'; buffer: string; vocabulary: Range[] }
  /** Receives hidden states of the step from the stage before (TensorLink). First operation of every stage but the first. */
  | { op: 'receive_hidden'; buffer: string }
  /** Sends hidden states of the step to the ranks of the next stage that this rank serves. Last operation of every stage but the last. */
  | { op: 'send_hidden'; buffer: string }
  /** out = x * (1 / sqrt(mean(x^2) + eps)) * w       Zhang & Sennrich 2019, section 4 */
  | { op: 'rms_norm'; in: string; weight: number; epsilon: number; out: string }
  /**
   * Column-parallel product: out[t, r] = sum_k w[r, k] * in[t, k] (+ bias[r]). `segments`: K is cut after these groups of 32 (ascending,
   * last one = K / 32); segment sums are joined by the tree.
   */
  | { op: 'linear'; in: string; weight: number; bias: number | null; segments: number[]; out: string }
  /**
   * Row-parallel product: this rank holds columns of its own units. `segments`: ends, in local groups of 32, of each own unit. `cut.ranks[rank]` are the own
   * units. The result is one vector a maximal subtree of the own range, kept in an implicit buffer until the `all_reduce` that follows.
   */
  | { op: 'linear_partial'; in: string; weight: number; segments: number[]; cut: UnitCut; rank: number; width: number }
  /** Exchanges subtree sums with the other ranks, finishes the tree, then residual += (sum + bias). `cut` as in the product before it. */
  | { op: 'all_reduce'; cut: UnitCut; rank: number; bias: number | null; residual: string }
  /**
   * Rotary position embedding on `heads` heads of `headSize` in place, first `dimensions` values of each. `adjacent` rotates pairs (2i, 2i+1) (GGUF llama),
   * `half` pairs (i, i + dimensions / 2) (GGUF qwen2). angle = position * scale * base^(-2i / dimensions) / factors[i].      Su et al. 2021
   */
  | {
      op: 'rope';
      buffer: string;
      heads: number;
      headSize: number;
      dimensions: number;
      style: 'adjacent' | 'half';
      base: number;
      scale: number;
      factors: number | null;
    }
  /** Quantises k and v of the step's tokens into the KV cache of local layer `layer`. */
  | { op: 'store_kv'; k: string; v: string; layer: number }
  /** Causal attention of local query heads over the KV cache. `kvHead[h]`: local KV head of local query head h. `window`: null = whole context. */
  | {
      op: 'attention';
      q: string;
      out: string;
      layer: number;
      heads: number;
      headSize: number;
      kvHead: number[];
      scale: number;
      window: number | null;
    }
  /** out = activation(gate) * up */
  | { op: 'gated_activation'; gate: string; up: string; out: string; activation: 'silu' | 'gelu_tanh' }
  /** out[r] = in[output row r] */
  | { op: 'select_rows'; in: string; out: string }
  /** Gathers each rank's vocabulary range of the logits at rank 0, in vocabulary order, into `out` (width: whole vocabulary). */
  | { op: 'gather_logits'; in: string; out: string; vocabulary: Range[]; rank: number }
  /** Samples or scores each output row (rank 0 of the last stage), and sends the sampled ids to the ranks of stage 0. */
  | { op: 'sample'; logits: string };

/** Activations of quantised products, in groups of 32 with a scale each. `int16`: two int8 halves, for twice the integer work and a hundredth of the error. */
export type ActivationType = 'int8' | 'int16';

/** K/V cache of this rank. `int8`: a scale per head and token. `f16` K with int8 V where k has a bias (|K| is large there). */
export interface KvSpec {
  layers: number;
  /** KV heads held by this rank (a KV head whose query heads lie on two ranks is held by both). */
  heads: number;
  headSize: number;
  key: 'int8' | 'f16';
  value: 'int8' | 'f16';
}

export interface Program {
  architecture: string;
  /**
   * `exact`: any executor gives the reference's bits. `per-kind`: only executors of one kind agree, since a card may put BF16 weights through its tensor cores. `free`: a card
   * may also leave such products to NVIDIA's library, and then a token's bits hang on what else is in its step.
   */
  bits: 'exact' | 'per-kind' | 'free';
  activations: ActivationType;
  stage: number;
  stages: number;
  rank: number;
  ranks: number;
  /** Layers of the model that this stage computes. */
  layers: Range;
  hiddenSize: number;
  vocabularySize: number;
  contextTokensMax: number;
  buffers: BufferSpec[];
  weights: WeightSlice[];
  kv: KvSpec;
  operations: Operation[];
}
