// Attention over the paged int8 cache, decode and prefill in one kernel.        Online softmax: Milakov & Gimelshein 2018; the arithmetic: ARCHITECTURE.md
//   q [T, heads * D] fp32 after rope    cache: kernels/include/kernel_set.h, int8 K    out [T, heads * D] fp32
// A warp takes one piece of work: up to 16 pairs (row, query head) that share a sequence and a KV head, the 16 rows of an mma. So the query heads of a group
// share each load of K and V, and so do the rows of a prefill chunk. Work is a list in device memory that a fixed grid walks: no launch depends on contexts.
//
// One step is 64 keys, four subblocks of 16. g = lane / 4, t = lane % 4; a lane has rows g and g + 8.
//   scores  A: q as int8, B: 8 keys. Column 2t' + e of product n stands for key 4t' + 2n + e of the subblock, so that after both products lane t holds keys
//           4t .. 4t + 3, which is what the second product wants of it: nothing moves between lanes.
//   values  A: softmax weights u8, B: V words of four tokens; 8 of D per product.
// Decode splits a context: a piece is one span of 256 positions, attention_join folds the spans, or, in steps of few rows, whichever piece comes last. Prefill folds them in registers, in the same order.
// A cache with f16 in it is for attention_f16.cu.
// Limits: D = 32, 64, 96, 128 or 256; q_stride a multiple of 4, q 16-byte aligned.
#include "arrivals.cuh"
#include "attention_rows.cuh"
#include "device.cuh"
#include "finite.cuh"
#include "kv_place.cuh"
#include "operations.h"
#include "quantize_group.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kSpan = kSpanTokens, kStep = kAttentionStep, kSubblocks = 4;

// Running softmax of a lane's two rows, for the `dims` values of this block.
template <int dims>
struct Softmax {
  float m[2], l[2];
  float o[dims / 8][4];
};

template <int dims>
__device__ __forceinline__ void clear(Softmax<dims>& s) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    s.m[i] = kNegativeInfinity;
    s.l[i] = 0.0f;
  }
#pragma unroll
  for (int n = 0; n < dims / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s.o[n][i] = 0.0f;
}

// Of the four lanes that share a row.
__device__ __forceinline__ float quad_larger(float v) {
  v = larger(v, __shfl_xor_sync(kWholeWarp, v, 1));
  return larger(v, __shfl_xor_sync(kWholeWarp, v, 2));
}

// The rows of a piece, as one lane sees them.
struct PieceRows {
  int row[2], head[2];        // of the step; -1: no such row
  int position[2], oldest[2]; // keys oldest..position are unmasked
  int lowest, highest;        // over all rows of the piece
};

__device__ __forceinline__ PieceRows rows_of(const AttentionStep& step, const AttentionWork& work, const HeadRun& run, int lane) {
  PieceRows rows;
  for (int i = 0; i < 2; i++) {
    const int index = lane / 4 + 8 * i, row = index / run.count;
    const bool exists = row < work.rows;
    rows.row[i] = exists ? work.row + row : -1;
    rows.head[i] = run.first + index % run.count;
    rows.position[i] = exists ? step.rows.positions[work.row + row] : -1;
    rows.oldest[i] = oldest_key(rows.position[i], step.window);
  }
  rows.lowest = oldest_key(step.rows.positions[work.row], step.window);
  rows.highest = step.rows.positions[work.row + work.rows - 1];
  return rows;
}

// q of the lane's two rows as operand A: chunk c is values 32 c and up. scale[i] = rn(amax / 127 * step.scale).
template <int D>
__device__ __forceinline__ void quantize_query(const AttentionStep& step, const PieceRows& rows, int lane, uint32_t (&a)[D / 32][4], float (&scale)[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 x[D / 16];
    const float4* q = reinterpret_cast<const float4*>(step.q + max(rows.row[i], 0) * step.q_stride + rows.head[i] * D);
    float amax = 0.0f;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      x[j] = rows.row[i] < 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : q[j * 4 + lane % 4];
      for (const float v : {x[j].x, x[j].y, x[j].z, x[j].w}) amax = larger(amax, v < 0.0f ? -v : v);
    }
    amax = quad_larger(amax);
    scale[i] = __fmul_rn(quantized_scale(amax), step.scale);
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      const uint32_t word = static_cast<uint32_t>(quantized(x[j].x, amax) & 255) | static_cast<uint32_t>(quantized(x[j].y, amax) & 255) << 8 |
                            static_cast<uint32_t>(quantized(x[j].z, amax) & 255) << 16 | static_cast<uint32_t>(quantized(x[j].w, amax) & 255) << 24;
      a[j / 2][i + 2 * (j % 2)] = word;
    }
  }
}

