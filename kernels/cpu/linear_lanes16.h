// Matrix products with one row a lane, sixteen lanes, and a 4-byte dot product (unsigned weight bytes times signed activation bytes, exact in int32).
// Built for avx512 (vpdpbusd) and, on plain C++ lanes, for portable; the includer brings WeightLanes.
#pragma once
#include "linear_walk.h"

namespace shardmesh {
namespace {

struct Lanes16 {
  using L = WeightLanes;
  using F = L::F;
  using I = L::I;
  static constexpr bool kStreams = L::wide_registers;
  static constexpr int kPanelStrips = L::wide_registers ? 2 : 1;  // 2 strips x 6 tokens: twelve independent chains
  static constexpr int kWholeParts = L::wide_registers ? 8 : kTilePartsMax;  // for fewer walks through the weights; one strip of 8 is as fast as two of 6
  static constexpr int kTileRegistersFrom = INT_MAX;
  static constexpr int kPairParts = L::wide_registers ? kTilePartsMax : 0;

  template <class>
  using Input = TokenGroup;
  template <class>
  static constexpr bool kExpands = true;

  SHARDMESH_LANES F zero() { return L::set(0.0f); }
  SHARDMESH_LANES F load(const float* p) { return L::load(p); }
  SHARDMESH_LANES void store(float* p, F x) { L::store(p, x); }
  SHARDMESH_LANES F add(F a, F b) { return L::add(a, b); }

  // Unsigned weights of k = 4j .. 4j + 3 of all 16 rows.
  template <class W>
  SHARDMESH_LANES I weights(const uint8_t* record, int j) {
    if constexpr (W::panel) return L::load_int(record + kPanelWeightsAt + 64 * j);
    const uint8_t* bytes = record + W::weights_at;
    if constexpr (W::bits == 8) return L::load_int(bytes + 64 * j);
    const I low4 = L::set_int(0x0f0f0f0f);
    const I nibbles = j < 4 ? L::bit_and(L::load_int(bytes + 64 * j), low4) : L::bit_and(L::shift_right(L::load_int(bytes + 64 * (j - 4)), 4), low4);
    if constexpr (W::bits == 4) return nibbles;
    // Shifts cross byte borders; the mask keeps each byte's own bits.
    const uint8_t* planes = record + W::scale_bytes;
    if constexpr (W::bits == 5) {
      const I plane = L::load_int(planes);
      return L::bit_or(nibbles, L::bit_and(j < 4 ? L::shift_left(plane, 4 - j) : L::shift_right(plane, j - 4), L::set_int(0x10101010)));
    }
    const I plane = L::load_int(planes + 64 * (j / 4));
    const int up = 4 - 2 * (j % 4);
    return L::bit_or(nibbles, L::bit_and(up >= 0 ? L::shift_left(plane, up) : L::shift_right(plane, -up), L::set_int(0x30303030)));
  }

  template <class W>
  SHARDMESH_LANES F scale(const uint8_t* record, const uint8_t* head) {
    if constexpr (W::panel) return L::load(reinterpret_cast<const float*>(record));
    if constexpr (!W::k_format) return L::load_half(reinterpret_cast<const uint16_t*>(record));
    const F d = L::load_half(reinterpret_cast<const uint16_t*>(head));
    if constexpr (W::half_scales) return d;
    return L::mul(d, L::to_float(L::load_u8(record)));
  }
  template <class W>
  SHARDMESH_LANES F minimum(const uint8_t* record, const uint8_t* head) {
    if constexpr (W::panel) return L::load(reinterpret_cast<const float*>(record + 64));
    if constexpr (!W::k_format) return L::load_half(reinterpret_cast<const uint16_t*>(record + 32));
    return L::mul(L::load_half(reinterpret_cast<const uint16_t*>(head + 32)), L::to_float(L::load_u8(record + 16)));
  }
  // Scale of columns 0..15 and of 16..31 of each row (Q6_K).
  template <class W>
  SHARDMESH_LANES void half_scales(const uint8_t* record, I* first, I* second) {
    if constexpr (W::panel) {  // int16 pairs
      const I pairs = L::load_int(record + 64);
      *first = L::shift_right_signed(L::shift_left(pairs, 16), 16);
      *second = L::shift_right_signed(pairs, 16);
    } else {  // int8 pairs
      const I pairs = L::load_s16(record);
      *first = L::shift_right_signed(L::shift_left(pairs, 24), 24);
      *second = L::shift_right_signed(pairs, 8);
    }
  }

  // The whole of P parts: 256 * high + low.
  template <int P>
  SHARDMESH_LANES I join_parts(const I* parts) {
    if constexpr (P == 1) return parts[0];
    return L::add_int(L::shift_left(parts[0], 8), parts[1]);
  }

