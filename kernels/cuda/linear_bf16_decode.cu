// The product of BF16 weights and activations rounded to bf16 for few tokens, by tensor cores: out = W x with fp32 sums in the order of the hardware inside 16 columns,
// k ascending from one 16 to the next, and the tree over segments. Not the reference's bits; those of linear_bf16_prefill, of every batch and every cut on one architecture.
//   W    BF16, strips of 16 rows, weight_layout.h, or row after row (pack_rows): the same bits        x  tiles of 8 tokens, Bf16Group
//   out  subtree s, token t, row r at out[s * subtree_stride + t * out_stride + r]
// A block is one strip and up to 8 * tiles tokens, a warp one of its segments. A lane reads 16 bytes of each of its two rows, 8 columns, which are two products: which
// columns of 32 stand where in an mma is free as long as both operands agree. Weights are read once, straight into registers; row after row, four lanes read 64 bytes of
// one row, which are whole sectors as well.
// Limits: K a multiple of 32, 1 to 16 segments. Any number of tokens, but above 64 weights are read again: linear_bf16_prefill is for those.
#include "decode_leaves.cuh"
#include "device.cuh"
#include "operations.h"
#include "product_plan.h"

namespace shardmesh::cuda {
namespace {

template <int tiles, bool by_rows>
__global__ void __launch_bounds__(kSegmentsMax * 32, 1) linear_bf16_decode_kernel(const ProductPlan plan) {
  using F = FloatFormat<TensorType::BF16>;
  const int lane = static_cast<int>(threadIdx.x % 32), segment = static_cast<int>(threadIdx.x / 32);
  const int strip = static_cast<int>(blockIdx.x), first_tile = static_cast<int>(blockIdx.y) * tiles;
  // Of rows g and g + 8: the lane's 16 bytes of group 0, those of the next group `group_bytes` on.
  constexpr int group_bytes = by_rows ? 64 : F::record_bytes;
  const int64_t row_bytes = static_cast<int64_t>(plan.groups) * group_bytes;
  const uint8_t* records = plan.weight + strip * plan.strip_bytes;
  const uint8_t* upper = records + (by_rows ? lane / 4 * row_bytes + lane % 4 * 16 : float_piece_at(lane % 4, lane / 4));
  const uint8_t* lower = records + (by_rows ? (lane / 4 + 8) * row_bytes + lane % 4 * 16 : float_piece_at(lane % 4, lane / 4 + 8));
  const Bf16Group* x = plan.bf16 + static_cast<int64_t>(first_tile) * plan.groups;
  int own[tiles];
  for (int i = 0; i < tiles; i++) own[i] = min(i, plan.tiles - 1 - first_tile) * plan.groups;  // a tile too many repeats the last and is not stored
  float acc[tiles][4] = {};
  const int begin = plan.segment_begin(segment), end = plan.segment_end[segment];
  if constexpr (by_rows) {  // two lanes a row
    if (lane % 2 * 128 < (end - begin) * group_bytes) prefetch_l2(records + lane / 2 * row_bytes + static_cast<int64_t>(begin) * group_bytes + lane % 2 * 128);
  } else {
    prefetch_weights(records + static_cast<int64_t>(begin) * F::record_bytes, (end - begin) * F::record_bytes, lane);
  }
  grid_dependency_wait();
#pragma unroll(tiles == 1 ? 4 : 2)
  for (int group = begin; group < end; group++) {
    const int64_t at = static_cast<int64_t>(group) * group_bytes;
    const uint4 u = *reinterpret_cast<const uint4*>(upper + at), l = *reinterpret_cast<const uint4*>(lower + at);
    const uint32_t first[4] = {u.x, l.x, u.y, l.y}, second[4] = {u.z, l.z, u.w, l.w};
#pragma unroll
    for (int i = 0; i < tiles; i++) {
      const uint4 b = reinterpret_cast<const uint4*>(&x[own[i] + group])[lane];
      const uint32_t b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
      mma_bf16_k16(acc[i], first, b_first);
      mma_bf16_k16(acc[i], second, b_second);
    }
  }
  join_leaves(plan, acc, strip, first_tile);
}

template <int tiles>
Problem launch_tiles(const ProductPlan& plan, bool by_rows, Stream stream) {
  const dim3 grid(static_cast<unsigned>(plan.strips), static_cast<unsigned>((plan.tiles + tiles - 1) / tiles));
  return launch(by_rows ? linear_bf16_decode_kernel<tiles, true> : linear_bf16_decode_kernel<tiles, false>, grid, static_cast<unsigned>(plan.segment_count * 32), leaf_bytes(plan), stream, plan);
}

}  // namespace

Problem linear_bf16_decode(const Product& product, Stream stream) {
  ProductPlan plan;
  if (const Problem problem = make_product_plan(product, &plan, Products::Bf16)) return problem;
  if (plan.tiles == 1) return launch_tiles<1>(plan, product.by_rows, stream);
  if (plan.tiles <= 4) return launch_tiles<4>(plan, product.by_rows, stream);
  return launch_tiles<8>(plan, product.by_rows, stream);
}

}  // namespace shardmesh::cuda
