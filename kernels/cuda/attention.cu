// Attention over the paged int8 cache, decode and prefill.        Online softmax: Milakov & Gimelshein 2018; the arithmetic: ARCHITECTURE.md
//   q [T, heads * D] fp32 after rope    cache: kernels/include/kernel_set.h, int8 K    out [T, heads * D] fp32
// A piece of work is up to 64 pairs (row, query head) that share a sequence and a KV head, rows of an mma. So the query heads of a group share each load of K and V,
// and so do the rows of a prefill chunk. Work is a list in device memory that a fixed grid walks: no launch depends on contexts.
//
// One step is 64 keys, four subblocks of 16. g = lane / 4, t = lane % 4; a lane has rows g and g + 8, or g alone (`rows`) in pieces of one span, which have 8 pairs.
//   scores  A: q as int8, B: 8 keys. Column 2t' + e of product n stands for key 4t' + 2e + n of the subblock: what a lane reads of K for both products lies side by side, and
//           after them lane t holds keys 4t .. 4t + 3, which is what the second product wants of it: nothing moves between lanes.
//   values  A: softmax weights u8, B: V words of four tokens. Column g of product n stands for value 4g + n of 32: four products read 16 bytes a lane.
// Decode splits a context: a piece is one span of 256 positions, a block of four warps takes one, each warp a step of it. Steps meet twice in shared memory: their maxima,
// then their sums, which are folded in order. attention_join folds the spans, or, in steps of few rows, whichever piece comes last. In prefill a piece is all spans of up to 64
// pairs, 16 a warp, which folds them in the same order. K and V come through shared memory: a span's whole, a prefill's step by step, one ahead.
// A cache with f16 in it is for attention_f16.cu.
// Limits: D = 32, 64, 96, 128 or 256; strides of q and out multiples of 4, both 16-byte aligned.
#include "arrivals.cuh"
#include "attention_rows.cuh"
#include "device.cuh"
#include "finite.cuh"
#include "kv_place.cuh"
#include "operations.h"
#include "quantize_group.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kSpan = kSpanTokens, kStep = kAttentionStep, kSubblocks = 4, kWarps = 4;

// The lowest bytes of four words, as one.
__device__ __forceinline__ uint32_t lowest_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410); }

// Of the four lanes that share a row.
__device__ __forceinline__ float quad_largest(float v) {
  v = fmaxf(v, __shfl_xor_sync(kWholeWarp, v, 1));
  return fmaxf(v, __shfl_xor_sync(kWholeWarp, v, 2));
}

// The rows of a piece, as one lane sees them.
template <int rows>
struct PieceRows {
  int row[rows], head[rows];        // of the step; -1: no such row
  int position[rows], oldest[rows]; // keys oldest..position are unmasked
  int lowest, highest;              // keys that any row of the piece sees
  int all_from, all_to;             // keys that every row of the piece sees
};

// Pairs [first, first + 8 * rows) of a piece that has more than `first`.
template <int rows>
__device__ __forceinline__ PieceRows<rows> rows_of(const AttentionStep& step, const AttentionWork& work, const HeadRun& run, int first, int lane) {
  PieceRows<rows> of;
  for (int i = 0; i < rows; i++) {
    const int index = first + lane / 4 + 8 * i, row = index / run.count;
    const bool exists = row < work.rows;
    of.row[i] = exists ? work.row + row : -1;
    of.head[i] = run.first + index % run.count;
    of.position[i] = exists ? step.rows.positions[work.row + row] : -1;
    of.oldest[i] = oldest_key(of.position[i], step.window);
  }
  const int nearest = step.rows.positions[work.row + first / run.count], farthest = step.rows.positions[work.row + min(work.rows - 1, (first + 8 * rows - 1) / run.count)];
  of.lowest = oldest_key(nearest, step.window);
  of.highest = farthest;
  of.all_from = oldest_key(farthest, step.window);
  of.all_to = nearest;
  return of;
}

// A step's K, V and scales in shared memory, as they lie in the cache, subblock after subblock: all K, then all V, whose rows are 32 bytes farther apart so that the lanes of a
// load find different banks, then scales of keys and values. Where no row of a piece has a key anything may be: it meets weights of 0.
template <int D, int dims>
struct StepPlace {
  static constexpr int key_bytes = 16 * D, value_row = 4 * dims + 32, value_bytes = 4 * value_row, scale_bytes = 128;
  static constexpr int values = kSubblocks * key_bytes, scales = values + kSubblocks * value_bytes, bytes = scales + kSubblocks * scale_bytes;
};

