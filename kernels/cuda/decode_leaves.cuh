// The end of a decode product whose warps are segments and whose lanes hold sums in the order of an mma's result: segments meet in shared memory, tile by tile, and
// the tree is made there. Accumulator i of a lane belongs to row g + 8 (i / 2) of the strip and token 2t + i mod 2 of the tile; g = lane / 4, t = lane % 4.
#pragma once
#include "device.cuh"
#include "product_plan.h"

namespace shardmesh::cuda {

// Floats of a token's 16 sums and of a segment's 8 tokens: 4 more a token and 8 more a segment keep those of a store on different banks.
constexpr int kLeafToken = kStripRows + 4, kLeafStride = kTileTokens * kLeafToken + 8;

// Where a lane's sum c of a tile goes in its segment's leaves.
__device__ __forceinline__ int leaf_place(int lane, int c) { return (lane % 4 * 2 + c % 2) * kLeafToken + lane / 4 + 8 * (c / 2); }

inline size_t leaf_bytes(const ProductPlan& plan) { return static_cast<size_t>(plan.segment_count) * kLeafStride * 4; }

template <int tiles>
__device__ __forceinline__ void join_leaves(const ProductPlan& plan, const float (&acc)[tiles][4], int strip, int first_tile) {
  const int lane = static_cast<int>(threadIdx.x % 32), segment = static_cast<int>(threadIdx.x / 32);
  float* leaves = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < tiles; i++) {
    if (i > 0) __syncthreads();  // the tile before has been read
    for (int c = 0; c < 4; c++) leaves[segment * kLeafStride + leaf_place(lane, c)] = acc[i][c];
    __syncthreads();
    const int tokens = min(kTileTokens, plan.tokens - (first_tile + i) * kTileTokens), sums = kStripRows * max(tokens, 0);
    for (int subtree = 0; subtree < plan.subtree_count; subtree++)
      for (int at = static_cast<int>(threadIdx.x); at < sums; at += static_cast<int>(blockDim.x)) {
        const int token = (first_tile + i) * kTileTokens + at / kStripRows, row = strip * kStripRows + at % kStripRows;
        if (row >= plan.rows) continue;
        float y = tree_sum(leaves + plan.subtree[subtree].first * kLeafStride + at / kStripRows * kLeafToken + at % kStripRows, plan.subtree[subtree].count, kLeafStride);
        if (plan.bias) y = __fadd_rn(y, plan.bias[row]);
        plan.out[subtree * plan.subtree_stride + token * plan.out_stride + row] = y;
      }
  }
}

}  // namespace shardmesh::cuda
