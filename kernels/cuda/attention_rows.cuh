// What both attention kernels know of a step: its spans, and which keys a row sees.
#pragma once
#include "device.cuh"
#include "operations.h"

namespace shardmesh::cuda {

constexpr int kAttentionStep = 64;

__device__ __forceinline__ int oldest_key(int position, int window) { return window > 0 ? max(0, position - window + 1) : 0; }

inline Problem check_attention(const AttentionStep& step) {
  if (step.layout.key == KeyType::F32 || step.layout.value == ValueType::F32) return "attention: K and V must be int8 or f16";
  const int D = step.layout.head_size;
  if (D != 32 && D != 64 && D != 96 && D != 128 && D != 256) return "attention: the head size must be 32, 64, 96, 128 or 256";
  if (step.q_stride % 4 != 0 || reinterpret_cast<uintptr_t>(step.q) % 16 != 0) return "attention: q must be 16-byte aligned, its stride a multiple of 4";
  if (step.out_stride % 4 != 0 || reinterpret_cast<uintptr_t>(step.out) % 16 != 0) return "attention: out must be 16-byte aligned, its stride a multiple of 4";
  return nullptr;
}

}  // namespace shardmesh::cuda
