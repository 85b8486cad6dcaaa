// Whether values are finite, for the kernels that look at what they read.
#pragma once
#include "device.cuh"
#include "operations.h"

namespace shardmesh::cuda {

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ void note_unless_finite(float x, const FiniteCheck& check, int row) {
  if (check.least && !is_finite(x) && (!check.live_rows || row < *check.live_rows)) atomicMin(check.least, check.mark + static_cast<uint32_t>(row));
}

}  // namespace shardmesh::cuda
