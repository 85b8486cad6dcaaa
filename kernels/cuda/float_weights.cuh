// 16 bytes of a row of float weights (weight_layout.h) as fp32: 8 columns, or 4 of F32.
#pragma once
#include "device.cuh"
#include "weight_layout.h"

namespace shardmesh::cuda {

template <typename F>
__device__ __forceinline__ void widen_piece(const uint4& piece, float (&w)[F::piece_values]) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (F::type == TensorType::F32) {
      w[i] = __uint_as_float(words[i]);
    } else {
      w[2 * i] = F::type == TensorType::F16 ? low_half(words[i]) : low_bf16(words[i]);
      w[2 * i + 1] = F::type == TensorType::F16 ? high_half(words[i]) : high_bf16(words[i]);
    }
  }
}

}  // namespace shardmesh::cuda
