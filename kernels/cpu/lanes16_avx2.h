// Sixteen lanes as two ymm registers. Members and their meaning: lanes16_portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../include/arithmetic.h"

namespace shardmesh {
namespace {

#define SHARDMESH_LANES [[maybe_unused]] static inline __attribute__((always_inline))
// Before a loop over registers: their arrays must vanish.
#define SHARDMESH_UNROLL _Pragma("GCC unroll 8")

struct Lanes {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  struct M {
    __m256 a, b;
  };

  static constexpr int kExpTogether = 2;

  SHARDMESH_LANES F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  SHARDMESH_LANES void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  SHARDMESH_LANES F load_first(const float* p, int n) {
    const M m = range(0, n);
    return {_mm256_maskload_ps(p, _mm256_castps_si256(m.a)), n > 8 ? _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.b)) : _mm256_setzero_ps()};
  }
  SHARDMESH_LANES void store_first(float* p, F x, int n) {
    const M m = range(0, n);
    _mm256_maskstore_ps(p, _mm256_castps_si256(m.a), x.a);
    if (n > 8) _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.b), x.b);
  }
  SHARDMESH_LANES I load_int(const void* p) {
    const __m256i* v = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
  }
  SHARDMESH_LANES void store_int(int32_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
  }
  // 16 int16 in order.
  SHARDMESH_LANES __m256i pack16(I x) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8); }
  SHARDMESH_LANES void store_int8(int8_t* p, I x) {
    const __m256i w = pack16(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
  }
  SHARDMESH_LANES void store_int8_apart(int8_t* p, int byte, I x) {
    int8_t bytes[16];
    store_int8(bytes, x);
    for (int i = 0; i < 16; i++) p[4 * i + byte] = bytes[i];
  }
  SHARDMESH_LANES void store_int16(int16_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack16(x)); }
  SHARDMESH_LANES F load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  SHARDMESH_LANES void store_half(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
  }

  SHARDMESH_LANES F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  SHARDMESH_LANES F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  SHARDMESH_LANES F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  SHARDMESH_LANES F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  SHARDMESH_LANES F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  SHARDMESH_LANES F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  SHARDMESH_LANES F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  SHARDMESH_LANES F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  SHARDMESH_LANES F abs(F x) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, magnitude), _mm256_and_ps(x.b, magnitude)};
  }
  SHARDMESH_LANES F negate(F x) { return {_mm256_xor_ps(x.a, _mm256_set1_ps(-0.0f)), _mm256_xor_ps(x.b, _mm256_set1_ps(-0.0f))}; }
  SHARDMESH_LANES float highest(F x) {
    const __m256 m = _mm256_max_ps(x.a, x.b);
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }
  SHARDMESH_LANES float halving_sum(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  SHARDMESH_LANES F pair_max(F x, F y) { return {_mm256_max_ps(x.a, x.b), _mm256_max_ps(y.a, y.b)}; }
  SHARDMESH_LANES F pair_sum(F x, F y) { return {_mm256_add_ps(x.a, x.b), _mm256_add_ps(y.a, y.b)}; }
  SHARDMESH_LANES F each_max(const F* pairs) {
    const auto max = [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); };
    return {eight_by(pairs, max), eight_by(pairs + 4, max)};
  }
  SHARDMESH_LANES F each_sum(const F* pairs) {
    const auto add = [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); };
    return {eight_by(pairs, add), eight_by(pairs + 4, add)};
  }
  template <class Join>
  SHARDMESH_LANES __m256 eight_by(const F* pairs, Join join) {
    const auto quarters = [&](__m256 x, __m256 y) { return join(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31)); };
    const __m256 p = quarters(pairs[0].a, pairs[2].a), q = quarters(pairs[0].b, pairs[2].b), r = quarters(pairs[1].a, pairs[3].a), s = quarters(pairs[1].b, pairs[3].b);
    const __m256 x = join(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee)), y = join(_mm256_shuffle_ps(r, s, 0x44), _mm256_shuffle_ps(r, s, 0xee));
    return join(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xdd));
  }

  template <class Vector>
  SHARDMESH_LANES void hold(Vector&) {}
  SHARDMESH_LANES I set_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  SHARDMESH_LANES I bit_and(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  SHARDMESH_LANES I max_int(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  SHARDMESH_LANES int32_t highest_int(I x) {
    const __m256i s = _mm256_max_epi32(x.a, x.b);
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
  }

  SHARDMESH_LANES F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  SHARDMESH_LANES I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
  SHARDMESH_LANES I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  SHARDMESH_LANES F scale_where(M m, F x, I n) {
    const auto scale = [](__m256 x, __m256i n) { return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(n, 23))); };
    return {_mm256_and_ps(m.a, scale(x.a, n.a)), _mm256_and_ps(m.b, scale(x.b, n.b))};
  }

  SHARDMESH_LANES M greater(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)}; }
  SHARDMESH_LANES M range(int from, int to) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i before = _mm256_set1_epi32(from - 1), end = _mm256_set1_epi32(to);
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(low, before), _mm256_cmpgt_epi32(end, low))),
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(high, before), _mm256_cmpgt_epi32(end, high)))};
  }
  SHARDMESH_LANES M mask_of(uint32_t x) {
    const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8), all = _mm256_set1_epi32(static_cast<int32_t>(x));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low)), _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, high), high))};
  }
  SHARDMESH_LANES F select(M m, F yes, F no) { return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)}; }

  SHARDMESH_LANES void load_pairs(const float* x, F* even, F* odd) {
    const F p = load(x), q = load(x + 16);
    even->a = by_quarters(_mm256_shuffle_ps(p.a, p.b, 0x88));
    even->b = by_quarters(_mm256_shuffle_ps(q.a, q.b, 0x88));
    odd->a = by_quarters(_mm256_shuffle_ps(p.a, p.b, 0xdd));
    odd->b = by_quarters(_mm256_shuffle_ps(q.a, q.b, 0xdd));
  }
  SHARDMESH_LANES void store_pairs(float* x, F even, F odd) {
    const __m256 e0 = by_quarters(even.a), o0 = by_quarters(odd.a), e1 = by_quarters(even.b), o1 = by_quarters(odd.b);
    store(x, {_mm256_unpacklo_ps(e0, o0), _mm256_unpackhi_ps(e0, o0)});
    store(x + 16, {_mm256_unpacklo_ps(e1, o1), _mm256_unpackhi_ps(e1, o1)});
  }
  // 64-bit quarters in order 0, 2, 1, 3.
  SHARDMESH_LANES __m256 by_quarters(__m256 x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); }
};

}  // namespace
}  // namespace shardmesh
