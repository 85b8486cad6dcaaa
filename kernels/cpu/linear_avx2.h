// Matrix products with AVX2: a strip of 16 rows is two registers of 8. There is no 4-byte dot product here: vpmaddubsw multiplies unsigned weight bytes with
// signed activation bytes and adds pairs to int16, saturating. Each format adds up as many of these pairs in int16 as can never overflow, then widens:
//   4 bits  15 * 127 * 2 * 8 = 30480    all of a group
//   5 bits  31 * 127 * 2 * 4 = 31496    half of it
//   6 bits  63 * 127 * 2 * 2 = 32004    a quarter; the widening multiplies with the row's scale of that half (Q6_K)
//   8 bits  none: 16-bit words of weights and activations (vpmaddwd)
// so nothing needs abs or sign, and -128 is a weight like any other (stored as 0). The low half of an int16 activation may be -128: 15 * 128 * 2 * 8 = 30720 and
// its like still fit.
#pragma once
#include <immintrin.h>

#include <type_traits>

#define SHARDMESH_UNROLL _Pragma("GCC unroll 8")
#define SHARDMESH_AVX2 [[maybe_unused]] static inline __attribute__((always_inline))

#include "linear_walk.h"

namespace shardmesh {
namespace {

struct Avx2 {
  struct F {
    __m256 v[2];  // rows 0..7, 8..15
  };
  static constexpr bool kStreams = true;
  static constexpr int kWholeParts = kTilePartsMax;
  static constexpr int kTileRegistersFrom = INT_MAX;
  static constexpr int kPairParts = 4;
  static constexpr int kPanelStrips = 1;  // 2 halves x 6 tokens: twelve accumulators, the rest of the 16 registers holds weights and activations

  template <class W>
  using Input = std::conditional_t<W::bits == 8, WideGroup, TokenGroup>;
  template <class W>
  static constexpr bool kExpands = W::bits != 8;  // bytes are what a panel would hold

  SHARDMESH_AVX2 F zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  SHARDMESH_AVX2 F load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  SHARDMESH_AVX2 void store(float* p, const F& x) {
    _mm256_storeu_ps(p, x.v[0]);
    _mm256_storeu_ps(p + 8, x.v[1]);
  }
  SHARDMESH_AVX2 F add(const F& a, const F& b) { return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}}; }

  SHARDMESH_AVX2 __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  SHARDMESH_AVX2 __m256i broadcast4(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }
  SHARDMESH_AVX2 __m256 load_half(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  SHARDMESH_AVX2 __m256 load_u8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }

  // Keeps a running sum in its register, in the written order: gcc otherwise sums integers as a tree, runs out of registers and spills half of them.
  SHARDMESH_AVX2 void hold(__m256i& x) { __asm__("" : "+x"(x)); }

  SHARDMESH_AVX2 void add_products(__m256i* sum, __m256i w, __m256i x, bool first) {
    const __m256i products = _mm256_maddubs_epi16(w, x);
    *sum = first ? products : _mm256_add_epi16(*sum, products);
    hold(*sum);
  }

  // Unsigned weights of k = 4j .. 4j + 3 of rows 8h .. 8h + 7.
  template <class W>
  SHARDMESH_AVX2 __m256i weights(const uint8_t* record, int j, int h) {
    const __m256i low4 = _mm256_set1_epi8(15);
    if constexpr (W::panel || W::bits == 8) return load_bytes(record + (W::panel ? kPanelWeightsAt : W::weights_at) + 64 * j + 32 * h);
    const uint8_t* bytes = record + W::weights_at + 32 * h;
    const __m256i nibbles = _mm256_and_si256(j < 4 ? load_bytes(bytes + 64 * j) : _mm256_srli_epi16(load_bytes(bytes + 64 * (j - 4)), 4), low4);
    if constexpr (W::bits == 4) return nibbles;
    // Shifts cross byte borders; the mask keeps each byte's own bits.
    const uint8_t* planes = record + W::scale_bytes + 32 * h;
    if constexpr (W::bits == 5) {
      const __m256i plane = load_bytes(planes);
      return _mm256_or_si256(nibbles, _mm256_and_si256(j < 4 ? _mm256_slli_epi16(plane, 4 - j) : _mm256_srli_epi16(plane, j - 4), _mm256_set1_epi8(0x10)));
    }
    const __m256i plane = load_bytes(planes + 64 * (j / 4));
    const int up = 4 - 2 * (j % 4);
    return _mm256_or_si256(nibbles, _mm256_and_si256(up >= 0 ? _mm256_slli_epi16(plane, up) : _mm256_srli_epi16(plane, -up), _mm256_set1_epi8(0x30)));
  }

