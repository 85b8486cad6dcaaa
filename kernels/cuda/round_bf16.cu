// Activations for bf16 products: x rounded to bf16, to nearest even, in the order in which a lane of the mma reads them (Bf16Group, weight_layout.h).
//   x    [T, K] fp32, x_stride apart       out  tiles of 8 tokens x K / 32 Bf16Group, or rows [T, K]
// A thread is two values of one token.
#include "device.cuh"
#include "operations.h"
#include "weight_layout.h"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ uint32_t rounded_pair(const float* from) { return static_cast<uint32_t>(float_to_bfloat(from[0])) | static_cast<uint32_t>(float_to_bfloat(from[1])) << 16; }

__global__ void __launch_bounds__(kThreads) round_bf16_kernel(const float* x, int64_t x_stride, int64_t columns, Bf16Group* out) {
  grid_dependency_wait();
  const int token = static_cast<int>(blockIdx.y);
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 2;
  if (k >= columns) return;
  Bf16Group& group = out[token / kTileTokens * (columns / 32) + k / 32];
  group.x[token % kTileTokens][k % 32 / 2] = rounded_pair(x + token * x_stride + k);
}

__global__ void __launch_bounds__(kThreads) round_bf16_rows_kernel(const float* x, int64_t x_stride, int64_t columns, uint16_t* out) {
  grid_dependency_wait();
  const int token = static_cast<int>(blockIdx.y);
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 2;
  if (k >= columns) return;
  *reinterpret_cast<uint32_t*>(out + token * columns + k) = rounded_pair(x + token * x_stride + k);
}

template <typename Out>
Problem launch_rounding(void (*kernel)(const float*, int64_t, int64_t, Out*), const float* x, int64_t x_stride, int tokens, int64_t columns, Out* out, Stream stream) {
  if (columns <= 0 || columns % 32 != 0) return "round_bf16: columns must be a positive multiple of 32";
  if (tokens < 1 || tokens > 65535) return "round_bf16: tokens must be in 1..65535";
  const dim3 grid(static_cast<unsigned>((columns / 2 + kThreads - 1) / kThreads), static_cast<unsigned>(tokens));
  return launch(kernel, grid, kThreads, 0, stream, x, x_stride, columns, out);
}

}  // namespace

Problem round_bf16(const float* x, int64_t x_stride, int tokens, int64_t columns, Bf16Group* out, Stream stream) {
  return launch_rounding(round_bf16_kernel, x, x_stride, tokens, columns, out, stream);
}

Problem round_bf16_rows(const float* x, int64_t x_stride, int tokens, int64_t columns, uint16_t* out, Stream stream) {
  return launch_rounding(round_bf16_rows_kernel, x, x_stride, tokens, columns, out, stream);
}

}  // namespace shardmesh::cuda
