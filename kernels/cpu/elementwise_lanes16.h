// Norm, rope, gated activation, the end of a reduction and the check for finite values, 16 lanes wide. Built three times: elementwise_{portable,avx2,avx512}.cpp
// include `Lanes` (lanes16_*.h) and then this. Arithmetic: ARCHITECTURE.md "Arithmetic".
#pragma once
#include <cmath>
#include <cstdint>

#include "../include/arithmetic.h"
#include "../include/kernel_set.h"
#include "lanes16_math.h"

namespace shardmesh {
namespace {

// ---------------------------------------------------------------- rms_norm

// Sum of squares: 128 interleaved partial sums (8 registers), then halving. Lanes behind the end hold zeros, and fma(0, 0, partial) changes nothing.
SHARDMESH_LANES float sum_of_squares(const float* x, int64_t width) {
  Lanes::F partial[8];
  SHARDMESH_UNROLL
  for (int i = 0; i < 8; i++) partial[i] = Lanes::set(0.0f);
  int64_t at = 0;
  for (; at + 128 <= width; at += 128) {
    SHARDMESH_UNROLL
    for (int i = 0; i < 8; i++) {
      const Lanes::F v = Lanes::load(x + at + 16 * i);
      partial[i] = Lanes::fma(v, v, partial[i]);
    }
  }
  SHARDMESH_UNROLL
  for (int i = 0; i < 8; i++) {
    const int64_t left = width - at - 16 * i;
    if (left > 0) {
      const Lanes::F v = Lanes::load_first(x + at + 16 * i, left < 16 ? static_cast<int>(left) : 16);
      partial[i] = Lanes::fma(v, v, partial[i]);
    }
  }
  SHARDMESH_UNROLL
  for (int distance = 4; distance >= 1; distance /= 2)
    SHARDMESH_UNROLL
    for (int i = 0; i < distance; i++) partial[i] = Lanes::add(partial[i], partial[i + distance]);
  return Lanes::halving_sum(partial[0]);
}

SHARDMESH_LANES void rms_norm_parts(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride,
                                    Part part) {
  const Share share = share_of(tokens, 1, part);
  for (int64_t t = share.from; t < share.to; t++) {
    const float* row = x + t * x_stride;
    float* to = out + t * out_stride;
    const float mean = sum_of_squares(row, width) / static_cast<float>(width);
    const Lanes::F r = Lanes::set(1.0f / sqrtf(mean + epsilon));
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) Lanes::store(to + i, Lanes::mul(Lanes::mul(Lanes::load(row + i), r), Lanes::load(w + i)));
    if (i < width) {
      const int left = static_cast<int>(width - i);
      Lanes::store_first(to + i, Lanes::mul(Lanes::mul(Lanes::load_first(row + i, left), r), Lanes::load_first(w + i, left)), left);
    }
  }
}

// ---------------------------------------------------------------- rope

// (a, b) -> (rn(rn(a c) - rn(b s)), rn(rn(a s) + rn(b c)))      Su et al. 2021
struct Rotation {
  Lanes::F a, b;
};
SHARDMESH_LANES Rotation rotate(Lanes::F a, Lanes::F b, Lanes::F c, Lanes::F s) {
  return {Lanes::sub(Lanes::mul(a, c), Lanes::mul(b, s)), Lanes::add(Lanes::mul(a, s), Lanes::mul(b, c))};
}

SHARDMESH_LANES void rope_parts(float* x, int64_t stride, int heads, int head_size, const RopeTable& table, const StepRows& rows, Part part) {
  const int pairs = table.dimensions / 2;
  const Share share = share_of(static_cast<int64_t>(rows.tokens) * heads, 1, part);
  for (int64_t n = share.from; n < share.to; n++) {
    const int64_t t = n / heads;
    float* head = x + t * stride + n % heads * head_size;
    const float* cosine = table.cosine + static_cast<int64_t>(rows.positions[t]) * pairs;
    const float* sine = table.sine + static_cast<int64_t>(rows.positions[t]) * pairs;
    int i = 0;
    for (; i + 16 <= pairs; i += 16) {
      const Lanes::F c = Lanes::load(cosine + i), s = Lanes::load(sine + i);
      if (table.half_style) {
        const Rotation r = rotate(Lanes::load(head + i), Lanes::load(head + pairs + i), c, s);
        Lanes::store(head + i, r.a);
        Lanes::store(head + pairs + i, r.b);
      } else {
        Lanes::F a, b;
        Lanes::load_pairs(head + 2 * i, &a, &b);
        const Rotation r = rotate(a, b, c, s);
        Lanes::store_pairs(head + 2 * i, r.a, r.b);
      }
    }
    for (; i < pairs; i++) {
      float* const a = table.half_style ? head + i : head + 2 * i;
      float* const b = table.half_style ? head + pairs + i : head + 2 * i + 1;
      const float c = cosine[i], s = sine[i], a0 = *a, b0 = *b;
      *a = a0 * c - b0 * s;
      *b = a0 * s + b0 * c;
    }
  }
}

// ---------------------------------------------------------------- gated activation

// -z of g * sigmoid(z): silu has z = g, gelu in its tanh form z = 2 sqrt(2 / pi) (g + 0.044715 g^3).
template <bool Gelu>
SHARDMESH_LANES Lanes::F minus_z(Lanes::F g) {
  if (!Gelu) return Lanes::negate(g);
  const Lanes::F cubic = Lanes::mul(Lanes::set(0.044715f), Lanes::mul(g, g));
  return Lanes::mul(Lanes::set(-2.0f), Lanes::mul(Lanes::set(0.7978845608f), Lanes::fma(cubic, g, g)));
}

// N vectors of gate, in place: g * (1 / (1 + exp(-z))).
template <bool Gelu, int N>
SHARDMESH_LANES void activate_each(Lanes::F* g) {
  const Lanes::F one = Lanes::set(1.0f);
  Lanes::F e[N];
  SHARDMESH_UNROLL
  for (int i = 0; i < N; i++) e[i] = Lanes::min(minus_z<Gelu>(g[i]), Lanes::set(88.0f));
  exp_each<N>(e);
  SHARDMESH_UNROLL
  for (int i = 0; i < N; i++) g[i] = Lanes::mul(g[i], Lanes::div(one, Lanes::add(one, e[i])));
}

template <bool Gelu>
SHARDMESH_LANES void gated_row(const float* gate, const float* up, float* out, int64_t count) {
  constexpr int N = 4;  // chains side by side
  int64_t i = 0;
  for (; i + 16 * N <= count; i += 16 * N) {
    Lanes::F g[N];
    SHARDMESH_UNROLL
    for (int n = 0; n < N; n++) g[n] = Lanes::load(gate + i + 16 * n);
    activate_each<Gelu, N>(g);
    SHARDMESH_UNROLL
    for (int n = 0; n < N; n++) Lanes::store(out + i + 16 * n, Lanes::mul(g[n], Lanes::load(up + i + 16 * n)));
  }
  for (; i < count; i += 16) {
    const int left = count - i < 16 ? static_cast<int>(count - i) : 16;
    Lanes::F g = Lanes::load_first(gate + i, left);
    activate_each<Gelu, 1>(&g);
    Lanes::store_first(out + i, Lanes::mul(g, Lanes::load_first(up + i, left)), left);
  }
}

// Parts share blocks of columns of all rows: visit(t, from, to). Columns first, as products share them, so that a thread mostly reads what it wrote itself.
template <typename Visit>
SHARDMESH_LANES void each_column_range(int64_t width, int tokens, Part part, Visit visit) {
  const Share share = share_of((width + kColumnBlock - 1) / kColumnBlock * tokens, 1, part);
  for (int64_t n = share.from; n < share.to;) {
    const int64_t t = n % tokens, from = n / tokens * kColumnBlock;
    // With one token the blocks lie behind each other.
    const int64_t blocks = tokens == 1 ? share.to - n : 1;
    const int64_t to = from + blocks * kColumnBlock;
    visit(t, from, to < width ? to : width);
    n += blocks;
  }
}

SHARDMESH_LANES void gated_activation_parts(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int tokens, int activation,
                                            float* out, int64_t out_stride, Part part) {
  each_column_range(width, tokens, part, [&](int64_t t, int64_t from, int64_t to) {
    const float* g = gate + t * gate_stride + from;
    const float* u = up + t * up_stride + from;
    float* o = out + t * out_stride + from;
    if (activation == 0)
      gated_row<false>(g, u, o, to - from);
    else
      gated_row<true>(g, u, o, to - from);
  });
}

// ---------------------------------------------------------------- finish_tree

// The tree over `units` whose given nodes are leaves, in postfix order: a value >= 0 pushes that node, -1 adds the two on top.
constexpr int kTreeOperationsMax = 2 * kSegmentsMax - 1;
constexpr int kTreeDepthMax = 6;  // values on the stack at once: 1 + ceil(log2(kSegmentsMax)), and one more

struct TreeOrder {
  int count;
  int operations[kTreeOperationsMax];
};

static void order_tree(int from, int to, const int* lo, const int* hi, int node_count, int* node, TreeOrder* order) {
  if (*node < node_count && lo[*node] == from && hi[*node] == to) {
    order->operations[order->count++] = (*node)++;
    return;
  }
  if (to - from <= 1) return;  // a unit that no node covers: the caller's nodes are not the subtrees of a cut
  const int middle = from + tree_left(to - from);
  order_tree(from, middle, lo, hi, node_count, node, order);
  order_tree(middle, to, lo, hi, node_count, node, order);
  order->operations[order->count++] = -1;
}

// Sixteen columns from `r` (or the first `left` of them) of row t.
template <bool Whole>
SHARDMESH_LANES void finish_columns(const TreeOrder& order, const float* const* nodes, const int64_t* strides, int64_t t, const float* bias, float* residual, int64_t r,
                                    int left) {
  const auto load = [left](const float* p) { return Whole ? Lanes::load(p) : Lanes::load_first(p, left); };
  Lanes::F stack[kTreeDepthMax];
  stack[0] = Lanes::set(0.0f);
  int top = 0;
  for (int i = 0; i < order.count; i++) {
    const int node = order.operations[i];
    if (node >= 0) {
      stack[top++] = load(nodes[node] + t * strides[node] + r);
    } else {
      top--;
      stack[top - 1] = Lanes::add(stack[top - 1], stack[top]);
    }
  }
  Lanes::F y = stack[0];
  if (bias) y = Lanes::add(y, load(bias + r));
  y = Lanes::add(load(residual + r), y);
  if (Whole)
    Lanes::store(residual + r, y);
  else
    Lanes::store_first(residual + r, y, left);
}

SHARDMESH_LANES void finish_tree_parts(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias,
                                       float* residual, int64_t residual_stride, int64_t width, int tokens, Part part) {
  TreeOrder order;
  order.count = 0;
  int node = 0;
  order_tree(0, units, lo, hi, node_count, &node, &order);
  each_column_range(width, tokens, part, [&](int64_t t, int64_t from, int64_t to) {
    float* row = residual + t * residual_stride;
    int64_t r = from;
    for (; r + 16 <= to; r += 16) finish_columns<true>(order, nodes, strides, t, bias, row, r, 16);
    if (r < to) finish_columns<false>(order, nodes, strides, t, bias, row, r, static_cast<int>(to - r));
  });
}

}  // namespace
}  // namespace shardmesh
