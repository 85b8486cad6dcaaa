// The product of BF16 weights and activations rounded to bf16 for many tokens; formula, operands and result as in linear_bf16_decode.cu, and the same bits.
// A block is 128 rows x 128 tokens, four warps of 64 x 64: 64 products for 16 loads of 16 bytes a lane, so that shared memory keeps up with the tensor cores. Groups of 32
// columns pass through it four deep, copied as they lie in memory: both operands are in fragment order, so no load meets a bank conflict and ldmatrix has nothing to do.
// A warp walks the segments in order and keeps the finished left sides of the tree on a stack of at most four, in local memory: it is touched once a segment.
// Limits: K a multiple of 32, 1 to 16 segments.
#include "device.cuh"
#include "operations.h"
#include "product_plan.h"

namespace shardmesh::cuda {
namespace {

using F = FloatFormat<TensorType::BF16>;
constexpr int kBlockStrips = 8, kBlockTiles = 16, kWarpStrips = 4, kWarpTiles = 8, kThreads = 128, kStages = 4, kStackDepth = 4;
constexpr int kValues = kWarpStrips * kWarpTiles * 4;  // accumulators of a lane
constexpr int kTileBytes = static_cast<int>(sizeof(Bf16Group));
constexpr int kWeightBytes = kBlockStrips * F::record_bytes, kStageBytes = kWeightBytes + kBlockTiles * kTileBytes;

__global__ void __launch_bounds__(kThreads) linear_bf16_prefill_kernel(const ProductPlan plan) {
  grid_dependency_wait();
  uint8_t* shared = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_strip = static_cast<int>(blockIdx.x) * kBlockStrips, first_tile = static_cast<int>(blockIdx.y) * kBlockTiles;

  // A thread's pieces of 16 bytes lie at one place of every second strip and of every fourth tile. What lies behind the matrix or the batch is computed from whatever shared memory
  // holds and not stored.
  constexpr int kStripsApart = kThreads * 16 / F::record_bytes, kTilesApart = kThreads * 16 / kTileBytes;
  static_assert(kThreads * 16 % F::record_bytes == 0 && kThreads * 16 % kTileBytes == 0);
  const int own_first_strip = thread * 16 / F::record_bytes, own_first_tile = thread * 16 / kTileBytes;
  const uint8_t* weights = plan.weight + (first_strip + own_first_strip) * plan.strip_bytes + thread * 16 % F::record_bytes;
  const int64_t tile_bytes = plan.groups * static_cast<int64_t>(kTileBytes);
  const uint8_t* tokens = reinterpret_cast<const uint8_t*>(plan.bf16) + (first_tile + own_first_tile) * tile_bytes + thread * 16 % kTileBytes;
  const bool whole = first_strip + kBlockStrips <= plan.strips && first_tile + kBlockTiles <= plan.tiles;
  const auto copy_group = [&](int group) {
    if (group < plan.groups) {
      uint8_t* to = shared + group % kStages * kStageBytes + thread * 16;
      const auto copy = [&](bool all) {
#pragma unroll
        for (int k = 0; k < kBlockStrips / kStripsApart; k++)
          if (all || first_strip + own_first_strip + k * kStripsApart < plan.strips) copy_async<16>(to + k * kThreads * 16, weights + k * kStripsApart * plan.strip_bytes + group * F::record_bytes);
#pragma unroll
        for (int k = 0; k < kBlockTiles / kTilesApart; k++)
          if (all || first_tile + own_first_tile + k * kTilesApart < plan.tiles) copy_async<16>(to + kWeightBytes + k * kThreads * 16, tokens + k * kTilesApart * tile_bytes + group * kTileBytes);
      };
      if (whole) copy(true);
      else copy(false);
    }
    commit_copies();  // an empty one too, so that counting them stays simple
  };
  for (int i = 0; i < kStages - 1; i++) copy_group(i);

  const int own_strip = warp % 2 * kWarpStrips, own_tile = warp / 2 * kWarpTiles;
  const int upper = float_piece_at(lane % 4, lane / 4), lower = float_piece_at(lane % 4, lane / 4 + 8);
  float acc[kWarpStrips][kWarpTiles][4] = {};
  float stack[kStackDepth][kValues];
  int depth = 0, segment = 0;
  for (int group = 0; group < plan.groups; group++) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this group is here for all, and the one before has been read by all
    copy_group(group + kStages - 1);
    const uint8_t* from = shared + group % kStages * kStageBytes;
    uint4 u[kWarpStrips], l[kWarpStrips];
#pragma unroll
    for (int s = 0; s < kWarpStrips; s++) {
      u[s] = *reinterpret_cast<const uint4*>(from + (own_strip + s) * F::record_bytes + upper);
      l[s] = *reinterpret_cast<const uint4*>(from + (own_strip + s) * F::record_bytes + lower);
    }
#pragma unroll
    for (int t = 0; t < kWarpTiles; t++) {
      const uint4 b = *reinterpret_cast<const uint4*>(from + kWeightBytes + (own_tile + t) * kTileBytes + lane * 16);
      const uint32_t b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
#pragma unroll
      for (int s = 0; s < kWarpStrips; s++) {
        const uint32_t first[4] = {u[s].x, l[s].x, u[s].y, l[s].y}, second[4] = {u[s].z, l[s].z, u[s].w, l[s].w};
        mma_bf16_k16(acc[s][t], first, b_first);
        mma_bf16_k16(acc[s][t], second, b_second);
      }
    }
    if (group + 1 < plan.segment_end[segment]) continue;

    float* sums = &acc[0][0][0];
    for (int m = 0; m < plan.merges[segment]; m++) {
      depth--;
#pragma unroll
      for (int i = 0; i < kValues; i++) sums[i] = __fadd_rn(stack[depth][i], sums[i]);
    }
    const int subtree = plan.finishes[segment++];
#pragma unroll
    for (int i = 0; i < kValues; i++) {
      const int s = i / (kWarpTiles * 4), t = i / 4 % kWarpTiles, c = i % 4;
      const int row = (first_strip + own_strip + s) * kStripRows + lane / 4 + 8 * (c / 2), token = (first_tile + own_tile + t) * kTileTokens + lane % 4 * 2 + c % 2;
      if (subtree < 0) stack[depth][i] = sums[i];
      else if (row < plan.rows && token < plan.tokens) plan.out[subtree * plan.subtree_stride + token * plan.out_stride + row] = plan.bias ? __fadd_rn(sums[i], plan.bias[row]) : sums[i];
      sums[i] = 0.0f;
    }
    if (subtree < 0) depth++;
  }
  wait_copies<0>();
}

}  // namespace

Problem linear_bf16_prefill(const Product& product, Stream stream) {
  ProductPlan plan;
  if (product.by_rows) return "linear_bf16_prefill: weights must be packed in strips";
  if (const Problem problem = make_product_plan(product, &plan, Products::Bf16)) return problem;
  const dim3 grid(static_cast<unsigned>((plan.strips + kBlockStrips - 1) / kBlockStrips), static_cast<unsigned>((plan.tiles + kBlockTiles - 1) / kBlockTiles));
  return launch(linear_bf16_prefill_kernel, grid, kThreads, static_cast<size_t>(kStages) * kStageBytes, stream, plan);
}

}  // namespace shardmesh::cuda
