// Attention over a paged cache whose K, V or both are f16, decode and prefill in one kernel, with the reference's bits (ARCHITECTURE.md, "Arithmetic").
//   q [T, heads * D] fp32 after rope    cache: kernels/include/kernel_set.h    out [T, heads * D] fp32
// f16 K wants one chain of D fma a key, f16 V one of the unmasked keys a value, so neither is shared by lanes and no tensor core can take part. int8 K or V stays integer.
//
// Work is the list of attention.cu: pieces of up to 16 pairs (row, query head) of one sequence and KV head; a warp takes four pairs at a time. The whole context of a piece
// (prefill) is a block's: its four warps read the same K and V, three of them from the first-level cache. One span of a piece (decode) is a warp's, since there a piece
// often has four pairs or fewer. One step is 64 keys.
//   scores  a lane has keys 2l and 2l + 1 for four rows: eight chains, each load of K serves four rows, q comes from shared memory, one load for four rows
//   values  a lane has D / 32 values for four rows, weights come from shared memory, one load for four rows
// Limits: D = 32, 64, 96, 128 or 256; strides of q and out multiples of 4, both 16-byte aligned.
#include "attention_rows.cuh"
#include "device.cuh"
#include "kv_place.cuh"
#include "operations.h"

namespace shardmesh::cuda {
namespace {

constexpr int kWarps = 4, kRows = 4;  // warps of a block, rows (pairs) of a warp

// Rows of a warp, the same in every lane.
struct WarpRows {
  int count;                              // that exist
  int row[kRows], head[kRows];
  int position[kRows], oldest[kRows];     // keys oldest .. position are unmasked; no key where the row does not exist
  int lowest, highest;                    // over those that exist
};

// Pairs 4 * quarter and up of a piece.
__device__ __forceinline__ WarpRows warp_rows(const AttentionStep& step, const AttentionWork& work, const HeadRun& run, int quarter) {
  WarpRows rows;
  rows.count = min(kRows, work.rows * run.count - quarter * kRows);
  rows.lowest = 0x7fffffff;
  rows.highest = -1;
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int index = quarter * kRows + r;
    rows.row[r] = work.row + index / run.count;
    rows.head[r] = run.first + index % run.count;
    rows.position[r] = r < rows.count ? step.rows.positions[rows.row[r]] : -1;
    rows.oldest[r] = r < rows.count ? oldest_key(rows.position[r], step.window) : 0;
    if (r < rows.count) {
      rows.lowest = min(rows.lowest, rows.oldest[r]);
      rows.highest = max(rows.highest, rows.position[r]);
    }
  }
  return rows;
}

// A warp's part of shared memory.
template <int D>
struct WarpShared {
  float4 q[D];        // a component a row, as in all of these
  uint4 q8[D / 4];    // of int8 K: four values a word
  float4 weight[64];  // of each key, for f16 V
  uint4 u[16];        // for int8 V: of four keys a word
  float total[kRows][D];  // of the spans folded so far, where a piece has several
};

// Value i of a lane: neighbours by two where a head has whole pairs for 32 lanes.
template <int D>
__device__ __forceinline__ int value_of_lane(int i, int lane) { return D % 64 == 0 ? 64 * (i / 2) + 2 * lane + i % 2 : 32 * i + lane; }

// Words of a lane's values.
template <int D>
__device__ __forceinline__ void load_neighbours(const uint32_t* words, int lane, uint32_t (&v)[D / 32]) {
  if constexpr (D % 64 == 0) {
#pragma unroll
    for (int i = 0; i < D / 32; i += 2) {
      const uint2 both = *reinterpret_cast<const uint2*>(words + value_of_lane<D>(i, lane));
      v[i] = both.x;
      v[i + 1] = both.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < D / 32; i++) v[i] = words[value_of_lane<D>(i, lane)];
  }
}

template <int D>
struct RowsState {
  float m[kRows], l[kRows], o[kRows][D / 32];
};

template <int D>
__device__ __forceinline__ void clear(RowsState<D>& s) {
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    s.m[r] = kNegativeInfinity;
    s.l[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 32; i++) s.o[r][i] = 0.0f;
  }
}

