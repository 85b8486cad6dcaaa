// Rows as they are: copied to where the output tail reads them, or looked at.
//   select_rows   out[r, i] = x[from[r], i]
//   check_rows    notes the first row of x that holds a value that is not finite
// A thread is one value of a row. Limits: at most 65,535 rows.
#include "device.cuh"
#include "finite.cuh"
#include "operations.h"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) select_rows_kernel(const float* x, int64_t x_stride, const int32_t* from, int64_t width, float* out, int64_t out_stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y;
  if (i < width) out[row * out_stride + i] = x[from[row] * x_stride + i];
}

__global__ void __launch_bounds__(kThreads) check_rows_kernel(const float* x, int64_t x_stride, int64_t width, const FiniteCheck check) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int row = static_cast<int>(blockIdx.y);
  if (i < width) note_unless_finite(x[row * x_stride + i], check, row);
}

dim3 grid_of(int rows, int64_t width) { return dim3(static_cast<unsigned>((width + kThreads - 1) / kThreads), static_cast<unsigned>(rows)); }

}  // namespace

Problem select_rows(const float* x, int64_t x_stride, const int32_t* from, int rows, int64_t width, float* out, int64_t out_stride, Stream stream) {
  if (width < 1 || rows < 1 || rows > 65535) return "select_rows: width must be positive, rows in 1..65535";
  return launch(select_rows_kernel, grid_of(rows, width), kThreads, 0, stream, x, x_stride, from, width, out, out_stride);
}

Problem check_rows(const float* x, int64_t x_stride, int rows, int64_t width, const FiniteCheck& check, Stream stream) {
  if (width < 1 || rows < 1 || rows > 65535) return "check_rows: width must be positive, rows in 1..65535";
  return launch(check_rows_kernel, grid_of(rows, width), kThreads, 0, stream, x, x_stride, width, check);
}

}  // namespace shardmesh::cuda
