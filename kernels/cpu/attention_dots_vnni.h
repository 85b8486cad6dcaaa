// Integer products of attention for sets with a 4-byte dot product (vpdpbusd): 16 tokens (scores) or 16 head values (values) fill a register, the other
// factor is broadcast four bytes at a time. Built for avx512 and, with the plain C++ lanes, for portable.
//
//   scores  K ^ 0x80 is K + 128 unsigned: the sum starts at -128 * sum(q), so that it ends at sum(q * K). Exact.
//   values  the softmax weights are the unsigned bytes, V the signed ones. Exact.
#pragma once
#include <cstdint>

namespace shardmesh {
namespace {

struct Dots {
  using Query = int8_t;
  using Weight = uint8_t;
  static constexpr int lanes_max = 6;  // heads or rows that share one load

  SHARDMESH_LANES void store_query(Query* p, Lanes::I x) { Lanes::store_int8(p, x); }
  SHARDMESH_LANES void store_weight(Weight* p, Lanes::I x) { Lanes::store_uint8(p, x); }

  // dots[l * 64 + 16 * b + t] = sum_d q[l * D + d] * K[d, t] of subblock b, for subblocks [from, to) and l < L.
  //   keys      [4] pointers to a subblock's K      sums  [L] sum of q over D
  template <int L>
  SHARDMESH_LANES void scores(const uint8_t* const* keys, int from, int to, int D, const Query* q, const int32_t* sums, int32_t* dots) {
    int b = from;
    if (to - b == 4) {
      scores_tile<L, 4>(keys, D, q, sums, dots);
      return;
    }
    for (; b < to; b++) scores_tile<L, 1>(keys + b, D, q, sums, dots + 16 * b);
  }

  // o[l * D + d] = fma(float(sum_j u[l * 64 + j] * V[j, d]), sw[l], o[l * D + d] * c[l]) over the tokens j of subblocks [from, to).
  //   values  [4] pointers to a subblock's V
  template <int L>
  SHARDMESH_LANES void values(const uint8_t* const* values, int from, int to, int D, const Weight* u, const float* sw, const float* c, float* o) {
    int d = 0;
    for (; d + 64 <= D; d += 64) values_tile<L, 4>(values, from, to, D, d, u, sw, c, o);
    for (; d < D; d += 32) values_tile<L, 2>(values, from, to, D, d, u, sw, c, o);
  }

 private:
  template <int L, int B>
  SHARDMESH_LANES void scores_tile(const uint8_t* const* keys, int D, const Query* q, const int32_t* sums, int32_t* dots) {
    Lanes::I acc[L][B];
    const Lanes::I sign = Lanes::set_int(static_cast<int32_t>(0x80808080u));
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++)
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) acc[l][b] = Lanes::set_int(-128 * sums[l]);
    for (int quad = 0; quad < D / 4; quad++) {
      Lanes::I k[B];
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) k[b] = Lanes::bit_xor(Lanes::load_int(keys[b] + 64 * quad), sign);
      SHARDMESH_UNROLL
      for (int l = 0; l < L; l++) {
        const Lanes::I x = Lanes::broadcast4(q + l * D + 4 * quad);
        SHARDMESH_UNROLL
        for (int b = 0; b < B; b++) acc[l][b] = Lanes::dot4(acc[l][b], k[b], x);
      }
    }
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++)
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) Lanes::store_int(dots + l * 64 + 16 * b, acc[l][b]);
  }

  template <int L, int B>
  SHARDMESH_LANES void values_tile(const uint8_t* const* values, int from, int to, int D, int d, const Weight* u, const float* sw, const float* c, float* o) {
    Lanes::I acc[L][B];
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++)
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) acc[l][b] = Lanes::set_int(0);
    for (int sub = from; sub < to; sub++) {
      const uint8_t* v = values[sub] + 4 * d;
      for (int quad = 0; quad < 4; quad++, v += 4 * D) {
        Lanes::I x[B];
        SHARDMESH_UNROLL
        for (int b = 0; b < B; b++) x[b] = Lanes::load_int(v + 64 * b);
        SHARDMESH_UNROLL
        for (int l = 0; l < L; l++) {
          const Lanes::I w = Lanes::broadcast4(u + l * 64 + 16 * sub + 4 * quad);
          SHARDMESH_UNROLL
          for (int b = 0; b < B; b++) acc[l][b] = Lanes::dot4(acc[l][b], w, x[b]);
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
