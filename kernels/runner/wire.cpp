#include "../include/wire.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../include/arithmetic.h"

namespace shardmesh {
namespace {

constexpr int64_t kGroup = 32;
constexpr uint16_t kHalfNan = 0x7e00;

uint16_t float_to_bfloat(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void pack_group(const float* x, int64_t width, uint8_t* out) {
  float amax = 0;
  bool finite = true;
  for (int64_t i = 0; i < width; i++) {
    const float magnitude = std::fabs(x[i]);
    finite &= magnitude < INFINITY;
    amax = std::max(amax, magnitude);
  }
  const uint16_t half = finite ? float_to_half(amax / 127.0f) : kHalfNan;
  std::memcpy(out, &half, 2);
  const float scale = half_to_float(half);
  // A scale too small for a half is zero, and so is the group; one too large is infinite, and the group is not finite.
  const float inverse = scale > 0 && scale < INFINITY ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < width; i++) {
    const float q = finite ? std::clamp(x[i] * inverse, -127.0f, 127.0f) : 1.0f;
    out[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(round_even(q)));
  }
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
    for (int64_t i = 0; i < width; i += kGroup, out += 2 + kGroup) pack_group(x + i, std::min(kGroup, width - i), out);
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
    for (int64_t i = 0; i < width; i += kGroup, in += 2 + kGroup) unpack_group(in, std::min(kGroup, width - i), x + i);
  }
}

}  // namespace shardmesh
