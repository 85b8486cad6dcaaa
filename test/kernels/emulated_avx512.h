// The AVX-512 that the avx512 kernel set uses, and the tiles of the amx set, in plain C++, so that their very source runs on a machine without them. For tests only.
//
// Forced in front of kernels/cpu/*_avx512.cpp and *_amx.cpp (-include, see CMakeLists.txt): the 512-bit types become the structs below, and inside namespace shardmesh the
// names _mm512_* and _tile_* mean the functions below, which hide those of <immintrin.h>. 128 and 256-bit intrinsics stay the machine's own (AVX2, FMA and F16C needed). A
// kernel that uses a 512-bit intrinsic which is missing here does not compile: the types differ.
//
// Each function follows the operation section of its instruction, one lane at a time.                        Intel SDM volume 2; Intel Intrinsics Guide
// Rounding, flush-to-zero and denormals-are-zero are those of MXCSR, as with the real instructions, since the compiler uses SSE for single lanes.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "emulated_avx512.h: build with -mavx2 -mfma -mf16c; the kernels use their 256-bit intrinsics beside the 512-bit ones"
#endif
#ifdef __AVX512F__
#error "emulated_avx512.h: build without -mavx512*; a kernel could reach the real instructions"
#endif

// Macros in some compilers.
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_extracti64x4_epi64
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_srai_epi32
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd

#define __m512 EmulatedFloats
#define __m512i EmulatedInts

