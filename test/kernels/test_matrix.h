// Weight matrices in file blocks, and activations, for kernel tests and benchmarks: random, extreme, zero or tiny, always finite, from a seed.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../kernels/include/kernel_set.h"
#include "../../kernels/reference/blocks.h"

namespace shardmesh {

// SplitMix64.                                                                                                      Steele, Lea & Flood 2014
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return n == 0 ? 0 : static_cast<uint32_t>(next() >> 33) % n; }
  float uniform() { return static_cast<float>(static_cast<int32_t>(next() >> 40) - (1 << 23)) * 0x1p-23f; }  // -1 .. 1

 private:
  uint64_t state_;
};

class AlignedBytes {
 public:
  AlignedBytes(size_t bytes, int fill) : data_(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) { std::memset(data_, fill, (bytes + 127) / 64 * 64); }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  ~AlignedBytes() { std::free(data_); }
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
};

enum class Values { Random, Extreme, Zero, Tiny };
inline const char* name_of(Values v) { return v == Values::Random ? "random" : v == Values::Extreme ? "extreme" : v == Values::Zero ? "zero" : "tiny"; }

constexpr TensorType kTypes[] = {TensorType::F32,  TensorType::F16,  TensorType::BF16, TensorType::Q4_0, TensorType::Q4_1, TensorType::Q5_0,
                                 TensorType::Q5_1, TensorType::Q8_0, TensorType::Q4_K, TensorType::Q5_K, TensorType::Q6_K};
inline const char* name_of(TensorType t) {
  const char* const names[] = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"};
  return names[static_cast<int>(t)];
}

// A finite half: moderate, or for Tiny subnormal and zero too.
inline uint16_t random_half(Random& random, Values values) {
  const uint16_t sign = static_cast<uint16_t>(random.below(2) << 15);
  switch (values) {
    case Values::Random: return static_cast<uint16_t>(sign | (random.below(12) + 6) << 10 | random.below(1024));
    case Values::Extreme: return static_cast<uint16_t>(sign | (random.below(2) ? 0x7bff : 0x3c00));
    case Values::Zero: return sign;
    case Values::Tiny: return static_cast<uint16_t>(sign | random.below(3) << 10 | (random.below(4) ? random.below(1024) : 0));
  }
  return 0;
}

// A weight slice in raw blocks.
struct Source {
  std::vector<uint8_t> bytes;
  MatrixSource view;

  Source(TensorType type, int64_t rows, int64_t columns, int64_t skip, Values values, Random& random) {
    const BlockSize block = block_size(type);
    const int64_t blocks = (skip + columns + block.values - 1) / block.values;
    bytes.resize(static_cast<size_t>(rows * blocks * block.bytes));
    for (int64_t i = 0; i < rows * blocks; i++) fill(type, values, random, bytes.data() + i * block.bytes, static_cast<size_t>(block.bytes));
    view = {type, rows, columns, skip, blocks * block.bytes, bytes.data()};
  }

 private:
  static void put(uint8_t* p, uint16_t h) { std::memcpy(p, &h, 2); }
  static void fill(TensorType type, Values values, Random& random, uint8_t* block, size_t count) {
    // One byte for the whole block: all weights at the same end of their range.
    const uint8_t ends[] = {0x00, 0xff, 0x80, 0x7f, 0x0f, 0xf0};
    const uint8_t end = ends[random.below(6)];
    for (size_t i = 0; i < count; i++) block[i] = values == Values::Extreme ? end : values == Values::Zero ? 0 : static_cast<uint8_t>(random.next() >> 56);
    const uint16_t d = random_half(random, values), m = random_half(random, values);
    switch (type) {
      case TensorType::F32: {
        uint32_t bits = static_cast<uint32_t>(random.next());
        const uint32_t exponent = values == Values::Tiny ? random.below(3) : values == Values::Extreme ? 150 : 110 + random.below(20);
        bits = values == Values::Zero ? bits & 0x80000000u : (bits & 0x807fffffu) | exponent << 23;
        std::memcpy(block, &bits, 4);
        return;
      }
      case TensorType::BF16: {
        const uint32_t exponent = values == Values::Tiny ? random.below(3) : values == Values::Extreme ? 150 : 110 + random.below(20);
        const uint32_t bits = static_cast<uint32_t>(random.next());
        put(block, static_cast<uint16_t>(values == Values::Zero ? bits & 0x8000u : (bits & 0x807fu) | exponent << 7));
        return;
      }
      case TensorType::F16: return put(block, d);
      case TensorType::Q6_K: return put(block + 208, d);
      case TensorType::Q4_1:
      case TensorType::Q5_1:
      case TensorType::Q4_K:
      case TensorType::Q5_K: put(block + 2, m); [[fallthrough]];
      default: return put(block, d);
    }
  }
};

// `view` as `set` packs it, in `parts` parts.
struct Packed {
  AlignedBytes bytes;
  PackedMatrix matrix;

  Packed(const KernelSet& set, const MatrixSource& view, int parts) : bytes(set.packed_bytes(view), 0xee) {
    matrix = {view.type, view.rows, view.columns, set.packed_bytes(view), bytes.data(), 0, -1.0};
    for (int i = 0; i < parts; i++) set.pack(view, &matrix, {i, parts});
  }
};

inline std::vector<float> make_activations(size_t count, Values values, Random& random) {
  std::vector<float> x(count);
  for (size_t i = 0; i < count; i++) {
    const float u = random.uniform();
    switch (values) {
      case Values::Random: x[i] = u * u * u * 40.0f; break;
      case Values::Extreme: x[i] = random.below(8) == 0 ? u : (i / 97) % 2 ? 3.5f : -3.5f; break;
      case Values::Zero: x[i] = i % 64 < 40 ? (u < 0 ? -0.0f : 0.0f) : u; break;
      case Values::Tiny: x[i] = std::ldexp(u, -static_cast<int>((i / 16) % 5) * 30 - static_cast<int>(random.below(12))); break;  // down to denormals
    }
  }
  return x;
}

}  // namespace shardmesh
