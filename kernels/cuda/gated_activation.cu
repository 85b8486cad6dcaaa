// out[t, i] = act(gate[t, i]) * up[t, i]; silu(g) = g * sigmoid(g), gelu(g) = g * sigmoid(2 * inner(g)) (its tanh form), sigmoid(x) = 1 / (1 + exp(-x))
//   gate, up [T, width] fp32    out [T, width] fp32, or the quantised activations of it
// A warp is 32 values of one token, which are one group when they are quantised. Limit: width a multiple of 32 for quantised output.
#include "device.cuh"
#include "finite.cuh"
#include "gated_value.cuh"
#include "operations.h"
#include "quantize_group.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) gated_activation_kernel(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int activation,
                                                                    float* out, int64_t out_stride, const ActivationTiles quantized_out, const FiniteCheck check) {
  grid_dependency_wait();
  const int token = static_cast<int>(blockIdx.y);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= width) return;
  const float y = gated_value(gate[token * gate_stride + i], up[token * up_stride + i], activation);
  if (quantized_out.groups) {
    note_unless_finite(y, check, token);
    quantize_group(y, token, i / 32, width / 32, static_cast<int>(threadIdx.x % 32), quantized_out);
  } else {
    out[token * out_stride + i] = y;
  }
}

}  // namespace

Problem gated_activation(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int tokens, int activation, float* out, int64_t out_stride,
                         ActivationTiles quantized, Stream stream, const FiniteCheck& check) {
  if (width < 1 || tokens < 1 || tokens > 65535) return "gated_activation: width must be positive, tokens in 1..65535";
  if (activation != 0 && activation != 1) return "gated_activation: activation must be 0 (silu) or 1 (gelu)";
  if ((out == nullptr) == (quantized.groups == nullptr)) return "gated_activation: one output, fp32 or quantised";
  if (quantized.groups && width % 32 != 0) return "gated_activation: the width of quantised output must be a multiple of 32";
  const dim3 grid(static_cast<unsigned>((width + kThreads - 1) / kThreads), static_cast<unsigned>(tokens));
  return launch(gated_activation_kernel, grid, kThreads, 0, stream, gate, gate_stride, up, up_stride, width, activation, out, out_stride, quantized, check);
}

}  // namespace shardmesh::cuda
