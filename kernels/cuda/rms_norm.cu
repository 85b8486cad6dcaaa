// out[t, i] = (x[t, i] * r) * w[i], r = 1 / sqrt(sum of x[t]^2 / width + epsilon)        RMSNorm: Zhang & Sennrich 2019, section 4
//   x [T, width] fp32    w [width]    out [T, width] fp32, or the quantised activations of it; out may be x
// The sum is 128 interleaved partial sums by fma ascending, then halving; a block is one token, each of its first 128 threads one partial sum. All warps scale: a group of 32 to
// be quantised is a warp's 32 values of one pass, so it never leaves the registers. One block has to do it all for a single token, and what it waits for is memory: a row is read
// once, all of it at once, and summed from shared memory (4,096 values on an H200: 14 us with one load after the other, 5.2 with 16 at once).
// Limits: width any below 2^24 for fp32, a multiple of 32 for quantised output.
#include "device.cuh"
#include "finite.cuh"
#include "operations.h"
#include "quantize_group.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kThreadsMax = 512;

// own: values of a thread in registers; 0: rows that are too wide for that are read twice.
template <int own>
__global__ void __launch_bounds__(kThreadsMax, 1) rms_norm_kernel(const float* x, int64_t x_stride, const float* w, float epsilon, int width, float* out, int64_t out_stride,
                                                               const ActivationTiles quantized_out, const FiniteCheck check) {
  grid_dependency_wait();
  const int token = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 32;
  const float* row = x + token * x_stride;
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  float values[own ? own : 1], weights[own ? own : 1];
  if constexpr (own > 0) {
    float* staged = shared + kPartials + 4;
#pragma unroll
    for (int k = 0; k < own; k++) {
      const int i = thread + k * threads;
      values[k] = i < width ? row[i] : 0.0f;
      weights[k] = i < width ? w[i] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < own; k++)
      if (thread + k * threads < width) staged[thread + k * threads] = values[k];
    __syncthreads();
    row = staged;
  }
  const float partial = thread < kPartials ? partial_of_squares(row, thread, width) : 0.0f;
  const float mean = __fdiv_rn(halving_sum_128(partial, shared), __int2float_rn(width));
  const float r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
  const auto put = [&](int i, float value, float weight) {
    const float y = __fmul_rn(__fmul_rn(value, r), weight);
    if (quantized_out.groups) {  // whole warps come here: width is a multiple of 32
      note_unless_finite(y, check, token);
      quantize_group(y, token, i / 32, width / 32, lane, quantized_out);
    } else {
      out[token * out_stride + i] = y;
    }
  };
  if constexpr (own > 0) {
#pragma unroll
    for (int k = 0; k < own; k++)
      if (thread + k * threads < width) put(thread + k * threads, values[k], weights[k]);
  } else {
#pragma unroll 4
    for (int i = thread; i < width; i += threads) put(i, row[i], w[i]);
  }
}

}  // namespace

Problem rms_norm(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride, ActivationTiles quantized, Stream stream,
                 const FiniteCheck& check) {
  if (width < 1 || width >= 1 << 24 || tokens < 1) return "rms_norm: width must be in 1..2^24 - 1, tokens positive";
  if ((out == nullptr) == (quantized.groups == nullptr)) return "rms_norm: one output, fp32 or quantised";
  if (quantized.groups && width % 32 != 0) return "rms_norm: the width of quantised output must be a multiple of 32";
  // Whole warps, a group each in a pass or two.
  const int threads = width < 2 * kPartials ? kPartials : width < kThreadsMax ? static_cast<int>(width) / 32 * 32 : kThreadsMax;
  const int own = (static_cast<int>(width) + threads - 1) / threads;
  const auto run = [&](auto kernel, bool stages) {
    const size_t shared = (kPartials + 4 + (stages ? static_cast<size_t>(width) : 0)) * 4;
    return launch(kernel, static_cast<unsigned>(tokens), static_cast<unsigned>(threads), shared, stream, x, x_stride, w, epsilon, static_cast<int>(width), out, out_stride, quantized, check);
  };
  return own <= 2 ? run(rms_norm_kernel<2>, true) : own <= 8 ? run(rms_norm_kernel<8>, true) : own <= 16 ? run(rms_norm_kernel<16>, true) : run(rms_norm_kernel<0>, false);
}

}  // namespace shardmesh::cuda
