// Scalar functions of the sampler: logarithm and noise. Everything here is fp32 or integers, in a written order; internal linkage (arithmetic.h says why).
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>

#include "../include/arithmetic.h"
#include "sampler_loops.h"

namespace shardmesh {
namespace {

// ln(1 + r) + e ln 2 for 1 + r in [sqrt(1/2), sqrt(2)): minimax polynomial of degree 9 and ln 2 in two parts.      Moshier, Cephes, logf
[[maybe_unused]] inline float log_core(float r, float e) {
  const float z = r * r;
  float p = 7.0376836292e-2f;
  p = fmaf(p, r, -1.1514610310e-1f);
  p = fmaf(p, r, 1.1676998740e-1f);
  p = fmaf(p, r, -1.2420140846e-1f);
  p = fmaf(p, r, 1.4249322787e-1f);
  p = fmaf(p, r, -1.6668057665e-1f);
  p = fmaf(p, r, 2.0000714765e-1f);
  p = fmaf(p, r, -2.4999993993e-1f);
  p = fmaf(p, r, 3.3333331174e-1f);
  float y = (p * r) * z;
  y = fmaf(e, -2.12194440e-4f, y);
  y = fmaf(z, -0.5f, y);
  return fmaf(e, 0.693359375f, r + y);
}

// ln(x) for a normal x > 0.
[[maybe_unused]] inline float log_fixed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  int32_t exponent = static_cast<int32_t>(bits >> 23) - 126;
  bits = (bits & 0x7fffffu) | 0x3f000000u;  // m in [0.5, 1)
  float m;
  std::memcpy(&m, &bits, 4);
  if (m < 0.70710678f) {
    m = m + m;
    exponent--;
  }
  return log_core(m - 1.0f, static_cast<float>(exponent));
}

// Mass of a token at distance d = z - zmax <= 0: round(exp(d) * 2^40), an integer of at most 2^40.
[[maybe_unused]] inline uint64_t mass_of(float d) {
  const double shifted = static_cast<double>(nearbyintf(exp_fixed(d) * 0x1p40f)) + 0x1p52;  // the integer is now in the low bits
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  return bits & 0xfffffffffffffull;
}

[[maybe_unused]] inline uint64_t mix64(uint64_t x) {  // the finaliser of splitmix64      Steele, Lea, Flood 2014
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The key hangs on the request's seed, the choice among n, and the absolute position of the token to be sampled.
[[maybe_unused]] inline NoiseKey noise_key(uint64_t seed, uint32_t choice, uint32_t position) {
  uint64_t key = mix64(seed + 0x9e3779b97f4a7c15ull);
  key = mix64(key ^ (static_cast<uint64_t>(choice) << 32 | position));
  key = mix64(key + 0x9e3779b97f4a7c15ull);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

[[maybe_unused]] inline uint32_t mix32(uint32_t x) {  // the finaliser of MurmurHash3      Appleby 2011
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// 32 random bits of a token: two keyed rounds of a bijection.
[[maybe_unused]] inline uint32_t noise_bits(NoiseKey key, uint32_t token) { return mix32(mix32(token * 0x9e3779b1u + key.low) + key.high); }

// Gumbel noise -log(-log(u)), u = (bits + 1/2) / 2^32. Where u > 3/4, log(u) is taken as ln(1 - w) of the exact distance w = 1 - u, so that large noise
// (the one that wins) has the resolution of w.
[[maybe_unused]] inline float gumbel_noise(uint32_t bits) {
  const uint32_t distance = ~bits;  // w = (distance + 1/2) / 2^32
  float e;
  if (distance < (1u << 30)) {
    const float w = static_cast<float>(static_cast<int64_t>(distance) * 2 + 1) * 0x1p-33f;
    e = -log_core(-w, 0.0f);
  } else {
    e = -log_fixed(static_cast<float>(static_cast<int64_t>(bits) * 2 + 1) * 0x1p-33f);
  }
  return -log_fixed(e);
}

}  // namespace
}  // namespace shardmesh
