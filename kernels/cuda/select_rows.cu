// out[r, i] = x[from[r], i]: the rows that the output tail reads, side by side.
//   x [T, width] fp32    from [rows]    out [rows, width]
// A thread is one value. Limits: at most 65,535 rows.
#include "device.cuh"
#include "operations.h"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) select_rows_kernel(const float* x, int64_t x_stride, const int32_t* from, int64_t width, float* out, int64_t out_stride) {
  grid_dependency_wait();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y;
  if (i < width) out[row * out_stride + i] = x[from[row] * x_stride + i];
}

}  // namespace

Problem select_rows(const float* x, int64_t x_stride, const int32_t* from, int rows, int64_t width, float* out, int64_t out_stride, Stream stream) {
  if (width < 1 || rows < 1 || rows > 65535) return "select_rows: width must be positive, rows in 1..65535";
  const dim3 grid(static_cast<unsigned>((width + kThreads - 1) / kThreads), static_cast<unsigned>(rows));
  return launch(select_rows_kernel, grid, kThreads, 0, stream, x, x_stride, from, width, out, out_stride);
}

}  // namespace shardmesh::cuda