namespace shardmesh {
namespace {

struct alignas(64) EmulatedFloats {
  float lane[16];
};
struct alignas(64) EmulatedInts {
  int32_t lane[16];
};

// Calls: inlined into the kernels, lane by lane, they would take minutes to build.
#define SHARDMESH_EMULATED [[maybe_unused]] static __attribute__((noinline))

// dst[i] = of(i)
template <class Lane>
[[maybe_unused]] inline EmulatedFloats each_float(Lane of) {
  EmulatedFloats r;
  for (int i = 0; i < 16; i++) r.lane[i] = of(i);
  return r;
}
template <class Lane>
[[maybe_unused]] inline EmulatedInts each_int(Lane of) {
  EmulatedInts r;
  for (int i = 0; i < 16; i++) r.lane[i] = of(i);
  return r;
}
// Integer lanes wrap: the sums and products are those of unsigned numbers.
[[maybe_unused]] inline uint32_t u32(int32_t x) { return static_cast<uint32_t>(x); }
[[maybe_unused]] inline int32_t s32(uint32_t x) { return static_cast<int32_t>(x); }

// --- memory
SHARDMESH_EMULATED EmulatedFloats _mm512_loadu_ps(const void* p) {
  EmulatedFloats r;
  std::memcpy(r.lane, p, 64);
  return r;
}
SHARDMESH_EMULATED void _mm512_storeu_ps(void* p, const EmulatedFloats& a) { std::memcpy(p, a.lane, 64); }
SHARDMESH_EMULATED EmulatedInts _mm512_loadu_si512(const void* p) {
  EmulatedInts r;
  std::memcpy(r.lane, p, 64);
  return r;
}
SHARDMESH_EMULATED void _mm512_storeu_si512(void* p, const EmulatedInts& a) { std::memcpy(p, a.lane, 64); }
// Lanes whose mask bit is clear are zero, and their memory is not touched.
SHARDMESH_EMULATED EmulatedFloats _mm512_maskz_loadu_ps(__mmask16 k, const void* p) {
  EmulatedFloats r;
  for (int i = 0; i < 16; i++) {
    r.lane[i] = 0.0f;
    if (k >> i & 1) std::memcpy(&r.lane[i], static_cast<const char*>(p) + 4 * i, 4);
  }
  return r;
}
SHARDMESH_EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 k, const EmulatedFloats& a) {
  for (int i = 0; i < 16; i++)
    if (k >> i & 1) std::memcpy(static_cast<char*>(p) + 4 * i, &a.lane[i], 4);
}

// --- one value in all lanes; values from lane 0 up
SHARDMESH_EMULATED EmulatedFloats _mm512_set1_ps(float x) {
  return each_float([&](int) { return x; });
}
SHARDMESH_EMULATED EmulatedInts _mm512_set1_epi32(int32_t x) {
  return each_int([&](int) { return x; });
}
SHARDMESH_EMULATED EmulatedInts _mm512_setr_epi32(int32_t e0, int32_t e1, int32_t e2, int32_t e3, int32_t e4, int32_t e5, int32_t e6, int32_t e7, int32_t e8, int32_t e9, int32_t e10,
                                                  int32_t e11, int32_t e12, int32_t e13, int32_t e14, int32_t e15) {
  return {{e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15}};
}

// --- fp32
SHARDMESH_EMULATED EmulatedFloats _mm512_add_ps(const EmulatedFloats& a, const EmulatedFloats& b) {
  return each_float([&](int i) { return a.lane[i] + b.lane[i]; });
}
SHARDMESH_EMULATED EmulatedFloats _mm512_sub_ps(const EmulatedFloats& a, const EmulatedFloats& b) {
  return each_float([&](int i) { return a.lane[i] - b.lane[i]; });
}
SHARDMESH_EMULATED EmulatedFloats _mm512_mul_ps(const EmulatedFloats& a, const EmulatedFloats& b) {
  return each_float([&](int i) { return a.lane[i] * b.lane[i]; });
}
SHARDMESH_EMULATED EmulatedFloats _mm512_div_ps(const EmulatedFloats& a, const EmulatedFloats& b) {
  return each_float([&](int i) { return a.lane[i] / b.lane[i]; });
}
// a * b + c, rounded once
SHARDMESH_EMULATED EmulatedFloats _mm512_fmadd_ps(const EmulatedFloats& a, const EmulatedFloats& b, const EmulatedFloats& c) {
  return each_float([&](int i) { return std::fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
// The second operand when either is NaN and when both are zero.
SHARDMESH_EMULATED EmulatedFloats _mm512_max_ps(const EmulatedFloats& a, const EmulatedFloats& b) {
  return each_float([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
SHARDMESH_EMULATED EmulatedFloats _mm512_min_ps(const EmulatedFloats& a, const EmulatedFloats& b) {
  return each_float([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// Max of lanes i and i + 8, then 4, 2, 1 apart.
SHARDMESH_EMULATED float _mm512_reduce_max_ps(EmulatedFloats a) {
  for (int half = 8; half >= 1; half /= 2)
    for (int i = 0; i < half; i++) a.lane[i] = a.lane[i] > a.lane[i + half] ? a.lane[i] : a.lane[i + half];
  return a.lane[0];
}

// --- bits
SHARDMESH_EMULATED EmulatedInts _mm512_castps_si512(const EmulatedFloats& a) {
  EmulatedInts r;
  std::memcpy(r.lane, a.lane, 64);
  return r;
}
SHARDMESH_EMULATED EmulatedFloats _mm512_castsi512_ps(const EmulatedInts& a) {
  EmulatedFloats r;
  std::memcpy(r.lane, a.lane, 64);
  return r;
}
SHARDMESH_EMULATED EmulatedInts _mm512_and_si512(const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) { return a.lane[i] & b.lane[i]; });
}
SHARDMESH_EMULATED EmulatedInts _mm512_or_si512(const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) { return a.lane[i] | b.lane[i]; });
}
SHARDMESH_EMULATED EmulatedInts _mm512_xor_si512(const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
SHARDMESH_EMULATED EmulatedFloats _mm512_xor_ps(const EmulatedFloats& a, const EmulatedFloats& b) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
SHARDMESH_EMULATED EmulatedFloats _mm512_abs_ps(const EmulatedFloats& a) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
}
// A count beyond 31 leaves nothing, or for srai the sign.
SHARDMESH_EMULATED EmulatedInts _mm512_slli_epi32(const EmulatedInts& a, unsigned count) {
  return each_int([&](int i) { return count > 31 ? 0 : s32(u32(a.lane[i]) << (count & 31)); });
}
SHARDMESH_EMULATED EmulatedInts _mm512_sll_epi32(const EmulatedInts& a, __m128i count) {
  const uint64_t n = static_cast<uint64_t>(_mm_cvtsi128_si64(count));
  return each_int([&](int i) { return n > 31 ? 0 : s32(u32(a.lane[i]) << n); });
}
SHARDMESH_EMULATED EmulatedInts _mm512_srli_epi32(const EmulatedInts& a, unsigned count) {
  return each_int([&](int i) { return count > 31 ? 0 : s32(u32(a.lane[i]) >> (count & 31)); });
}
SHARDMESH_EMULATED EmulatedInts _mm512_srai_epi32(const EmulatedInts& a, unsigned count) {
  return each_int([&](int i) { return a.lane[i] >> (count > 31 ? 31 : count); });
}

// --- int32
SHARDMESH_EMULATED EmulatedInts _mm512_add_epi32(const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) { return s32(u32(a.lane[i]) + u32(b.lane[i])); });
}
// 0 where the mask bit is clear.
SHARDMESH_EMULATED EmulatedInts _mm512_maskz_add_epi32(__mmask16 k, const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) { return k >> i & 1 ? s32(u32(a.lane[i]) + u32(b.lane[i])) : 0; });
}
SHARDMESH_EMULATED EmulatedInts _mm512_sub_epi32(const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) { return s32(u32(a.lane[i]) - u32(b.lane[i])); });
}
SHARDMESH_EMULATED EmulatedInts _mm512_sub_epi8(const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) {
    uint32_t r = 0;
    for (int byte = 0; byte < 32; byte += 8) r |= (((u32(a.lane[i]) >> byte) - (u32(b.lane[i]) >> byte)) & 0xffu) << byte;
    return s32(r);
  });
}
// The low 32 bits of the product.
SHARDMESH_EMULATED EmulatedInts _mm512_mullo_epi32(const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) { return s32(u32(a.lane[i]) * u32(b.lane[i])); });
}
SHARDMESH_EMULATED EmulatedInts _mm512_max_epi32(const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
SHARDMESH_EMULATED int32_t _mm512_reduce_add_epi32(const EmulatedInts& a) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += u32(a.lane[i]);
  return s32(sum);
}
SHARDMESH_EMULATED int32_t _mm512_reduce_max_epi32(const EmulatedInts& a) {
  int32_t largest = a.lane[0];
  for (int i = 1; i < 16; i++) largest = a.lane[i] > largest ? a.lane[i] : largest;
  return largest;
}
// c + the four products of an unsigned byte of a and a signed byte of b; wraps, does not saturate (vpdpbusds would).
SHARDMESH_EMULATED EmulatedInts _mm512_dpbusd_epi32(const EmulatedInts& c, const EmulatedInts& a, const EmulatedInts& b) {
  return each_int([&](int i) {
    uint32_t sum = u32(c.lane[i]);
    for (int byte = 0; byte < 4; byte++) {
      const int32_t x = static_cast<uint8_t>(u32(a.lane[i]) >> (8 * byte)), y = static_cast<int8_t>(u32(b.lane[i]) >> (8 * byte));
      sum += u32(x * y);
    }
    return s32(sum);
  });
}

