// out[t, i] = (x[t, i] * r) * w[i], r = 1 / sqrt(sum of x[t]^2 / width + epsilon)        RMSNorm: Zhang & Sennrich 2019, section 4
//   x [T, width] fp32    w [width]    out [T, width] fp32, or the quantised activations of it; out may be x
// The sum is 128 interleaved partial sums by fma ascending, then halving; a block of 128 threads is one token, a thread one partial sum. A group of 32 to
// be quantised is a warp's 32 values of one pass, so it never leaves the registers.
// Limits: width any for fp32, a multiple of 32 for quantised output.
#include "device.cuh"
#include "finite.cuh"
#include "operations.h"
#include "quantize_group.cuh"

namespace shardmesh::cuda {
namespace {

__global__ void __launch_bounds__(kPartials) rms_norm_kernel(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, float* out, int64_t out_stride,
                                                             const ActivationTiles quantized_out, const FiniteCheck check) {
  grid_dependency_wait();
  const int token = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const float* row = x + token * x_stride;
  float partial = 0.0f;
  for (int64_t i = thread; i < width; i += kPartials) partial = __fmaf_rn(row[i], row[i], partial);
  const float mean = __fdiv_rn(halving_sum_128(partial, reinterpret_cast<float*>(dynamic_shared())), __ll2float_rn(width));
  const float r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
  for (int64_t i = thread; i < width; i += kPartials) {
    const float y = __fmul_rn(__fmul_rn(row[i], r), w[i]);
    if (quantized_out.groups) {  // whole warps come here: width is a multiple of 32
      note_unless_finite(y, check, token);
      quantize_group(y, token, i / 32, width / 32, lane, quantized_out);
    } else {
      out[token * out_stride + i] = y;
    }
  }
}

}  // namespace

Problem rms_norm(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride, ActivationTiles quantized, Stream stream,
                 const FiniteCheck& check) {
  if (width < 1 || tokens < 1) return "rms_norm: width and tokens must be positive";
  if ((out == nullptr) == (quantized.groups == nullptr)) return "rms_norm: one output, fp32 or quantised";
  if (quantized.groups && width % 32 != 0) return "rms_norm: the width of quantised output must be a multiple of 32";
  return launch(rms_norm_kernel, static_cast<unsigned>(tokens), kPartials, (kPartials + 1) * 4, stream, x, x_stride, w, epsilon, width, out, out_stride, quantized, check);
}

}  // namespace shardmesh::cuda