// Adds the 64 keys from `base` on. first_dim: the first of the block's values.
template <int D, int dims>
__device__ __forceinline__ void attend_step(const AttentionStep& step, const PieceRows& rows, const int32_t* table, int kv_head, int base, int first_dim, int lane,
                                            const uint32_t (&q)[D / 32][4], const float (&q_scale)[2], Softmax<dims>& state) {
  const int g = lane / 4, t = lane % 4;
  const uint8_t* subblock[kSubblocks];  // null where no row of the piece has a key: such slots may hold anything, and their blocks may not exist
#pragma unroll
  for (int b = 0; b < kSubblocks; b++) {
    const int from = base + 16 * b;
    subblock[b] = from <= rows.highest && from + 16 > rows.lowest ? step.cache + subblock_offset(step.layout, table, from, kv_head) : nullptr;
  }

  float s[2][kSubblocks][4];  // score, then weight, then weight * value scale
  float m[2] = {state.m[0], state.m[1]};
#pragma unroll
  for (int b = 0; b < kSubblocks; b++) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      int dot[4] = {0, 0, 0, 0};
      float2 key_scale = make_float2(0.0f, 0.0f);
      if (subblock[b]) {  // the same for the whole warp
        const uint32_t* keys = reinterpret_cast<const uint32_t*>(subblock[b]) + 4 * (g / 2) + 2 * n + g % 2;
#pragma unroll
        for (int c = 0; c < D / 32; c++) {
          const uint32_t k[2] = {keys[(8 * c + t) * 16], keys[(8 * c + 4 + t) * 16]};
          mma_s8s8_k32(dot, q[c], k);
        }
        key_scale = *reinterpret_cast<const float2*>(subblock[b] + step.layout.key_bytes + step.layout.value_bytes + (4 * t + 2 * n) * 4);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = i / 2, key = base + 16 * b + 4 * t + 2 * n + i % 2;
        const bool unmasked = key >= rows.oldest[r] && key <= rows.position[r];
        const float score = __fmul_rn(__int2float_rn(dot[i]), __fmul_rn(i % 2 ? key_scale.y : key_scale.x, q_scale[r]));
        s[r][b][2 * n + i % 2] = unmasked ? score : kNegativeInfinity;
        if (unmasked) m[r] = larger(m[r], score);
      }
    }
  }

  float value_weight[2];  // what one unit of u stands for; 0: the row gets no values
  uint32_t u[kSubblocks][2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool active = max(base, rows.oldest[r]) < min(base + kStep, rows.position[r] + 1);
    m[r] = quad_larger(m[r]);
    if (active && m[r] > state.m[r]) {
      const float c = exp_fixed(__fsub_rn(state.m[r], m[r]));
      state.l[r] = __fmul_rn(state.l[r], c);
#pragma unroll
      for (int n = 0; n < dims / 8; n++) {
        state.o[n][2 * r] = __fmul_rn(state.o[n][2 * r], c);
        state.o[n][2 * r + 1] = __fmul_rn(state.o[n][2 * r + 1], c);
      }
      state.m[r] = m[r];
    }
    // Weights; their halving sum goes 32 and 16 over subblocks, 8 and 4 over lanes, 2 and 1 over the lane's four keys.
    float sum[4], largest = 0.0f;
#pragma unroll
    for (int b = 0; b < kSubblocks; b++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = base + 16 * b + 4 * t + i;
        s[r][b][i] = key >= rows.oldest[r] && key <= rows.position[r] ? exp_fixed(__fsub_rn(s[r][b][i], state.m[r])) : 0.0f;
      }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sum[i] = __fadd_rn(__fadd_rn(s[r][0][i], s[r][2][i]), __fadd_rn(s[r][1][i], s[r][3][i]));
      sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(kWholeWarp, sum[i], 2));
      sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(kWholeWarp, sum[i], 1));
    }
    if (active) state.l[r] = __fadd_rn(state.l[r], __fadd_rn(__fadd_rn(sum[0], sum[2]), __fadd_rn(sum[1], sum[3])));