// --- conversions
SHARDMESH_EMULATED EmulatedFloats _mm512_cvtepi32_ps(const EmulatedInts& a) {
  return each_float([&](int i) { return static_cast<float>(a.lane[i]); });
}
// By the rounding mode (nearest even); INT32_MIN for NaN and for what does not fit.
SHARDMESH_EMULATED EmulatedInts _mm512_cvtps_epi32(const EmulatedFloats& a) {
  return each_int([&](int i) {
    const float x = std::nearbyintf(a.lane[i]);
    return x >= -0x1p31f && x < 0x1p31f ? static_cast<int32_t>(x) : INT32_MIN;
  });
}
// The low byte of each lane.
SHARDMESH_EMULATED __m128i _mm512_cvtepi32_epi8(const EmulatedInts& a) {
  uint8_t bytes[16];
  for (int i = 0; i < 16; i++) bytes[i] = static_cast<uint8_t>(a.lane[i]);
  __m128i r;
  std::memcpy(&r, bytes, 16);
  return r;
}
SHARDMESH_EMULATED void _mm512_mask_storeu_epi8(void* p, __mmask64 k, const EmulatedInts& a) {
  for (int i = 0; i < 64; i++)
    if (k >> i & 1) std::memcpy(static_cast<char*>(p) + i, reinterpret_cast<const char*>(a.lane) + i, 1);
}
SHARDMESH_EMULATED EmulatedInts _mm512_cvtepu8_epi32(__m128i a) {
  uint8_t bytes[16];
  std::memcpy(bytes, &a, 16);
  return each_int([&](int i) { return static_cast<int32_t>(bytes[i]); });
}
SHARDMESH_EMULATED EmulatedInts _mm512_cvtepu16_epi32(__m256i a) {
  uint16_t words[16];
  std::memcpy(words, &a, 32);
  return each_int([&](int i) { return static_cast<int32_t>(words[i]); });
}
SHARDMESH_EMULATED EmulatedInts _mm512_cvtepi16_epi32(__m256i a) {
  int16_t words[16];
  std::memcpy(words, &a, 32);
  return each_int([&](int i) { return static_cast<int32_t>(words[i]); });
}
// Subnormal halves are exact whatever MXCSR says; a NaN becomes quiet and keeps sign and payload.
[[maybe_unused]] inline float emulated_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31u, fraction = h & 0x3ffu;
  uint32_t bits;
  if (exponent == 31) {
    bits = 0x7f800000u | fraction << 13 | (fraction ? 0x00400000u : 0u);
  } else if (exponent == 0) {
    const float x = static_cast<float>(fraction) * 0x1p-24f;  // normal or zero
    std::memcpy(&bits, &x, 4);
  } else {
    bits = (exponent + 112) << 23 | fraction << 13;
  }
  bits |= sign;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