// Asks for subblocks [first, first + count) of the step at `base`, of those that some of the keys lowest..highest are in. A warp calls it.
template <int D, int dims>
__device__ __forceinline__ void copy_step(const AttentionStep& step, const int32_t* table, int kv_head, int base, int lowest, int highest, int first_dim, int first, int count, uint8_t* place, int lane) {
  using At = StepPlace<D, dims>;
#pragma unroll
  for (int b = first; b < first + count; b++) {
    const int from = base + 16 * b;
    if (from > highest || from + 16 <= lowest) continue;  // its block may not exist
    const uint8_t* subblock = step.cache + subblock_offset(step.layout, table, from, kv_head);
#pragma unroll
    for (int i = 0; i < D / 32; i++) copy_async<16>(place + b * At::key_bytes + (32 * i + lane) * 16, subblock + (32 * i + lane) * 16);
    const uint8_t* values = subblock + At::key_bytes + first_dim * 4;
#pragma unroll
    for (int i = 0; i < dims / 32; i++) {
      const int piece = 32 * i + lane, row = piece / (dims / 4), at = piece % (dims / 4) * 16;
      copy_async<16>(place + At::values + b * At::value_bytes + row * At::value_row + at, values + row * D * 4 + at);
    }
    if (lane < At::scale_bytes / 16) copy_async<16>(place + At::scales + b * At::scale_bytes + lane * 16, subblock + 2 * At::key_bytes + lane * 16);
  }
}

// q of the lane's rows as operand A: chunk c is values 32 c and up. scale[i] = rn(amax / 127 * step.scale).
template <int D, int rows>
__device__ __forceinline__ void quantize_query(const AttentionStep& step, const PieceRows<rows>& of, int lane, uint32_t (&a)[D / 32][4], float (&scale)[rows]) {
#pragma unroll
  for (int j = 0; j < D / 32; j++) a[j][1] = a[j][3] = 0;
#pragma unroll
  for (int i = 0; i < rows; i++) {
    float4 x[D / 16];
    const float4* q = reinterpret_cast<const float4*>(step.q + max(of.row[i], 0) * step.q_stride + of.head[i] * D);
    float amax = 0.0f;
#pragma unroll
    for (int j = 0; j < D / 16; j++) x[j] = of.row[i] < 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : q[j * 4 + lane % 4];
#pragma unroll
    for (int j = 0; j < D / 16; j++)
      for (const float v : {x[j].x, x[j].y, x[j].z, x[j].w}) amax = fmaxf(amax, fabsf(v));
    amax = quad_largest(amax);
    scale[i] = __fmul_rn(quantized_scale(amax), step.scale);
    const float inverse = amax >= kQuantizableMin ? __fdiv_rn(127.0f, amax) : 0.0f;  // quantized(), with one division for all
    const auto byte_of = [&](float v) { return static_cast<uint32_t>(__float2int_rn(__fmul_rn(v, inverse))); };
#pragma unroll
    for (int j = 0; j < D / 16; j++)
      a[j / 2][i + 2 * (j % 2)] = lowest_bytes(byte_of(x[j].x), byte_of(x[j].y), byte_of(x[j].z), byte_of(x[j].w));
  }
}

// The 64 keys from `base` on, as a lane has them: key 16 b + 4t + i of its row r at s[r][b][i].
template <int rows>
struct StepScores {
  float s[rows][kSubblocks][4];
  float largest[rows];  // of the row's unmasked scores, in its four lanes
};

// masked: some row of the piece does not see all of the keys.
template <int D, int dims, int rows, bool masked>
__device__ __forceinline__ void score_keys(const PieceRows<rows>& of, const uint8_t* place, int base, int lane, const uint32_t (&q)[D / 32][4], const float (&q_scale)[rows], StepScores<rows>& scores) {
  using At = StepPlace<D, dims>;
  const int g = lane / 4, t = lane % 4;
  constexpr int bias[4] = {kBiasBits, kBiasBits, kBiasBits, kBiasBits};
#pragma unroll
  for (int r = 0; r < rows; r++) scores.largest[r] = kNegativeInfinity;
#pragma unroll
  for (int b = 0; b < kSubblocks; b++) {
    int dot[2][4];
    const uint2* keys = reinterpret_cast<const uint2*>(place + b * At::key_bytes) + g;
#pragma unroll
    for (int c = 0; c < D / 32; c++) {
      const uint2 near = keys[(8 * c + t) * 8], far = keys[(8 * c + 4 + t) * 8];
      const uint32_t first[2] = {near.x, far.x}, second[2] = {near.y, far.y};
      if (c == 0) {
        mma_s8s8_k32_onto(dot[0], bias, q[c], first);
        mma_s8s8_k32_onto(dot[1], bias, q[c], second);
      } else {
        mma_s8s8_k32(dot[0], q[c], first);
        mma_s8s8_k32(dot[1], q[c], second);
      }
    }
    const float4 scale = *reinterpret_cast<const float4*>(place + At::scales + b * At::scale_bytes + 16 * t);
    const float scale_of[4] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
    for (int r = 0; r < rows; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = base + 16 * b + 4 * t + i;
        const float score = __fmul_rn(__fadd_rn(__int_as_float(dot[i % 2][2 * r + i / 2]), -kBias), __fmul_rn(scale_of[i], q_scale[r]));
        const float seen = !masked || (key >= of.oldest[r] && key <= of.position[r]) ? score : kNegativeInfinity;
        scores.s[r][b][i] = seen;
        scores.largest[r] = fmaxf(scores.largest[r], seen);
      }
  }
#pragma unroll
  for (int r = 0; r < rows; r++) scores.largest[r] = quad_largest(scores.largest[r]);
}

