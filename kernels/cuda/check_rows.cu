// Notes the first row of x [rows, width] that holds a value that is not finite: for rows that leave this shard, or the layers, as they are.
// A thread is one value. Limits: at most 65,535 rows.
#include "device.cuh"
#include "finite.cuh"
#include "operations.h"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) check_rows_kernel(const float* x, int64_t x_stride, int64_t width, const FiniteCheck check) {
  grid_dependency_wait();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int row = static_cast<int>(blockIdx.y);
  if (i < width) note_unless_finite(x[row * x_stride + i], check, row);
}

}  // namespace

Problem check_rows(const float* x, int64_t x_stride, int rows, int64_t width, const FiniteCheck& check, Stream stream) {
  if (width < 1 || rows < 1 || rows > 65535) return "check_rows: width must be positive, rows in 1..65535";
  const dim3 grid(static_cast<unsigned>((width + kThreads - 1) / kThreads), static_cast<unsigned>(rows));
  return launch(check_rows_kernel, grid, kThreads, 0, stream, x, x_stride, width, check);
}

}  // namespace shardmesh::cuda
