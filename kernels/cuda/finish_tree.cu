// residual[t, r] = residual[t, r] + (tree + bias[r]): the tree over the units of a row-parallel product, from the maximal subtrees of all ranks in unit order.
//   nodes[n] [T, width] fp32, strides[n] apart; each covers units [lo[n], hi[n])      residual [T, width] fp32
// A thread is one value. finish_tree_norm goes on with the norm of the
// residual, in the block that comes last.
// Limits: 1 to 16 nodes, which join to exactly the tree over [0, units).
#include "arrivals.cuh"
#include "device.cuh"
#include "norm_rows.cuh"
#include "operations.h"
#include "tree_walk.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 256;

struct TreeNodes {
  const float* values[kSegmentsMax];
  int64_t strides[kSegmentsMax];
};

__device__ __forceinline__ void finish_value(const TreeWalk& walk, const TreeNodes& nodes, const float* bias, float* residual, int64_t residual_stride, int64_t token, int64_t r) {
  float y = walk_tree<float>(walk, [&](int n) { return nodes.values[n][token * nodes.strides[n] + r]; });
  if (bias) y = __fadd_rn(y, bias[r]);
  residual[token * residual_stride + r] = __fadd_rn(residual[token * residual_stride + r], y);
}

__global__ void __launch_bounds__(kThreads) finish_tree_kernel(const TreeWalk walk, const TreeNodes nodes, const float* bias, float* residual, int64_t residual_stride, int64_t width) {
  grid_dependency_wait();
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r < width) finish_value(walk, nodes, bias, residual, residual_stride, blockIdx.y, r);
}

__global__ void __launch_bounds__(kThreads) finish_tree_norm_kernel(const TreeWalk walk, const TreeNodes nodes, const float* bias, float* residual, int64_t residual_stride, int64_t width, const NormAfter norm,
                                                                    uint32_t* arrivals) {
  grid_dependency_wait();
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r < width) finish_value(walk, nodes, bias, residual, residual_stride, blockIdx.y, r);
  uint32_t* flag = reinterpret_cast<uint32_t*>(dynamic_shared());
  if (comes_last(arrivals, gridDim.x * gridDim.y, flag))
    norm_rows(norm, residual, residual_stride, static_cast<int>(width), static_cast<int>(gridDim.y), reinterpret_cast<float*>(dynamic_shared() + 16));
}

Problem make_walk(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, int64_t width, int tokens, TreeWalk* walk, TreeNodes* found) {
  if (units < 1 || units > kSegmentsMax || node_count < 1 || node_count > kSegmentsMax) return "finish_tree: 1 to 16 units and nodes are possible";
  if (width < 1 || tokens < 1 || tokens > 65535) return "finish_tree: width must be positive, tokens in 1..65535";
  *found = {};
  for (int n = 0; n < node_count; n++) {
    found->values[n] = nodes[n];
    found->strides[n] = strides[n];
  }
  return plan_tree_walk(units, node_count, lo, hi, walk) ? nullptr : "finish_tree: the nodes are not the maximal subtrees of a cut of the units";
}

dim3 grid_of(int64_t width, int tokens) { return dim3(static_cast<unsigned>((width + kThreads - 1) / kThreads), static_cast<unsigned>(tokens)); }

}  // namespace

Problem finish_tree(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                    int64_t residual_stride, int64_t width, int tokens, Stream stream) {
  TreeWalk walk;
  TreeNodes found;
  if (const Problem problem = make_walk(units, node_count, lo, hi, nodes, strides, width, tokens, &walk, &found)) return problem;
  return launch(finish_tree_kernel, grid_of(width, tokens), kThreads, 0, stream, walk, found, bias, residual, residual_stride, width);
}

Problem finish_tree_norm(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                         int64_t residual_stride, int64_t width, int tokens, const NormAfter& norm, uint32_t* arrivals, Stream stream) {
  TreeWalk walk;
  TreeNodes found;
  if (const Problem problem = make_walk(units, node_count, lo, hi, nodes, strides, width, tokens, &walk, &found)) return problem;
  if (tokens > kFusedTokensMax || width % 32 != 0 || width > (1 << 24)) return "finish_tree_norm: at most 8 tokens, the width a multiple of 32";
  return launch(finish_tree_norm_kernel, grid_of(width, tokens), kThreads, kFusedTokensMax * kPartials * 4 + 16, stream, walk, found, bias, residual, residual_stride, width, norm, arrivals);
}

}  // namespace shardmesh::cuda