#pragma unroll
    for (int b = 0; b < kSubblocks; b++) {
      float4 scale = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (subblock[b]) scale = *reinterpret_cast<const float4*>(subblock[b] + step.layout.key_bytes + step.layout.value_bytes + 64 + 16 * t);
      const float scales[4] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = base + 16 * b + 4 * t + i;
        s[r][b][i] = key >= rows.oldest[r] && key <= rows.position[r] ? __fmul_rn(s[r][b][i], scales[i]) : 0.0f;  // a masked scale may be NaN
        largest = larger(largest, s[r][b][i]);
      }
    }
    largest = quad_larger(largest);
    const bool some = active && largest >= kQuantizableMin;
    value_weight[r] = some ? __fdiv_rn(largest, 255.0f) : 0.0f;
    const float inverse = some ? __fdiv_rn(255.0f, largest) : 0.0f;
#pragma unroll
    for (int b = 0; b < kSubblocks; b++) {
      u[b][r] = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) u[b][r] |= static_cast<uint32_t>(__float2int_rn(__fmul_rn(s[r][b][i], inverse))) << 8 * i;
    }
  }

#pragma unroll
  for (int n = 0; n < dims / 8; n++) {
    int sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      const uint32_t a[4] = {u[2 * pair][0], u[2 * pair][1], u[2 * pair + 1][0], u[2 * pair + 1][1]};
      uint32_t v[2] = {0, 0};
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (subblock[2 * pair + half])
          v[half] = *reinterpret_cast<const uint32_t*>(subblock[2 * pair + half] + step.layout.key_bytes + (t * D + first_dim + 8 * n + g) * 4);
      mma_u8s8_k32(sum, a, v);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (value_weight[i / 2] != 0.0f) state.o[n][i] = __fmaf_rn(__int2float_rn(sum[i]), value_weight[i / 2], state.o[n][i]);
  }
}

template <int D, int dims, bool whole>
__device__ __forceinline__ void attend(const AttentionStep& step, const AttentionWork& work) {
  const int lane = static_cast<int>(threadIdx.x), t = lane % 4, first_dim = static_cast<int>(blockIdx.y) * dims;
  const HeadRun run = step.runs[work.run];
  const PieceRows rows = rows_of(step, work, run, lane);
  const int32_t* table = step.rows.block_tables + step.rows.block_offsets[step.rows.row_sequence[work.row]];
  uint32_t q[D / 32][4];
  float q_scale[2];
  quantize_query<D>(step, rows, lane, q, q_scale);

  Softmax<dims> total, state;
  if constexpr (whole) clear(total);
  bool started[2] = {false, false};
  const int first = whole ? rows.lowest / kSpan : work.span, last = whole ? rows.highest / kSpan : work.span;
  for (int span = first; span <= last; span++) {
    clear(state);
    for (int base = span * kSpan; base < (span + 1) * kSpan; base += kStep)
      if (base <= rows.highest && base + kStep > rows.lowest) attend_step<D, dims>(step, rows, table, run.kv_head, base, first_dim, lane, q, q_scale, state);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (rows.row[r] < 0 || span < rows.oldest[r] / kSpan || span > rows.position[r] / kSpan) continue;  // no key of this row
      if constexpr (!whole) {
        const int slot = step.first_slot[rows.row[r]] + span - rows.oldest[r] / kSpan;
        float* partial = step.partials + (static_cast<int64_t>(slot) * step.heads + rows.head[r]) * (D + 2);
#pragma unroll
        for (int n = 0; n < dims / 8; n++)
          for (int i = 0; i < 2; i++) partial[first_dim + 8 * n + 2 * t + i] = state.o[n][2 * r + i];
        if (t == 0 && first_dim == 0) {
          partial[D] = state.m[r];
          partial[D + 1] = state.l[r];
        }
      } else if (!started[r]) {
        started[r] = true;
        total.m[r] = state.m[r];
        total.l[r] = state.l[r];
#pragma unroll
        for (int n = 0; n < dims / 8; n++)
          for (int i = 0; i < 2; i++) total.o[n][2 * r + i] = state.o[n][2 * r + i];
      } else {
        const float larger_m = larger(total.m[r], state.m[r]), a = exp_fixed(__fsub_rn(total.m[r], larger_m)), b = exp_fixed(__fsub_rn(state.m[r], larger_m));
        total.l[r] = __fadd_rn(__fmul_rn(total.l[r], a), __fmul_rn(state.l[r], b));
#pragma unroll
        for (int n = 0; n < dims / 8; n++)
          for (int i = 0; i < 2; i++) total.o[n][2 * r + i] = __fadd_rn(__fmul_rn(total.o[n][2 * r + i], a), __fmul_rn(state.o[n][2 * r + i], b));
        total.m[r] = larger_m;
      }
    }
  }
  if constexpr (whole) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (rows.row[r] < 0) continue;
      const float inverse = __fdiv_rn(1.0f, total.l[r]);
      float* out = step.out + rows.row[r] * step.out_stride + rows.head[r] * D + first_dim + 2 * t;
