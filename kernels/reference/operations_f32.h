// The reference with fp32 activations and K/V: weights dequantised, plain sums in double where that is cheap. It is held against figures that other
// engines computed; it promises accuracy, not bits.
//
// Layout of a packed matrix: fp32 [rows][K]. K/V: KeyType::F32 of kernel_set.h.
#pragma once
#include <math.h>

#include "operations.h"

namespace shardmesh {
namespace {

size_t f32_packed_bytes(const MatrixSource& source) { return static_cast<size_t>(source.rows * source.columns) * 4; }

void f32_pack(const MatrixSource& source, PackedMatrix* out, Part part) {
  float* values = reinterpret_cast<float*>(out->data);
  int64_t from, to;
  split(source.rows, part, &from, &to);
  for (int64_t r = from; r < to; r++) {
    const uint8_t* row = source.data + r * source.row_bytes;
    float* target = values + r * source.columns;
    if (is_float(source.type)) {
      read_floats(source.type, row, source.skip, source.columns, target);
      continue;
    }
    for (int64_t g = 0; g < source.columns / 32; g++) {
      Group group;
      unpack_group(source.type, row, source.skip / 32 + g, &group);
      for (int i = 0; i < 32; i++) target[g * 32 + i] = group_value(group, i);
    }
  }
  if (part.index == 0) out->repack_error = 0;
}

void f32_read_row(const PackedMatrix& matrix, int64_t row, float* out) {
  std::memcpy(out, matrix.data + row * matrix.columns * 4, static_cast<size_t>(matrix.columns) * 4);
}

size_t f32_activation_bytes(ActivationType, int, int64_t) { return 0; }
// There is no other form: values are only looked at.
bool f32_quantize_activations(const Activations& in, Part part) {
  bool finite = true;
  each_column_block(in.columns, in.tokens, part, [&](int64_t t, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) finite = finite && isfinite(in.x[t * in.x_stride + i]);
  });
  return finite;
}

// Products in 32 fp32 lanes, added up in double every 256 values; `count` is a multiple of 32.
double dot_f32(const float* w, const float* x, int64_t count) {
  typedef float Lanes __attribute__((vector_size(32)));
  double sum = 0;
  for (int64_t from = 0; from < count; from += 256) {
    const int64_t to = smaller(count, from + 256);
    Lanes lanes[4] = {};
    for (int64_t k = from; k < to; k += 32) {
      for (int i = 0; i < 4; i++) {
        Lanes a, b;
        std::memcpy(&a, w + k + i * 8, 32);
        std::memcpy(&b, x + k + i * 8, 32);
        lanes[i] += a * b;
      }
    }
    const Lanes four = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    for (int i = 0; i < 8; i++) sum += static_cast<double>(four[i]);
  }
  return sum;
}

void f32_linear(const LinearArguments& a, Part part) {
  const PackedMatrix& matrix = *a.weight;
  int64_t from, to;
  split(a.row_count ? a.row_count : matrix.rows, part, &from, &to);
  for (int64_t r = a.first_row + from; r < a.first_row + to; r++) {
    const float* w = reinterpret_cast<const float*>(matrix.data) + r * matrix.columns;
    for (int64_t t = 0; t < a.in.tokens; t++) {
      const float* x = a.in.x + t * a.in.x_stride;
      for (int s = 0; s < a.subtree_count; s++) {
        const Subtree& tree = a.subtrees[s];
        const int64_t begin = tree.first ? a.segment_ends[tree.first - 1] * int64_t{32} : 0, end = a.segment_ends[tree.first + tree.count - 1] * int64_t{32};
        const double y = dot_f32(w + begin, x + begin, end - begin) + (a.bias ? static_cast<double>(a.bias[r]) : 0.0);
        a.out[s * a.subtree_stride + t * a.out_stride + r - a.first_row] = static_cast<float>(y);
      }
    }
  }
}

void f32_rms_norm(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride, Part part) {
  int64_t from, to;
  split(tokens, part, &from, &to);
  for (int64_t t = from; t < to; t++) {
    const float* row = x + t * x_stride;
    double sum = 0;
    for (int64_t i = 0; i < width; i++) sum += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    const double r = 1.0 / sqrt(sum / static_cast<double>(width) + static_cast<double>(epsilon));
    for (int64_t i = 0; i < width; i++) out[t * out_stride + i] = static_cast<float>(static_cast<double>(row[i]) * r * static_cast<double>(w[i]));
  }
}

float* key_f32(const TokenPlace& p) { return reinterpret_cast<float*>(p.subblock) + p.column; }  // value d at [d * 16]
float* value_f32(const KvLayout& layout, const TokenPlace& p) { return reinterpret_cast<float*>(p.subblock + layout.key_bytes) + p.column * layout.head_size; }

bool f32_store_kv(const float* k, int64_t k_stride, const float* v, int64_t v_stride, const KvLayout& layout, uint8_t* cache, const StepRows& rows, Part part) {
  const int D = layout.head_size;
  int64_t from, to;
  split(rows.tokens, part, &from, &to);
  bool finite = true;
  for (int64_t t = from; t < to; t++) {
    for (int h = 0; h < layout.heads; h++) {
      const TokenPlace place = place_of(layout, cache, rows, rows.row_sequence[t], rows.positions[t], h);
      const float* key = k + t * k_stride + static_cast<int64_t>(h) * D;
      const float* value = v + t * v_stride + static_cast<int64_t>(h) * D;
      for (int d = 0; d < D; d++) finite = finite && isfinite(key[d]) && isfinite(value[d]);
      for (int d = 0; d < D; d++) key_f32(place)[d * 16] = key[d];
      std::memcpy(value_f32(layout, place), value, static_cast<size_t>(D) * 4);
    }
  }
  return finite;
}

size_t f32_attention_scratch_bytes(int, int, int) { return 0; }

void f32_attend_row(const AttentionArguments& a, int64_t t, int h) {
  const int D = a.layout->head_size, head = a.kv_head[h], sequence = a.rows->row_sequence[t];
  const int64_t p = a.rows->positions[t], oldest = a.window > 0 ? larger(int64_t{0}, p - a.window + 1) : 0;
  const float* q = a.q + t * a.q_stride + static_cast<int64_t>(h) * D;
  double m = -INFINITY, l = 0, o[kHeadSizeMax] = {};
  for (int64_t j = oldest; j <= p; j++) {
    const TokenPlace place = place_of(*a.layout, a.cache, *a.rows, sequence, j, head);
    const float* key = key_f32(place);
    double s = 0;
    for (int d = 0; d < D; d++) s += static_cast<double>(q[d]) * static_cast<double>(key[d * 16]);
    s *= static_cast<double>(a.scale);
    if (s > m) {
      const double c = exp(m - s);
      l *= c;
      for (int d = 0; d < D; d++) o[d] *= c;
      m = s;
    }
    const double w = exp(s - m);
    const float* value = value_f32(*a.layout, place);
    l += w;
    for (int d = 0; d < D; d++) o[d] += w * static_cast<double>(value[d]);
  }
  for (int d = 0; d < D; d++) a.out[t * a.out_stride + static_cast<int64_t>(h) * D + d] = static_cast<float>(o[d] / l);
}

void f32_attention(const AttentionArguments& a, Part part) {
  int64_t from, to;
  split(static_cast<int64_t>(a.rows->tokens) * a.heads, part, &from, &to);
  for (int64_t i = from; i < to; i++) f32_attend_row(a, i / a.heads, static_cast<int>(i % a.heads));
}

double gelu_tanh_f64(double g) { return 0.5 * g * (1.0 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))); }

void f32_gated_activation(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int tokens, int activation, float* out,
                          int64_t out_stride, Part part) {
  int64_t from, to;
  split(width, part, &from, &to);
  for (int t = 0; t < tokens; t++) {
    for (int64_t i = from; i < to; i++) {
      const double g = static_cast<double>(gate[t * gate_stride + i]);
      const double act = activation == 0 ? g / (1.0 + exp(-g)) : gelu_tanh_f64(g);
      out[t * out_stride + i] = static_cast<float>(act * static_cast<double>(up[t * up_stride + i]));
    }
  }
}

}  // namespace
}  // namespace shardmesh