// Softmax weights times value scales as bytes, for the second product. m: the largest score so far, of the row. sum: of the weights; unit: what one of a byte stands for, 0 where the
// row gets no values.
template <int D, int dims, int rows, bool masked>
__device__ __forceinline__ void weigh_keys(const PieceRows<rows>& of, const uint8_t* place, int base, int lane, const float (&m)[rows], const bool (&active)[rows], StepScores<rows>& scores,
                                           uint32_t (&u)[kSubblocks][2], float (&sum)[rows], float (&unit)[rows]) {
  const int t = lane % 4;
  float scale_of[kSubblocks][4];
#pragma unroll
  for (int b = 0; b < kSubblocks; b++) {
    const float4 scale = *reinterpret_cast<const float4*>(place + StepPlace<D, dims>::scales + b * StepPlace<D, dims>::scale_bytes + 64 + 16 * t);
    scale_of[b][0] = scale.x;
    scale_of[b][1] = scale.y;
    scale_of[b][2] = scale.z;
    scale_of[b][3] = scale.w;
    u[b][1] = 0;
  }
#pragma unroll
  for (int r = 0; r < rows; r++) {
    float(&s)[kSubblocks][4] = scores.s[r];
#pragma unroll
    for (int b = 0; b < kSubblocks; b++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[b][i] = exp_not_positive(__fsub_rn(s[b][i], m[r]));  // a masked key has the weight 0
    // The weights' halving sum goes 32 and 16 over subblocks, 8 and 4 over lanes, 2 and 1 over the lane's four keys.
    float part[4], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      part[i] = __fadd_rn(__fadd_rn(s[0][i], s[2][i]), __fadd_rn(s[1][i], s[3][i]));
      part[i] = __fadd_rn(part[i], __shfl_xor_sync(kWholeWarp, part[i], 2));
      part[i] = __fadd_rn(part[i], __shfl_xor_sync(kWholeWarp, part[i], 1));
    }
    sum[r] = __fadd_rn(__fadd_rn(part[0], part[2]), __fadd_rn(part[1], part[3]));
#pragma unroll
    for (int b = 0; b < kSubblocks; b++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = base + 16 * b + 4 * t + i;
        s[b][i] = !masked || (key >= of.oldest[r] && key <= of.position[r]) ? __fmul_rn(s[b][i], scale_of[b][i]) : 0.0f;  // a masked scale may be NaN
        largest = fmaxf(largest, s[b][i]);
      }
    largest = quad_largest(largest);
    const bool some = active[r] && largest >= kQuantizableMin;
    unit[r] = some ? __fdiv_rn(largest, 255.0f) : 0.0f;
    const float inverse = some ? __fdiv_rn(255.0f, largest) : 0.0f;
#pragma unroll
    for (int b = 0; b < kSubblocks; b++) {
      uint32_t rounded[4];  // the integer in the lowest byte
#pragma unroll
      for (int i = 0; i < 4; i++) rounded[i] = __float_as_uint(__fadd_rn(__fmul_rn(s[b][i], inverse), kBias));
      u[b][r] = lowest_bytes(rounded[0], rounded[1], rounded[2], rounded[3]);
    }
  }
}

// Values [32 d, 32 d + 32) of the step times bytes of weights: bits of kBias + the sum of row r at value 32 d + 8t + 4e + n in sum[n][2r + e].
template <int D, int dims>
__device__ __forceinline__ void weigh_values(const uint8_t* place, int d, int lane, const uint32_t (&u)[kSubblocks][2], int (&sum)[4][4]) {
  using At = StepPlace<D, dims>;
  uint4 v[kSubblocks];
#pragma unroll
  for (int b = 0; b < kSubblocks; b++) v[b] = *reinterpret_cast<const uint4*>(place + At::values + b * At::value_bytes + lane % 4 * At::value_row + 128 * d + lane / 4 * 16);
  constexpr int bias[4] = {kBiasBits, kBiasBits, kBiasBits, kBiasBits};
  const uint32_t a0[4] = {u[0][0], u[0][1], u[1][0], u[1][1]}, a1[4] = {u[2][0], u[2][1], u[3][0], u[3][1]};
  const auto add = [&](int n, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
    const uint32_t first[2] = {v0, v1}, second[2] = {v2, v3};
    mma_u8s8_k32_onto(sum[n], bias, a0, first);
    mma_u8s8_k32(sum[n], a1, second);
  };
  add(0, v[0].x, v[1].x, v[2].x, v[3].x);
  add(1, v[0].y, v[1].y, v[2].y, v[3].y);
  add(2, v[0].z, v[1].z, v[2].z, v[3].z);
  add(3, v[0].w, v[1].w, v[2].w, v[3].w);
}

