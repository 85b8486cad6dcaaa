// Quantises one group of 32 activations that a warp holds, a value a lane, into the fragment order of weight_layout.h. Shared by the kernels that make
// activations: quantize, rms_norm, gated_activation.
#pragma once
#include "device.cuh"
#include "weight_layout.h"

namespace shardmesh::cuda {

__device__ __forceinline__ void quantize_group(float x, int token, int64_t group, int64_t groups, int lane, ActivationGroup* out) {
  const float amax = warp_magnitude(x);
  const int q = quantized(x, amax), sum = __reduce_add_sync(kWholeWarp, q);
  ActivationGroup& target = out[token / kTileTokens * groups + group];
  const int column = token % kTileTokens;
  // Byte of value `lane`: lane 4 * column + (value mod 16) / 4 of the fragment, word value / 16.
  reinterpret_cast<int8_t*>(target.q)[(4 * column + lane % 16 / 4) * 8 + lane / 16 * 4 + lane % 4] = static_cast<int8_t>(q);
  if (lane == 0) {
    const float sa = quantized_scale(amax);
    target.sa[column] = sa;
    target.ms[column] = __fmul_rn(sa, __int2float_rn(sum));
    target.sum[column] = sum;
  }
}

}  // namespace shardmesh::cuda
