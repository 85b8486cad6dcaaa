// Activations for integer products: for each token and group of 32, amax, sa = amax / 127, q = rne(x * (127 / amax)), ms = sa * float(sum q).
// As int16 the same with 32512 = 127 * 256 in the place of 127.
//   x    [T, K] fp32, x_stride apart       out  tiles of 8 tokens x K / 32 ActivationGroup or WideGroup (weight_layout.h)
// A warp is one group of one token, a lane one value; sums and maxima over lanes are integers.
#include "device.cuh"
#include "finite.cuh"
#include "operations.h"
#include "quantize_group.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kWarps = 4;

__global__ void __launch_bounds__(kWarps * 32) quantize_kernel(const float* x, int64_t x_stride, int64_t groups, const ActivationTiles out, const FiniteCheck check) {
  grid_dependency_wait();
  const int token = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (group >= groups) return;
  const float value = x[token * x_stride + group * 32 + lane];
  note_unless_finite(value, check, token);
  quantize_group(value, token, group, groups, lane, out);
}

}  // namespace

Problem quantize(const float* x, int64_t x_stride, int tokens, int64_t columns, ActivationTiles out, Stream stream, const FiniteCheck& check) {
  if (columns <= 0 || columns % 32 != 0) return "quantize: columns must be a positive multiple of 32";
  if (tokens < 1 || tokens > 65535) return "quantize: tokens must be in 1..65535";
  const int64_t groups = columns / 32;
  return launch(quantize_kernel, dim3(static_cast<unsigned>((groups + kWarps - 1) / kWarps), static_cast<unsigned>(tokens)), kWarps * 32, 0, stream, x, x_stride, groups, out, check);
}

}  // namespace shardmesh::cuda
