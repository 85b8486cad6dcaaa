// Quantises one group of 32 activations that a warp holds, a value a lane, into the fragment order of weight_layout.h. Shared by the kernels that make
// activations: quantize, rms_norm, gated_activation.
#pragma once
#include "device.cuh"
#include "operations.h"
#include "weight_layout.h"

namespace shardmesh::cuda {

__device__ __forceinline__ void quantize_group(float x, int token, int64_t group, int64_t groups, int lane, const ActivationTiles& out) {
  const bool wide = out.type == ActivationType::Int16;
  const float amax = warp_magnitude(x), largest = wide ? static_cast<float>(kInt16Max) : 127.0f;
  const int q = quantized(x, amax, largest), sum = __reduce_add_sync(kWholeWarp, q);
  const int64_t at = token / kTileTokens * groups + group;
  const int column = token % kTileTokens;
  // Byte of value `lane`: lane 4 * column + (value mod 16) / 4 of the fragment, word value / 16.
  const int byte = (4 * column + lane % 16 / 4) * 8 + lane / 16 * 4 + lane % 4;
  ActivationGroup* target = out.groups + at;
  if (wide) {
    WideGroup& both = reinterpret_cast<WideGroup*>(out.groups)[at];
    const int low = static_cast<int8_t>(q);
    reinterpret_cast<int8_t*>(both.low)[byte] = static_cast<int8_t>(low);
    reinterpret_cast<int8_t*>(both.high.q)[byte] = static_cast<int8_t>((q - low) / 256);
    target = &both.high;
  } else {
    reinterpret_cast<int8_t*>(target->q)[byte] = static_cast<int8_t>(q);
  }
  if (lane == 0) {
    const float sa = quantized_scale(amax, largest);
    target->scale[column] = {sa, __fmul_rn(sa, __int2float_rn(sum))};
  }
}

}  // namespace shardmesh::cuda