#pragma unroll
      for (int n = 0; n < dims / 8; n++)
        for (int i = 0; i < 2; i++) out[8 * n + i] = __fmul_rn(total.o[n][2 * r + i], inverse);
    }
  }
}

// Pieces of both kinds stand in one list; this launch takes those of its kind.
template <int D, int dims, bool whole>
__global__ void __launch_bounds__(32) attention_kernel(const AttentionStep step) {
  grid_dependency_wait();
  const int count = step.work_count[0], first = step.work_count[1];
  for (int i = static_cast<int>(blockIdx.x); i < count; i += static_cast<int>(gridDim.x)) {
    const AttentionWork work = step.work[first + i];
    if ((work.span < 0) == whole) attend<D, dims, whole>(step, work);
  }
}

// Value d of a head: its spans, which lie in slots [first, last), folded from the left.
__device__ __forceinline__ float joined(const AttentionStep& step, int head, int first, int last, int D, int d) {
  const auto partial = [&](int slot) { return step.partials + (static_cast<int64_t>(slot) * step.heads + head) * (D + 2); };
  float m = partial(first)[D], l = partial(first)[D + 1], o = partial(first)[d];
  for (int slot = first + 1; slot < last; slot++) {
    const float* next = partial(slot);
    const float larger_m = larger(m, next[D]), a = exp_fixed(__fsub_rn(m, larger_m)), b = exp_fixed(__fsub_rn(next[D], larger_m));
    l = __fadd_rn(__fmul_rn(l, a), __fmul_rn(next[D + 1], b));
    o = __fadd_rn(__fmul_rn(o, a), __fmul_rn(next[d], b));
    m = larger_m;
  }
  return __fmul_rn(o, __fdiv_rn(1.0f, l));
}

__global__ void attention_join_kernel(const AttentionStep step) {
  grid_dependency_wait();
  const int row = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), D = static_cast<int>(blockDim.x), d = static_cast<int>(threadIdx.x);
  const int first = step.first_slot[row], last = step.first_slot[row + 1];
  if (first < last) step.out[row * step.out_stride + head * D + d] = joined(step, head, first, last, D, d);
}

