// exp, quantisation and work splitting over `Lanes`. Include one of lanes16_{portable,avx2,avx512}.h before this.
#pragma once
#include <cstdint>

#include "../include/arithmetic.h"
#include "../include/kernel_set.h"

namespace shardmesh {
namespace {

// exp_fixed of arithmetic.h in every lane of N vectors, in place, the same bits, for x up to 88. Step by step for all of them: a vector alone is a chain of fifteen
// instructions that each wait for the one before; but no more of them at a time than have room in registers. The power of two is added to the exponent: the product
// is never subnormal.
template <int N>
SHARDMESH_LANES void exp_each(Lanes::F* x) {
  using L = Lanes;
  if constexpr (N > L::kExpTogether) {
    exp_each<L::kExpTogether>(x);
    exp_each<N - L::kExpTogether>(x + L::kExpTogether);
    return;
  }
  L::M keep[N];
  L::I whole[N];
  L::F n[N], p[N];
#define SHARDMESH_EACH \
  SHARDMESH_UNROLL     \
  for (int i = 0; i < N; i++)
  SHARDMESH_EACH keep[i] = L::greater(x[i], L::set(-87.0f));
  SHARDMESH_EACH whole[i] = L::to_int(L::mul(x[i], L::set(1.44269504088896341f)));
  SHARDMESH_EACH n[i] = L::to_float(whole[i]);
  SHARDMESH_EACH L::hold(x[i] = L::fma(n[i], L::set(-0.693145751953125f), x[i]));
  SHARDMESH_EACH L::hold(x[i] = L::fma(n[i], L::set(-1.42860682030941723e-6f), x[i]));
  SHARDMESH_EACH L::hold(p[i] = L::fma(L::set(1.9875691500e-4f), x[i], L::set(1.3981999507e-3f)));
  SHARDMESH_EACH L::hold(p[i] = L::fma(p[i], x[i], L::set(8.3334519073e-3f)));
  SHARDMESH_EACH L::hold(p[i] = L::fma(p[i], x[i], L::set(4.1665795894e-2f)));
  SHARDMESH_EACH L::hold(p[i] = L::fma(p[i], x[i], L::set(1.6666665459e-1f)));
  SHARDMESH_EACH L::hold(p[i] = L::fma(p[i], x[i], L::set(5.0000001201e-1f)));
  SHARDMESH_EACH n[i] = L::mul(x[i], x[i]);
  SHARDMESH_EACH L::hold(p[i] = L::fma(p[i], n[i], x[i]));
  SHARDMESH_EACH L::hold(p[i] = L::add(p[i], L::set(1.0f)));
  SHARDMESH_EACH x[i] = L::scale_where(keep[i], p[i], whole[i]);
#undef SHARDMESH_EACH
}

SHARDMESH_LANES Lanes::F exp_of_negative(Lanes::F x) {
  exp_each<1>(&x);
  return x;
}

// Largest |x| of n values, n a multiple of 16.
SHARDMESH_LANES float largest_magnitude(const float* x, int n) {
  Lanes::F m = Lanes::abs(Lanes::load(x));
  for (int i = 16; i < n; i += 16) m = Lanes::max(m, Lanes::abs(Lanes::load(x + i)));
  return Lanes::highest(m);
}

// A value is finite unless all bits of its exponent are set.
SHARDMESH_LANES bool finite_values(const float* x, int64_t count) {
  const Lanes::I exponent = Lanes::set_int(0x7f800000);
  Lanes::I highest[2] = {Lanes::set_int(0), Lanes::set_int(0)};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    highest[0] = Lanes::max_int(highest[0], Lanes::bit_and(Lanes::bits(Lanes::load(x + i)), exponent));
    highest[1] = Lanes::max_int(highest[1], Lanes::bit_and(Lanes::bits(Lanes::load(x + i + 16)), exponent));
  }
  for (; i < count; i += 16) {
    const int left = count - i < 16 ? static_cast<int>(count - i) : 16;
    highest[0] = Lanes::max_int(highest[0], Lanes::bit_and(Lanes::bits(Lanes::load_first(x + i, left)), exponent));
  }
  return Lanes::highest_int(Lanes::max_int(highest[0], highest[1])) != 0x7f800000;
}

struct Share {
  int64_t from, to;
};

// Share of [0, count) of one part, cut at multiples of `grain`.
SHARDMESH_LANES Share share_of(int64_t count, int64_t grain, Part part) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t from = grains * part.index / part.count * grain, to = grains * (part.index + 1) / part.count * grain;
  return {from < count ? from : count, to < count ? to : count};
}

}  // namespace
}  // namespace shardmesh
