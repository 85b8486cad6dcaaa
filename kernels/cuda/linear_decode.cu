// The quantised product for few tokens: out = W x, a tree over segments of K (ARCHITECTURE.md, "Arithmetic").
//   W    strips of 16 rows, weight_layout.h        x  tiles of 8 tokens, ActivationGroup (int8) or WideGroup (int16)
//   out  subtree s, token t, row r at out[s * subtree_stride + t * out_stride + r]
// A block is one strip and up to 16 tokens, or two strips and up to 32, a warp one of the segments: 16 x 8 x 32 products are one mma, and every lane scales its own four sums
// (two, where there is one token). Matrices of many strips are walked by two strips a block for one token as well: a warp has few groups, and what it does around them counts.
// The first weights are asked for, into the second-level cache, while the kernel before still makes the activations (grid_dependency_wait). Segments meet in shared memory, tile
// by tile. Blocks of the same strips and other tokens are neighbours, so that weights come once from memory.
// Limits: K a multiple of 32, 1 to 16 segments.
#include "decode_leaves.cuh"
#include "decode_walk.cuh"
#include "device.cuh"
#include "group_product.cuh"
#include "operations.h"
#include "product_plan.h"

namespace shardmesh::cuda {
namespace {

// Blocks of 16 warps that a multiprocessor has registers for: two where that takes no registers that products need.
template <typename F, typename X, int tiles, int strips>
constexpr int kBlocksOfCard = tiles == 1 && sizeof(X) == sizeof(ActivationGroup) && (strips == 1 || F::scales != Scales::Halves) ? 2 : 1;

// strips, tiles: that a warp walks side by side, so that they share each load. stages: of its ring, 0: straight into registers.
template <typename F, typename X, int tiles, int strips, int columns, int stages>
__global__ void __launch_bounds__(kSegmentsMax * 32, kBlocksOfCard<F, X, tiles, strips>) linear_decode_kernel(const ProductPlan plan, int token_blocks) {
  const int lane = static_cast<int>(threadIdx.x % 32), segment = static_cast<int>(threadIdx.x / 32), block = static_cast<int>(blockIdx.x);
  const int strip_block = token_blocks == 1 ? block : block / token_blocks, first_strip = strip_block * strips, first_tile = (block - strip_block * token_blocks) * tiles;
  const int begin = plan.segment_begin(segment), end = plan.segment_end[segment];
  // A strip or tile too many repeats the last one, and is not stored.
  const uint8_t *heads[strips], *records[strips];
  const X* x[tiles];
  for (int s = 0; s < strips; s++) {
    heads[s] = plan.weight + min(first_strip + s, plan.strips - 1) * plan.strip_bytes;
    records[s] = heads[s] + plan.heads * F::head_bytes;
    prefetch_groups<F>(records[s], heads[s], plan.phase, begin, end, lane);
  }
  for (int i = 0; i < tiles; i++) x[i] = reinterpret_cast<const X*>(plan.in) + static_cast<int64_t>(min(first_tile + i, plan.tiles - 1)) * plan.groups;
  grid_dependency_wait();
  float acc[strips][tiles][4] = {};
  if constexpr (stages > 0)
    walk_staged<F, X, tiles, strips, stages>(records, heads, plan.phase, x, begin, end, dynamic_shared() + plan.segment_count * kLeafStride * 4 + segment * stages * kChunkBytesMax, lane, acc);
  else walk_groups<F, X, tiles, strips, columns>(records, heads, plan.phase, x, begin, end, lane, acc);
#pragma unroll
  for (int s = 0; s < strips; s++) {
    if (s > 0) __syncthreads();  // the strip before has been read
    if (first_strip + s < plan.strips) join_leaves(plan, acc[s], first_strip + s, first_tile);
  }
}

template <typename F, typename X, int tiles, int strips, int columns, int stages>
Problem launch_kernel(const ProductPlan& plan, Stream stream) {
  const int token_blocks = (plan.tiles + tiles - 1) / tiles, warps = plan.segment_count;
  const size_t shared = leaf_bytes(plan) + (stages > 0 ? ring_bytes(warps) : 0);
  return launch(linear_decode_kernel<F, X, tiles, strips, columns, stages>, static_cast<unsigned>((plan.strips + strips - 1) / strips * token_blocks), static_cast<unsigned>(warps * 32), shared, stream, plan, token_blocks);
}

template <typename F>
Problem launch_format(const ProductPlan& plan, ActivationType activations, int tiles, Stream stream) {
  using Int8 = ActivationGroup;
  if (activations == ActivationType::Int16) return tiles == 1 ? launch_kernel<F, WideGroup, 1, 1, 2, 0>(plan, stream) : launch_kernel<F, WideGroup, 2, 1, 2, 0>(plan, stream);
  if (plan.tokens == 1) return plan.strips >= kManyStrips ? launch_kernel<F, Int8, 1, 2, 1, 0>(plan, stream) : launch_kernel<F, Int8, 1, 1, 1, 0>(plan, stream);
  if (tiles == 1) return launch_kernel<F, Int8, 1, 1, 2, 0>(plan, stream);
  if (tiles == 2) return launch_kernel<F, Int8, 2, 1, 2, 0>(plan, stream);
  return ring_stages(plan.segment_count) == 4 ? launch_kernel<F, Int8, 4, 2, 2, 4>(plan, stream) : launch_kernel<F, Int8, 4, 2, 2, 2>(plan, stream);
}

}  // namespace

Problem linear_decode(const Product& product, Stream stream) {
  ProductPlan plan;
  if (const Problem problem = make_product_plan(product, &plan)) return problem;
  Problem problem = nullptr;
  const int tiles = plan.tiles < product.decode_tiles ? plan.tiles : product.decode_tiles;
  with_format(product.type, [&](auto format) { problem = launch_format<decltype(format)>(plan, product.activations, tiles, stream); });
  return problem;
}

}  // namespace shardmesh::cuda
