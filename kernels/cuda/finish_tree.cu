// residual[t, r] = residual[t, r] + (tree + bias[r]): the tree over the units of a row-parallel product, from the maximal subtrees of all ranks in unit order.
//   nodes[n] [T, width] fp32, strides[n] apart; each covers units [lo[n], hi[n])      residual [T, width] fp32
// A thread is one value. The walk is planned on the host: after node n, merges[n] times the last left side is added in front.
// Limits: 1 to 16 nodes, which join to exactly the tree over [0, units).
#include "device.cuh"
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

__global__ void __launch_bounds__(kThreads) finish_tree_kernel(const TreeWalk walk, const float* bias, float* residual, int64_t residual_stride, int64_t width) {
  const int64_t token = blockIdx.y, r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= width) return;
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

}  // namespace

Problem finish_tree(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                    int64_t residual_stride, int64_t width, int tokens, Stream stream) {
  if (units < 1 || units > kSegmentsMax || node_count < 1 || node_count > kNodesMax) return "finish_tree: 1 to 16 units and nodes are possible";
  if (width < 1 || tokens < 1 || tokens > 65535) return "finish_tree: width must be positive, tokens in 1..65535";
  TreeWalk walk{};
  walk.count = node_count;
  for (int n = 0; n < node_count; n++) {
    walk.nodes[n] = nodes[n];
    walk.strides[n] = strides[n];
  }
  int next = 0;
  if (!plan_walk(0, units, node_count, lo, hi, &next, &walk) || next != node_count) return "finish_tree: the nodes are not the maximal subtrees of a cut of the units";
  const dim3 grid(static_cast<unsigned>((width + kThreads - 1) / kThreads), static_cast<unsigned>(tokens));
  return launch(finish_tree_kernel, grid, kThreads, 0, stream, walk, bias, residual, residual_stride, width);
}

}  // namespace shardmesh::cuda