__device__ __forceinline__ bool sees_none(int base, int oldest, int position) { return max(base, oldest) >= min(base + kStep, position + 1); }

// ---------------------------------------------------------------- one span a block

// What a row's step leaves in shared memory for the fold: maximum, factor of what came before, sum of weights and unit, [step][row]; behind them the places of the steps, where
// sums of values take the place of keys.
constexpr int kStepFloats = 4 * kWarps * kSplitPairsMax;
template <int dims>
constexpr int kValuesStride = dims + 4;  // floats of a row; 4 more keep the rows of a store on different banks
template <int D, int dims>
constexpr size_t kSpanBytes = 16 + kStepFloats * 4 + kWarps * StepPlace<D, dims>::bytes;
struct StepFacts {
  float *maxima, *factors, *sums, *units;
};
__device__ __forceinline__ StepFacts facts_in(float* shared) {
  constexpr int each = kWarps * kSplitPairsMax;
  return {shared, shared + each, shared + 2 * each, shared + 3 * each};
}

// A warp's step behind the meeting of maxima.
template <int D, int dims, bool masked>
__device__ __forceinline__ void finish_step_of_span(const PieceRows<1>& of, uint8_t* place, int base, StepScores<1>& scores, const StepFacts& facts) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32), g = lane / 4, t = lane % 4, at = warp * kSplitPairsMax + g;
  float before = kNegativeInfinity, sum[1], unit[1];
  for (int w = 0; w < warp; w++) before = fmaxf(before, facts.maxima[w * kSplitPairsMax + g]);
  const float m[1] = {fmaxf(before, scores.largest[0])};
  const bool active[1] = {!masked || !sees_none(base, of.oldest[0], of.position[0])};
  uint32_t u[kSubblocks][2];
  weigh_keys<D, dims, 1, masked>(of, place, base, lane, m, active, scores, u, sum, unit);
  if (t == 0) {
    facts.factors[at] = active[0] && m[0] > before ? exp_not_positive(__fsub_rn(before, m[0])) : 1.0f;
    facts.sums[at] = active[0] ? sum[0] : 0.0f;
    facts.units[at] = unit[0];
  }
#pragma unroll
  for (int d = 0; d < dims / 32; d++) {
    int sum_of[4][4];
    weigh_values<D, dims>(place, d, lane, u, sum_of);
#pragma unroll
    for (int e = 0; e < 2; e++)
      *reinterpret_cast<float4*>(reinterpret_cast<float*>(place) + g * kValuesStride<dims> + 32 * d + 8 * t + 4 * e) =
          make_float4(__fadd_rn(__int_as_float(sum_of[0][e]), -kBias), __fadd_rn(__int_as_float(sum_of[1][e]), -kBias), __fadd_rn(__int_as_float(sum_of[2][e]), -kBias),
                      __fadd_rn(__int_as_float(sum_of[3][e]), -kBias));
  }
}

