// RMSNorm of a few rows by one block of any number of warps, quantised: formula, order of the sum and bits of rms_norm.cu. For kernels that have just finished the rows
// (linear_fused, finish_tree), in the block that comes last (arrivals.cuh).
#pragma once
#include "device.cuh"
#include "finite.cuh"
#include "operations.h"
#include "quantize_group.cuh"

namespace shardmesh::cuda {

// shared: kPartials floats a row. Width: a multiple of 32.
__device__ __forceinline__ void norm_rows(const NormAfter& norm, const float* x, int64_t x_stride, int width, int rows, float* shared) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), groups = width / 32;
  for (int i = thread; i < rows * kPartials; i += threads) shared[i] = partial_of_squares(x + i / kPartials * x_stride, i % kPartials, width);
  for (int distance = kPartials / 2; distance; distance /= 2) {
    __syncthreads();
    for (int i = thread; i < rows * distance; i += threads) {
      float* sums = shared + i / distance * kPartials + i % distance;
      sums[0] = __fadd_rn(sums[0], sums[distance]);
    }
  }
  __syncthreads();
#pragma unroll 4
  for (int i = thread / 32; i < rows * groups; i += threads / 32) {
    const int row = i / groups, group = i % groups, lane = thread % 32, k = group * 32 + lane;
    const float mean = __fdiv_rn(shared[row * kPartials], __ll2float_rn(width));
    const float r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, norm.epsilon)));
    const float y = __fmul_rn(__fmul_rn(x[row * x_stride + k], r), norm.weight[k]);
    note_unless_finite(y, norm.check, norm.first_row + row);
    quantize_group(y, norm.first_row + row, group, groups, lane, norm.quantized);
  }
}

}  // namespace shardmesh::cuda
