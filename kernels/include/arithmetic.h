// The arithmetic that every kernel set shares, as scalar inline functions. This file and kernels/reference are the definition; a SIMD kernel repeats these
// steps lane by lane. Built with -ffp-contract=off: an fma happens only where std::fma (or its intrinsic) is written.
//
// Everything here has internal linkage: files compiled for an instruction set must not leak it into the baseline.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace shardmesh {
namespace {

// exp(x) for x <= 0 (also right up to 88): 2^n * p(f), f in [-0.5, 0.5]. exp(0) is exactly 1. Below -87 the result is 0. NaN is not handled.
// Every step is one IEEE operation; the SIMD versions repeat them in this order.
[[maybe_unused]] inline float exp_fixed(float x) {
  if (!(x > -87.0f)) return 0.0f;
  if (x > 88.0f) x = 88.0f;
  const float n = std::nearbyintf(x * 1.44269504088896341f);  // round to nearest even
  float r = std::fmaf(n, -0.693145751953125f, x);             // ln2, high and low part (Cody & Waite 1980)
  r = std::fmaf(n, -1.42860682030941723e-6f, r);
  float p = 1.9875691500e-4f;  // minimax polynomial of (e^r - 1 - r) / r^2
  p = std::fmaf(p, r, 1.3981999507e-3f);
  p = std::fmaf(p, r, 8.3334519073e-3f);
  p = std::fmaf(p, r, 4.1665795894e-2f);
  p = std::fmaf(p, r, 1.6666665459e-1f);
  p = std::fmaf(p, r, 5.0000001201e-1f);
  p = std::fmaf(p, r * r, r);
  p = p + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// Whatever is quantised with a scale of its own (a group of activations, a head of q, K or V, the softmax weights of a step) counts as all zero when its
// largest magnitude is below this: q = 0 and scale = 0. It keeps 127 / amax and 255 / X finite.
[[maybe_unused]] constexpr float kQuantizableMin = 0x1p-100f;

// Round to nearest even, as cvtps2dq does.
[[maybe_unused]] inline int32_t round_even(float x) { return static_cast<int32_t>(std::nearbyintf(x)); }

// Halving sum of n = 2^k partial sums: distance n/2, n/4, ... 1. Destroys `partial`.
[[maybe_unused]] inline float halving_sum(float* partial, int n) {
  for (int distance = n / 2; distance >= 1; distance /= 2)
    for (int i = 0; i < distance; i++) partial[i] = partial[i] + partial[i + distance];
  return partial[0];
}

// tree(n) = tree(ceil(n/2)) + tree(rest): the left child's size.
[[maybe_unused]] constexpr int tree_left(int n) { return (n + 1) / 2; }

[[maybe_unused]] inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, bits;
  if (exponent == 0) {
    if (mantissa == 0) {
      bits = sign;
    } else {  // a half's subnormal is a normal float
      exponent = 127 - 15 + 1;
      while (!(mantissa & 0x400u)) { mantissa <<= 1; exponent--; }
      bits = sign | (exponent << 23) | ((mantissa & 0x3ffu) << 13);
    }
  } else if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else {
    bits = sign | ((exponent + 127 - 15) << 23) | (mantissa << 13);
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

[[maybe_unused]] inline float bfloat_to_float(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; overflow to infinity; subnormal halves are kept (as vcvtps2ph does without flush).
[[maybe_unused]] inline uint16_t float_to_half(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  const uint32_t sign = (x >> 16) & 0x8000u;
  const uint32_t magnitude = x & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x33000001u) return static_cast<uint16_t>(sign);
  uint32_t mantissa, shift, half;
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 113) {  // subnormal half
    mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    shift = 126 - exponent;
    half = mantissa >> shift;
  } else {
    mantissa = magnitude;
    shift = 13;
    half = (magnitude - (112u << 23)) >> 13;
  }
  const uint32_t rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
  if (rest > middle || (rest == middle && (half & 1u))) half++;
  return static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace shardmesh