// The partial result of a span for all pairs of a piece, at most kSplitPairsMax. A whole block calls it.
template <int D, int dims>
__device__ __forceinline__ void attend_span(const AttentionStep& step, const AttentionWork& work, float* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32), g = lane / 4, t = lane % 4, first_dim = static_cast<int>(blockIdx.y) * dims;
  const HeadRun run = step.runs[work.run];
  const StepFacts facts = facts_in(shared);
  const PieceRows<1> of = rows_of<1>(step, work, run, 0, lane);
  const auto place_of = [&](int w) { return reinterpret_cast<uint8_t*>(shared + kStepFloats) + w * StepPlace<D, dims>::bytes; };
  uint8_t* place = place_of(warp);
  const int base = work.span * kSpan + warp * kStep;
  const bool some = base <= of.highest && base + kStep > of.lowest, all = base >= of.all_from && base + kStep <= of.all_to + 1;  // the same for the whole warp
  StepScores<1> scores;
  scores.largest[0] = kNegativeInfinity;
  if (some) {
    const int32_t* table = step.rows.block_tables + step.rows.block_offsets[step.rows.row_sequence[work.row]];
    copy_step<D, dims>(step, table, run.kv_head, base, of.lowest, of.highest, first_dim, 0, kSubblocks, place, lane);
    commit_copies();
    uint32_t q[D / 32][4];
    float q_scale[1];
    quantize_query<D, 1>(step, of, lane, q, q_scale);
    wait_copies<0>();
    __syncwarp();
    if (all) score_keys<D, dims, 1, false>(of, place, base, lane, q, q_scale, scores);
    else score_keys<D, dims, 1, true>(of, place, base, lane, q, q_scale, scores);
  }
  if (t == 0) facts.maxima[warp * kSplitPairsMax + g] = scores.largest[0];
  __syncthreads();
  if (some) {
    if (all) finish_step_of_span<D, dims, false>(of, place, base, scores, facts);
    else finish_step_of_span<D, dims, true>(of, place, base, scores, facts);
  } else if (t == 0) {
    facts.factors[warp * kSplitPairsMax + g] = 1.0f;
    facts.sums[warp * kSplitPairsMax + g] = facts.units[warp * kSplitPairsMax + g] = 0.0f;
  }
  __syncthreads();
  const int pairs = work.rows * run.count;
  for (int i = static_cast<int>(threadIdx.x); i < pairs * (dims / 4); i += kWarps * 32) {
    const int pair = i / (dims / 4), d = i % (dims / 4) * 4, row = work.row + pair / run.count, head = run.first + pair % run.count;
    const int position = step.rows.positions[row], oldest = oldest_key(position, step.window);
    if (work.span < oldest / kSpan || work.span > position / kSpan) continue;  // no key of this row
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const int at = w * kSplitPairsMax + pair;
      const float factor = facts.factors[at], unit = facts.units[at];
      o = make_float4(__fmul_rn(o.x, factor), __fmul_rn(o.y, factor), __fmul_rn(o.z, factor), __fmul_rn(o.w, factor));
      if (unit == 0.0f) continue;
      const float4 v = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(place_of(w)) + pair * kValuesStride<dims> + d);
      o = make_float4(__fmaf_rn(v.x, unit, o.x), __fmaf_rn(v.y, unit, o.y), __fmaf_rn(v.z, unit, o.z), __fmaf_rn(v.w, unit, o.w));
    }
    float* partial = step.partials + (static_cast<int64_t>(step.first_slot[row] + work.span - oldest / kSpan) * step.heads + head) * (D + 2);
    float2* const to = reinterpret_cast<float2*>(partial + first_dim + d);  // D + 2 floats are 8-byte aligned
    to[0] = make_float2(o.x, o.y);
    to[1] = make_float2(o.z, o.w);
    if (d > 0 || first_dim > 0) continue;
    float m = kNegativeInfinity, l = 0.0f;
    for (int w = 0; w < kWarps; w++) {
      const int at = w * kSplitPairsMax + pair;
      m = fmaxf(m, facts.maxima[at]);
      l = __fadd_rn(__fmul_rn(l, facts.factors[at]), facts.sums[at]);
    }
    partial[D] = m;
    partial[D + 1] = l;
  }
  __syncthreads();  // before the next piece
}

// ---------------------------------------------------------------- all spans a block

// What a lane has of its rows' running softmax in a span: maximum and sum, and of the values sums [n][2r + e] of each 32, as weigh_values() has them.
template <int dims>
struct Softmax {
  float m[2], l[2];
  float o[dims / 32][4][4];
};

template <int D, int dims, bool masked>
__device__ __forceinline__ void attend_step(const PieceRows<2>& of, const uint8_t* place, int base, int lane, const uint32_t (&q)[D / 32][4], const float (&q_scale)[2], Softmax<dims>& state) {
  StepScores<2> scores;
  score_keys<D, dims, 2, masked>(of, place, base, lane, q, q_scale, scores);
  float m[2], sum[2], unit[2];
  bool active[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    active[r] = !masked || !sees_none(base, of.oldest[r], of.position[r]);
    m[r] = fmaxf(state.m[r], scores.largest[r]);
    if (active[r] && m[r] > state.m[r]) {
      const float c = exp_not_positive(__fsub_rn(state.m[r], m[r]));
      state.l[r] = __fmul_rn(state.l[r], c);
#pragma unroll
      for (int d = 0; d < dims / 32; d++)
#pragma unroll
        for (int n = 0; n < 4; n++)
          for (int e = 0; e < 2; e++) state.o[d][n][2 * r + e] = __fmul_rn(state.o[d][n][2 * r + e], c);
      state.m[r] = m[r];
    }
  }
  uint32_t u[kSubblocks][2];
  weigh_keys<D, dims, 2, masked>(of, place, base, lane, m, active, scores, u, sum, unit);
#pragma unroll
  for (int r = 0; r < 2; r++)
    if (active[r]) state.l[r] = __fadd_rn(state.l[r], sum[r]);
#pragma unroll
  for (int d = 0; d < dims / 32; d++) {
    int sum_of[4][4];
    weigh_values<D, dims>(place, d, lane, u, sum_of);
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (unit[i / 2] != 0.0f) state.o[d][n][i] = __fmaf_rn(__fadd_rn(__int_as_float(sum_of[n][i]), -kBias), unit[i / 2], state.o[d][n][i]);
  }
}