SHARDMESH_EMULATED EmulatedFloats _mm512_cvtph_ps(__m256i a) {
  uint16_t halves[16];
  std::memcpy(halves, &a, 32);
  return each_float([&](int i) { return emulated_half(halves[i]); });
}
// To nearest even only; subnormal halves are kept whatever MXCSR says; a NaN becomes quiet and keeps sign and the upper ten bits of its payload.
[[maybe_unused]] inline uint16_t emulated_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520, half way between the largest half and 2^16, and up
  if (magnitude <= 0x33000000u) return static_cast<uint16_t>(sign);            // 2^-25, half of the smallest half, and down
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const int dropped = exponent >= -14 ? 13 : -1 - exponent;  // bits of the 24-bit significand below a half's last place
  const uint32_t significand = 0x800000u | (magnitude & 0x7fffffu);
  const uint32_t kept = significand >> dropped, rest = significand & ((1u << dropped) - 1), middle = 1u << (dropped - 1);
  // A carry out of the significand raises the exponent by itself, a subnormal's into the first normal.
  const uint32_t half = (exponent >= -14 ? static_cast<uint32_t>(exponent + 14) << 10 : 0u) + kept + (rest > middle || (rest == middle && kept % 2) ? 1u : 0u);
  return static_cast<uint16_t>(sign | half);
}
SHARDMESH_EMULATED __m256i _mm512_cvtps_ph(const EmulatedFloats& a, int rounding) {
  if (rounding != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  uint16_t halves[16];
  for (int i = 0; i < 16; i++) halves[i] = emulated_to_half(a.lane[i]);
  __m256i r;
  std::memcpy(&r, halves, 32);
  return r;
}

// --- masks: bit i is lane i
SHARDMESH_EMULATED __mmask16 _mm512_cmp_ps_mask(const EmulatedFloats& a, const EmulatedFloats& b, int predicate) {
  if (predicate != _CMP_GT_OQ) __builtin_trap();
  unsigned k = 0;
  for (int i = 0; i < 16; i++) k |= (a.lane[i] > b.lane[i] ? 1u : 0u) << i;
  return static_cast<__mmask16>(k);
}
// b where the mask bit is set, a elsewhere.
SHARDMESH_EMULATED EmulatedFloats _mm512_mask_blend_ps(__mmask16 k, const EmulatedFloats& a, const EmulatedFloats& b) {
  return each_float([&](int i) { return k >> i & 1 ? b.lane[i] : a.lane[i]; });
}

// --- between lanes
// Lane idx[3:0] of a, or of b where idx[4] is set; higher bits are ignored.
SHARDMESH_EMULATED EmulatedFloats _mm512_permutex2var_ps(const EmulatedFloats& a, const EmulatedInts& idx, const EmulatedFloats& b) {
  return each_float([&](int i) { return (idx.lane[i] & 16 ? b : a).lane[idx.lane[i] & 15]; });
}
// Quarters of 128 bits: two of a, chosen by imm[1:0] and imm[3:2], then two of b, by imm[5:4] and imm[7:6].
SHARDMESH_EMULATED EmulatedFloats _mm512_shuffle_f32x4(const EmulatedFloats& a, const EmulatedFloats& b, int imm) {
  return each_float([&](int i) { return (i < 8 ? a : b).lane[4 * (imm >> (2 * (i / 4)) & 3) + i % 4]; });
}
// The same of single lanes, inside each quarter.
SHARDMESH_EMULATED EmulatedFloats _mm512_shuffle_ps(const EmulatedFloats& a, const EmulatedFloats& b, int imm) {
  return each_float([&](int i) { return (i % 4 < 2 ? a : b).lane[4 * (i / 4) + (imm >> (2 * (i % 4)) & 3)]; });
}
// Inside each quarter: the lanes of a, then those of b, with signed saturation to half their width; the second from int16 to unsigned bytes.
SHARDMESH_EMULATED EmulatedInts _mm512_packs_epi32(const EmulatedInts& a, const EmulatedInts& b) {
  int16_t words[32];
  for (int i = 0; i < 32; i++) {
    const int32_t x = (i % 8 < 4 ? a : b).lane[4 * (i / 8) + i % 4];
    words[i] = static_cast<int16_t>(x < -32768 ? -32768 : x > 32767 ? 32767 : x);
  }
  EmulatedInts r;
  std::memcpy(r.lane, words, 64);
  return r;
}
SHARDMESH_EMULATED EmulatedInts _mm512_packus_epi16(const EmulatedInts& a, const EmulatedInts& b) {
  int16_t words[2][32];
  std::memcpy(words[0], a.lane, 64);
  std::memcpy(words[1], b.lane, 64);
  uint8_t bytes[64];
  for (int i = 0; i < 64; i++) {
    const int16_t x = words[i % 16 / 8][8 * (i / 16) + i % 8];
    bytes[i] = static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x);
  }
  EmulatedInts r;
  std::memcpy(r.lane, bytes, 64);
  return r;
}
SHARDMESH_EMULATED __m256i _mm512_castsi512_si256(const EmulatedInts& a) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.lane)); }
SHARDMESH_EMULATED __m256i _mm512_extracti64x4_epi64(const EmulatedInts& a, int half) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.lane + 8 * (half & 1))); }
SHARDMESH_EMULATED __m256 _mm512_castps512_ps256(const EmulatedFloats& a) { return _mm256_loadu_ps(a.lane); }
SHARDMESH_EMULATED __m256 _mm512_extractf32x8_ps(const EmulatedFloats& a, int half) { return _mm256_loadu_ps(a.lane + 8 * (half & 1)); }


