// What matrix products need of sixteen lanes beyond lanes16_avx512.h. Members and their meaning: weight_lanes_portable.h.
#pragma once
#include "lanes16_avx512.h"

namespace shardmesh {
namespace {

struct WeightLanes : Lanes {
  static constexpr bool wide_registers = true;
  SHARDMESH_LANES F load_bfloat(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
  }
  SHARDMESH_LANES I load_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  SHARDMESH_LANES I load_s16(const void* p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  SHARDMESH_LANES I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  SHARDMESH_LANES I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
  SHARDMESH_LANES I sub_bytes(I a, I b) { return _mm512_sub_epi8(a, b); }
  SHARDMESH_LANES I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
  SHARDMESH_LANES I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  SHARDMESH_LANES I shift_left(I a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
  SHARDMESH_LANES I shift_right(I a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
  SHARDMESH_LANES I shift_right_signed(I a, int n) { return _mm512_srai_epi32(a, static_cast<unsigned>(n)); }
};

}  // namespace
}  // namespace shardmesh
