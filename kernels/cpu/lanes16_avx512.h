// Sixteen lanes as one zmm register. Members and their meaning: lanes16_portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../include/arithmetic.h"

// gcc 12 takes the undefined pass-through operand inside its own intrinsics for a mistake of ours.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace shardmesh {
namespace {

#define SHARDMESH_LANES [[maybe_unused]] static inline __attribute__((always_inline))
// Before a loop over registers: their arrays must vanish.
#define SHARDMESH_UNROLL _Pragma("GCC unroll 16")

struct Lanes {
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static constexpr int kExpTogether = 8;

  SHARDMESH_LANES F load(const float* p) { return _mm512_loadu_ps(p); }
  SHARDMESH_LANES void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  SHARDMESH_LANES F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(range(0, n), p); }
  SHARDMESH_LANES void store_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, range(0, n), x); }
  SHARDMESH_LANES I load_int(const void* p) { return _mm512_loadu_si512(p); }
  SHARDMESH_LANES void store_int(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  SHARDMESH_LANES void store_int8(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
  SHARDMESH_LANES void store_int8_apart(int8_t* p, int byte, I x) {
    _mm512_mask_storeu_epi8(p, 0x1111111111111111ull << byte, _mm512_sll_epi32(x, _mm_cvtsi32_si128(8 * byte)));
  }
  SHARDMESH_LANES void store_uint8(uint8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
  SHARDMESH_LANES void store_uint8_quads(uint8_t* p, I a, I b, I c, I d) {
    _mm512_storeu_si512(p, _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
  }
  SHARDMESH_LANES I broadcast4(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  SHARDMESH_LANES F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  SHARDMESH_LANES void store_half(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  SHARDMESH_LANES F set(float x) { return _mm512_set1_ps(x); }
  SHARDMESH_LANES F add(F x, F y) { return _mm512_add_ps(x, y); }
  SHARDMESH_LANES F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  SHARDMESH_LANES F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  SHARDMESH_LANES F div(F x, F y) { return _mm512_div_ps(x, y); }
  SHARDMESH_LANES F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  SHARDMESH_LANES F max(F x, F y) { return _mm512_max_ps(x, y); }
  SHARDMESH_LANES F min(F x, F y) { return _mm512_min_ps(x, y); }
  SHARDMESH_LANES F abs(F x) { return _mm512_abs_ps(x); }
  SHARDMESH_LANES F negate(F x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }
  SHARDMESH_LANES float highest(F x) { return _mm512_reduce_max_ps(x); }
  // Written out: the order inside _mm512_reduce_add_ps is the compiler's own.
  SHARDMESH_LANES float halving_sum(F x) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  SHARDMESH_LANES F pair_max(F a, F b) { return pair_by(a, b, max); }
  SHARDMESH_LANES F pair_sum(F a, F b) { return pair_by(a, b, add); }
  SHARDMESH_LANES F each_max(const F* pairs) { return each_by(pairs, max); }
  SHARDMESH_LANES F each_sum(const F* pairs) { return each_by(pairs, add); }
  template <class Join>
  SHARDMESH_LANES F pair_by(F a, F b, Join join) {
    return join(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  template <class Join>
  SHARDMESH_LANES F each_by(const F* pairs, Join join) {
    F four[4], eight[2];  // a lane has a quarter, then half of one
    SHARDMESH_UNROLL
    for (int i = 0; i < 4; i++) four[i] = join(_mm512_shuffle_f32x4(pairs[2 * i], pairs[2 * i + 1], 0x88), _mm512_shuffle_f32x4(pairs[2 * i], pairs[2 * i + 1], 0xdd));
    SHARDMESH_UNROLL
    for (int i = 0; i < 2; i++) eight[i] = join(_mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44), _mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0xee));
    const F mixed = join(_mm512_shuffle_ps(eight[0], eight[1], 0x88), _mm512_shuffle_ps(eight[0], eight[1], 0xdd));  // lane 4 * i + j at 4 * j + i
    return _mm512_permutex2var_ps(mixed, _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), mixed);
  }

  SHARDMESH_LANES I set_int(int32_t x) { return _mm512_set1_epi32(x); }
  SHARDMESH_LANES I bit_and(I x, I y) { return _mm512_and_si512(x, y); }
  SHARDMESH_LANES I bit_xor(I x, I y) { return _mm512_xor_si512(x, y); }
  template <class Vector>
  SHARDMESH_LANES void hold([[maybe_unused]] Vector& x) {
#ifdef __AVX512F__  // else emulated
    __asm__("" : "+v"(x));
#endif
  }
  SHARDMESH_LANES I sub_int(I x, I y) { return _mm512_sub_epi32(x, y); }
  SHARDMESH_LANES I max_int(I x, I y) { return _mm512_max_epi32(x, y); }
  SHARDMESH_LANES void sum_two(I x, I y, int32_t* first, int32_t* second) {
    const __m256i a = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)), b = _mm256_add_epi32(_mm512_castsi512_si256(y), _mm512_extracti64x4_epi64(y, 1));
    const __m256i pairs = _mm256_hadd_epi32(a, b);
    const __m128i quarters = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const __m128i sums = _mm_hadd_epi32(quarters, quarters);
    *first = _mm_cvtsi128_si32(sums);
    *second = _mm_extract_epi32(sums, 1);
  }
  SHARDMESH_LANES int32_t highest_int(I x) { return _mm512_reduce_max_epi32(x); }
  SHARDMESH_LANES I dot4(I c, I a, I b) { return _mm512_dpbusd_epi32(c, a, b); }

  SHARDMESH_LANES F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  SHARDMESH_LANES I to_int(F x) { return _mm512_cvtps_epi32(x); }
  SHARDMESH_LANES I bits(F x) { return _mm512_castps_si512(x); }
  SHARDMESH_LANES F from_bits(I x) { return _mm512_castsi512_ps(x); }
  SHARDMESH_LANES F scale_where(M m, F x, I n) { return _mm512_castsi512_ps(_mm512_maskz_add_epi32(m, _mm512_castps_si512(x), _mm512_slli_epi32(n, 23))); }

  SHARDMESH_LANES M greater(F x, F y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
  SHARDMESH_LANES M range(int from, int to) {
    const uint32_t below = from <= 0 ? 0u : from >= 16 ? 0xffffu : (1u << from) - 1u;
    const uint32_t up_to = to <= 0 ? 0u : to >= 16 ? 0xffffu : (1u << to) - 1u;
    return static_cast<__mmask16>(up_to & ~below);
  }
  SHARDMESH_LANES M mask_of(uint32_t x) { return static_cast<__mmask16>(x); }
  SHARDMESH_LANES F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }

  SHARDMESH_LANES void load_pairs(const float* x, F* even, F* odd) {
    const F p = load(x), q = load(x + 16);
    const I e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = _mm512_permutex2var_ps(p, e, q);
    *odd = _mm512_permutex2var_ps(p, _mm512_add_epi32(e, _mm512_set1_epi32(1)), q);
  }
  SHARDMESH_LANES void store_pairs(float* x, F even, F odd) {
    const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    store(x, _mm512_permutex2var_ps(even, low, odd));
    store(x + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
  }
};

}  // namespace
}  // namespace shardmesh
