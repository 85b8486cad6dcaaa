// What a card can do at most, measured beside our kernels in the same run: bytes copied, bytes read, products of fragments from registers (mma.sync, which is also what our
// kernels are made of; a card's wgmma peak is higher).
#include "../../kernels/cuda/device.cuh"
#include "bench_card.h"

namespace shardmesh::bench {
namespace {

using cuda::launch;
using cuda::Problem;
using cuda::Stream;

constexpr int kThreads = 256, kBlocksOfMultiprocessor = 8, kMultiplyBlocks = 2, kChains = 8;

__global__ void copy_kernel(uint4* to, const uint4* from, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) to[i] = from[i];
}

__global__ void read_kernel(const uint4* from, int64_t count, uint32_t* sink) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t all = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint4 v = from[i];
    all ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (all == 0x9e3779b9u) *sink = all;  // so that nothing of it can be left out
}

#if defined(__CUDACC__)
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { cuda::mma_bf16_k16(d, a, b); }
#endif

// As many independent chains a warp as hide one product behind the others.
template <Multiply kind, typename Sum>
__global__ void __launch_bounds__(kThreads) multiply_kernel(int iterations, uint32_t* sink) {
  const uint32_t seed = threadIdx.x * 0x01010101u & 0x3f3f3f3fu;
  const uint32_t a[4] = {seed, seed + 1, seed + 2, seed + 3}, b[2] = {seed ^ 0x05050505u, seed ^ 0x03030303u};
  Sum sums[kChains][4] = {};
  for (int i = 0; i < iterations; i++)
#pragma unroll
    for (int c = 0; c < kChains; c++) {
      if constexpr (kind == Multiply::Int8) cuda::mma_s8s8_k32(sums[c], a, b);
      else multiply_bf16(sums[c], a, b);
    }
  Sum all = 0;
  for (int c = 0; c < kChains; c++)
    for (int j = 0; j < 4; j++) all += sums[c][j];
  if (all == static_cast<Sum>(0x1234567)) *sink = 1;
}

}  // namespace

Problem copy_bytes(void* to, const void* from, size_t bytes, int multiprocessors, Stream stream) {
  return launch(copy_kernel, static_cast<unsigned>(multiprocessors * kBlocksOfMultiprocessor), kThreads, 0, stream, static_cast<uint4*>(to), static_cast<const uint4*>(from),
                static_cast<int64_t>(bytes / 16));
}

Problem read_bytes(const void* from, size_t bytes, uint32_t* sink, int multiprocessors, Stream stream) {
  return launch(read_kernel, static_cast<unsigned>(multiprocessors * kBlocksOfMultiprocessor), kThreads, 0, stream, static_cast<const uint4*>(from), static_cast<int64_t>(bytes / 16), sink);
}

Problem multiply_fragments(Multiply kind, int iterations, uint32_t* sink, int multiprocessors, Stream stream) {
  const unsigned blocks = static_cast<unsigned>(multiprocessors * kMultiplyBlocks);
  return kind == Multiply::Int8 ? launch(multiply_kernel<Multiply::Int8, int>, blocks, kThreads, 0, stream, iterations, sink)
                                : launch(multiply_kernel<Multiply::Bf16, float>, blocks, kThreads, 0, stream, iterations, sink);
}

double fragment_operations(Multiply kind, int multiprocessors) {
  return 2.0 * 16 * 8 * (kind == Multiply::Int8 ? 32 : 16) * kChains * (kThreads / 32) * kMultiplyBlocks * multiprocessors;
}

}  // namespace shardmesh::bench
