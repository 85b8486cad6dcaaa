// What our kernels need of the card beyond CUDA C++: the operations that exist as PTX only, and the arithmetic of kernels/include/arithmetic.h as device
// functions. Under test the first part comes from test/kernels/simt/cuda_source.h instead, which is included ahead of every kernel.
//
// Built with -fmad=false -ftz=true: a fused multiply-add happens where __fmaf_rn is written, and denormals are zero. Division and square root are IEEE's.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <tuple>

namespace shardmesh::cuda {

__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(16) uint8_t bytes[];
  return bytes;
}

// --- programmatic dependent launch (sm_90 and later): CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, "griddepcontrol"
//
// Every thread of every kernel of a step calls this once, before its first access to memory that a kernel or a copy writes. Where a graph's edge is programmatic (runtime.h), the
// kernel may have started when those before it had not ended. The wait ends when the grids that an edge leads from have ended and what they wrote can be seen. It says nothing
// about grids before those: that they have ended as well follows from their successors having waited in their turn, which is why no kernel may leave the wait out, not even
// one that reads nothing of its predecessor's; and only behind the wait may a kernel write what an earlier one still reads. Where no edge is programmatic it ends at once.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The line of 128 bytes at `p` is asked for, into the second-level cache: what a kernel may do with memory before the wait, since it has no result. Nothing before sm_90.
__device__ __forceinline__ void prefetch_l2(const void* p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  static_cast<void>(p);
#endif
}

// --- asynchronous copies from global to shared memory; bytes behind `source_bytes` become zero
template <int bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int source_bytes = bytes) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(source_bytes) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(bytes), "r"(source_bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// --- products of fragments: d += a b. A lane's registers: PTX ISA, "Matrix Fragments for mma.m16n8k32" and "mma.m16n8k16"
#define SHARDMESH_MMA_K32(name, a_type, b_type)                                                                                              \
  __device__ __forceinline__ void name(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                                        \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." a_type "." b_type ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"             \
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                                                 \
  }                                                                                                                                          \
  /* d = c + a b, c apart from d: it stays where it is for the next product, and d need not be filled first. */                            \
  __device__ __forceinline__ void name##_onto(int (&d)[4], const int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {             \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." a_type "." b_type ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"         \
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));                     \
  }
SHARDMESH_MMA_K32(mma_s8s8_k32, "s8", "s8")
SHARDMESH_MMA_K32(mma_u8s8_k32, "u8", "s8")
#undef SHARDMESH_MMA_K32
__device__ __forceinline__ void mma_s8s8_k16(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

__device__ __forceinline__ void mma_bf16_k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x > limit ? y : 0, never as a branch around what y is made of: a branch for each of many values leaves nothing to do while one is waited for.
__device__ __forceinline__ float where_above(float x, float limit, float y) {
  float selected;
  asm("{\n .reg .pred above;\n setp.gt.f32 above, %1, %2;\n selp.f32 %0, %3, 0f00000000, above;\n}" : "=f"(selected) : "f"(x), "f"(limit), "f"(y));
  return selected;
}

// Keeps the compiler from computing a value anew where it could keep it.
__device__ __forceinline__ void keep(int& value) { asm volatile("" : "+r"(value)); }

// c + sum of four products of bytes, unsigned and signed.
__device__ __forceinline__ int dp4a_u8s8(uint32_t a, uint32_t b, int c) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Half and bfloat16 as their 16 bits.
__device__ __forceinline__ float half_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ uint16_t float_to_half(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ uint16_t float_to_bfloat(float f) {
  uint16_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
  return b;
}

// Everything that this thread has written, or seen written, is there for whoever reads `value` with acquire, the host too.
__device__ __forceinline__ void store_release_system(uint32_t* word, uint32_t value) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory"); }

}  // namespace shardmesh::cuda

#elif !defined(SHARDMESH_SIMT)
#error "kernels/cuda is compiled by nvcc, or by a C++ compiler with test/kernels/simt/cuda_source.h included first"
#endif

namespace shardmesh::cuda {

constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr float kQuantizableMin = 0x1p-100f;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

// For a warp that is about to read `bytes` bytes of weights from `first` on, while it still waits for its activations: a line a lane.
__device__ __forceinline__ void prefetch_weights(const uint8_t* first, int bytes, int lane) {
  if (lane * 128 < bytes) prefetch_l2(first + lane * 128);
}

// An integer product that begins at the bits of 1.5 * 2^23 is, read as fp32, that plus the product while its magnitude is below 2^22, exactly: conversions of integers have a
// quarter or less of the rate of additions.
constexpr float kBias = 12582912.0f;
constexpr int kBiasBits = 0x4b400000;

// Not fmaxf: this one keeps the first of equal values, as the reference does.
__device__ __forceinline__ float larger(float a, float b) { return a < b ? b : a; }

// exp of x - n ln 2, where n is the integer next to x / ln 2.
__device__ __forceinline__ float exp_of_rest(float x, float n) {
  float r = __fmaf_rn(n, -0.693145751953125f, x);
  r = __fmaf_rn(n, -1.42860682030941723e-6f, r);
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  p = __fmaf_rn(p, __fmul_rn(r, r), r);
  return __fadd_rn(p, 1.0f);
}

// exp_fixed of arithmetic.h, step by step.
__device__ __forceinline__ float exp_fixed(float x) {
  if (!(x > -87.0f)) return 0.0f;
  if (x > 88.0f) x = 88.0f;
  const int n_int = __float2int_rn(__fmul_rn(x, 1.44269504088896341f));
  const float n = __int2float_rn(n_int);
  return __fmul_rn(exp_of_rest(x, n), __int_as_float((n_int + 127) << 23));
}

// exp_fixed of an x that is at most 0, or NaN: the same bits in fewer instructions. The integer is found by adding 1.5 * 2^23, whose lower bits are zeros: no conversions.
__device__ __forceinline__ float exp_not_positive(float x) {
  const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896341f), kBias), n = __fadd_rn(shifted, -kBias);
  return where_above(x, -87.0f, __fmul_rn(exp_of_rest(x, n), __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23))));
}