  // A sum of integer products that begins at the bits of 1.5 * 2^23 is, read as fp32, kBias + dot while |dot| < 2^22 (it is at most 255 * 127 * 32): no conversion.
  // S has at most 17 significant bits, so kBias * S is exact and fma(kBias + dot, S, -kBias * S) rounds once, as S * float(dot) does: the same bits.
  static constexpr float kBias = 12582912.0f;
  static constexpr int32_t kBiasBits = 0x4b400000;
  template <class W, int P>
  static constexpr bool kBiased = L::wide_registers && P == 1 && !W::half_scales;  // plain C++ lanes have no fma to spare

  // Strips together: every broadcast activation meets all of them at once. One after the other, the compiler keeps the broadcasts of a whole group for the next
  // strip, in memory, and the products wait for loads.
  template <class W, int M, int P, int S>
  SHARDMESH_LANES void accumulate(const uint8_t* const* records, const uint8_t* const* heads, const TokenGroup* in, F (*acc)[M]) {
    constexpr int N = M * P;
    I dot[S][N];
    [[maybe_unused]] I second_dot[S][M];  // int16 activations under half scales: the sum of both halves would not fit 32 bits
    if constexpr (W::half_scales) {
      SHARDMESH_UNROLL
      for (int half = 0; half < 2; half++) {
        I c[S][N];
        SHARDMESH_UNROLL
        for (int t = 0; t < N; t++)
          SHARDMESH_UNROLL
          for (int s = 0; s < S; s++) c[s][t] = L::set_int(-32 * in[t].halves[half]);
        SHARDMESH_UNROLL
        for (int j = 4 * half; j < 4 * half + 4; j++) add_products<W, N, S>(records, j, in, c);
        SHARDMESH_UNROLL
        for (int s = 0; s < S; s++) {
          I scales[2];
          half_scales<W>(records[s], &scales[0], &scales[1]);
          SHARDMESH_UNROLL
          for (int t = 0; t < M; t++) {
            const I scaled = L::mul_int(join_parts<P>(&c[s][t * P]), scales[half]);
            if (half == 0) dot[s][t] = scaled;
            else if (P == 1) dot[s][t] = L::add_int(dot[s][t], scaled);
            else second_dot[s][t] = scaled;
          }
        }
      }
    } else {
      SHARDMESH_UNROLL
      for (int t = 0; t < N; t++)
        SHARDMESH_UNROLL
        for (int s = 0; s < S; s++) {
          dot[s][t] = L::set_int(kBiased<W, P> ? kBiasBits : 0);
          if constexpr (W::zero_shift >= 0) dot[s][t] = L::sub_int(dot[s][t], L::shift_left(L::broadcast4(&in[t].sum), W::zero_shift));
        }
      SHARDMESH_UNROLL
      for (int i = 0; i < 8; i++) add_products<W, N, S>(records, W::panel || W::bits == 8 ? i : i / 2 + 4 * (i % 2), in, dot);  // both nibbles of a register, one after the other
      if constexpr (P == 2) {
        SHARDMESH_UNROLL
        for (int s = 0; s < S; s++)
          SHARDMESH_UNROLL
          for (int t = 0; t < M; t++) dot[s][t] = join_parts<P>(&dot[s][t * P]);
      }
    }
    SHARDMESH_UNROLL
    for (int s = 0; s < S; s++) add_dots<W, M, P, kBiased<W, P>>(records[s], heads[s], in, dot[s], second_dot[s], acc[s]);
  }

  // One group of one strip into its sums. `biased`: the integers are the bits of kBias + dot. `second_dot` of int16 activations under half scales only.
  template <class W, int M, int P, bool biased>
  SHARDMESH_LANES void add_dots(const uint8_t* record, const uint8_t* head, const TokenGroup* in, const I* dot, [[maybe_unused]] const I* second_dot, F* acc) {
    const F scales = scale<W>(record, head);
    [[maybe_unused]] const F bias = L::mul(scales, L::set(-kBias));
    const auto scaled = [&](I sum) __attribute__((always_inline)) {
      if constexpr (biased) return L::fma(L::from_bits(sum), scales, bias);
      return L::mul(L::to_float(sum), scales);
    };
    SHARDMESH_UNROLL
    for (int t = 0; t < M; t++) {
      const F sa = L::set(in[t * P].sa);
      acc[t] = L::fma(scaled(dot[t]), sa, acc[t]);
      if constexpr (W::half_scales && P == 2) acc[t] = L::fma(scaled(second_dot[t]), sa, acc[t]);
    }
    if constexpr (W::minimum) {
      const F m = minimum<W>(record, head);
      SHARDMESH_UNROLL
      for (int t = 0; t < M; t++) acc[t] = L::fma(m, L::set(in[t * P].ms), acc[t]);
    }
  }

