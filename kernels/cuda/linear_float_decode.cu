// The product of float weights for few tokens, with the reference's bits: for each (row, token, segment) one chain acc = fma(w, x, acc), k ascending from acc = 0,
// then the tree over segments (ARCHITECTURE.md, "Arithmetic").
//   W    F32, F16 or BF16, strips of 16 rows, weight_layout.h        x  [T, x_stride] fp32, 16-byte aligned
//   out  subtree s, token t, row r at out[s * subtree_stride + t * out_stride + r]
// A block is 32 rows (two strips) and up to `tokens` tokens, a warp one of its segments, a lane one row. A chain cannot be shared by lanes, so rows and segments are
// all there is to spread: weights are read once, 16 bytes a lane and 512 a warp, in the order of memory; x is the same for all lanes and comes from the first-level cache.
// Limits: K a multiple of 32, 1 to 16 segments. Any number of tokens, but above 8 weights are read again: linear_float_prefill is for those.
#include "device.cuh"
#include "float_weights.cuh"
#include "operations.h"
#include "product_plan.h"

namespace shardmesh::cuda {
namespace {

constexpr int kBlockRows = 2 * kStripRows;

template <typename F, int tokens>
__global__ void __launch_bounds__(kSegmentsMax * 32, 1) linear_float_decode_kernel(const ProductPlan plan) {
  constexpr int kLeaf = kBlockRows * tokens;  // sums of a segment, [token][row]
  const int lane = static_cast<int>(threadIdx.x % 32), segment = static_cast<int>(threadIdx.x / 32);
  const int first_row = static_cast<int>(blockIdx.x) * kBlockRows, first_token = static_cast<int>(blockIdx.y) * tokens;
  const int strip = min(first_row / kStripRows + lane / kStripRows, plan.strips - 1);  // rows of a strip too many are not stored, nor are tokens
  const uint8_t* records = plan.weight + strip * plan.strip_bytes;
  const float* x = plan.x + first_token * plan.x_stride;
  int own[tokens];
  for (int i = 0; i < tokens; i++) own[i] = min(i, plan.tokens - 1 - first_token) * static_cast<int>(plan.x_stride);
  float acc[tokens] = {};
  const int begin = plan.segment_begin(segment), end = plan.segment_end[segment];
  // Of one of the strips: lanes of the other one do the same for theirs.
  prefetch_weights(records + static_cast<int64_t>(begin) * F::record_bytes, (end - begin) * F::record_bytes, lane % kStripRows);
  grid_dependency_wait();
#pragma unroll(tokens == 1 ? 2 : 1)
  for (int group = begin; group < end; group++) {
    uint4 pieces[F::pieces];
#pragma unroll
    for (int c = 0; c < F::pieces; c++) pieces[c] = *reinterpret_cast<const uint4*>(records + static_cast<int64_t>(group) * F::record_bytes + float_piece_at(c, lane % kStripRows));
#pragma unroll
    for (int c = 0; c < F::pieces; c++) {
      float w[F::piece_values];
      widen_piece<F>(pieces[c], w);
#pragma unroll
      for (int k = 0; k < F::piece_values; k += 4)
#pragma unroll
        for (int i = 0; i < tokens; i++) {
          const float4 four = *reinterpret_cast<const float4*>(x + own[i] + group * 32 + c * F::piece_values + k);
          acc[i] = __fmaf_rn(w[k], four.x, acc[i]);
          acc[i] = __fmaf_rn(w[k + 1], four.y, acc[i]);
          acc[i] = __fmaf_rn(w[k + 2], four.z, acc[i]);
          acc[i] = __fmaf_rn(w[k + 3], four.w, acc[i]);
        }
      if constexpr (tokens > 1) __syncwarp();  // else the compiler moves loads of x to where they cost more registers than there are
    }
  }

  float* leaves = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < tokens; i++) leaves[segment * kLeaf + i * kBlockRows + lane] = acc[i];
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kLeaf * plan.subtree_count; at += static_cast<int>(blockDim.x)) {
    const int subtree = at / kLeaf, place = at % kLeaf, token = first_token + place / kBlockRows, row = first_row + place % kBlockRows;
    if (token >= plan.tokens || row >= plan.rows) continue;
    float y = tree_sum(leaves + plan.subtree[subtree].first * kLeaf + place, plan.subtree[subtree].count, kLeaf);
    if (plan.bias) y = __fadd_rn(y, plan.bias[row]);
    plan.out[subtree * plan.subtree_stride + token * plan.out_stride + row] = y;
  }
}

template <typename F, int tokens>
Problem launch_tokens(const ProductPlan& plan, Stream stream) {
  const dim3 grid(static_cast<unsigned>((plan.strips + 1) / 2), static_cast<unsigned>((plan.tokens + tokens - 1) / tokens));
  return launch(linear_float_decode_kernel<F, tokens>, grid, static_cast<unsigned>(plan.segment_count * 32), static_cast<size_t>(plan.segment_count) * kBlockRows * tokens * 4, stream, plan);
}

}  // namespace

Problem linear_float_decode(const Product& product, Stream stream) {
  ProductPlan plan;
  if (const Problem problem = make_product_plan(product, &plan, Products::Float)) return problem;
  Problem problem = nullptr;
  with_float_format(product.type, [&](auto format) {
    using F = decltype(format);
    if (plan.tokens == 1) problem = launch_tokens<F, 1>(plan, stream);
    else problem = launch_tokens<F, 8>(plan, stream);
  });
  return problem;
}

}  // namespace shardmesh::cuda