// Pieces that are spans, then the join: the piece that comes last of its rows and heads folds their spans and quantises what they give, 32 values of a head at a time.
template <int D, int dims>
__global__ void __launch_bounds__(32, 8) attention_fused_kernel(const AttentionStep step, int runs, ActivationGroup* quantized, uint32_t* arrivals, const FiniteCheck check) {
  grid_dependency_wait();
  uint32_t* flag = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x), count = step.work_count[0], first_piece = step.work_count[1];
  for (int i = static_cast<int>(blockIdx.x); i < count; i += static_cast<int>(gridDim.x)) {
    const AttentionWork work = step.work[first_piece + i];
    attend<D, dims, false>(step, work);
    const int spans = step.rows.positions[work.row + work.rows - 1] / kSpan - oldest_key(step.rows.positions[work.row], step.window) / kSpan + 1;
    if (!comes_last(arrivals + work.row * runs + work.run, static_cast<uint32_t>(spans) * gridDim.y, flag)) continue;
    const HeadRun run = step.runs[work.run];
    for (int row = work.row; row < work.row + work.rows; row++)
      for (int head = run.first; head < run.first + run.count; head++)
        for (int d = lane; d < D; d += 32) {
          const float y = joined(step, head, step.first_slot[row], step.first_slot[row + 1], D, d);
          note_unless_finite(y, check, row);
          quantize_group(y, row, head * (D / 32) + d / 32, step.heads * (D / 32), lane, quantized);
        }
  }
}

template <int D, int dims>
Problem launch_both(const AttentionStep& step, int blocks, Stream stream) {
  const dim3 grid(static_cast<unsigned>(blocks), D / dims);
  if (const Problem problem = launch(attention_kernel<D, dims, false>, grid, 32, 0, stream, step)) return problem;
  return launch(attention_kernel<D, dims, true>, grid, 32, 0, stream, step);
}

template <int D, int dims>
Problem launch_fused(const AttentionStep& step, int runs, ActivationGroup* quantized, uint32_t* arrivals, int blocks, Stream stream, const FiniteCheck& check) {
  return launch(attention_fused_kernel<D, dims>, dim3(static_cast<unsigned>(blocks), D / dims), 32, 16, stream, step, runs, quantized, arrivals, check);
}

}  // namespace

Problem attention(const AttentionStep& step, int blocks, Stream stream) {
  if (const Problem problem = check_attention(step)) return problem;
  if (step.layout.key != KeyType::Int8 || step.layout.value != ValueType::Int8) return "attention: K and V must be int8; attention_f16 takes others";
  if (blocks < 1) return "attention: blocks must be positive";
  switch (step.layout.head_size) {
    case 32: return launch_both<32, 32>(step, blocks, stream);
    case 64: return launch_both<64, 64>(step, blocks, stream);
    case 96: return launch_both<96, 96>(step, blocks, stream);
    case 128: return launch_both<128, 128>(step, blocks, stream);
    default: return launch_both<256, 64>(step, blocks, stream);
  }
}

Problem attention_fused(const AttentionStep& step, int runs, ActivationGroup* quantized, uint32_t* arrivals, int blocks, Stream stream, const FiniteCheck& rows_check) {
  if (const Problem problem = check_attention(step)) return problem;
  if (step.layout.key != KeyType::Int8 || step.layout.value != ValueType::Int8) return "attention_fused: K and V must be int8";
  if (blocks < 1 || runs < 1) return "attention_fused: blocks and runs must be positive";
  switch (step.layout.head_size) {
    case 32: return launch_fused<32, 32>(step, runs, quantized, arrivals, blocks, stream, rows_check);
    case 64: return launch_fused<64, 64>(step, runs, quantized, arrivals, blocks, stream, rows_check);
    case 96: return launch_fused<96, 96>(step, runs, quantized, arrivals, blocks, stream, rows_check);
    case 128: return launch_fused<128, 128>(step, runs, quantized, arrivals, blocks, stream, rows_check);
    default: return launch_fused<256, 64>(step, runs, quantized, arrivals, blocks, stream, rows_check);
  }
}

Problem attention_join(const AttentionStep& step, Stream stream) {
  if (const Problem problem = check_attention(step)) return problem;
  const dim3 grid(static_cast<unsigned>(step.rows.tokens), static_cast<unsigned>(step.heads));
  return launch(attention_join_kernel, grid, static_cast<unsigned>(step.layout.head_size), 0, stream, step);
}

}  // namespace shardmesh::cuda