// Lays q of the rows into shared memory; scale[r] is what a score of row r is multiplied with: the step's scale, or for int8 K rn(amax / 127 * step.scale).
template <int D>
__device__ __forceinline__ void load_query(const AttentionStep& step, const WarpRows& rows, int lane, WarpShared<D>* shared, float (&scale)[kRows]) {
  const bool integer = step.layout.key == KeyType::Int8;
  __syncwarp();  // the piece before has been read
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    float x[D / 32], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      x[i] = r < rows.count ? step.q[rows.row[r] * step.q_stride + rows.head[r] * D + 32 * i + lane] : 0.0f;
      amax = larger(amax, x[i] < 0.0f ? -x[i] : x[i]);
      reinterpret_cast<float*>(&shared->q[32 * i + lane])[r] = x[i];
    }
    scale[r] = step.scale;
    if (!integer) continue;
    amax = warp_magnitude(amax);
    scale[r] = __fmul_rn(quantized_scale(amax), step.scale);
#pragma unroll
    for (int i = 0; i < D / 32; i++) reinterpret_cast<int8_t*>(&shared->q8[8 * i + lane / 4])[4 * r + lane % 4] = static_cast<int8_t>(quantized(x[i], amax));
  }
  __syncwarp();
}

// Scores of keys 2l and 2l + 1 of the step at `base`, whose subblock `own` is (null: no key of it is wanted).
template <int D>
__device__ __forceinline__ void make_scores(const AttentionStep& step, const uint8_t* own, int lane, const WarpShared<D>& shared, const float (&scale)[kRows], float (&s)[kRows][2]) {
  if (step.layout.key == KeyType::Int8) {
    int dot[kRows][2] = {};
    float2 key_scale = make_float2(0.0f, 0.0f);
    if (own) {
      const uint2* keys = reinterpret_cast<const uint2*>(own + lane % 8 * 8);  // words of both keys
      key_scale = *reinterpret_cast<const float2*>(own + step.layout.key_bytes + step.layout.value_bytes + lane % 8 * 8);
#pragma unroll 8
      for (int d = 0; d < D / 4; d++) {
        const uint2 k = keys[d * 8];
        const uint4 q = shared.q8[d];
        const uint32_t of_rows[kRows] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          dot[r][0] = __dp4a(static_cast<int>(of_rows[r]), static_cast<int>(k.x), dot[r][0]);
          dot[r][1] = __dp4a(static_cast<int>(of_rows[r]), static_cast<int>(k.y), dot[r][1]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      s[r][0] = __fmul_rn(__int2float_rn(dot[r][0]), __fmul_rn(key_scale.x, scale[r]));
      s[r][1] = __fmul_rn(__int2float_rn(dot[r][1]), __fmul_rn(key_scale.y, scale[r]));
    }
    return;
  }
  float chain[kRows][2] = {};
  if (own) {
    const uint32_t* keys = reinterpret_cast<const uint32_t*>(own) + lane % 8;
#pragma unroll 16
    for (int d = 0; d < D; d++) {
      const uint32_t pair = keys[d * 8];
      const float first = low_half(pair), second = high_half(pair);
      const float4 q = shared.q[d];
      const float of_rows[kRows] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        chain[r][0] = __fmaf_rn(of_rows[r], first, chain[r][0]);
        chain[r][1] = __fmaf_rn(of_rows[r], second, chain[r][1]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    s[r][0] = __fmul_rn(chain[r][0], scale[r]);
    s[r][1] = __fmul_rn(chain[r][1], scale[r]);
  }
}

// Halving sum of the 64 weights of a row: keys 32, 16, .. 2 apart lie in other lanes, the last two in this one.
__device__ __forceinline__ float halving_sum_64(float first, float second) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
    first = __fadd_rn(first, __shfl_xor_sync(kWholeWarp, first, distance));
    second = __fadd_rn(second, __shfl_xor_sync(kWholeWarp, second, distance));
  }
  return __fadd_rn(first, second);
}

// o += sum over the unmasked keys of 16 from `from` on, ascending. whole: none is masked for any row.
template <int D, bool whole>
__device__ __forceinline__ void add_half_values(const uint8_t* values, const WarpRows& rows, int from, int lane, const float4* weights, RowsState<D>& state) {
  const int begin = max(from, rows.lowest), end = min(from + 16, rows.highest + 1);
#pragma unroll(whole ? 8 : 1)
  for (int j = whole ? from : begin; j < (whole ? from + 16 : end); j++) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(values) + (j - from) * D;
    float v[D / 32];
    if constexpr (D % 64 == 0) {
#pragma unroll
      for (int i = 0; i < D / 32; i += 2) {
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + value_of_lane<D>(i, lane));
        v[i] = low_half(pair);
        v[i + 1] = high_half(pair);
      }
    } else {
#pragma unroll
      for (int i = 0; i < D / 32; i++) v[i] = half_to_float(row[value_of_lane<D>(i, lane)]);
    }
    const float4 w = weights[j - from];
    const float of_rows[kRows] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (!whole && (j < rows.oldest[r] || j > rows.position[r])) continue;
#pragma unroll
      for (int i = 0; i < D / 32; i++) state.o[r][i] = __fmaf_rn(of_rows[r], v[i], state.o[r][i]);
    }
  }
}

