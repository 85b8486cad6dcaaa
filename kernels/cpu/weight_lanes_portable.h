// What matrix products need of sixteen lanes beyond lanes16_portable.h; the byte product takes pmaddwd, which every x86-64 has, because compilers do not find
// it by themselves.
#pragma once
#include "lanes16_portable.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace shardmesh {
namespace {

struct WeightLanes : Lanes {
  static constexpr bool wide_registers = false;

  // 16 bfloats, exact.
  SHARDMESH_LANES F load_bfloat(const void* p) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return from_bits(__builtin_convertvector(h, I) << 16);
  }
  // 16 uint8, 16 int16, widened to int32.
  SHARDMESH_LANES I load_u8(const void* p) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    Bytes b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, I);
  }
  SHARDMESH_LANES I load_s16(const void* p) {
    typedef int16_t Halves __attribute__((vector_size(32)));
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, I);
  }
  SHARDMESH_LANES I add_int(I a, I b) { return a + b; }
  SHARDMESH_LANES I sub_int(I a, I b) { return a - b; }
  // Byte by byte.
  SHARDMESH_LANES I sub_bytes(I a, I b) {
    typedef uint8_t Bytes __attribute__((vector_size(64)));
    return reinterpret_cast<I>(reinterpret_cast<Bytes>(a) - reinterpret_cast<Bytes>(b));
  }
  SHARDMESH_LANES I mul_int(I a, I b) { return a * b; }
  SHARDMESH_LANES I bit_or(I a, I b) { return a | b; }
  SHARDMESH_LANES I shift_left(I a, int n) { return a << n; }
  // Zeros come in; the sign comes in.
  SHARDMESH_LANES I shift_right(I a, int n) {
    typedef uint32_t U __attribute__((vector_size(64)));
    return reinterpret_cast<I>(reinterpret_cast<U>(a) >> static_cast<uint32_t>(n));
  }
  SHARDMESH_LANES I shift_right_signed(I a, int n) { return a >> n; }

#if defined(__SSE2__)
  // Bytes 0 and 2, then bytes 1 and 3 of each lane, widened to 16 bits: pmaddwd multiplies them and adds the two products.
  SHARDMESH_LANES I dot4(I c, I u, I s) {
    __m128i a[4], b[4], sum[4];
    std::memcpy(a, &u, sizeof a);
    std::memcpy(b, &s, sizeof b);
    std::memcpy(sum, &c, sizeof sum);
    const __m128i low = _mm_set1_epi16(255);
    for (int i = 0; i < 4; i++) {
      const __m128i even = _mm_madd_epi16(_mm_and_si128(a[i], low), _mm_srai_epi16(_mm_slli_epi16(b[i], 8), 8));
      const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(a[i], 8), _mm_srai_epi16(b[i], 8));
      sum[i] = _mm_add_epi32(sum[i], _mm_add_epi32(even, odd));
    }
    std::memcpy(&c, sum, sizeof sum);
    return c;
  }
#endif
};

}  // namespace
}  // namespace shardmesh
