// Rotates q in place, rotates k, quantises k and v, and writes both into the cache: three operations of a program in one pass over q, k and v.
//   (a, b) of a pair becomes (a c - b s, a s + b c), c and s from the table at the token's position        Su et al. 2021
//   q [T, q_heads * D]    k, v [T, layout.heads * D]    cache: layout in kernels/include/kernel_set.h, K and V int8 or f16
// A warp is one head of one token (rope_head.cuh).
// Limits: D a multiple of 32, at most 256.
#include "device.cuh"
#include "operations.h"
#include "rope_head.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kWarps = 4;

__global__ void __launch_bounds__(kWarps * 32) rope_store_kv_kernel(const RopeStore step) {
  grid_dependency_wait();
  const int lane = static_cast<int>(threadIdx.x % 32), item = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  if (item < step.q_heads + 2 * step.layout.heads)
    rope_store_head(step, item, static_cast<int>(blockIdx.y), lane, reinterpret_cast<float*>(dynamic_shared()) + threadIdx.x / 32 * kHeadSizeMax);
}

}  // namespace

Problem rope_store_kv(const RopeStore& step, Stream stream) {
  if (const Problem problem = check_rope_store(step)) return problem;
  const dim3 grid(static_cast<unsigned>((step.q_heads + 2 * step.layout.heads + kWarps - 1) / kWarps), static_cast<unsigned>(step.rows.tokens));
  return launch(rope_store_kv_kernel, grid, kWarps * 32, kWarps * kHeadSizeMax * 4, stream, step);
}

}  // namespace shardmesh::cuda
