// The part of CUDA C++ that our kernels are written in, for g++: included ahead of a .cu file, it makes that file a test's C++ (machine.h says what of).
//
// Missing on purpose, so that a kernel that uses it does not build: static __shared__ arrays (kernels take dynamic shared memory, dynamic_shared() below),
// __activemask, float atomics, fast-math functions, textures. The operations that CUDA has as PTX only carry the names that kernels/cuda/device.cuh gives them.
//
// "Site" is the place in the source of the call: two copies of a call that a compiler makes are one site, and so are two calls of one helper function.
#pragma once
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"
#include "system_memory.h"

#define SHARDMESH_SIMT 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define threadIdx (simt::place->thread)
#define blockIdx (simt::place->block)
#define blockDim (simt::place->block_size)
#define gridDim (simt::place->grid_size)

// ---------------------------------------------------------------- types

struct dim3 : simt::Dim {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : simt::Dim{x_, y_, z_} {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) int2 { int32_t x, y; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---------------------------------------------------------------- warp operations

template <typename T>
struct Exchange {
  T value;
  int source;  // lane
};

template <typename T>
T exchange(const char* operation, uint32_t mask, T value, int source, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Exchange<T> slot{value, source};
  meet_warp(operation, mask, site, &slot, [](void* const* slots, uint32_t lanes, const Site& at) {
    T results[32];
    for (unsigned l = 0; l < 32; l++) {
      if (!(lanes >> l & 1)) continue;
      const int from = static_cast<Exchange<T>*>(slots[l])->source;
      if (!(lanes >> from & 1)) fault(at, "lane %u reads from lane %d, which is not in mask %08x", l, from, lanes);
      results[l] = static_cast<Exchange<T>*>(slots[from])->value;
    }
    for (unsigned l = 0; l < 32; l++)
      if (lanes >> l & 1) static_cast<Exchange<T>*>(slots[l])->value = results[l];
  });
  return slot.value;
}

// Folds the values of all lanes in lane order; integers only, whose sums have no order.
template <typename T, typename Fold>
T reduce(const char* operation, uint32_t mask, T value, const Site& site, Fold) {
  static_assert(std::is_integral_v<T> && std::is_empty_v<Fold>);
  T slot = value;
  meet_warp(operation, mask, site, &slot, [](void* const* slots, uint32_t lanes, const Site&) {
    bool first = true;
    T sum{};
    for (unsigned l = 0; l < 32; l++) {
      if (!(lanes >> l & 1)) continue;
      const T v = *static_cast<T*>(slots[l]);
      sum = first ? v : Fold{}(sum, v);
      first = false;
    }
    for (unsigned l = 0; l < 32; l++)
      if (lanes >> l & 1) *static_cast<T*>(slots[l]) = sum;
  });
  return slot;
}

struct Ballot {
  bool predicate;
  uint32_t result;
};

}  // namespace simt

#define SIMT_SITE const simt::Site& site = simt::Site::current()

inline void __syncthreads(SIMT_SITE) { simt::meet_block(site); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_SITE) {
  simt::meet_warp("__syncwarp", mask, site, nullptr, [](void* const*, uint32_t, const simt::Site&) {});
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::lane());
  return simt::exchange("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::lane()), source = lane ^ distance;
  // A lane beyond the own part of `width` lanes gives the own value.
  return simt::exchange("__shfl_xor_sync", mask, value, (source | (width - 1)) > (lane | (width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::lane()), source = lane + static_cast<int>(distance);
  return simt::exchange("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::lane()), source = lane - static_cast<int>(distance);
  return simt::exchange("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_SITE) {
  simt::Ballot slot{predicate != 0, 0};
  simt::meet_warp("__ballot_sync", mask, site, &slot, [](void* const* slots, uint32_t lanes, const simt::Site&) {
    uint32_t bits = 0;
    for (unsigned l = 0; l < 32; l++)
      if ((lanes >> l & 1) && static_cast<simt::Ballot*>(slots[l])->predicate) bits |= 1u << l;
    for (unsigned l = 0; l < 32; l++)
      if (lanes >> l & 1) static_cast<simt::Ballot*>(slots[l])->result = bits;
  });
  return slot.result;
}
inline int __any_sync(uint32_t mask, int predicate, SIMT_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
inline int __all_sync(uint32_t mask, int predicate, SIMT_SITE) { return __ballot_sync(mask, predicate, site) == mask; }

template <typename T>
T __reduce_add_sync(uint32_t mask, T v, SIMT_SITE) {
  return simt::reduce("__reduce_add_sync", mask, v, site, [](T a, T b) { return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); });
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T v, SIMT_SITE) { return simt::reduce("__reduce_max_sync", mask, v, site, [](T a, T b) { return a < b ? b : a; }); }
template <typename T>
T __reduce_min_sync(uint32_t mask, T v, SIMT_SITE) { return simt::reduce("__reduce_min_sync", mask, v, site, [](T a, T b) { return b < a ? b : a; }); }
inline uint32_t __reduce_and_sync(uint32_t mask, uint32_t v, SIMT_SITE) { return simt::reduce("__reduce_and_sync", mask, v, site, [](uint32_t a, uint32_t b) { return a & b; }); }
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t v, SIMT_SITE) { return simt::reduce("__reduce_or_sync", mask, v, site, [](uint32_t a, uint32_t b) { return a | b; }); }

// ---------------------------------------------------------------- numbers

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __ll2float_rn(long long a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) {  // saturates; NaN is 0
  if (std::isnan(a)) return 0;
  const double r = std::nearbyint(static_cast<double>(a));
  return r >= 2147483647.0 ? INT32_MAX : r <= -2147483648.0 ? INT32_MIN : static_cast<int>(r);
}
inline uint32_t __float_as_uint(float a) { return simt::bits_as<uint32_t>(a); }
inline int __float_as_int(float a) { return simt::bits_as<int>(a); }
inline float __uint_as_float(uint32_t a) { return simt::bits_as<float>(a); }
inline float __int_as_float(int a) { return simt::bits_as<float>(a); }

// ---------------------------------------------------------------- memory

// Threads of a run never overlap, so every access is atomic, and fences order nothing that is not in order already.
inline uint32_t atomicAdd(uint32_t* p, uint32_t v) { const uint32_t old = *p; *p = old + v; return old; }
inline int atomicAdd(int* p, int v) { const int old = *p; *p = old + v; return old; }
inline uint32_t atomicMin(uint32_t* p, uint32_t v) { const uint32_t old = *p; *p = v < old ? v : old; return old; }
inline uint32_t atomicMax(uint32_t* p, uint32_t v) { const uint32_t old = *p; *p = old < v ? v : old; return old; }
inline uint32_t atomicOr(uint32_t* p, uint32_t v) { const uint32_t old = *p; *p = old | v; return old; }
inline uint32_t atomicExch(uint32_t* p, uint32_t v) { const uint32_t old = *p; *p = v; return old; }
inline uint32_t atomicCAS(uint32_t* p, uint32_t expected, uint32_t v) { const uint32_t old = *p; if (old == expected) *p = v; return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { simt::spin(); }
template <typename T>
T __ldg(const T* p) { return *p; }

// ---------------------------------------------------------------- what kernels/cuda/device.cuh writes in PTX

namespace shardmesh::cuda {

inline uint8_t* dynamic_shared() { return simt::shared_memory(); }
inline void grid_dependency_wait() { simt::grid_dependency_wait(); }
inline void prefetch_l2(const void* p) { simt::prefetch(p); }
inline uint32_t load_acquire(const uint32_t* p) { simt::spin(); return *p; }
inline void store_release(uint32_t* p, uint32_t v) { *p = v; }
inline void store_release_system(uint32_t* p, uint32_t v) { *p = v; }
inline uint64_t global_timer() { return simt::global_timer(); }
// At system scope, where other cards, other processes and the host take part. A load lets others go first, as spins must.
template <typename T>
T load_acquire_system(const T* p) {
  simt::spin();
  simt::acquire_system(p, sizeof(T));
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
template <typename T>
T load_relaxed_system(const T* p) {
  simt::spin();
  simt::relax_system(p, sizeof(T));
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
template <typename T>
void store_release_system(T* p, T v) {
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
  simt::release_system(p, sizeof(T));
}
template <typename T>
void store_relaxed_system(T* p, T v) {
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
  simt::expose_system(p, sizeof(T));
}

template <int bytes>
void copy_async(void* shared, const void* global, int source_bytes = bytes, SIMT_SITE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  simt::copy_async(site, shared, global, bytes, static_cast<unsigned>(source_bytes));
}
inline float where_above(float x, float limit, float y) { return x > limit ? y : 0.0f; }
inline void keep(int&) {}
inline void commit_copies() { simt::commit_copies(); }
template <int groups_left>
void wait_copies() { simt::wait_copies(groups_left); }

// Half and bfloat16 as their 16 bits.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 0) return simt::bits_as<float>(sign | simt::bits_as<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return simt::bits_as<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}
inline uint16_t float_to_half(float f) {
  const uint32_t x = simt::bits_as<uint32_t>(f), magnitude = x & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(x >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000)                                                  // subnormal: a count of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(simt::bits_as<float>(magnitude) * 0x1p24f)));
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}
inline uint16_t float_to_bfloat(float f) {
  const uint32_t x = simt::bits_as<uint32_t>(f);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
}
inline int dp4a_u8s8(uint32_t a, uint32_t b, int c) {
  for (int i = 0; i < 4; i++) c += static_cast<uint8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline float bfloat_to_float(uint16_t b) { return simt::bits_as<float>(static_cast<uint32_t>(b) << 16); }

}  // namespace shardmesh::cuda

namespace simt {

// Operands of one lane. Fragment maps: PTX ISA, "Matrix Fragments for mma.m16n8k32" and "... mma.m16n8k16"; g = lane / 4, t = lane % 4.
template <typename Accumulator>
struct MmaSlot {
  Accumulator* d;
  const uint32_t *a, *b;
};

// Bytes of a register, widened. Products of bytes are exact in 16-bit pairs, and their sums in 32 bits, in any order: vectors change nothing but the time.
template <typename Byte>
void widen(uint32_t word, int16_t* to) {
  for (int k = 0; k < 4; k++) to[k] = static_cast<Byte>(word >> 8 * k);
}
template <int count>
int dot_of(const int16_t* a, const int16_t* b) {
  __m128i sum = _mm_setzero_si128();
  for (int k = 0; k < count; k += 8)
    sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(a + k)), _mm_load_si128(reinterpret_cast<const __m128i*>(b + k))));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}
// Wraps, as the card does without .satfinite.
inline void add_wrapping(int* d, int sum) { *d = static_cast<int>(static_cast<uint32_t>(*d) + static_cast<uint32_t>(sum)); }

// A: register i holds row g + 8 (i mod 2), columns 4t + 16 (i / 2) and up. B: register i holds rows 4t + 16 i and up of column g.
// C, D: value i is row g + 8 (i / 2), column 2t + i mod 2.
template <typename A, typename B>
void mma_k32(void* const* slots, uint32_t, const Site&) {
  using Slot = MmaSlot<int>;
  alignas(16) int16_t a[16][32], b[8][32];
  for (int l = 0; l < 32; l++) {
    const Slot& slot = *static_cast<Slot*>(slots[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) widen<A>(slot.a[i], &a[g + 8 * (i % 2)][4 * t + 16 * (i / 2)]);
    for (int i = 0; i < 2; i++) widen<B>(slot.b[i], &b[g][4 * t + 16 * i]);
  }
  for (int l = 0; l < 32; l++) {
    const Slot& slot = *static_cast<Slot*>(slots[l]);
    for (int i = 0; i < 4; i++) add_wrapping(&slot.d[i], dot_of<32>(a[l / 4 + 8 * (i / 2)], b[2 * (l % 4) + i % 2]));
  }
}

// m16n8k16 of bytes: A register i: row g + 8 i, columns 4t and up; B: rows 4t and up of column g.
template <typename A, typename B>
void mma_k16_bytes(void* const* slots, uint32_t, const Site&) {
  using Slot = MmaSlot<int>;
  alignas(16) int16_t a[16][16], b[8][16];
  for (int l = 0; l < 32; l++) {
    const Slot& slot = *static_cast<Slot*>(slots[l]);
    for (int i = 0; i < 2; i++) widen<A>(slot.a[i], &a[l / 4 + 8 * i][4 * (l % 4)]);
    widen<B>(slot.b[0], &b[l / 4][4 * (l % 4)]);
  }
  for (int l = 0; l < 32; l++) {
    const Slot& slot = *static_cast<Slot*>(slots[l]);
    for (int i = 0; i < 4; i++) add_wrapping(&slot.d[i], dot_of<16>(a[l / 4 + 8 * (i / 2)], b[2 * (l % 4) + i % 2]));
  }
}

// A: register i holds row g + 8 (i mod 2), columns 2t + 8 (i / 2) and the next. B: register i holds rows 2t + 8 i and the next of column g.
template <float (*convert)(uint16_t)>
void mma_k16(void* const* slots, uint32_t, const Site&) {
  using Slot = MmaSlot<float>;
  float a[16][16], b[8][16];
  for (int l = 0; l < 32; l++) {
    const Slot& slot = *static_cast<Slot*>(slots[l]);
    const int g = l / 4, t = l % 4;
    for (int k = 0; k < 2; k++) {
      for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + k] = convert(static_cast<uint16_t>(slot.a[i] >> 16 * k));
      for (int i = 0; i < 2; i++) b[g][2 * t + 8 * i + k] = convert(static_cast<uint16_t>(slot.b[i] >> 16 * k));
    }
  }
  for (int l = 0; l < 32; l++) {
    const Slot& slot = *static_cast<Slot*>(slots[l]);
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 16; k++) slot.d[i] += a[l / 4 + 8 * (i / 2)][k] * b[2 * (l % 4) + i % 2][k];
  }
}

struct MatrixSlot {
  const void* row;
  uint32_t* registers;
};

// ldmatrix: 8x8 matrices of 16-bit values; lane 8i + r gives the address of row r of matrix i. Lane l gets values 2 (l mod 4) and the next of row l / 4;
// transposed: of column l / 4.
template <int count, bool transposed>
void load_matrices(void* const* slots, uint32_t, const Site& site) {
  for (int i = 0; i < count; i++) {
    uint16_t m[8][8];
    for (int r = 0; r < 8; r++) {
      const void* row = static_cast<MatrixSlot*>(slots[8 * i + r])->row;
      if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fault(site, "ldmatrix: the row of lane %d is not aligned to 16 bytes", 8 * i + r);
      std::memcpy(m[r], row, 16);
    }
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = 2 * (l % 4);
      const uint16_t low = transposed ? m[t][g] : m[g][t], high = transposed ? m[t + 1][g] : m[g][t + 1];
      static_cast<MatrixSlot*>(slots[l])->registers[i] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
}

}  // namespace simt

namespace shardmesh::cuda {

#define SIMT_MMA(name, accumulator, a_count, b_count, complete)                                                          \
  inline void name(accumulator (&d)[4], const uint32_t (&a)[a_count], const uint32_t (&b)[b_count], SIMT_SITE) {         \
    simt::MmaSlot<accumulator> slot{d, a, b};                                                                            \
    simt::meet_warp(#name, 0xffffffffu, site, &slot, complete);                                                          \
  }
SIMT_MMA(mma_s8s8_k32, int, 4, 2, (simt::mma_k32<int8_t, int8_t>))
SIMT_MMA(mma_u8s8_k32, int, 4, 2, (simt::mma_k32<uint8_t, int8_t>))
SIMT_MMA(mma_s8u8_k32, int, 4, 2, (simt::mma_k32<int8_t, uint8_t>))
SIMT_MMA(mma_u8u8_k32, int, 4, 2, (simt::mma_k32<uint8_t, uint8_t>))
SIMT_MMA(mma_s8s8_k16, int, 2, 1, (simt::mma_k16_bytes<int8_t, int8_t>))
SIMT_MMA(mma_f16_k16, float, 4, 2, (simt::mma_k16<half_to_float>))
SIMT_MMA(mma_bf16_k16, float, 4, 2, (simt::mma_k16<bfloat_to_float>))
#undef SIMT_MMA
inline void mma_s8s8_k32_onto(int (&d)[4], const int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  for (int i = 0; i < 4; i++) d[i] = c[i];
  mma_s8s8_k32(d, a, b, site);
}
inline void mma_u8s8_k32_onto(int (&d)[4], const int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  for (int i = 0; i < 4; i++) d[i] = c[i];
  mma_u8s8_k32(d, a, b, site);
}

template <int count, bool transposed = false>
void load_matrix(uint32_t (&registers)[count], const void* shared_row, SIMT_SITE) {
  static_assert(count == 1 || count == 2 || count == 4);
  simt::MatrixSlot slot{shared_row, registers};
  simt::meet_warp(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, site, &slot, simt::load_matrices<count, transposed>);
}

// Queues a kernel; with no stream: runs it. Null, or what went wrong (valid until the next launch).
template <typename... Parameters, typename... Given>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Given... given) {
  const auto run = [=] { return simt::run_grid(grid, block, shared_bytes, [=] { kernel(given...); }); };
  if (stream) {
    static_cast<simt::WorkQueue*>(stream)->add(run);
    return nullptr;
  }
  static std::string problem;
  problem = run();
  return problem.empty() ? nullptr : problem.c_str();
}

}  // namespace shardmesh::cuda