// What a warp's rows have of the spans before: values in shared memory, value i of a lane at values[32 i + lane].
struct SpansBefore {
  float* values;
  float m[2], l[2];
  bool started[2];
};

// Folds a span that has ended into those before; behind a row's last one its result is written.
template <int D, int dims>
__device__ __forceinline__ void fold_span(const AttentionStep& step, const PieceRows<2>& of, int span, int first_dim, int lane, const Softmax<dims>& state, SpansBefore& before) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (of.row[r] < 0 || span < of.oldest[r] / kSpan || span > of.position[r] / kSpan) continue;  // no key of this row
    const bool last = span == of.position[r] / kSpan;
    float a = 0.0f, b = 1.0f, inverse = 1.0f;
    if (before.started[r]) {
      const float larger_m = larger(before.m[r], state.m[r]);
      a = exp_fixed(__fsub_rn(before.m[r], larger_m));
      b = exp_fixed(__fsub_rn(state.m[r], larger_m));
      before.l[r] = __fadd_rn(__fmul_rn(before.l[r], a), __fmul_rn(state.l[r], b));
      before.m[r] = larger_m;
    } else {
      before.l[r] = state.l[r];
      before.m[r] = state.m[r];
    }
    if (last) inverse = __fdiv_rn(1.0f, before.l[r]);
    float* out = step.out + of.row[r] * step.out_stride + of.head[r] * D + first_dim + 8 * (lane % 4);
#pragma unroll
    for (int d = 0; d < dims / 32; d++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float y[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
          float* const value = before.values + ((d * 4 + n) * 4 + 2 * r + e) * 32 + lane;
          y[n] = before.started[r] ? __fadd_rn(__fmul_rn(*value, a), __fmul_rn(state.o[d][n][2 * r + e], b)) : state.o[d][n][2 * r + e];
          if (!last) *value = y[n];
        }
        if (last) *reinterpret_cast<float4*>(out + 32 * d + 4 * e) = make_float4(__fmul_rn(y[0], inverse), __fmul_rn(y[1], inverse), __fmul_rn(y[2], inverse), __fmul_rn(y[3], inverse));
      }
    before.started[r] = true;
  }
}

template <int dims>
constexpr size_t kBeforeBytes = 16 * dims * 4;  // of a warp
template <int D, int dims>
constexpr size_t kWholeBytes = kWarps * kBeforeBytes<dims> + 2 * StepPlace<D, dims>::bytes;

// All spans of a piece of up to kWholePairsMax pairs, 16 a warp. The step after the one that is computed is on its way to the other of two places. A whole block calls it.
template <int D, int dims>
__device__ __forceinline__ void attend(const AttentionStep& step, const AttentionWork& work, uint8_t* shared) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32), first_dim = static_cast<int>(blockIdx.y) * dims;
  const HeadRun run = step.runs[work.run];
  const bool has_rows = 16 * warp < work.rows * run.count;
  const PieceRows<2> of = rows_of<2>(step, work, run, has_rows ? 16 * warp : 0, lane);
  const int32_t* table = step.rows.block_tables + step.rows.block_offsets[step.rows.row_sequence[work.row]];
  const int lowest = oldest_key(step.rows.positions[work.row], step.window), highest = step.rows.positions[work.row + work.rows - 1];
  uint8_t* places[2] = {shared + kWarps * kBeforeBytes<dims>, shared + kWarps * kBeforeBytes<dims> + StepPlace<D, dims>::bytes};
  const auto copy = [&](int base, uint8_t* place) {
    if (base <= highest) copy_step<D, dims>(step, table, run.kv_head, base, lowest, highest, first_dim, warp, 1, place, lane);
    commit_copies();
  };
  const int first = lowest / kStep * kStep;
  copy(first, places[0]);
  uint32_t q[D / 32][4];
  float q_scale[2];
  quantize_query<D, 2>(step, of, lane, q, q_scale);
  SpansBefore before{reinterpret_cast<float*>(shared + warp * kBeforeBytes<dims>), {}, {}, {}};
  Softmax<dims> state;
  for (int base = first; base <= highest; base += kStep) {
    wait_copies<0>();
    __syncthreads();  // the step is here for all, and the one before has been read by all
    copy(base + kStep, places[1]);
    if (has_rows) {
      if (base == first || base % kSpan == 0) {
        for (int r = 0; r < 2; r++) {
          state.m[r] = kNegativeInfinity;
          state.l[r] = 0.0f;
        }
#pragma unroll
        for (int d = 0; d < dims / 32; d++)
#pragma unroll
          for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) state.o[d][n][i] = 0.0f;
      }
      if (base >= of.all_from && base + kStep <= of.all_to + 1) attend_step<D, dims, false>(of, places[0], base, lane, q, q_scale, state);
      else if (base <= of.highest && base + kStep > of.lowest) attend_step<D, dims, true>(of, places[0], base, lane, q, q_scale, state);
      if ((base + kStep) % kSpan == 0 || base + kStep > highest) fold_span<D, dims>(step, of, base / kSpan, first_dim, lane, state, before);
    }
    uint8_t* const other = places[1];
    places[1] = places[0];
    places[0] = other;
  }
  __syncthreads();  // before the next piece
}

