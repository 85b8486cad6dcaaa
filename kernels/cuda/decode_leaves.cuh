// The end of a decode product whose warps are segments and whose lanes hold sums in the order of an mma's result: segments meet in shared memory, tile by tile, and
// the tree is made there. Accumulator i of a lane belongs to row g + 8 (i / 2) of the strip and token 2t + i mod 2 of the tile; g = lane / 4, t = lane % 4.
#pragma once
#include "device.cuh"
#include "product_plan.h"

namespace shardmesh::cuda {

constexpr int kLeafStride = kStripRows * kTileTokens + 8;  // floats of one segment's 16 x 8 sums; 8 more keep segments on different banks

inline size_t leaf_bytes(const ProductPlan& plan) { return static_cast<size_t>(plan.segment_count) * kLeafStride * 4; }

template <int tiles>
__device__ __forceinline__ void join_leaves(const ProductPlan& plan, const float (&acc)[tiles][4], int strip, int first_tile) {
  const int lane = static_cast<int>(threadIdx.x % 32), segment = static_cast<int>(threadIdx.x / 32);
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

}  // namespace shardmesh::cuda
