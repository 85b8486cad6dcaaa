// One value of a gated activation; formulas in gated_activation.cu. Shared with linear_fused.
#pragma once
#include "device.cuh"

namespace shardmesh::cuda {

__device__ __forceinline__ float sigmoid_fixed(float x) { return __fdiv_rn(1.0f, __fadd_rn(1.0f, exp_fixed(-x))); }
__device__ __forceinline__ float gelu_inner(float g) { return __fmul_rn(0.7978845608f, __fmaf_rn(__fmul_rn(0.044715f, __fmul_rn(g, g)), g, g)); }

// activation 0: silu, 1: gelu (tanh form).
__device__ __forceinline__ float gated_value(float gate, float up, int activation) {
  return __fmul_rn(__fmul_rn(gate, sigmoid_fixed(activation == 0 ? gate : __fmul_rn(2.0f, gelu_inner(gate)))), up);
}

}  // namespace shardmesh::cuda