// ---------------------------------------------------------------- kernels

// Pieces of both kinds stand in one list; each launch takes those of its kind.
template <int D, int dims>
__global__ void __launch_bounds__(kWarps * 32, D <= 64 ? 4 : 3) attention_spans_kernel(const AttentionStep step) {
  grid_dependency_wait();
  const int count = step.work_count[0], first = step.work_count[1];
  for (int i = static_cast<int>(blockIdx.x); i < count; i += static_cast<int>(gridDim.x)) {
    const AttentionWork work = step.work[first + i];
    if (work.span >= 0) attend_span<D, dims>(step, work, reinterpret_cast<float*>(dynamic_shared() + 16));
  }
}

template <int D, int dims>
__global__ void __launch_bounds__(kWarps * 32, 3) attention_kernel(const AttentionStep step) {
  grid_dependency_wait();
  const int count = step.work_count[0], first = step.work_count[1];
  for (int i = static_cast<int>(blockIdx.x); i < count; i += static_cast<int>(gridDim.x)) {
    const AttentionWork work = step.work[first + i];
    if (work.span < 0) attend<D, dims>(step, work, dynamic_shared());
  }
}

// The spans of a row and head, which lie in slots [first, last), folded from the left: value d in thread d, of a block of at least D threads. What a fold multiplies by hangs on maxima alone:
// threads find it for kFoldSlots spans at once. shared: 3 * kFoldSlots floats. A whole block calls it.
constexpr int kFoldSlots = 128;
constexpr size_t kFoldBytes = 3 * kFoldSlots * 4;
__device__ __forceinline__ float joined(const AttentionStep& step, int head, int first, int last, int D, int d, float* shared) {
  float *maxima = shared, *before = maxima + kFoldSlots, *own = before + kFoldSlots;
  const auto partial = [&](int slot) { return step.partials + (static_cast<int64_t>(slot) * step.heads + head) * (D + 2); };
  float m = 0.0f, l = 0.0f, o = 0.0f;
  for (int begin = first; begin < last; begin += kFoldSlots) {
    const int count = min(kFoldSlots, last - begin), thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    __syncthreads();  // what was found before has been read
    for (int i = thread; i < count; i += threads) maxima[i] = partial(begin + i)[D];
    __syncthreads();
    const float of_before = m;
    for (int i = thread; i < count; i += threads) {
      float largest = begin == first ? maxima[0] : of_before;
      for (int j = begin == first ? 1 : 0; j < i; j++) largest = larger(largest, maxima[j]);
      const float larger_m = larger(largest, maxima[i]);
      before[i] = exp_fixed(__fsub_rn(largest, larger_m));
      own[i] = exp_fixed(__fsub_rn(maxima[i], larger_m));
    }
    __syncthreads();
    for (int i = 0; i < count; i++) m = begin == first && i == 0 ? maxima[0] : larger(m, maxima[i]);
#pragma unroll 8
    for (int i = 0; i < count; i++) {
      const float* p = partial(begin + i);
      const float l_i = p[D + 1], o_i = d < D ? p[d] : 0.0f;
      const bool is_first = begin == first && i == 0;
      l = is_first ? l_i : __fadd_rn(__fmul_rn(l, before[i]), __fmul_rn(l_i, own[i]));
      o = is_first ? o_i : __fadd_rn(__fmul_rn(o, before[i]), __fmul_rn(o_i, own[i]));
    }
  }
  return __fmul_rn(o, __fdiv_rn(1.0f, l));
}

__global__ void attention_join_kernel(const AttentionStep step) {
  grid_dependency_wait();
  const int row = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), D = static_cast<int>(blockDim.x), d = static_cast<int>(threadIdx.x);
  const int first = step.first_slot[row], last = step.first_slot[row + 1];
  if (first >= last) return;
  const float y = joined(step, head, first, last, D, d, reinterpret_cast<float*>(dynamic_shared()));
  step.out[row * step.out_stride + head * D + d] = y;
}

