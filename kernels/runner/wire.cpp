#include "../include/wire.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../include/arithmetic.h"

namespace shardmesh {
namespace {

constexpr int64_t kGroup = 32;
constexpr uint16_t kHalfNan = 0x7e00;
constexpr uint32_t kInfinityBits = 0x7f800000u;

// The loops below have no branches, calls or float reductions, so that the compiler turns them into vectors for any x86-64.

uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

uint16_t float_to_bfloat(float f) {
  const uint32_t bits = bits_of(f);
  const uint32_t nan = (bits >> 16) | 0x40u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > kInfinityBits ? nan : rounded);
}

// To nearest even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits of the significand.
int32_t round_small(float x) { return static_cast<int32_t>(bits_of(x + 12582912.0f) - 0x4b400000u); }

void pack_group(const float* x, int64_t width, uint8_t* out) {
  // Magnitudes are in the order of their bits, with what is not finite above all others.
  int32_t largest = 0;
  for (int64_t i = 0; i < width; i++) largest = std::max(largest, static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu));
  const bool finite = static_cast<uint32_t>(largest) < kInfinityBits;
  float amax;
  std::memcpy(&amax, &largest, 4);
  const uint16_t half = finite ? float_to_half(amax / 127.0f) : kHalfNan;
  std::memcpy(out, &half, 2);
  out += 2;
  if (!finite) {
    std::memset(out, 1, static_cast<size_t>(width));
    return;
  }
  const float scale = half_to_float(half);
  // A scale too small for a half is zero, and so is the group; one too large is infinite, and the group is not finite.
  const float inverse = scale > 0 && scale < INFINITY ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < width; i++) out[i] = static_cast<uint8_t>(std::clamp(round_small(x[i] * inverse), -127, 127));
}

void unpack_group(const uint8_t* in, int64_t width, float* x) {
  uint16_t half;
  std::memcpy(&half, in, 2);
  const float scale = half_to_float(half);
  for (int64_t i = 0; i < width; i++) x[i] = scale * static_cast<float>(static_cast<int8_t>(in[2 + i]));
}

}  // namespace

size_t wire_bytes(WireType type, int64_t width) {
  const size_t values = static_cast<size_t>(width);
  switch (type) {
    case WireType::F32: return values * 4;
    case WireType::Bf16: return values * 2;
    case WireType::Q8: return values + 2 * ((values + kGroup - 1) / kGroup);
  }
  return 0;
}

void to_wire(WireType type, const float* x, int64_t width, uint8_t* out) {
  if (type == WireType::F32) {
    std::memcpy(out, x, static_cast<size_t>(width) * 4);
  } else if (type == WireType::Bf16) {
    for (int64_t i = 0; i < width; i++) {
      const uint16_t value = float_to_bfloat(x[i]);
      std::memcpy(out + 2 * i, &value, 2);
    }
  } else {
    int64_t i = 0;
    for (; i + kGroup <= width; i += kGroup, out += 2 + kGroup) pack_group(x + i, kGroup, out);
    if (i < width) pack_group(x + i, width - i, out);
  }
}

void from_wire(WireType type, const uint8_t* in, int64_t width, float* x) {
  if (type == WireType::F32) {
    std::memcpy(x, in, static_cast<size_t>(width) * 4);
  } else if (type == WireType::Bf16) {
    for (int64_t i = 0; i < width; i++) {
      uint16_t value;
      std::memcpy(&value, in + 2 * i, 2);
      x[i] = bfloat_to_float(value);
    }
  } else {
    int64_t i = 0;
    for (; i + kGroup <= width; i += kGroup, in += 2 + kGroup) unpack_group(in, kGroup, x + i);
    if (i < width) unpack_group(in, width - i, x + i);
  }
}

}  // namespace shardmesh