  template <class W>
  SHARDMESH_AVX2 __m256 scale(const uint8_t* record, const uint8_t* head, int h) {
    if constexpr (W::panel) return _mm256_loadu_ps(reinterpret_cast<const float*>(record) + 8 * h);
    if constexpr (!W::k_format) return load_half(record + 16 * h);
    const __m256 d = load_half(head + 16 * h);
    if constexpr (W::half_scales) return d;
    return _mm256_mul_ps(d, load_u8(record + 8 * h));
  }
  template <class W>
  SHARDMESH_AVX2 __m256 minimum(const uint8_t* record, const uint8_t* head, int h) {
    if constexpr (W::panel) return _mm256_loadu_ps(reinterpret_cast<const float*>(record + 64) + 8 * h);
    if constexpr (!W::k_format) return load_half(record + 32 + 16 * h);
    return _mm256_mul_ps(load_half(head + 32 + 16 * h), load_u8(record + 16 + 8 * h));
  }
  // int16 pairs (scale of columns 0..15, scale of columns 16..31), a row a lane (Q6_K).
  template <class W>
  SHARDMESH_AVX2 __m256i half_scales(const uint8_t* record, int h) {
    if constexpr (W::panel) return load_bytes(record + 64 + 32 * h);
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(record + 16 * h)));
  }

  // How a group is cut into runs whose pairs fit int16, and in which order its eight registers are taken.
  template <class W>
  SHARDMESH_AVX2 constexpr int run_count() { return W::bits == 4 ? 1 : W::bits == 6 ? 4 : 2; }
  template <class W>
  SHARDMESH_AVX2 constexpr int register_at(int i) { return W::panel || W::bits == 6 ? i : i / 2 + 4 * (i % 2); }

  // 8 bits: even and odd bytes as 16-bit words times the token's words in the same order (WideGroup), 32-bit sums from the start. int16 activations cost
  // nothing more here.
  template <class W, int M, int>
  SHARDMESH_AVX2 void accumulate_strip(const uint8_t* record, const uint8_t*, const WideGroup* in, F* acc) {
    __m256i dot[M][2];
    SHARDMESH_UNROLL
    for (int j = 0; j < 8; j++) {
      SHARDMESH_UNROLL
      for (int odd = 0; odd < 2; odd++) {
        // Read again for the odd bytes: twelve sums leave no register to keep them in, and a spill costs more than a load.
        const uint8_t* again = record;
        __asm__("" : "+r"(again));
        __m256i w[2];
        SHARDMESH_UNROLL
        for (int h = 0; h < 2; h++) {
          const __m256i bytes = weights<W>(again, j, h);
          w[h] = odd ? _mm256_srli_epi16(bytes, 8) : _mm256_and_si256(bytes, _mm256_set1_epi16(255));
        }
        SHARDMESH_UNROLL
        for (int t = 0; t < M; t++) {
          __m256i x = broadcast4(in[t].q + 4 * j + 2 * odd);
          hold(x);
          SHARDMESH_UNROLL
          for (int h = 0; h < 2; h++) {
            const __m256i products = _mm256_madd_epi16(w[h], x);
            dot[t][h] = j + odd == 0 ? products : _mm256_add_epi32(dot[t][h], products);
            hold(dot[t][h]);
          }
        }
      }
    }
    SHARDMESH_UNROLL
    for (int h = 0; h < 2; h++) {
      const __m256 s = scale<W>(record, nullptr, h);
      SHARDMESH_UNROLL
      for (int t = 0; t < M; t++) {
        const __m256i zero = _mm256_slli_epi32(broadcast4(&in[t].sum), W::zero_shift);
        acc[t].v[h] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(dot[t][h], zero)), s), _mm256_set1_ps(in[t].sa), acc[t].v[h]);
      }
    }
  }

  // The whole of P parts: 256 * high + low.
  template <int P>
  SHARDMESH_AVX2 __m256i join_parts(const __m256i (*parts)[2], int h) {
    if constexpr (P == 1) return parts[0][h];
    return _mm256_add_epi32(_mm256_slli_epi32(parts[0][h], 8), parts[1][h]);
  }

  template <class W, int M, int P>
  SHARDMESH_AVX2 void accumulate_strip(const uint8_t* record, const uint8_t* head, const TokenGroup* in, F* acc) {
    constexpr int N = M * P, kRuns = run_count<W>(), kRun = 8 / kRuns;
    // int16 activations under half scales: the sum of both halves would not fit 32 bits, each has its own.
    constexpr int kDots = W::half_scales && P == 2 ? 2 : 1;
    __m256i dot[kDots][N][2];
    __m256i pairs[2];  // of half scales
    if constexpr (W::half_scales) {
      pairs[0] = half_scales<W>(record, 0);
      pairs[1] = half_scales<W>(record, 1);
    }
    SHARDMESH_UNROLL
    for (int run = 0; run < kRuns; run++) {
      __m256i c[N][2];
      SHARDMESH_UNROLL
      for (int i = 0; i < kRun; i++) {
        const int j = register_at<W>(run * kRun + i);
        const __m256i w0 = weights<W>(record, j, 0), w1 = weights<W>(record, j, 1);
        SHARDMESH_UNROLL
        for (int t = 0; t < N; t++) {
          const __m256i x = broadcast4(in[t].q + 4 * j);
          add_products(&c[t][0], w0, x, i == 0);
          add_products(&c[t][1], w1, x, i == 0);
        }
      }
      const int to = kDots == 2 ? run / 2 : 0;
      const bool begins = kDots == 2 ? run % 2 == 0 : run == 0;
      SHARDMESH_UNROLL
      for (int h = 0; h < 2; h++) {
        __m256i by = _mm256_set1_epi16(1);
        if constexpr (W::half_scales) {
          by = run < 2 ? _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(pairs[h], 0xa0), 0xa0) : _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(pairs[h], 0xf5), 0xf5);
        }
        SHARDMESH_UNROLL
        for (int t = 0; t < N; t++) {
          const __m256i wide = _mm256_madd_epi16(c[t][h], by);
          dot[to][t][h] = begins ? wide : _mm256_add_epi32(dot[to][t][h], wide);
        }
      }
    }
    if constexpr (W::zero_shift >= 0) {
      SHARDMESH_UNROLL
      for (int t = 0; t < N; t++) {
        if constexpr (W::half_scales) {
          const __m256i sums = broadcast4(in[t].halves);
          SHARDMESH_UNROLL
          for (int i = 0; i < kDots; i++) {
            const __m256i of = kDots == 1 ? sums : i == 0 ? _mm256_and_si256(sums, _mm256_set1_epi32(0xffff)) : _mm256_andnot_si256(_mm256_set1_epi32(0xffff), sums);
            for (int h = 0; h < 2; h++) dot[i][t][h] = _mm256_sub_epi32(dot[i][t][h], _mm256_slli_epi32(_mm256_madd_epi16(pairs[h], of), W::zero_shift));
          }
        } else {
          const __m256i sum = _mm256_slli_epi32(broadcast4(&in[t].sum), W::zero_shift);
          for (int h = 0; h < 2; h++) dot[0][t][h] = _mm256_sub_epi32(dot[0][t][h], sum);
        }
      }
    }
    SHARDMESH_UNROLL
    for (int h = 0; h < 2; h++) {
      const __m256 s = scale<W>(record, head, h);
      SHARDMESH_UNROLL
      for (int t = 0; t < M; t++) {
        const __m256 sa = _mm256_set1_ps(in[t * P].sa);
        SHARDMESH_UNROLL
        for (int i = 0; i < kDots; i++) acc[t].v[h] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(join_parts<P>(&dot[i][t * P], h)), s), sa, acc[t].v[h]);
      }
      if constexpr (W::minimum) {
        const __m256 m = minimum<W>(record, head, h);
        SHARDMESH_UNROLL
        for (int t = 0; t < M; t++) acc[t].v[h] = _mm256_fmadd_ps(m, _mm256_set1_ps(in[t * P].ms), acc[t].v[h]);
      }
    }
  }

  // Strips one after the other: 16 registers hold the products of one.
  template <class W, int M, int P, int S, class Group>
  SHARDMESH_AVX2 void accumulate(const uint8_t* const* records, const uint8_t* const* heads, const Group* in, F (*acc)[M]) {
    SHARDMESH_UNROLL
    for (int s = 0; s < S; s++) accumulate_strip<W, M, P>(records[s], heads[s], in, acc[s]);
  }

  template <TensorType type>
  SHARDMESH_AVX2 void expand(const uint8_t* record, const uint8_t* head, uint8_t* panel) {
    using W = Direct<type>;
    for (int h = 0; h < 2; h++) {
      _mm256_storeu_ps(reinterpret_cast<float*>(panel) + 8 * h, scale<W>(record, head, h));
      if constexpr (W::minimum) _mm256_storeu_ps(reinterpret_cast<float*>(panel + 64) + 8 * h, minimum<W>(record, head, h));
      if constexpr (W::half_scales) _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + 64 + 32 * h), half_scales<W>(record, h));
    }
    SHARDMESH_UNROLL
    for (int j = 0; j < 8; j++)
      SHARDMESH_UNROLL
      for (int h = 0; h < 2; h++) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + kPanelWeightsAt + 64 * j + 32 * h), weights<W>(record, j, h));
      }
  }

  template <TensorType type, int M>
  SHARDMESH_AVX2 void accumulate_float(const uint8_t* w, const float* x, int64_t stride, int64_t count, F* out) {
    F acc[M];
    SHARDMESH_UNROLL
    for (int t = 0; t < M; t++) acc[t] = out[t];
    for (int64_t k = 0; k < count; k++) {
      __m256 value[2];
      SHARDMESH_UNROLL
      for (int h = 0; h < 2; h++) {
        if constexpr (type == TensorType::F32) value[h] = _mm256_loadu_ps(reinterpret_cast<const float*>(w) + k * kStripRows + 8 * h);
        if constexpr (type == TensorType::F16) value[h] = load_half(w + k * kStripRows * 2 + 16 * h);
        if constexpr (type == TensorType::BF16) {
          const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k * kStripRows * 2 + 16 * h));
          value[h] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        }
      }
      SHARDMESH_UNROLL
      for (int t = 0; t < M; t++) {
        const __m256 broadcast = _mm256_set1_ps(x[t * stride + k]);
        acc[t].v[0] = _mm256_fmadd_ps(value[0], broadcast, acc[t].v[0]);
        acc[t].v[1] = _mm256_fmadd_ps(value[1], broadcast, acc[t].v[1]);
      }
    }
    SHARDMESH_UNROLL
    for (int t = 0; t < M; t++) out[t] = acc[t];
  }

  SHARDMESH_AVX2 int32_t sum_lanes(__m128i x) {
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
  }

  // Writes 32 integers of a part and their sums.
  SHARDMESH_AVX2 void store_part(const __m256i* q, TokenGroup* out) {
    // The packs work within halves of a register; the permutation puts the groups of four back in order.
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out->q), _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    const __m256i low = _mm256_add_epi32(q[0], q[1]), high = _mm256_add_epi32(q[2], q[3]);
    const int32_t first = sum_lanes(_mm_add_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
    const int32_t second = sum_lanes(_mm_add_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    out->sum = first + second;
    out->halves[0] = static_cast<int16_t>(first);
    out->halves[1] = static_cast<int16_t>(second);
  }

  // q[0..8) .. q[24..32) as words, the even ones of every four first.
  SHARDMESH_AVX2 void store_wide(const __m256i* q, WideGroup* wide) {
    for (int i = 0; i < 2; i++) {
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[2 * i], q[2 * i + 1]), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(wide->q + 16 * i), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
    }
  }

  // False when a value is not finite. `wide` is written if asked for.
  template <int P, bool wants_wide>
  SHARDMESH_AVX2 bool quantize_group(const float* x, TokenGroup* out, [[maybe_unused]] WideGroup* wide) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256 v[4];
    __m256i m = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
      v[i] = _mm256_loadu_ps(x + 8 * i);
      m = _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    }
    __m128i n = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    n = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0x4e));
    const int32_t largest_bits = _mm_cvtsi128_si32(_mm_max_epi32(n, _mm_shuffle_epi32(n, 0xb1)));
    if (largest_bits >= kInfinityBits) return false;
    float amax;
    std::memcpy(&amax, &largest_bits, 4);
    if (!(amax >= kQuantizableMin)) {
      std::memset(out, 0, P * sizeof *out);
      if constexpr (wants_wide) std::memset(wide, 0, sizeof *wide);
      return true;
    }
    constexpr float largest = P == 1 ? 127.0f : static_cast<float>(kInt16Max);
    const __m256 inverse = _mm256_set1_ps(largest / amax);
    __m256i q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    if constexpr (wants_wide) store_wide(q, wide);
    out->sa = amax / largest;
    if constexpr (P == 1) {
      store_part(q, out);
    } else {
      __m256i high[4];
      for (int i = 0; i < 4; i++) {
        high[i] = _mm256_srai_epi32(_mm256_add_epi32(q[i], _mm256_set1_epi32(128)), 8);
        q[i] = _mm256_sub_epi32(q[i], _mm256_slli_epi32(high[i], 8));
      }
      store_part(high, out);
      store_part(q, out + 1);
    }
    const int32_t sum = P == 1 ? out->sum : 256 * out[0].sum + out[1].sum;
    out->ms = out->sa * static_cast<float>(sum);
    if constexpr (wants_wide) {
      wide->sum = sum;
      wide->sa = out->sa;
    }
    return true;
  }
};

// This part's share of the groups, for weights of 8 bits in both forms.
template <int P>
bool quantize_parts(const Activations& in, Part part) {
  if (!in.meets_bytes) return quantize_each<Avx2, P>(in, part, [](const float* x, TokenGroup* out) { return Avx2::quantize_group<P, false>(x, out, nullptr); });
  WideGroup* wide = reinterpret_cast<WideGroup*>(in.data + wide_offset(in.type, in.tokens, in.columns / 32));
  const TokenGroup* first = reinterpret_cast<const TokenGroup*>(in.data);
  return quantize_each<Avx2, P>(in, part, [=](const float* x, TokenGroup* out) { return Avx2::quantize_group<P, true>(x, out, wide + (out - first) / P); });
}

}  // namespace

}  // namespace shardmesh