// --- tiles. The state of a thread; without a configuration, or with shapes that do not fit, the processor faults.
struct EmulatedTiles {
  bool configured = false;
  int rows[8], row_bytes[8];
  uint8_t data[8][16][64];
};
[[maybe_unused]] inline EmulatedTiles& tiles() {
  static thread_local EmulatedTiles all;
  return all;
}
[[maybe_unused]] inline void demand(bool fits) {
  if (!fits) __builtin_trap();
}
SHARDMESH_EMULATED void _tile_loadconfig(const void* p) {
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  demand(bytes[0] == 1 && bytes[1] == 0);
  EmulatedTiles& t = tiles();
  for (int i = 0; i < 8; i++) {
    t.rows[i] = bytes[48 + i];
    t.row_bytes[i] = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    demand(t.rows[i] <= 16 && t.row_bytes[i] <= 64);
    std::memset(t.data[i], 0xee, sizeof t.data[i]);  // the processor clears them; nothing here may count on that
  }
  t.configured = true;
}
SHARDMESH_EMULATED void _tile_release() { tiles().configured = false; }
SHARDMESH_EMULATED void _tile_zero(int c) {
  demand(tiles().configured);
  std::memset(tiles().data[c], 0, sizeof tiles().data[c]);
}
SHARDMESH_EMULATED void _tile_loadd(int to, const void* p, size_t stride) {
  EmulatedTiles& t = tiles();
  demand(t.configured);
  std::memset(t.data[to], 0, sizeof t.data[to]);
  for (int r = 0; r < t.rows[to]; r++) std::memcpy(t.data[to][r], static_cast<const uint8_t*>(p) + static_cast<size_t>(r) * stride, static_cast<size_t>(t.row_bytes[to]));
}
SHARDMESH_EMULATED void _tile_stored(int from, void* p, size_t stride) {
  const EmulatedTiles& t = tiles();
  demand(t.configured);
  for (int r = 0; r < t.rows[from]; r++) std::memcpy(static_cast<uint8_t*>(p) + static_cast<size_t>(r) * stride, t.data[from][r], static_cast<size_t>(t.row_bytes[from]));
}
// c[m][n] += the four products of signed bytes of a[m][k] and b[k][n], for every k.
SHARDMESH_EMULATED void _tile_dpbssd(int c, int a, int b) {
  EmulatedTiles& t = tiles();
  demand(t.configured && t.rows[c] == t.rows[a] && t.row_bytes[c] == t.row_bytes[b] && t.row_bytes[a] == 4 * t.rows[b]);
  for (int m = 0; m < t.rows[c]; m++)
    for (int n = 0; n < t.row_bytes[c] / 4; n++) {
      int32_t sum;
      std::memcpy(&sum, t.data[c][m] + 4 * n, 4);
      for (int k = 0; k < t.rows[b]; k++)
        for (int byte = 0; byte < 4; byte++) sum = s32(u32(sum) + u32(static_cast<int8_t>(t.data[a][m][4 * k + byte]) * static_cast<int8_t>(t.data[b][k][4 * n + byte])));
      std::memcpy(t.data[c][m] + 4 * n, &sum, 4);
    }
}

#undef SHARDMESH_EMULATED

}  // namespace
}  // namespace shardmesh

// Loops over registers stay loops (SHARDMESH_UNROLL), for the same reason. Compilers warn of the redefinition, but not in a system header.
#pragma GCC system_header
#undef _Pragma
#define _Pragma(text)