// Adds the 64 keys from `base` on.
template <int D>
__device__ __forceinline__ void attend_step(const AttentionStep& step, const WarpRows& rows, const int32_t* table, int kv_head, int base, int lane, WarpShared<D>* shared,
                                            const float (&scale)[kRows], RowsState<D>& state) {
  // Where none of the warp's rows has a key, slots may hold anything, and their blocks may not exist.
  const auto subblock = [&](int from) { return from <= rows.highest && from + 16 > rows.lowest ? step.cache + subblock_offset(step.layout, table, from, kv_head) : nullptr; };
  const uint8_t* own = subblock(base + lane / 8 * 16);
  float s[kRows][2];  // score, then weight
  make_scores<D>(step, own, lane, *shared, scale, s);

  const bool integer = step.layout.value == ValueType::Int8;
  float2 value_scale = make_float2(0.0f, 0.0f);
  if (integer && own)
    value_scale = *reinterpret_cast<const float2*>(own + step.layout.key_bytes + step.layout.value_bytes + (step.layout.key == KeyType::Int8 ? 64 : 0) + lane % 8 * 8);
  float unit[kRows];  // int8 V: what one unit of u stands for; 0: the row gets no values
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    unit[r] = 0.0f;
    uint32_t u = 0;
    // The same for the whole warp.
    if (max(base, rows.oldest[r]) < min(base + kAttentionStep, rows.position[r] + 1)) {
      const int key = base + 2 * lane;
      const bool first = key >= rows.oldest[r] && key <= rows.position[r], second = key + 1 >= rows.oldest[r] && key + 1 <= rows.position[r];
      const float m = larger(state.m[r], warp_largest(larger(first ? s[r][0] : kNegativeInfinity, second ? s[r][1] : kNegativeInfinity)));
      if (m > state.m[r]) {
        const float c = exp_fixed(__fsub_rn(state.m[r], m));
        state.l[r] = __fmul_rn(state.l[r], c);
#pragma unroll
        for (int i = 0; i < D / 32; i++) state.o[r][i] = __fmul_rn(state.o[r][i], c);
        state.m[r] = m;
      }
      s[r][0] = first ? exp_fixed(__fsub_rn(s[r][0], m)) : 0.0f;
      s[r][1] = second ? exp_fixed(__fsub_rn(s[r][1], m)) : 0.0f;
      state.l[r] = __fadd_rn(state.l[r], halving_sum_64(s[r][0], s[r][1]));
      if (integer) {
        const float x0 = first ? __fmul_rn(s[r][0], value_scale.x) : 0.0f, x1 = second ? __fmul_rn(s[r][1], value_scale.y) : 0.0f;  // a masked scale may be NaN
        const float largest = warp_largest(larger(x0, x1));
        if (largest >= kQuantizableMin) {
          unit[r] = __fdiv_rn(largest, 255.0f);
          const float inverse = __fdiv_rn(255.0f, largest);
          u = static_cast<uint32_t>(__float2int_rn(__fmul_rn(x0, inverse))) | static_cast<uint32_t>(__float2int_rn(__fmul_rn(x1, inverse))) << 8;
        }
      }
    }
    if (integer) reinterpret_cast<uint16_t*>(&shared->u[lane / 2])[2 * r + lane % 2] = static_cast<uint16_t>(u);
  }
  if (!integer) {
    shared->weight[2 * lane] = make_float4(s[0][0], s[1][0], s[2][0], s[3][0]);
    shared->weight[2 * lane + 1] = make_float4(s[0][1], s[1][1], s[2][1], s[3][1]);
  }
  __syncwarp();

  if (!integer) {
    bool whole = rows.count == kRows;
#pragma unroll
    for (int r = 0; r < kRows; r++) whole = whole && rows.oldest[r] <= base && rows.position[r] >= base + kAttentionStep - 1;
    for (int b = 0; b < 4; b++) {
      const uint8_t* from = subblock(base + 16 * b);
      if (!from) continue;
      if (whole) add_half_values<D, true>(from + step.layout.key_bytes, rows, base + 16 * b, lane, shared->weight + 16 * b, state);
      else add_half_values<D, false>(from + step.layout.key_bytes, rows, base + 16 * b, lane, shared->weight + 16 * b, state);
    }
  } else {
    int sum[kRows][D / 32] = {};
    for (int b = 0; b < 4; b++) {
      const uint8_t* from = subblock(base + 16 * b);
      if (!from) continue;
#pragma unroll
      for (int four = 0; four < 4; four++) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(from + step.layout.key_bytes) + four * D;
        uint32_t v[D / 32];
        load_neighbours<D>(words, lane, v);
        const uint4 u = shared->u[4 * b + four];
        const uint32_t of_rows[kRows] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
          for (int i = 0; i < D / 32; i++) sum[r][i] = dp4a_u8s8(of_rows[r], v[i], sum[r][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++)
#pragma unroll
      for (int i = 0; i < D / 32; i++)
        if (unit[r] != 0.0f) state.o[r][i] = __fmaf_rn(__int2float_rn(sum[r][i]), unit[r], state.o[r][i]);
  }
  __syncwarp();  // weights have been read
}

template <int D>
__device__ __forceinline__ void attend(const AttentionStep& step, const AttentionWork& work, WarpShared<D>* shared, int quarter, int lane) {
  const HeadRun run = step.runs[work.run];
  const WarpRows rows = warp_rows(step, work, run, quarter);
  if (rows.count < 1) return;
  const bool whole = work.span < 0;  // all spans, folded here
  const int32_t* table = step.rows.block_tables + step.rows.block_offsets[step.rows.row_sequence[work.row]];
  float scale[kRows];
  load_query<D>(step, rows, lane, shared, scale);

  RowsState<D> state;
  float total_m[kRows], total_l[kRows];  // their values lie in shared memory, each read by the lane that wrote it
  bool started[kRows] = {};
  const int first = whole ? rows.lowest / kSpanTokens : work.span, last = whole ? rows.highest / kSpanTokens : work.span;
  for (int span = first; span <= last; span++) {
    clear(state);
    for (int base = span * kSpanTokens; base < (span + 1) * kSpanTokens; base += kAttentionStep)
      if (base <= rows.highest && base + kAttentionStep > rows.lowest) attend_step<D>(step, rows, table, run.kv_head, base, lane, shared, scale, state);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (r >= rows.count || span < rows.oldest[r] / kSpanTokens || span > rows.position[r] / kSpanTokens) continue;  // no key of this row
      if (!whole) {
        const int slot = step.first_slot[rows.row[r]] + span - rows.oldest[r] / kSpanTokens;
        float* partial = step.partials + (static_cast<int64_t>(slot) * step.heads + rows.head[r]) * (D + 2);
#pragma unroll
        for (int i = 0; i < D / 32; i++) partial[value_of_lane<D>(i, lane)] = state.o[r][i];
        if (lane == 0) {
          partial[D] = state.m[r];
          partial[D + 1] = state.l[r];
        }
      } else if (!started[r]) {
        started[r] = true;
        total_m[r] = state.m[r];
        total_l[r] = state.l[r];
#pragma unroll
        for (int i = 0; i < D / 32; i++) shared->total[r][32 * i + lane] = state.o[r][i];
      } else {
        const float m = larger(total_m[r], state.m[r]), a = exp_fixed(__fsub_rn(total_m[r], m)), b = exp_fixed(__fsub_rn(state.m[r], m));
        total_l[r] = __fadd_rn(__fmul_rn(total_l[r], a), __fmul_rn(state.l[r], b));
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
          float& o = shared->total[r][32 * i + lane];
          o = __fadd_rn(__fmul_rn(o, a), __fmul_rn(state.o[r][i], b));
        }
        total_m[r] = m;
      }
    }
  }
  if (!whole) return;
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    if (r >= rows.count) continue;
    const float inverse = __fdiv_rn(1.0f, total_l[r]);
    float* out = step.out + rows.row[r] * step.out_stride + rows.head[r] * D;
