// Integer products of attention without a 4-byte dot product. vpmaddubsw would saturate (255 * 127 * 2 > 32767), so K and V are widened to 16 bits, once for
// all heads and rows that share the load, and multiplied by 16-bit q or softmax weights (vpmaddwd: exact). K [D/4][16][4] and V [4][D][4] are the same to
// this code: rows of 16 outputs with four terms each. A sum is kept in two halves (terms 0-1, terms 2-3) and joined once at the end.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lines_ahead.h"

namespace shardmesh {
namespace {

struct Dots {
  using Query = int16_t;
  using Weight = int16_t;
  static constexpr int lanes_max = 6;

  SHARDMESH_LANES void store_query(Query* p, Lanes::I x) { Lanes::store_int16(p, x); }
  SHARDMESH_LANES void store_weights(Weight* p, const Lanes::I* x) {
    for (int b = 0; b < 4; b++) Lanes::store_int16(p + 16 * b, x[b]);
  }
  SHARDMESH_LANES void sum_keys(const uint8_t* const*, int, int, int, int32_t*) {}  // not needed here

  // dots[l * 64 + 16 * b + t] = sum_d q[l * D + d] * K[d, t] of subblock b, for subblocks [from, to) and l < L.
  template <int L>
  SHARDMESH_LANES void scores(const uint8_t* const* keys, int from, int to, int D, const Query* q, const int32_t*, int32_t* dots, LinesAhead* ahead) {
    constexpr int V = registers(L);
    for (int b = from; b < to; b++) {
      SHARDMESH_UNROLL
      for (int half = 0; half < 4 / V; half++) {
        __m256i acc[L][V];
        clear<L, V>(acc);
        for (int row = 0; row < D / 4; row += 4) accumulate_four<L, V>(keys[b] + 16 * V * half + 64 * row, 64, q + 4 * row, D, acc, ahead);
        SHARDMESH_UNROLL
        for (int l = 0; l < L; l++)
          SHARDMESH_UNROLL
          for (int i = 0; i < V / 2; i++)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(dots + l * 64 + 16 * b + 4 * V * half + 8 * i), join(acc[l][2 * i], acc[l][2 * i + 1]));
      }
    }
  }

  // o[l * D + d] = fma(float(sum_j u[l * 64 + j] * V[j, d]), sw[l], o[l * D + d] * c[l]) over the tokens j of subblocks [from, to).
  template <int L>
  SHARDMESH_LANES void values(const uint8_t* const* values, int from, int to, int D, const Weight* u, const float* sw, const float* c, float* o, LinesAhead* ahead) {
    constexpr int V = registers(L);
    for (int d = 0; d < D; d += 4 * V) {
      __m256i acc[L][V];
      clear<L, V>(acc);
      for (int sub = from; sub < to; sub++) accumulate_four<L, V>(values[sub] + 4 * d, 4 * D, u + 16 * sub, 64, acc, ahead);
      SHARDMESH_UNROLL
      for (int l = 0; l < L; l++) {
        const __m256 scale = _mm256_set1_ps(sw[l]), decay = _mm256_set1_ps(c[l]);
        SHARDMESH_UNROLL
        for (int i = 0; i < V / 2; i++) {
          float* p = o + l * D + d + 8 * i;
          const __m256 sum = _mm256_cvtepi32_ps(join(acc[l][2 * i], acc[l][2 * i + 1]));
          _mm256_storeu_ps(p, _mm256_fmadd_ps(sum, scale, _mm256_mul_ps(_mm256_loadu_ps(p), decay)));
        }
      }
    }
  }

 private:
  // Registers of 4 outputs a lane holds: as many as leave room among 16.
  static constexpr int registers(int lanes) { return lanes <= 2 ? 4 : 2; }

  template <int L, int V>
  SHARDMESH_LANES void clear(__m256i (&acc)[L][V]) {
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++)
      SHARDMESH_UNROLL
      for (int i = 0; i < V; i++) acc[l][i] = _mm256_setzero_si256();
  }

  // acc[l] += rows * factors for four rows of 4 * V outputs with four signed bytes each, `stride` bytes apart; factors[l * factor_stride + 4 * row ...].
  template <int L, int V>
  SHARDMESH_LANES void accumulate_four(const uint8_t* p, int stride, const int16_t* factors, int factor_stride, __m256i (&acc)[L][V], LinesAhead* ahead) {
    ahead->take_four();
    SHARDMESH_UNROLL
    for (int row = 0; row < 4; row++) {
      __m256i x[V];
      SHARDMESH_UNROLL
      for (int i = 0; i < V; i++) x[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + row * stride + 16 * i)));
      SHARDMESH_UNROLL
      for (int l = 0; l < L; l++) {
        int64_t four;
        std::memcpy(&four, factors + l * factor_stride + 4 * row, 8);
        const __m256i y = _mm256_set1_epi64x(four);
        SHARDMESH_UNROLL
        for (int i = 0; i < V; i++) add_products(acc[l][i], x[i], y);
      }
    }
  }

  // acc += x0 * y0 + x1 * y1 of each pair of 16-bit terms. Written out, since gcc takes all products of a row before all sums and spills half of them.
  SHARDMESH_LANES void add_products(__m256i& acc, __m256i x, __m256i y) {
    __m256i products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(x), "x"(y));
  }

  // Eight outputs in order from two registers of (half, half) pairs.
  SHARDMESH_LANES __m256i join(__m256i x, __m256i y) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(x, y), 0xd8); }
};

}  // namespace
}  // namespace shardmesh