// Pieces that are spans, then the join: the piece that comes last of its rows and heads folds their spans and quantises what they give, 32 values of a head a warp.
template <int D, int dims>
__global__ void __launch_bounds__(kWarps * 32, D <= 64 ? 4 : 3) attention_fused_kernel(const AttentionStep step, int runs, ActivationGroup* quantized, uint32_t* arrivals, const FiniteCheck check) {
  grid_dependency_wait();
  uint32_t* flag = reinterpret_cast<uint32_t*>(dynamic_shared());
  float* shared = reinterpret_cast<float*>(dynamic_shared() + 16);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, count = step.work_count[0], first_piece = step.work_count[1];
  for (int i = static_cast<int>(blockIdx.x); i < count; i += static_cast<int>(gridDim.x)) {
    const AttentionWork work = step.work[first_piece + i];
    attend_span<D, dims>(step, work, shared);
    const int spans = step.rows.positions[work.row + work.rows - 1] / kSpan - oldest_key(step.rows.positions[work.row], step.window) / kSpan + 1;
    if (!comes_last(arrivals + work.row * runs + work.run, static_cast<uint32_t>(spans) * gridDim.y, flag)) continue;
    const HeadRun run = step.runs[work.run];
    for (int row = work.row; row < work.row + work.rows; row++)
      for (int head = run.first; head < run.first + run.count; head++)
        for (int from = 0; from < D; from += kWarps * 32) {
          const int d = from + thread;
          const float y = joined(step, head, step.first_slot[row], step.first_slot[row + 1], D, d, shared);
          if (d >= D) continue;  // whole warps
          note_unless_finite(y, check, row);
          quantize_group(y, row, head * (D / 32) + d / 32, step.heads * (D / 32), lane, quantized);
        }
    __syncthreads();  // before the next piece
  }
}

int blocks_of(int warps) { return (warps + kWarps - 1) / kWarps; }

template <int D, int dims>
Problem launch_both(const AttentionStep& step, int warps, Stream stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(warps)), D / dims);
  if (const Problem problem = launch(attention_spans_kernel<D, dims>, grid, kWarps * 32, kSpanBytes<D, dims>, stream, step)) return problem;
  return launch(attention_kernel<D, dims>, grid, kWarps * 32, kWholeBytes<D, dims>, stream, step);
}

template <int D, int dims>
Problem launch_fused(const AttentionStep& step, int runs, ActivationGroup* quantized, uint32_t* arrivals, int warps, Stream stream, const FiniteCheck& check) {
  return launch(attention_fused_kernel<D, dims>, dim3(static_cast<unsigned>(blocks_of(warps)), D / dims), kWarps * 32, kSpanBytes<D, dims>, stream, step, runs, quantized, arrivals, check);
}

template <int value_>
struct Number {
  static constexpr int value = value_;
};
// Calls `use` with a launcher's numbers for the head size: D, and how many of its values a block has.
template <typename Use>
Problem with_head_size(int head_size, const Use& use) {
  switch (head_size) {
    case 32: return use(Number<32>{}, Number<32>{});
    case 64: return use(Number<64>{}, Number<64>{});
    case 96: return use(Number<96>{}, Number<96>{});
    case 128: return use(Number<128>{}, Number<128>{});
    default: return use(Number<256>{}, Number<64>{});
  }
}

}  // namespace

Problem attention(const AttentionStep& step, int warps, Stream stream) {
  if (const Problem problem = check_attention(step)) return problem;
  if (step.layout.key != KeyType::Int8 || step.layout.value != ValueType::Int8) return "attention: K and V must be int8; attention_f16 takes others";
  if (warps < 1) return "attention: warps must be positive";
  return with_head_size(step.layout.head_size, [&](auto D, auto dims) { return launch_both<decltype(D)::value, decltype(dims)::value>(step, warps, stream); });
}

Problem attention_fused(const AttentionStep& step, int runs, ActivationGroup* quantized, uint32_t* arrivals, int warps, Stream stream, const FiniteCheck& rows_check) {
  if (const Problem problem = check_attention(step)) return problem;
  if (step.layout.key != KeyType::Int8 || step.layout.value != ValueType::Int8) return "attention_fused: K and V must be int8";
  if (warps < 1 || runs < 1) return "attention_fused: warps and runs must be positive";
  return with_head_size(step.layout.head_size, [&](auto D, auto dims) { return launch_fused<decltype(D)::value, decltype(dims)::value>(step, runs, quantized, arrivals, warps, stream, rows_check); });
}

Problem attention_join(const AttentionStep& step, Stream stream) {
  if (const Problem problem = check_attention(step)) return problem;
  const dim3 grid(static_cast<unsigned>(step.rows.tokens), static_cast<unsigned>(step.heads));
  return launch(attention_join_kernel, grid, static_cast<unsigned>(step.layout.head_size), kFoldBytes, stream, step);
}

}  // namespace shardmesh::cuda