#pragma unroll
    for (int i = 0; i < D / 32; i++) out[value_of_lane<D>(i, lane)] = __fmul_rn(shared->total[r][32 * i + lane], inverse);
  }
}

// Warps of a block have nothing to do with each other: where one has no row, the others go on.
template <int D>
__global__ void __launch_bounds__(kWarps * 32, D <= 128 ? 3 : 2) attention_f16_kernel(const AttentionStep step) {
  grid_dependency_wait();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  WarpShared<D>* shared = reinterpret_cast<WarpShared<D>*>(dynamic_shared()) + warp;
  const int count = step.work_count[0], first_piece = step.work_count[1];
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {  // pieces of both kinds stand in one list
    const bool whole = pass == 0;
    const int first = static_cast<int>(whole ? blockIdx.x : blockIdx.x * kWarps + warp), apart = static_cast<int>(whole ? gridDim.x : gridDim.x * kWarps);
    for (int i = first; i < count; i += apart) {
      const AttentionWork work = step.work[first_piece + i];
      if ((work.span < 0) != whole) continue;
#pragma unroll 1
      for (int quarter = whole ? warp : 0; quarter < (whole ? warp + 1 : kWarps); quarter++) attend<D>(step, work, shared, quarter, lane);
    }
  }
}

}  // namespace

Problem attention_f16(const AttentionStep& step, int blocks, Stream stream) {
  if (const Problem problem = check_attention(step)) return problem;
  if (blocks < 1) return "attention: blocks must be positive";
  const auto run = [&](auto kernel, size_t shared_bytes) { return launch(kernel, static_cast<unsigned>(blocks), kWarps * 32, kWarps * shared_bytes, stream, step); };
  switch (step.layout.head_size) {
    case 32: return run(attention_f16_kernel<32>, sizeof(WarpShared<32>));
    case 64: return run(attention_f16_kernel<64>, sizeof(WarpShared<64>));
    case 96: return run(attention_f16_kernel<96>, sizeof(WarpShared<96>));
    case 128: return run(attention_f16_kernel<128>, sizeof(WarpShared<128>));
    default: return run(attention_f16_kernel<256>, sizeof(WarpShared<256>));
  }
}

}  // namespace shardmesh::cuda
