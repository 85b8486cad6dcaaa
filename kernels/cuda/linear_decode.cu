// The quantised product for few tokens: out = W x, a tree over segments of K (ARCHITECTURE.md, "Arithmetic").
//   W    strips of 16 rows, weight_layout.h        x  tiles of 8 tokens, ActivationGroup (int8) or WideGroup (int16)
//   out  subtree s, token t, row r at out[s * subtree_stride + t * out_stride + r]
// A block is one strip, or two from 17 tokens on, and up to 8 * tiles tokens, a warp one of the segments: 16 x 8 x 32 products are one mma, and every lane scales its own
// four sums.
// Weights are read once, straight into registers, in the order of memory, and the first of them are asked for while the kernel before still makes the activations
// (grid_dependency_wait); activations come from L2. Segments meet in shared memory, tile by tile.
// Limits: K a multiple of 32, 1 to 16 segments. Any number of tokens, but above 64 weights are read again: linear_prefill is for those.
#include "decode_leaves.cuh"
#include "device.cuh"
#include "group_product.cuh"
#include "operations.h"
#include "product_plan.h"

namespace shardmesh::cuda {
namespace {

// strips: that a warp walks side by side, so that they share each load of activations.
template <typename F, typename X, int tiles, int strips>
__global__ void __launch_bounds__(kSegmentsMax * 32, 1) linear_decode_kernel(const ProductPlan plan) {
  const int lane = static_cast<int>(threadIdx.x % 32), segment = static_cast<int>(threadIdx.x / 32);
  const int first_strip = static_cast<int>(blockIdx.x) * strips, first_tile = static_cast<int>(blockIdx.y) * tiles;
  const uint8_t *heads[strips], *records[strips];
  for (int s = 0; s < strips; s++) {
    heads[s] = plan.weight + min(first_strip + s, plan.strips - 1) * plan.strip_bytes;  // a strip too many repeats the last and is not stored
    records[s] = heads[s] + plan.heads * F::head_bytes;
  }
  const X* x = reinterpret_cast<const X*>(plan.in) + static_cast<int64_t>(first_tile) * plan.groups;
  int own[tiles];
  for (int i = 0; i < tiles; i++) own[i] = min(i, plan.tiles - 1 - first_tile) * plan.groups;  // as strips
  float acc[strips][tiles][4] = {};
  const int begin = plan.segment_begin(segment), end = plan.segment_end[segment];
  for (int s = 0; s < strips; s++) prefetch_groups<F>(records[s], heads[s], plan.phase, begin, end, lane);
  grid_dependency_wait();
#pragma unroll(tiles == 1 ? 8 : tiles == 2 ? 4 : tiles == 4 ? 2 : 1)
  for (int group = begin; group < end; group++) {
    StripGroup<F> w[strips];
#pragma unroll
    for (int s = 0; s < strips; s++) w[s] = load_strip_group<F>(records[s] + group * F::record_bytes, heads[s] + (plan.phase + group) / 8 * F::head_bytes, lane);
#pragma unroll
    for (int i = 0; i < tiles; i++)
#pragma unroll
      for (int s = 0; s < strips; s++) add_group(acc[s][i], w[s], x[own[i] + group], lane);
  }
#pragma unroll
  for (int s = 0; s < strips; s++) {
    if (s > 0) __syncthreads();  // the strip before has been read
    if (first_strip + s < plan.strips) join_leaves(plan, acc[s], first_strip + s, first_tile);
  }
}

template <typename F, typename X, int tiles, int strips>
Problem launch_tiles(const ProductPlan& plan, Stream stream) {
  const dim3 grid(static_cast<unsigned>((plan.strips + strips - 1) / strips), static_cast<unsigned>((plan.tiles + tiles - 1) / tiles));
  return launch(linear_decode_kernel<F, X, tiles, strips>, grid, static_cast<unsigned>(plan.segment_count * 32), leaf_bytes(plan), stream, plan);
}

}  // namespace

Problem linear_decode(const Product& product, Stream stream) {
  ProductPlan plan;
  if (const Problem problem = make_product_plan(product, &plan)) return problem;
  Problem problem = nullptr;
  with_format(product.type, [&](auto format) {
    using F = decltype(format);
    using Int8 = ActivationGroup;
    const int tiles = plan.tiles < product.decode_tiles ? plan.tiles : product.decode_tiles;
    if (product.activations == ActivationType::Int16) problem = tiles == 1 ? launch_tiles<F, WideGroup, 1, 1>(plan, stream) : launch_tiles<F, WideGroup, 4, 1>(plan, stream);
    else if (tiles == 1) problem = launch_tiles<F, Int8, 1, 1>(plan, stream);
    else if (tiles == 2) problem = launch_tiles<F, Int8, 2, 1>(plan, stream);
    else if (tiles <= 4) problem = launch_tiles<F, Int8, 4, 2>(plan, stream);
    else problem = launch_tiles<F, Int8, 8, 2>(plan, stream);
  });
  return problem;
}

}  // namespace shardmesh::cuda
