// The quantised product for few tokens: out = W x, a tree over segments of K (ARCHITECTURE.md, "Arithmetic").
//   W    strips of 16 rows, weight_layout.h        x  ActivationGroup tiles of 8 tokens
//   out  subtree s, token t, row r at out[s * subtree_stride + t * out_stride + r]
// A block is one strip and up to 8 * tiles tokens, a warp one of its segments: 16 x 8 x 32 products are one mma, and every lane scales its own four sums.
// Weights are read once, straight into registers, in the order of memory; activations come from L2. Segments meet in shared memory, tile by tile.
// Limits: K a multiple of 32, 1 to 16 segments. Any number of tokens, but above 64 weights are read again: linear_prefill is for those.
#include "device.cuh"
#include "group_product.cuh"
#include "operations.h"
#include "product_plan.h"

namespace shardmesh::cuda {
namespace {

constexpr int kLeafStride = kStripRows * kTileTokens + 8;  // floats of one segment's 16 x 8 sums; 8 more keep segments on different banks

template <typename F, int tiles>
__global__ void __launch_bounds__(kSegmentsMax * 32, 1) linear_decode_kernel(const ProductPlan plan) {
  const int lane = static_cast<int>(threadIdx.x % 32), segment = static_cast<int>(threadIdx.x / 32);
  const int strip = static_cast<int>(blockIdx.x), first_tile = static_cast<int>(blockIdx.y) * tiles;
  const uint8_t* heads = plan.weight + strip * plan.strip_bytes;
  const uint8_t* records = heads + plan.heads * F::head_bytes;
  const ActivationGroup* x[tiles];
  for (int i = 0; i < tiles; i++) {
    const int tile = first_tile + i < plan.tiles ? first_tile + i : plan.tiles - 1;  // a tile too many repeats the last and is not stored
    x[i] = plan.in + static_cast<int64_t>(tile) * plan.groups;
  }
  float acc[tiles][4] = {};
  const int end = plan.segment_end[segment];
#pragma unroll(tiles == 1 ? 4 : tiles == 2 ? 2 : 1)
  for (int group = plan.segment_begin(segment); group < end; group++) {
    const StripGroup<F> w = load_strip_group<F>(records + group * F::record_bytes, heads + (plan.phase + group) / 8 * F::head_bytes, lane);
#pragma unroll
    for (int i = 0; i < tiles; i++) add_group(acc[i], w, x[i][group], lane);
  }

  float* leaves = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < tiles; i++) {
    if (i > 0) __syncthreads();  // the tile before has been read
    for (int c = 0; c < 4; c++) leaves[segment * kLeafStride + (lane % 4 * 2 + c % 2) * kStripRows + lane / 4 + 8 * (c / 2)] = acc[i][c];
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < kStripRows * kTileTokens * plan.subtree_count; at += static_cast<int>(blockDim.x)) {
      const int subtree = at / (kStripRows * kTileTokens), place = at % (kStripRows * kTileTokens);
      const int token = (first_tile + i) * kTileTokens + place / kStripRows, row = strip * kStripRows + place % kStripRows;
      if (token >= plan.tokens || row >= plan.rows) continue;
      float y = tree_sum(leaves + plan.subtree[subtree].first * kLeafStride + place, plan.subtree[subtree].count, kLeafStride);
      if (plan.bias) y = __fadd_rn(y, plan.bias[row]);
      plan.out[subtree * plan.subtree_stride + token * plan.out_stride + row] = y;
    }
  }
}

template <typename F, int tiles>
Problem launch_tiles(const ProductPlan& plan, Stream stream) {
  const dim3 grid(static_cast<unsigned>(plan.strips), static_cast<unsigned>((plan.tiles + tiles - 1) / tiles));
  return launch(linear_decode_kernel<F, tiles>, grid, static_cast<unsigned>(plan.segment_count * 32), static_cast<size_t>(plan.segment_count) * kLeafStride * 4, stream, plan);
}

}  // namespace

Problem linear_decode(const Product& product, Stream stream) {
  ProductPlan plan;
  if (const Problem problem = make_product_plan(product, &plan)) return problem;
  Problem problem = nullptr;
  with_format(product.type, [&](auto format) {
    using F = decltype(format);
    const int tiles = plan.tiles < product.decode_tiles ? plan.tiles : product.decode_tiles;
    if (tiles == 1) problem = launch_tiles<F, 1>(plan, stream);
    else if (tiles == 2) problem = launch_tiles<F, 2>(plan, stream);
    else if (tiles <= 4) problem = launch_tiles<F, 4>(plan, stream);
    else problem = launch_tiles<F, 8>(plan, stream);
  });
  return problem;
}

}  // namespace shardmesh::cuda
