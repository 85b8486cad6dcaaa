// What each CPU kernel set is made of: one namespace a set, one file an operation and set (`linear_avx2.cpp`, `attention_avx512.cpp`, ...).
// kernel_sets.cpp puts the tables together and is the only place that asks the machine what it can run.
//
// Arguments, layouts and arithmetic: kernels/include/kernel_set.h and ARCHITECTURE.md "Arithmetic".
//
// Files built for an instruction set (`*_avx2.cpp`, `*_avx512.cpp`) define only these functions with external linkage; everything else they hold or
// include lies in anonymous namespaces, or the linker could pick an AVX-512 copy of an inline function for the baseline.
//
// A 16-lane kernel is written once against the names of simd_avx512.h, as `<operation>_lanes16.h`, and built twice: with simd_avx512.h for `avx512`, with
// simd_portable.h (the same names in plain C++) for `portable`. Testing `portable` on any machine therefore tests the source of `avx512`.
#pragma once
#include "../include/kernel_set.h"

namespace shardmesh {

#define SHARDMESH_DECLARE_OPERATIONS                                                                                                              \
  /* linear_*.cpp, pack.cpp */                                                                                                                    \
  bool quantize_int8(const Activations& in, Part part);                                                                                           \
  void linear_int8(const LinearArguments& arguments, Part part);                                                                                  \
  /* linear_int16_*.cpp */                                                                                                                        \
  bool quantize_int16(const Activations& in, Part part);                                                                                          \
  void linear_int16(const LinearArguments& arguments, Part part);                                                                                 \
  /* elementwise_*.cpp */                                                                                                                         \
  void rms_norm(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride,       \
                Part part);                                                                                                                       \
  void rope(float* x, int64_t stride, int heads, int head_size, const RopeTable& table, const StepRows& rows, Part part);                         \
  void gated_activation(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int tokens, int activation,    \
                        float* out, int64_t out_stride, Part part);                                                                               \
  void finish_tree(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, \
                   float* residual, int64_t residual_stride, int64_t width, int tokens, Part part);                                               \
  bool all_finite(const float* x, int64_t count);                                                                                                 \
  /* attention_*.cpp */                                                                                                                           \
  bool store_kv(const float* k, int64_t k_stride, const float* v, int64_t v_stride, const KvLayout& layout, uint8_t* cache,                       \
                const StepRows& rows, Part part);                                                                                                 \
  size_t attention_scratch_bytes(int heads, int head_size, int tokens_max);                                                                       \
  void attention(const AttentionArguments& arguments, Part part);

namespace portable { SHARDMESH_DECLARE_OPERATIONS }
namespace avx2 { SHARDMESH_DECLARE_OPERATIONS }
namespace avx512 { SHARDMESH_DECLARE_OPERATIONS }
// Tiles multiply; all the rest is done as avx512 does it.
namespace amx {
bool quantize_int8(const Activations& in, Part part);
void linear_int8(const LinearArguments& arguments, Part part);
bool quantize_int16(const Activations& in, Part part);
void linear_int16(const LinearArguments& arguments, Part part);
using avx512::all_finite;
using avx512::attention;
using avx512::attention_scratch_bytes;
using avx512::finish_tree;
using avx512::gated_activation;
using avx512::rms_norm;
using avx512::rope;
using avx512::store_kv;
}  // namespace amx

#undef SHARDMESH_DECLARE_OPERATIONS

// pack.cpp: one layout for all CPU sets, so packing and reading back a row need no instruction set.
size_t packed_bytes(const MatrixSource& source);
void pack(const MatrixSource& source, PackedMatrix* out, Part part);
void read_row(const PackedMatrix& matrix, int64_t row, float* out);
size_t activation_bytes(ActivationType type, int tokens_max, int64_t columns);

}  // namespace shardmesh
