// Norm, rope, gated activation, end of a reduction, finite check of the avx512 set: elementwise_lanes16.h over lanes16_avx512.h.
#include "lanes16_avx512.h"
// Lanes is a parameter of what follows.
#include "elementwise_lanes16.h"
#include "operations.h"

namespace shardmesh::avx512 {

void rms_norm(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride, Part part) {
  rms_norm_parts(x, x_stride, w, epsilon, width, tokens, out, out_stride, part);
}

void rope(float* x, int64_t stride, int heads, int head_size, const RopeTable& table, const StepRows& rows, Part part) {
  rope_parts(x, stride, heads, head_size, table, rows, part);
}

void gated_activation(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int tokens, int activation, float* out,
                      int64_t out_stride, Part part) {
  gated_activation_parts(gate, gate_stride, up, up_stride, width, tokens, activation, out, out_stride, part);
}

void finish_tree(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                 int64_t residual_stride, int64_t width, int tokens, Part part) {
  finish_tree_parts(units, node_count, lo, hi, nodes, strides, bias, residual, residual_stride, width, tokens, part);
}

bool all_finite(const float* x, int64_t count) { return finite_values(x, count); }

}  // namespace shardmesh::avx512