// Largest |x| of the warp's lanes, in every lane. Bits of magnitudes order like the magnitudes; NaN counts as 0, as in the reference.
__device__ __forceinline__ float warp_magnitude(float x) {
  const uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
  return __uint_as_float(__reduce_max_sync(kWholeWarp, bits > 0x7f800000u ? 0u : bits));
}

// Largest of the warp's lanes, in every lane; none is NaN. As integers in the order of the floats, so that it is one instruction; -0 is below 0.
__device__ __forceinline__ float warp_largest(float x) {
  const int bits = __float_as_int(x);
  const int most = __reduce_max_sync(kWholeWarp, bits < 0 ? bits ^ 0x7fffffff : bits);
  return __int_as_float(most < 0 ? most ^ 0x7fffffff : most);
}

// One value of a thing with the largest magnitude `amax`, as an integer of at most `largest`: 127 for int8; 0 when the thing counts as zero.
__device__ __forceinline__ int quantized(float x, float amax, float largest = 127.0f) {
  return amax >= kQuantizableMin ? __float2int_rn(__fmul_rn(x, __fdiv_rn(largest, amax))) : 0;
}
__device__ __forceinline__ float quantized_scale(float amax, float largest = 127.0f) { return amax >= kQuantizableMin ? __fdiv_rn(amax, largest) : 0.0f; }

// Weights of a pair as their float values: of halves, of bf16.
__device__ __forceinline__ float low_half(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair)); }
__device__ __forceinline__ float high_half(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair >> 16)); }
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

constexpr int kPartials = 128;

// Partial sum `first` of the squares of a row: of its values first, first + 128 and so on, by fma ascending. Loads do not wait for the sum, so that many are under way at once.
__device__ __forceinline__ float partial_of_squares(const float* row, int first, int width) {
  constexpr int kAhead = 16;
  float partial = 0.0f;
  int i = first;
  for (; i + (kAhead - 1) * kPartials < width; i += kAhead * kPartials) {
    float x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; k++) x[k] = row[i + k * kPartials];
#pragma unroll
    for (int k = 0; k < kAhead; k++) partial = __fmaf_rn(x[k], x[k], partial);
  }
#pragma unroll 4
  for (; i < width; i += kPartials) partial = __fmaf_rn(row[i], row[i], partial);
  return partial;
}

// Halving sum (distance 64, 32, ... 1) of the values of a block's first 128 threads, in every thread of the block. `shared`: 129 floats.
__device__ __forceinline__ float halving_sum_128(float v, float* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kPartials) shared[thread] = v;
  __syncthreads();
  if (thread < 32) {
    // Distances 64 and 32 by hand, the others between lanes: a + b is b + a, so every lane below the distance has the written sum.
    v = __fadd_rn(__fadd_rn(v, shared[thread + 64]), __fadd_rn(shared[thread + 32], shared[thread + 96]));
    for (int distance = 16; distance; distance /= 2) v = __fadd_rn(v, __shfl_xor_sync(kWholeWarp, v, distance));
    if (thread == 0) shared[kPartials] = v;
  }
  __syncthreads();
  return shared[kPartials];
}

// tree(n) = tree(ceil(n / 2)) + tree(rest) over leaf[0], leaf[stride], ...
template <int n>
__device__ __forceinline__ float tree_of(const float* leaf, int stride) {
  if constexpr (n == 1) {
    return leaf[0];
  } else {
    constexpr int left = (n + 1) / 2;
    return __fadd_rn(tree_of<left>(leaf, stride), tree_of<n - left>(leaf + left * stride, stride));
  }
}
__device__ __forceinline__ float tree_sum(const float* leaf, int count, int stride) {
  switch (count) {
    case 1: return tree_of<1>(leaf, stride);
    case 2: return tree_of<2>(leaf, stride);
    case 3: return tree_of<3>(leaf, stride);
    case 4: return tree_of<4>(leaf, stride);
    case 5: return tree_of<5>(leaf, stride);
    case 6: return tree_of<6>(leaf, stride);
    case 7: return tree_of<7>(leaf, stride);
    case 8: return tree_of<8>(leaf, stride);
    case 9: return tree_of<9>(leaf, stride);
    case 10: return tree_of<10>(leaf, stride);
    case 11: return tree_of<11>(leaf, stride);
    case 12: return tree_of<12>(leaf, stride);
    case 13: return tree_of<13>(leaf, stride);
    case 14: return tree_of<14>(leaf, stride);
    case 15: return tree_of<15>(leaf, stride);
    default: return tree_of<16>(leaf, stride);
  }
}

#if defined(__CUDACC__)
// runtime.cpp: queues a kernel on a stream, or makes it a node of the graph that this thread builds.
const char* queue_kernel(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments, void* stream);

// Queues a kernel. Null, or what the runtime says.
template <typename... Parameters, typename... Given>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Given... given) {
  std::tuple<Parameters...> values(given...);
  return std::apply(
      [&](auto&... value) {
        void* arguments[] = {&value...};
        return queue_kernel(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, arguments, stream);
      },
      values);
}
#endif

}  // namespace shardmesh::cuda
