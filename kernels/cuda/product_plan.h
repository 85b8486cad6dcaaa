// A product's shape as its kernels take it: checked, and with the walk through the tree that linear_prefill follows.
#pragma once
#include "operations.h"
#include "weight_layout.h"

namespace shardmesh::cuda {

// Which products a plan is for: quantised weights, float weights with fp32 activations, BF16 weights with bf16 activations.
enum class Products { Quantised, Float, Bf16 };

struct ProductPlan {
  const uint8_t* weight;
  const ActivationGroup* in;
  const float* x;
  const Bf16Group* bf16;
  const float* bias;
  float* out;
  int64_t x_stride, out_stride, subtree_stride, strip_bytes;
  int rows, strips, groups, heads, phase, tokens, tiles;
  int segment_count, subtree_count;
  int segment_end[kSegmentsMax];
  Subtree subtree[kSegmentsMax];
  // Walking the segments in order with a stack of finished left sides: after segment i, merges[i] times the top of the stack is added in front; then the sum
  // is pushed, or, when finishes[i] >= 0, it is that subtree's result.
  int8_t merges[kSegmentsMax], finishes[kSegmentsMax];

#if defined(__CUDACC__)
  __device__ __forceinline__
#endif
  int segment_begin(int segment) const { return segment ? segment_end[segment - 1] : 0; }
};

// The last leaf of every inner node of the tree over [first, first + count) is where that node is made.
inline void count_merges(int first, int count, int8_t* merges) {
  if (count == 1) return;
  const int left = (count + 1) / 2;
  count_merges(first, left, merges);
  count_merges(first + left, count - left, merges);
  merges[first + count - 1]++;
}

inline Problem make_product_plan(const Product& p, ProductPlan* plan, Products products = Products::Quantised) {
  if (p.rows < 1 || p.rows > (1 << 27) || p.columns < 32 || p.columns % 32 != 0 || p.columns > (1 << 24)) return "linear: rows must be in 1..2^27, columns a multiple of 32 up to 2^24";
  if (p.tokens < 1 || p.tokens > 65535) return "linear: tokens must be in 1..65535";
  if (p.segment_count < 1 || p.segment_count > kSegmentsMax || p.subtree_count < 1 || p.subtree_count > kSegmentsMax) return "linear: 1 to 16 segments and subtrees are possible";
  if (p.phase < 0 || p.phase > 7) return "linear: phase must be in 0..7";
  *plan = {};
  plan->weight = p.weight;
  plan->in = p.in;
  plan->x = p.x;
  plan->bf16 = p.bf16;
  plan->x_stride = p.x_stride;
  plan->bias = p.bias;
  plan->out = p.out;
  plan->out_stride = p.out_stride;
  plan->subtree_stride = p.subtree_stride;
  plan->rows = static_cast<int>(p.rows);
  plan->strips = (plan->rows + kStripRows - 1) / kStripRows;
  plan->groups = static_cast<int>(p.columns / 32);
  plan->phase = p.phase;
  plan->tokens = p.tokens;
  plan->tiles = (p.tokens + kTileTokens - 1) / kTileTokens;
  plan->segment_count = p.segment_count;
  plan->subtree_count = p.subtree_count;
  int before = 0;
  for (int i = 0; i < p.segment_count; i++) {
    if (p.segment_ends[i] <= before) return "linear: segment ends must ascend";
    before = plan->segment_end[i] = p.segment_ends[i];
    plan->finishes[i] = -1;
  }
  if (before != plan->groups) return "linear: the last segment must end with the columns";
  before = 0;
  for (int i = 0; i < p.subtree_count; i++) {
    const Subtree& tree = p.subtrees[i];
    if (tree.count < 1 || tree.first != before || tree.first + tree.count > p.segment_count) return "linear: subtrees must cover the segments in order";
    before = tree.first + tree.count;
    plan->subtree[i] = tree;
    count_merges(tree.first, tree.count, plan->merges);
    plan->finishes[before - 1] = static_cast<int8_t>(i);
  }
  if (before != p.segment_count) return "linear: subtrees must cover the segments in order";
  if (products == Products::Quantised) {
    const bool known = with_format(p.type, [&](auto format) {
      using F = decltype(format);
      plan->heads = F::heads ? (p.phase + plan->groups + 7) / 8 : 0;
      plan->strip_bytes = static_cast<int64_t>(plan->heads) * F::head_bytes + static_cast<int64_t>(plan->groups) * F::record_bytes;
    });
    return known ? nullptr : "linear: float weights are for linear_float_decode and _prefill";
  }
  if (products == Products::Bf16 && p.type != TensorType::BF16) return "linear: bf16 products are for BF16 weights";
  if (products == Products::Float && (p.x_stride % 4 != 0 || reinterpret_cast<uintptr_t>(p.x) % 16 != 0)) return "linear: x must be 16-byte aligned, its stride a multiple of 4";
  const bool known = with_float_format(p.type, [&](auto format) { plan->strip_bytes = static_cast<int64_t>(plan->groups) * decltype(format)::record_bytes; });
  return known ? nullptr : "linear: quantised weights are for linear_decode and linear_prefill";
}

}  // namespace shardmesh::cuda
