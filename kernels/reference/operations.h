// The reference: every operation of KernelSet in scalar C++, one short function each. This is the definition of correct; ARCHITECTURE.md "Arithmetic"
// says the same in words. Compiled twice, without and with fma instructions (reference_baseline.cpp, reference_fma.cpp): fmaf is correctly rounded
// either way, so the bits are the same.
//
// Layout of a packed matrix: what the formula reads, in the plainest form.
//   float types   fp32 [rows][K]
//   others        int8 w [rows][K], fp32 S [rows][G], fp32 M [rows][G] (formats with a minimum), int8 half scales [rows][G][2] (Q6_K)
// Layout of quantised activations: int16 q [T][K], fp32 sa [T][G], fp32 ms [T][G].
#pragma once
#include <math.h>

#include "blocks.h"

namespace shardmesh {
namespace {

// Not std::max and std::min: their instantiations would carry this file's instruction set into the baseline.
template <typename T>
T larger(T a, T b) { return a < b ? b : a; }
template <typename T>
T smaller(T a, T b) { return b < a ? b : a; }

// ---------------------------------------------------------------- weights

struct PackedView {
  float* value;
  int8_t* w;
  float* s;
  float* m;
  int8_t* half_scale;
};

size_t round_up_64(size_t n) { return (n + 63) / 64 * 64; }

size_t view_packed(TensorType type, int64_t rows, int64_t columns, uint8_t* data, PackedView* view) {
  const size_t values = static_cast<size_t>(rows * columns), groups = values / 32;
  *view = {};
  if (is_float(type)) {
    view->value = reinterpret_cast<float*>(data);
    return round_up_64(values * 4);
  }
  size_t offset = 0;
  const auto take = [&](size_t bytes) { const size_t at = offset; offset += round_up_64(bytes); return data + at; };
  view->w = reinterpret_cast<int8_t*>(take(values));
  view->s = reinterpret_cast<float*>(take(groups * 4));
  if (has_minimum(type)) view->m = reinterpret_cast<float*>(take(groups * 4));
  if (type == TensorType::Q6_K) view->half_scale = reinterpret_cast<int8_t*>(take(groups * 2));
  return offset;
}

size_t reference_packed_bytes(const MatrixSource& source) {
  PackedView view;
  return view_packed(source.type, source.rows, source.columns, nullptr, &view);
}

void reference_pack(const MatrixSource& source, PackedMatrix* out, Part part) {
  PackedView view;
  view_packed(source.type, source.rows, source.columns, out->data, &view);
  const int64_t groups = source.columns / 32;
  int64_t from, to;
  split(source.rows, part, &from, &to);
  for (int64_t r = from; r < to; r++) {
    const uint8_t* row = source.data + r * source.row_bytes;
    if (is_float(source.type)) {
      read_floats(source.type, row, source.skip, source.columns, view.value + r * source.columns);
      continue;
    }
    for (int64_t g = 0; g < groups; g++) {
      Group group;
      unpack_group(source.type, row, source.skip / 32 + g, &group);
      std::memcpy(view.w + r * source.columns + g * 32, group.q, 32);
      view.s[r * groups + g] = group.s;
      if (view.m) view.m[r * groups + g] = group.m;
      if (view.half_scale) std::memcpy(view.half_scale + (r * groups + g) * 2, group.half_scale, 2);
    }
  }
  if (part.index == 0) out->repack_error = 0;  // the only field that pack sets; the caller fills the rest
}

void reference_read_row(const PackedMatrix& matrix, int64_t row, float* out) {
  PackedView view;
  view_packed(matrix.type, matrix.rows, matrix.columns, matrix.data, &view);
  if (view.value) {
    std::memcpy(out, view.value + row * matrix.columns, static_cast<size_t>(matrix.columns) * 4);
    return;
  }
  const int64_t groups = matrix.columns / 32;
  for (int64_t g = 0; g < groups; g++) {
    Group group{};
    const int64_t at = row * groups + g;
    std::memcpy(group.q, view.w + row * matrix.columns + g * 32, 32);
    group.s = view.s[at];
    group.minimum = view.m != nullptr;
    group.m = view.m ? view.m[at] : 0.0f;
    for (int h = 0; h < 2; h++) group.half_scale[h] = view.half_scale ? view.half_scale[at * 2 + h] : 1;
    for (int i = 0; i < 32; i++) out[g * 32 + i] = group_value(group, i);
  }
}

// ---------------------------------------------------------------- activations and products

struct ActivationView {
  int16_t* q;
  float* sa;
  float* ms;
};

size_t view_activations(int64_t tokens, int64_t columns, uint8_t* data, ActivationView* view) {
  const size_t values = round_up_64(static_cast<size_t>(tokens * columns) * 2), groups = round_up_64(static_cast<size_t>(tokens * columns / 32) * 4);
  *view = {reinterpret_cast<int16_t*>(data), reinterpret_cast<float*>(data + values), reinterpret_cast<float*>(data + values + groups)};
  return values + 2 * groups;
}

size_t reference_activation_bytes(ActivationType, int tokens_max, int64_t columns) {
  ActivationView view;
  return view_activations(tokens_max, columns, nullptr, &view);
}

// visit(token, first column, end) for the part's share of blocks of columns (KernelSet::gated_activation).
template <typename Visit>
void each_column_block(int64_t width, int64_t tokens, Part part, Visit visit) {
  int64_t from, to;
  split((width + kColumnBlock - 1) / kColumnBlock * tokens, part, &from, &to);
  for (int64_t n = from; n < to; n++) visit(n % tokens, n / tokens * kColumnBlock, smaller(width, (n / tokens + 1) * kColumnBlock));
}

// q[i] = rne(x[i] * (largest / amax)); returns the scale amax / largest (0 and all q = 0 when amax is too small to divide by).
template <typename Integer>
float quantize_signed(const float* x, int64_t count, float largest, Integer* q) {
  float amax = 0.0f;
  for (int64_t i = 0; i < count; i++) amax = larger(amax, fabsf(x[i]));
  if (!(amax >= kQuantizableMin)) {
    std::memset(q, 0, static_cast<size_t>(count) * sizeof(Integer));
    return 0.0f;
  }
  const float inverse = largest / amax;
  for (int64_t i = 0; i < count; i++) q[i] = static_cast<Integer>(round_even(x[i] * inverse));
  return amax / largest;
}

bool reference_quantize_activations(const Activations& in, Part part) {
  ActivationView view;
  view_activations(in.tokens, in.columns, in.data, &view);
  const int64_t groups = in.columns / 32;
  const float largest = in.type == ActivationType::Int8 ? 127.0f : static_cast<float>(kInt16Max);
  bool finite = true;
  const auto quantize = [&](int64_t t, int64_t g) {
    const float* x = in.x + t * in.x_stride + g * 32 - in.first_column;
    for (int j = 0; j < 32; j++) finite = finite && isfinite(x[j]);
    int16_t* q = view.q + t * in.columns + g * 32;
    const int64_t i = t * groups + g;
    view.sa[i] = quantize_signed(x, 32, largest, q);
    int32_t sum = 0;
    for (int j = 0; j < 32; j++) sum += q[j];
    view.ms[i] = view.sa[i] * static_cast<float>(sum);
  };
  const int64_t own_groups = in.column_count ? in.column_count / 32 : groups;
  int64_t from, to;
  split(in.tokens * own_groups, part, &from, &to);
  for (int64_t i = from; i < to; i++) quantize(i / own_groups, in.first_column / 32 + i % own_groups);
  return finite;
}

int32_t integer_dot(const int8_t* w, const int16_t* q, int count) {
  int32_t sum = 0;
  for (int i = 0; i < count; i++) sum += static_cast<int32_t>(w[i]) * static_cast<int32_t>(q[i]);
  return sum;
}

// Sum of one segment, groups [from, to), of row r and token t.
float segment_sum(const PackedView& weight, const ActivationView& in, const Activations& a, int64_t columns, int64_t r, int64_t t, int64_t from, int64_t to) {
  const int64_t groups = columns / 32;
  float acc = 0.0f;
  if (weight.value) {
    const float* w = weight.value + r * columns;
    const float* x = a.x + t * a.x_stride;
    for (int64_t k = from * 32; k < to * 32; k++) acc = fmaf(w[k], x[k], acc);
    return acc;
  }
  for (int64_t g = from; g < to; g++) {
    const int8_t* w = weight.w + r * columns + g * 32;
    const int16_t* q = in.q + t * columns + g * 32;
    const int64_t wg = r * groups + g, ag = t * groups + g;
    const auto scaled = [&](int32_t dot) { return static_cast<float>(dot) * weight.s[wg]; };
    if (weight.half_scale) {
      const int32_t first = weight.half_scale[wg * 2] * integer_dot(w, q, 16), second = weight.half_scale[wg * 2 + 1] * integer_dot(w + 16, q + 16, 16);
      if (a.type == ActivationType::Int8) {
        acc = fmaf(scaled(first + second), in.sa[ag], acc);
      } else {  // the sum of both would not fit 32 bits
        acc = fmaf(scaled(first), in.sa[ag], acc);
        acc = fmaf(scaled(second), in.sa[ag], acc);
      }
    } else {
      acc = fmaf(scaled(integer_dot(w, q, 32)), in.sa[ag], acc);
    }
    if (weight.m) acc = fmaf(weight.m[wg], in.ms[ag], acc);
  }
  return acc;
}

// tree(n) = tree(ceil(n / 2)) + tree(rest)
float tree_sum(const float* leaf, int count) {
  if (count == 1) return leaf[0];
  const int left = tree_left(count);
  return tree_sum(leaf, left) + tree_sum(leaf + left, count - left);
}

void reference_linear(const LinearArguments& a, Part part) {
  const PackedMatrix& matrix = *a.weight;
  PackedView weight;
  view_packed(matrix.type, matrix.rows, matrix.columns, matrix.data, &weight);
  ActivationView in;
  view_activations(a.in.tokens, a.in.columns, a.in.data, &in);
  int64_t from, to;
  split(a.row_count ? a.row_count : matrix.rows, part, &from, &to);
  for (int64_t r = a.first_row + from; r < a.first_row + to; r++) {
    for (int64_t t = 0; t < a.in.tokens; t++) {
      float sums[kSegmentsMax];
      for (int s = 0; s < a.segment_count; s++)
        sums[s] = segment_sum(weight, in, a.in, matrix.columns, r, t, s ? a.segment_ends[s - 1] : 0, a.segment_ends[s]);
      for (int s = 0; s < a.subtree_count; s++) {
        float y = tree_sum(sums + a.subtrees[s].first, a.subtrees[s].count);
        if (a.bias) y = y + a.bias[r];
        a.out[s * a.subtree_stride + t * a.out_stride + r - a.first_row] = y;
      }
    }
  }
}

// ---------------------------------------------------------------- norm, rope, activation

void reference_rms_norm(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride, Part part) {
  int64_t from, to;
  split(tokens, part, &from, &to);
  for (int64_t t = from; t < to; t++) {
    const float* row = x + t * x_stride;
    float partial[128] = {};
    for (int64_t i = 0; i < width; i++) partial[i % 128] = fmaf(row[i], row[i], partial[i % 128]);
    const float mean = halving_sum(partial, 128) / static_cast<float>(width);
    const float r = 1.0f / sqrtf(mean + epsilon);
    for (int64_t i = 0; i < width; i++) out[t * out_stride + i] = (row[i] * r) * w[i];
  }
}

void reference_rope(float* x, int64_t stride, int heads, int head_size, const RopeTable& table, const StepRows& rows, Part part) {
  const int pairs = table.dimensions / 2;
  int64_t from, to;
  split(rows.tokens, part, &from, &to);
  for (int64_t t = from; t < to; t++) {
    const float* cosine = table.cosine + static_cast<int64_t>(rows.positions[t]) * pairs;
    const float* sine = table.sine + static_cast<int64_t>(rows.positions[t]) * pairs;
    for (int h = 0; h < heads; h++) {
      float* head = x + t * stride + static_cast<int64_t>(h) * head_size;
      for (int i = 0; i < pairs; i++) {
        float& a = table.half_style ? head[i] : head[2 * i];
        float& b = table.half_style ? head[i + pairs] : head[2 * i + 1];
        const float c = cosine[i], s = sine[i], a0 = a, b0 = b;
        a = a0 * c - b0 * s;
        b = a0 * s + b0 * c;
      }
    }
  }
}

float sigmoid_fixed(float x) { return 1.0f / (1.0f + exp_fixed(-x)); }

float gelu_inner(float g) { return 0.7978845608f * fmaf(0.044715f * (g * g), g, g); }

void reference_gated_activation(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int tokens, int activation, float* out,
                                int64_t out_stride, Part part) {
  each_column_block(width, tokens, part, [&](int64_t t, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const float g = gate[t * gate_stride + i];
      const float act = activation == 0 ? g * sigmoid_fixed(g) : g * sigmoid_fixed(2.0f * gelu_inner(g));
      out[t * out_stride + i] = act * up[t * up_stride + i];
    }
  });
}

// ---------------------------------------------------------------- K and V

// One token's place in the pool: its subblock for one head and its column 0..15 there (layout: kernel_set.h).
struct TokenPlace {
  uint8_t* subblock;
  int column;
};

TokenPlace place_of(const KvLayout& layout, const uint8_t* cache, const StepRows& rows, int sequence, int64_t position, int head) {
  const int32_t* table = rows.block_tables + rows.block_offsets[sequence];
  const int64_t block = table[position / layout.block_tokens];
  const int in_block = static_cast<int>(position % layout.block_tokens);
  uint8_t* base = const_cast<uint8_t*>(cache) + block * static_cast<int64_t>(layout.block_bytes) + head * static_cast<int64_t>(layout.head_bytes) +
                  (in_block / 16) * static_cast<int64_t>(layout.subblock_bytes);
  return {base, in_block % 16};
}

int8_t& key_int8(const TokenPlace& p, int d) { return reinterpret_cast<int8_t*>(p.subblock)[(d / 4) * 64 + p.column * 4 + d % 4]; }
uint16_t& key_f16(const TokenPlace& p, int d) { return reinterpret_cast<uint16_t*>(p.subblock)[d * 16 + p.column]; }
uint16_t& value_f16(const KvLayout& layout, const TokenPlace& p, int d) {
  return reinterpret_cast<uint16_t*>(p.subblock + layout.key_bytes)[p.column * layout.head_size + d];
}
int8_t& value_int8(const KvLayout& layout, const TokenPlace& p, int d) {
  return reinterpret_cast<int8_t*>(p.subblock + layout.key_bytes)[(p.column / 4) * layout.head_size * 4 + d * 4 + p.column % 4];
}
float& key_scale(const KvLayout& layout, const TokenPlace& p) { return reinterpret_cast<float*>(p.subblock + layout.key_bytes + layout.value_bytes)[p.column]; }
float& value_scale(const KvLayout& layout, const TokenPlace& p) {
  return reinterpret_cast<float*>(p.subblock + layout.key_bytes + layout.value_bytes)[(layout.key == KeyType::Int8 ? 16 : 0) + p.column];
}

bool reference_store_kv(const float* k, int64_t k_stride, const float* v, int64_t v_stride, const KvLayout& layout, uint8_t* cache, const StepRows& rows, Part part) {
  const int D = layout.head_size;
  bool finite = true;
  int64_t from, to;
  split(static_cast<int64_t>(rows.tokens) * layout.heads, part, &from, &to);
  for (int64_t i = from; i < to; i++) {
    const int64_t t = i / layout.heads;
    const int h = static_cast<int>(i % layout.heads);
    const TokenPlace place = place_of(layout, cache, rows, rows.row_sequence[t], rows.positions[t], h);
    const float* key = k + t * k_stride + static_cast<int64_t>(h) * D;
    const float* value = v + t * v_stride + static_cast<int64_t>(h) * D;
    for (int d = 0; d < D; d++) finite = finite && isfinite(key[d]) && isfinite(value[d]);
    int8_t q[1024];
    if (layout.key == KeyType::Int8) {
      key_scale(layout, place) = quantize_signed(key, D, 127.0f, q);
      for (int d = 0; d < D; d++) key_int8(place, d) = q[d];
    } else {
      for (int d = 0; d < D; d++) key_f16(place, d) = float_to_half(key[d]);
    }
    if (layout.value == ValueType::Int8) {
      value_scale(layout, place) = quantize_signed(value, D, 127.0f, q);
      for (int d = 0; d < D; d++) value_int8(layout, place, d) = q[d];
    } else {
      for (int d = 0; d < D; d++) value_f16(layout, place, d) = float_to_half(value[d]);
    }
  }
  return finite;
}

// ---------------------------------------------------------------- attention

constexpr int kSpan = 256, kAttentionStep = 64, kHeadSizeMax = 1024;

// Running softmax of one row and head: maximum, sum of weights, weighted values.
struct Softmax {
  float m, l;
  float* o;  // [D]
};

// q of one row and head: quantised for int8 K, as it is for f16 K.
struct Query {
  int8_t q8[kHeadSizeMax];
  float qs;         // rn(sq * scale)
  const float* x;
  float scale;
};

float score(const Query& query, const KvLayout& layout, const TokenPlace& key) {
  if (layout.key == KeyType::Int8) {
    int32_t dot = 0;
    for (int d = 0; d < layout.head_size; d++) dot += static_cast<int32_t>(query.q8[d]) * key_int8(key, d);
    return static_cast<float>(dot) * (key_scale(layout, key) * query.qs);
  }
  float chain = 0.0f;
  for (int d = 0; d < layout.head_size; d++) chain = fmaf(query.x[d], half_to_float(key_f16(key, d)), chain);
  return chain * query.scale;
}

// Adds the keys [first, last) of the step of 64 that begins at `base` (base <= first < last <= base + 64).
void attend_step(const AttentionArguments& a, const Query& query, int sequence, int head, int64_t base, int64_t first, int64_t last, Softmax* state) {
  const KvLayout& layout = *a.layout;
  const int D = layout.head_size, begin = static_cast<int>(first - base), end = static_cast<int>(last - base);
  TokenPlace place[kAttentionStep];
  float s[kAttentionStep], w[kAttentionStep] = {}, x[kAttentionStep] = {};
  float m = state->m;
  for (int j = begin; j < end; j++) {
    place[j] = place_of(layout, a.cache, *a.rows, sequence, base + j, head);
    s[j] = score(query, layout, place[j]);
    m = larger(m, s[j]);
  }
  if (m > state->m) {
    const float c = exp_fixed(state->m - m);
    state->l = state->l * c;
    for (int d = 0; d < D; d++) state->o[d] = state->o[d] * c;
    state->m = m;
  }
  for (int j = begin; j < end; j++) w[j] = exp_fixed(s[j] - m);
  float partial[kAttentionStep];
  std::memcpy(partial, w, sizeof w);
  state->l = state->l + halving_sum(partial, kAttentionStep);
  if (layout.value == ValueType::F16) {
    for (int j = begin; j < end; j++)
      for (int d = 0; d < D; d++) state->o[d] = fmaf(w[j], half_to_float(value_f16(layout, place[j], d)), state->o[d]);
    return;
  }
  float largest = 0.0f;
  for (int j = begin; j < end; j++) {
    x[j] = w[j] * value_scale(layout, place[j]);
    largest = larger(largest, x[j]);
  }
  if (!(largest >= kQuantizableMin)) return;  // every u is 0
  const float sw = largest / 255.0f, inverse = 255.0f / largest;
  int32_t u[kAttentionStep];
  for (int j = begin; j < end; j++) u[j] = round_even(x[j] * inverse);
  for (int d = 0; d < D; d++) {
    int32_t sum = 0;
    for (int j = begin; j < end; j++) sum += u[j] * value_int8(layout, place[j], d);
    state->o[d] = fmaf(static_cast<float>(sum), sw, state->o[d]);
  }
}

// Joins the next span's result to the running one.
void fold_span(Softmax* state, const Softmax& next, int D) {
  const float n = larger(state->m, next.m), a = exp_fixed(state->m - n), b = exp_fixed(next.m - n);
  state->l = state->l * a + next.l * b;
  for (int d = 0; d < D; d++) state->o[d] = state->o[d] * a + next.o[d] * b;
  state->m = n;
}

void attend_row(const AttentionArguments& a, int64_t t, int h) {
  const int D = a.layout->head_size, head = a.kv_head[h], sequence = a.rows->row_sequence[t];
  const int64_t p = a.rows->positions[t];
  const int64_t oldest = a.window > 0 ? larger(int64_t{0}, p - a.window + 1) : 0;
  Query query;
  query.x = a.q + t * a.q_stride + static_cast<int64_t>(h) * D;
  query.scale = a.scale;
  query.qs = quantize_signed(query.x, D, 127.0f, query.q8) * a.scale;
  float total_o[kHeadSizeMax] = {}, span_o[kHeadSizeMax];
  Softmax total{-INFINITY, 0.0f, total_o};
  bool first_span = true;
  for (int64_t span = oldest / kSpan * kSpan; span <= p; span += kSpan) {  // spans without an unmasked key are skipped
    for (int d = 0; d < D; d++) span_o[d] = 0.0f;
    Softmax state{-INFINITY, 0.0f, span_o};
    for (int64_t base = span; base < span + kSpan; base += kAttentionStep) {
      const int64_t first = larger(base, oldest), last = smaller(base + kAttentionStep, p + 1);
      if (first < last) attend_step(a, query, sequence, head, base, first, last, &state);
    }
    if (first_span) {
      total.m = state.m;
      total.l = state.l;
      std::memcpy(total_o, span_o, static_cast<size_t>(D) * 4);
      first_span = false;
    } else {
      fold_span(&total, state, D);
    }
  }
  const float inverse = 1.0f / total.l;
  for (int d = 0; d < D; d++) a.out[t * a.out_stride + static_cast<int64_t>(h) * D + d] = total_o[d] * inverse;
}

size_t reference_attention_scratch_bytes(int, int, int) { return 0; }

void reference_attention(const AttentionArguments& a, Part part) {
  int64_t from, to;
  split(static_cast<int64_t>(a.rows->tokens) * a.heads, part, &from, &to);
  for (int64_t i = from; i < to; i++) attend_row(a, i / a.heads, static_cast<int>(i % a.heads));
}

// ---------------------------------------------------------------- reduction

// Value of the tree node that covers units [lo, hi), for token t and output r. `node` advances over the given nodes, in unit order.
float finish_node(int lo, int hi, int* node, const int* node_lo, const int* node_hi, const float* const* nodes, const int64_t* strides, int64_t t, int64_t r) {
  if (node_lo[*node] == lo && node_hi[*node] == hi) {
    const int n = (*node)++;
    return nodes[n][t * strides[n] + r];
  }
  const int middle = lo + tree_left(hi - lo);
  const float left = finish_node(lo, middle, node, node_lo, node_hi, nodes, strides, t, r);
  return left + finish_node(middle, hi, node, node_lo, node_hi, nodes, strides, t, r);
}

void reference_finish_tree(int units, int, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                           int64_t residual_stride, int64_t width, int tokens, Part part) {
  int64_t from, to;
  split(width, part, &from, &to);
  for (int t = 0; t < tokens; t++) {
    for (int64_t r = from; r < to; r++) {
      int node = 0;
      float y = finish_node(0, units, &node, lo, hi, nodes, strides, t, r);
      if (bias) y = y + bias[r];
      residual[t * residual_stride + r] = residual[t * residual_stride + r] + y;
    }
  }
}

bool reference_all_finite(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    if ((bits & 0x7f800000u) == 0x7f800000u) return false;
  }
  return true;
}

}  // namespace
}  // namespace shardmesh
