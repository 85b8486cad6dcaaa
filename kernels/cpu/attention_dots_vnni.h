// Integer products of attention for sets with a 4-byte dot product (vpdpbusd): 16 tokens (scores) or 16 head values (values) fill a register, the other
// factor is broadcast four bytes at a time. Built for avx512 and, with the plain C++ lanes, for portable.
//
//   scores  q + 128 is unsigned: the sum of the products starts at -128 * sum(K), so that it ends at sum(q * K). Exact.
//   values  the softmax weights are the unsigned bytes, V the signed ones. Exact.
#pragma once
#include <cstdint>

#include "lines_ahead.h"

namespace shardmesh {
namespace {

struct Dots {
  using Query = uint8_t;  // q + 128
  using Weight = uint8_t;
  static constexpr int lanes_max = 6;  // heads or rows that share one load

  SHARDMESH_LANES void store_query(Query* p, Lanes::I x) { Lanes::store_uint8(p, Lanes::bit_xor(x, Lanes::set_int(128))); }
  // The 64 weights of a step, 16 of each subblock: quad i of subblock b at p + 4 * (4 * i + b).
  SHARDMESH_LANES void store_weights(Weight* p, const Lanes::I* x) { Lanes::store_uint8_quads(p, x[0], x[1], x[2], x[3]); }

  // sums[16 * b + t] = -128 * sum_d K[d, t] of subblocks [from, to).
  SHARDMESH_LANES void sum_keys(const uint8_t* const* keys, int from, int to, int D, int32_t* sums) {
    const Lanes::I zero = Lanes::set_int(0), by = Lanes::set_int(static_cast<int32_t>(0x80808080u));
    if (to - from == 4) {
      Lanes::I acc[4] = {zero, zero, zero, zero};
      for (int quad = 0; quad < D / 4; quad++)
        SHARDMESH_UNROLL
        for (int b = 0; b < 4; b++) acc[b] = Lanes::dot4(acc[b], by, Lanes::load_int(keys[b] + 64 * quad));
      SHARDMESH_UNROLL
      for (int b = 0; b < 4; b++) Lanes::store_int(sums + 16 * b, Lanes::sub_int(zero, acc[b]));
      return;
    }
    for (int b = from; b < to; b++) {
      Lanes::I acc = zero;
      for (int quad = 0; quad < D / 4; quad++) acc = Lanes::dot4(acc, by, Lanes::load_int(keys[b] + 64 * quad));
      Lanes::store_int(sums + 16 * b, Lanes::sub_int(zero, acc));
    }
  }

  // dots[l * 64 + 16 * b + t] = sum_d q[l * D + d] * K[d, t] of subblock b, for subblocks [from, to) and l < L.
  //   keys  [4] pointers to a subblock's K      sums  of sum_keys
  template <int L>
  SHARDMESH_LANES void scores(const uint8_t* const* keys, int from, int to, int D, const Query* q, const int32_t* sums, int32_t* dots, LinesAhead* ahead) {
    keys += from;
    sums += 16 * from;
    dots += 16 * from;
    switch (to - from) {
      case 1: scores_tile<L, 1>(keys, D, q, sums, dots, ahead); break;
      case 2: scores_tile<L, 2>(keys, D, q, sums, dots, ahead); break;
      case 3: scores_tile<L, 3>(keys, D, q, sums, dots, ahead); break;
      default: scores_tile<L, 4>(keys, D, q, sums, dots, ahead); break;
    }
  }

  // o[l * D + d] = fma(float(sum_j u[l * 64 + j] * V[j, d]), sw[l], o[l * D + d] * c[l]) over the tokens j of subblocks [from, to).
  //   values  [4] pointers to a subblock's V
  template <int L>
  SHARDMESH_LANES void values(const uint8_t* const* values, int from, int to, int D, const Weight* u, const float* sw, const float* c, float* o, LinesAhead* ahead) {
    int d = 0;
    for (; d + 64 <= D; d += 64) values_tile<L, 4>(values, from, to, D, d, u, sw, c, o, ahead);
    for (; d < D; d += 32) values_tile<L, 2>(values, from, to, D, d, u, sw, c, o, ahead);
  }

 private:
  template <int L, int B>
  SHARDMESH_LANES void scores_tile(const uint8_t* const* keys, int D, const Query* q, const int32_t* sums, int32_t* dots, LinesAhead* ahead) {
    Lanes::I acc[L][B];
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++)
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) acc[l][b] = Lanes::load_int(sums + 16 * b);
    for (int quad = 0; quad < D / 4; quad++) {
      Lanes::I k[B];
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) {
        k[b] = Lanes::load_int(keys[b] + 64 * quad);
        Lanes::hold(k[b]);
      }
      ahead->take_four();
      SHARDMESH_UNROLL
      for (int l = 0; l < L; l++) {
        const Lanes::I x = Lanes::broadcast4(q + l * D + 4 * quad);
        SHARDMESH_UNROLL
        for (int b = 0; b < B; b++) Lanes::hold(acc[l][b] = Lanes::dot4(acc[l][b], x, k[b]));
      }
    }
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++)
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) Lanes::store_int(dots + l * 64 + 16 * b, acc[l][b]);
  }

  template <int L, int B>
  SHARDMESH_LANES void values_tile(const uint8_t* const* values, int from, int to, int D, int d, const Weight* u, const float* sw, const float* c, float* o,
                                   LinesAhead* ahead) {
    Lanes::I acc[L][B];
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++)
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) acc[l][b] = Lanes::set_int(0);
    for (int sub = from; sub < to; sub++) {
      const uint8_t* v = values[sub] + 4 * d;
      _Pragma("GCC unroll 1")  // several at once need more registers than there are
      for (int quad = 0; quad < 4; quad++, v += 4 * D) {
        Lanes::I x[B];
        SHARDMESH_UNROLL
        for (int b = 0; b < B; b++) {
          x[b] = Lanes::load_int(v + 64 * b);
          Lanes::hold(x[b]);
        }
        ahead->take_four();
        SHARDMESH_UNROLL
        for (int l = 0; l < L; l++) {
          const Lanes::I w = Lanes::broadcast4(u + l * 64 + 16 * quad + 4 * sub);
          SHARDMESH_UNROLL
          for (int b = 0; b < B; b++) Lanes::hold(acc[l][b] = Lanes::dot4(acc[l][b], w, x[b]));
        }
      }
    }
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++) {
      const Lanes::F scale = Lanes::set(sw[l]), decay = Lanes::set(c[l]);
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) {
        float* p = o + l * D + d + 16 * b;
        Lanes::store(p, Lanes::fma(Lanes::to_float(acc[l][b]), scale, Lanes::mul(Lanes::load(p), decay)));
      }
    }
  }
};

}  // namespace
}  // namespace shardmesh
