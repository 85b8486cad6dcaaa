// Block formats of a GGUF file (little-endian), unpacked one group of 32 values at a time.      Formats: ggml, docs/gguf.md and its block structs
//
// A group is what a product needs of 32 consecutive columns of one row: integers, one scale S, one minimum M (ARCHITECTURE.md, "Arithmetic").
// Q6_K has a scale for each half of the group: S is d, `half_scale` holds both.
#pragma once
#include <cstdint>
#include <cstring>

#include "../include/arithmetic.h"
#include "../include/kernel_set.h"

namespace shardmesh {
namespace {

struct Group {
  int8_t q[32];
  float s, m;             // m is 0 for formats without a minimum
  bool minimum;
  int8_t half_scale[2];   // 1, 1 but for Q6_K
};

[[maybe_unused]] inline bool is_float(TensorType type) { return type == TensorType::F32 || type == TensorType::F16 || type == TensorType::BF16; }

[[maybe_unused]] inline bool has_minimum(TensorType type) {
  return type == TensorType::Q4_1 || type == TensorType::Q5_1 || type == TensorType::Q4_K || type == TensorType::Q5_K;
}

struct BlockSize {
  int values, bytes;
};

[[maybe_unused]] inline BlockSize block_size(TensorType type) {
  switch (type) {
    case TensorType::F32: return {1, 4};
    case TensorType::F16:
    case TensorType::BF16: return {1, 2};
    case TensorType::Q4_0: return {32, 18};
    case TensorType::Q4_1: return {32, 20};
    case TensorType::Q5_0: return {32, 22};
    case TensorType::Q5_1: return {32, 24};
    case TensorType::Q8_0: return {32, 34};
    case TensorType::Q4_K: return {256, 144};
    case TensorType::Q5_K: return {256, 176};
    case TensorType::Q6_K: return {256, 210};
  }
  return {0, 0};
}

[[maybe_unused]] inline float half_at(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return half_to_float(h);
}

// 4-bit scale formats: byte j of `nibbles` holds value j (low) and value j + 16 (high).
[[maybe_unused]] inline void unpack_nibbles(const uint8_t* nibbles, int zero, int8_t* q) {
  for (int j = 0; j < 16; j++) {
    q[j] = static_cast<int8_t>((nibbles[j] & 15) - zero);
    q[j + 16] = static_cast<int8_t>((nibbles[j] >> 4) - zero);
  }
}

// Fifth bit of value j is bit j of `high`.
[[maybe_unused]] inline void unpack_five(const uint8_t* nibbles, const uint8_t* high_bytes, int zero, int8_t* q) {
  uint32_t high;
  std::memcpy(&high, high_bytes, 4);
  for (int j = 0; j < 16; j++) {
    q[j] = static_cast<int8_t>(((nibbles[j] & 15) | (((high >> j) & 1) << 4)) - zero);
    q[j + 16] = static_cast<int8_t>(((nibbles[j] >> 4) | (((high >> (j + 16)) & 1) << 4)) - zero);
  }
}

// Six-bit scale and minimum of group j (0..7) of a Q4_K or Q5_K super-block, from its 12 packed bytes.
[[maybe_unused]] inline void scale_and_minimum(const uint8_t* packed, int j, int* scale, int* minimum) {
  if (j < 4) {
    *scale = packed[j] & 63;
    *minimum = packed[j + 4] & 63;
  } else {
    *scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
    *minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
  }
}

// Group `g` (of 32) of the row that begins at `row`. Not for float types.
[[maybe_unused]] inline void unpack_group(TensorType type, const uint8_t* row, int64_t g, Group* out) {
  out->m = 0.0f;
  out->minimum = has_minimum(type);
  out->half_scale[0] = out->half_scale[1] = 1;
  const BlockSize size = block_size(type);
  const uint8_t* b = row + (g * 32 / size.values) * size.bytes;
  const int j = static_cast<int>(g % (size.values / 32));  // group within the block
  switch (type) {
    case TensorType::Q4_0:
      out->s = half_at(b);
      unpack_nibbles(b + 2, 8, out->q);
      return;
    case TensorType::Q4_1:
      out->s = half_at(b);
      out->m = half_at(b + 2);
      unpack_nibbles(b + 4, 0, out->q);
      return;
    case TensorType::Q5_0:
      out->s = half_at(b);
      unpack_five(b + 6, b + 2, 16, out->q);
      return;
    case TensorType::Q5_1:
      out->s = half_at(b);
      out->m = half_at(b + 2);
      unpack_five(b + 8, b + 4, 0, out->q);
      return;
    case TensorType::Q8_0:
      out->s = half_at(b);
      std::memcpy(out->q, b + 2, 32);
      return;
    case TensorType::Q4_K:
    case TensorType::Q5_K: {
      int scale, minimum;
      scale_and_minimum(b + 4, j, &scale, &minimum);
      out->s = half_at(b) * static_cast<float>(scale);
      out->m = -(half_at(b + 2) * static_cast<float>(minimum));
      const uint8_t* nibbles = b + (type == TensorType::Q4_K ? 16 : 48) + (j / 2) * 32;
      for (int i = 0; i < 32; i++) {
        int q = j % 2 ? nibbles[i] >> 4 : nibbles[i] & 15;
        if (type == TensorType::Q5_K) q |= ((b[16 + i] >> j) & 1) << 4;
        out->q[i] = static_cast<int8_t>(q);
      }
      return;
    }
    case TensorType::Q6_K: {
      // Two halves of 128 values; in each, group r (0..3): low nibbles of ql (r = 0, 1) or high ones (r = 2, 3), two more bits of qh.
      const int half = j / 4, r = j % 4;
      const uint8_t* low = b + half * 64 + (r % 2) * 32;
      const uint8_t* high = b + 128 + half * 32;
      const int8_t* scales = reinterpret_cast<const int8_t*>(b + 192) + half * 8 + r * 2;
      for (int i = 0; i < 32; i++) {
        const int nibble = r < 2 ? low[i] & 15 : low[i] >> 4;
        out->q[i] = static_cast<int8_t>((nibble | (((high[i] >> (2 * r)) & 3) << 4)) - 32);
      }
      out->s = half_at(b + 208);
      out->half_scale[0] = scales[0];
      out->half_scale[1] = scales[1];
      return;
    }
    default:
      return;
  }
}

// `count` values of a float row from value `from`, as exact fp32.
[[maybe_unused]] inline void read_floats(TensorType type, const uint8_t* row, int64_t from, int64_t count, float* out) {
  if (type == TensorType::F32) {
    std::memcpy(out, row + from * 4, static_cast<size_t>(count) * 4);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    uint16_t h;
    std::memcpy(&h, row + (from + i) * 2, 2);
    out[i] = type == TensorType::F16 ? half_to_float(h) : bfloat_to_float(h);
  }
}

// Value i of a group as fp32: S * w, exact for every format; with a minimum rn(S * w + M), one rounding.
[[maybe_unused]] inline float group_value(const Group& group, int i) {
  const float product = group.s * static_cast<float>(group.half_scale[i / 16] * group.q[i]);
  return group.minimum ? product + group.m : product;
}

// Share [*from, *to) of `count` things for this part.
[[maybe_unused]] inline void split(int64_t count, Part part, int64_t* from, int64_t* to) {
  *from = count * part.index / part.count;
  *to = count * (part.index + 1) / part.count;
}

}  // namespace
}  // namespace shardmesh
