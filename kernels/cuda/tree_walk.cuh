// A tree over units from the maximal subtrees of all ranks, in unit order: planned on the host, walked by each thread for its own value.
#pragma once
#include "device.cuh"
#include "operations.h"

namespace shardmesh::cuda {

// After node n, merges[n] times the last left side is added in front.
struct TreeWalk {
  int8_t merges[kSegmentsMax];
  int count;
};

namespace tree_walk {

// The part of the tree over [lo, hi); `next` is the first node not used yet. False when the nodes do not make that tree.
inline bool plan(int lo, int hi, int node_count, const int* node_lo, const int* node_hi, int* next, TreeWalk* walk) {
  if (*next < node_count && node_lo[*next] == lo && node_hi[*next] == hi) {
    (*next)++;
    return true;
  }
  if (hi - lo < 2) return false;
  const int middle = lo + (hi - lo + 1) / 2;
  if (!plan(lo, middle, node_count, node_lo, node_hi, next, walk) || !plan(middle, hi, node_count, node_lo, node_hi, next, walk)) return false;
  walk->merges[*next - 1]++;
  return true;
}

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float4 add(const float4& a, const float4& b) { return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w)}; }

}  // namespace tree_walk

// Node n covers units [lo[n], hi[n]); at most 16 of each. False when the nodes are not the maximal subtrees of a cut of the units.
inline bool plan_tree_walk(int units, int node_count, const int* lo, const int* hi, TreeWalk* walk) {
  int next = 0;
  *walk = {};
  walk->count = node_count;
  return tree_walk::plan(0, units, node_count, lo, hi, &next, walk) && next == node_count;
}

// node(n): the value of node n. V: float, or float4 for four values side by side.
template <typename V, typename Node>
__device__ __forceinline__ V walk_tree(const TreeWalk& walk, Node node) {
  constexpr int kDepthMax = 5;
  V stack[kDepthMax];
  int depth = 0;
  for (int n = 0; n < walk.count; n++) {
    V sum = node(n);
    for (int m = 0; m < walk.merges[n]; m++) sum = tree_walk::add(stack[--depth], sum);
    stack[depth++] = sum;
  }
  return stack[0];
}

}  // namespace shardmesh::cuda
