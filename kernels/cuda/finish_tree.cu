// residual[t, r] = residual[t, r] + (tree + bias[r]): the tree over the units of a row-parallel product, from the maximal subtrees of all ranks in unit order.
//   nodes[n] [T, width] fp32, strides[n] apart; each covers units [lo[n], hi[n])      residual [T, width] fp32
// A thread is one value. The walk is planned on the host: after node n, merges[n] times the last left side is added in front. finish_tree_norm goes on with the norm of the
// residual, in the block that comes last.
// Limits: 1 to 16 nodes, which join to exactly the tree over [0, units).
#include "arrivals.cuh"
#include "device.cuh"
#include "norm_rows.cuh"
#include "operations.h"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 256, kNodesMax = kSegmentsMax, kDepthMax = 5;

struct TreeWalk {
  const float* nodes[kNodesMax];
  int64_t strides[kNodesMax];
  int8_t merges[kNodesMax];
  int count;
};

__device__ __forceinline__ void finish_value(const TreeWalk& walk, const float* bias, float* residual, int64_t residual_stride, int64_t token, int64_t r) {
  float stack[kDepthMax];
  int depth = 0;
  for (int n = 0; n < walk.count; n++) {
    float sum = walk.nodes[n][token * walk.strides[n] + r];
    for (int m = 0; m < walk.merges[n]; m++) sum = __fadd_rn(stack[--depth], sum);
    stack[depth++] = sum;
  }
  float y = stack[0];
  if (bias) y = __fadd_rn(y, bias[r]);
  residual[token * residual_stride + r] = __fadd_rn(residual[token * residual_stride + r], y);
}

__global__ void __launch_bounds__(kThreads) finish_tree_kernel(const TreeWalk walk, const float* bias, float* residual, int64_t residual_stride, int64_t width) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r < width) finish_value(walk, bias, residual, residual_stride, blockIdx.y, r);
}

__global__ void __launch_bounds__(kThreads) finish_tree_norm_kernel(const TreeWalk walk, const float* bias, float* residual, int64_t residual_stride, int64_t width, const NormAfter norm,
                                                                    uint32_t* arrivals) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r < width) finish_value(walk, bias, residual, residual_stride, blockIdx.y, r);
  uint32_t* flag = reinterpret_cast<uint32_t*>(dynamic_shared());
  if (comes_last(arrivals, gridDim.x * gridDim.y, flag))
    norm_rows(norm, residual, residual_stride, static_cast<int>(width), static_cast<int>(gridDim.y), reinterpret_cast<float*>(dynamic_shared() + 16));
}

// Plans the part of the tree over [lo, hi); `next` is the first node not used yet. False when the nodes do not make that tree.
bool plan_walk(int lo, int hi, int node_count, const int* node_lo, const int* node_hi, int* next, TreeWalk* walk) {
  if (*next < node_count && node_lo[*next] == lo && node_hi[*next] == hi) {
    (*next)++;
    return true;
  }
  if (hi - lo < 2) return false;
  const int middle = lo + (hi - lo + 1) / 2;
  if (!plan_walk(lo, middle, node_count, node_lo, node_hi, next, walk) || !plan_walk(middle, hi, node_count, node_lo, node_hi, next, walk)) return false;
  walk->merges[*next - 1]++;
  return true;
}

Problem make_walk(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, int64_t width, int tokens, TreeWalk* walk) {
  if (units < 1 || units > kSegmentsMax || node_count < 1 || node_count > kNodesMax) return "finish_tree: 1 to 16 units and nodes are possible";
  if (width < 1 || tokens < 1 || tokens > 65535) return "finish_tree: width must be positive, tokens in 1..65535";
  *walk = {};
  walk->count = node_count;
  for (int n = 0; n < node_count; n++) {
    walk->nodes[n] = nodes[n];
    walk->strides[n] = strides[n];
  }
  int next = 0;
  const bool whole = plan_walk(0, units, node_count, lo, hi, &next, walk) && next == node_count;
  return whole ? nullptr : "finish_tree: the nodes are not the maximal subtrees of a cut of the units";
}

dim3 grid_of(int64_t width, int tokens) { return dim3(static_cast<unsigned>((width + kThreads - 1) / kThreads), static_cast<unsigned>(tokens)); }

}  // namespace

Problem finish_tree(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                    int64_t residual_stride, int64_t width, int tokens, Stream stream) {
  TreeWalk walk;
  if (const Problem problem = make_walk(units, node_count, lo, hi, nodes, strides, width, tokens, &walk)) return problem;
  return launch(finish_tree_kernel, grid_of(width, tokens), kThreads, 0, stream, walk, bias, residual, residual_stride, width);
}

Problem finish_tree_norm(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                         int64_t residual_stride, int64_t width, int tokens, const NormAfter& norm, uint32_t* arrivals, Stream stream) {
  TreeWalk walk;
  if (const Problem problem = make_walk(units, node_count, lo, hi, nodes, strides, width, tokens, &walk)) return problem;
  if (tokens > kFusedTokensMax || width % 32 != 0 || width > (1 << 24)) return "finish_tree_norm: at most 8 tokens, the width a multiple of 32";
  return launch(finish_tree_norm_kernel, grid_of(width, tokens), kThreads, kFusedTokensMax * kPartials * 4 + 16, stream, walk, bias, residual, residual_stride, width, norm, arrivals);
}

}  // namespace shardmesh::cuda