  // Columns 4j .. 4j + 3 of N activation groups and S strips.
  template <class W, int N, int S>
  SHARDMESH_LANES void add_products(const uint8_t* const* records, int j, const TokenGroup* in, I (*sums)[N]) {
    I w[S];
    SHARDMESH_UNROLL
    for (int s = 0; s < S; s++) w[s] = weights<W>(records[s], j);
    SHARDMESH_UNROLL
    for (int t = 0; t < N; t++) {
      const I x = L::broadcast4(in[t].q + 4 * j);
      SHARDMESH_UNROLL
      for (int s = 0; s < S; s++) sums[s][t] = L::dot4(sums[s][t], w[s], x);
    }
  }

  // Weight bytes as the format has them, unsigned, or with the true sign.
  template <TensorType type, bool with_sign = false>
  SHARDMESH_LANES void expand(const uint8_t* record, const uint8_t* head, uint8_t* panel) {
    using W = Direct<type>;
    L::store(reinterpret_cast<float*>(panel), scale<W>(record, head));
    if constexpr (W::minimum) L::store(reinterpret_cast<float*>(panel + 64), minimum<W>(record, head));
    if constexpr (W::half_scales) {
      I first, second;
      half_scales<W>(record, &first, &second);
      L::store_int(reinterpret_cast<int32_t*>(panel + 64), L::bit_or(L::bit_and(first, L::set_int(0xffff)), L::shift_left(second, 16)));
    }
    SHARDMESH_UNROLL
    for (int j = 0; j < 8; j++) {
      I w = weights<W>(record, j);
      if constexpr (with_sign && W::zero_shift >= 0) w = L::sub_bytes(w, L::set_int(static_cast<int32_t>(0x01010101u << W::zero_shift)));
      L::store_int(reinterpret_cast<int32_t*>(panel + kPanelWeightsAt + 64 * j), w);
    }
  }

  template <TensorType type, int M>
  SHARDMESH_LANES void accumulate_float(const uint8_t* w, const float* x, int64_t stride, int64_t count, F* out) {
    F acc[M];
    SHARDMESH_UNROLL
    for (int t = 0; t < M; t++) acc[t] = out[t];
    for (int64_t k = 0; k < count; k++) {
      F value;
      if constexpr (type == TensorType::F32) value = L::load(reinterpret_cast<const float*>(w) + k * kStripRows);
      if constexpr (type == TensorType::F16) value = L::load_half(reinterpret_cast<const uint16_t*>(w) + k * kStripRows);
      if constexpr (type == TensorType::BF16) value = L::load_bfloat(w + k * kStripRows * 2);
      SHARDMESH_UNROLL
      for (int t = 0; t < M; t++) acc[t] = L::fma(value, L::set(x[t * stride + k]), acc[t]);
    }
    SHARDMESH_UNROLL
    for (int t = 0; t < M; t++) out[t] = acc[t];
  }

  // Writes 32 integers of a part and their sums.
  SHARDMESH_LANES void store_part(I p, I q, TokenGroup* out) {
    L::store_int8(out->q, p);
    L::store_int8(out->q + 16, q);
    int32_t first, second;
    L::sum_two(p, q, &first, &second);
    out->sum = first + second;
    out->halves[0] = static_cast<int16_t>(first);
    out->halves[1] = static_cast<int16_t>(second);
  }

  template <int P>
  SHARDMESH_LANES bool quantize_group(const float* x, TokenGroup* out) {
    const F a = L::load(x), b = L::load(x + 16);
    const I magnitude = L::set_int(0x7fffffff);
    const int32_t largest_bits = L::highest_int(L::max_int(L::bit_and(L::bits(a), magnitude), L::bit_and(L::bits(b), magnitude)));
    if (largest_bits >= kInfinityBits) return false;
    float amax;
    std::memcpy(&amax, &largest_bits, 4);
    if (!(amax >= kQuantizableMin)) {
      std::memset(out, 0, P * sizeof *out);
      return true;
    }
    constexpr float largest = P == 1 ? 127.0f : static_cast<float>(kInt16Max);
    const F inverse = L::set(largest / amax);
    const I p = L::to_int(L::mul(a, inverse)), q = L::to_int(L::mul(b, inverse));
    out->sa = amax / largest;
    if constexpr (P == 1) {
      store_part(p, q, out);
      out->ms = out->sa * static_cast<float>(out->sum);
    } else {
      const I round = L::set_int(128);
      const I ph = L::shift_right_signed(L::add_int(p, round), 8), qh = L::shift_right_signed(L::add_int(q, round), 8);
      store_part(ph, qh, out);
      store_part(L::sub_int(p, L::shift_left(ph, 8)), L::sub_int(q, L::shift_left(qh, 8)), out + 1);
      out->ms = out->sa * static_cast<float>(256 * out[0].sum + out[1].sum);
    }
    return true;
  }
};

}  // namespace
}  // namespace shardmesh
