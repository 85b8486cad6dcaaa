// The one weight layout of all CPU sets: strips of 16 rows; a strip holds one record per group of 32 columns, so that a product reads memory in order.
//
// A record, in this order (rows padded to 16 with zeros; r row of the strip, k column of the group):
//   scales   Q4_0 Q5_0 Q8_0: d [16] half                     Q4_1 Q5_1: d [16] half, m [16] half
//            Q4_K Q5_K: sc [16] uint8, mn [16] uint8         Q6_K: sc [16][2] int8
//   planes   the bits above the fourth. Q5_*: 64 bytes, bit j of byte 4r + i belongs to k = 4j + i.
//            Q6_K: two times 64 bytes, bits 2(j mod 4) and up of byte 4r + i of plane j / 4 belong to k = 4j + i.
//   weights  4, 5, 6 bits: 4 x 64 nibble bytes; byte 4r + i of register j holds k = 4j + i low and k = 16 + 4j + i high.
//            Q8_0: 8 x 64 bytes, byte 4r + i of register j is k = 4j + i plus 128 (unsigned).
// The K-formats keep d and dmin once for 256 columns: the strip begins with ceil((phase + groups) / 8) heads of d [16] half and, but for Q6_K, -dmin [16] half;
// `phase` (0..7) is the slice's first group within its super-block. S = d * sc and M = -dmin * mn are exact in fp32.
// Float types: [K][16] values, no records.
//
// Activations: tokens in tiles of at most 6 / parts (avx512: 8 / parts where that makes it one tile; amx: 16 / parts from 13 parts on), tile after tile; in a tile
// [groups][tokens of the tile][parts] TokenGroup. int8: one part. int16: two, the high half of q first (q = 256 * high + low); sa and ms are the whole's and stand with the high half. Then (avx2 only, where `meets_bytes`) [groups][tokens of the tile] WideGroup
// in the same tiles.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../include/kernel_set.h"

namespace shardmesh {
namespace {

constexpr int kStripRows = 16;

// One format's record, known at compile time.
template <TensorType type>
struct Format {
  static constexpr bool k_format = type == TensorType::Q4_K || type == TensorType::Q5_K || type == TensorType::Q6_K;
  static constexpr int bits = type == TensorType::Q8_0                                                                        ? 8
                              : type == TensorType::Q6_K                                                                      ? 6
                              : type == TensorType::Q5_0 || type == TensorType::Q5_1 || type == TensorType::Q5_K ? 5
                                                                                                                              : 4;
  // What an unsigned weight is above the true one; log2 of it, or -1 for nothing.
  static constexpr int zero_shift = type == TensorType::Q4_0 ? 3 : type == TensorType::Q5_0 ? 4 : type == TensorType::Q6_K ? 5 : type == TensorType::Q8_0 ? 7 : -1;
  static constexpr bool minimum = type == TensorType::Q4_1 || type == TensorType::Q5_1 || type == TensorType::Q4_K || type == TensorType::Q5_K;
  static constexpr bool half_scales = type == TensorType::Q6_K;
  static constexpr size_t head_bytes = !k_format ? 0 : half_scales ? 32 : 64;
  static constexpr size_t scale_bytes = k_format ? 32 : minimum ? 64 : 32;
  static constexpr size_t plane_bytes = bits == 5 ? 64 : bits == 6 ? 128 : 0;
  static constexpr size_t weights_at = scale_bytes + plane_bytes;
  static constexpr size_t record_bytes = weights_at + (bits == 8 ? 512 : 256);
};

// A strip expanded for many tokens: S [16] fp32, then M [16] fp32 (or sc as int16 [16][2] for Q6_K), then 8 x 64 unsigned bytes.
constexpr size_t kPanelBytes = 640, kPanelWeightsAt = 128;
constexpr int kPanelGroupsMax = 256;

struct TokenGroup {
  int8_t q[32];
  float sa, ms;
  int32_t sum;        // of q
  int16_t halves[2];  // sums of q[0..16) and q[16..32)
};
static_assert(sizeof(TokenGroup) == 48);

// The whole group for instruction sets that multiply 8-bit weights as 16-bit words: q[4j], q[4j + 2], q[4j + 1], q[4j + 3].
struct WideGroup {
  int16_t q[32];
  float sa;
  int32_t sum;
};
static_assert(sizeof(WideGroup) == 72);

// Where the wide groups of a call begin.
[[maybe_unused]] inline size_t wide_offset(ActivationType type, int tokens, int64_t groups) {
  return (static_cast<size_t>(tokens) * static_cast<size_t>(groups) * sizeof(TokenGroup) * (type == ActivationType::Int16 ? 2 : 1) + 63) / 64 * 64;
}

// A tile's parts of all tokens: what a kernel holds accumulators for.
constexpr int kTilePartsMax = 6;
// Rows of a tile register (amx).
constexpr int kTileRows = 16;

// Tokens [first, first + count) of tile i; as equal as can be, the longer first. P parts an activation. The instruction set's own choice: up to kWholeParts parts
// are one tile; from kTileRegistersFrom parts on tiles are as large as tile registers.
struct Tile {
  int first, count;
};
template <class Isa, int P>
inline int tile_count(int tokens) {
  const int parts = tokens * P, most = parts >= Isa::kTileRegistersFrom ? kTileRows : kTilePartsMax;
  return parts <= Isa::kWholeParts ? 1 : (parts + most - 1) / most;
}
template <class Isa, int P>
inline Tile tile_at(int tokens, int i) {
  const int tiles = tile_count<Isa, P>(tokens), size = tokens / tiles, longer = tokens % tiles;
  return i < longer ? Tile{i * (size + 1), size + 1} : Tile{longer * (size + 1) + (i - longer) * size, size};
}
// Where the groups of a tile begin, in tokens.
[[maybe_unused]] inline int64_t tile_offset(Tile tile, int64_t groups) { return tile.first * groups; }
template <class Isa, int P>
inline Tile tile_of_token(int tokens, int token) {
  const int tiles = tile_count<Isa, P>(tokens), size = tokens / tiles, longer = tokens % tiles;
  return tile_at<Isa, P>(tokens, token < longer * (size + 1) ? token / (size + 1) : longer + (token - longer * (size + 1)) / size);
}

// Sizes of a packed matrix. `layout` of PackedMatrix is the phase.
struct StripShape {
  int64_t groups;  // of 32 columns (0 for float types)
  int64_t heads;
  size_t strip_bytes;
};

[[maybe_unused]] inline bool is_float_type(TensorType type) { return type == TensorType::F32 || type == TensorType::F16 || type == TensorType::BF16; }

template <TensorType type>
constexpr StripShape quantized_shape(int64_t columns, int phase) {
  using F = Format<type>;
  const int64_t groups = columns / 32;
  const int64_t heads = F::k_format ? (phase + groups + 7) / 8 : 0;
  return {groups, heads, static_cast<size_t>(heads) * F::head_bytes + static_cast<size_t>(groups) * F::record_bytes};
}

[[maybe_unused]] inline StripShape strip_shape(TensorType type, int64_t columns, int phase) {
  switch (type) {
    case TensorType::F32: return {0, 0, static_cast<size_t>(columns) * kStripRows * 4};
    case TensorType::F16:
    case TensorType::BF16: return {0, 0, static_cast<size_t>(columns) * kStripRows * 2};
    case TensorType::Q4_0: return quantized_shape<TensorType::Q4_0>(columns, phase);
    case TensorType::Q4_1: return quantized_shape<TensorType::Q4_1>(columns, phase);
    case TensorType::Q5_0: return quantized_shape<TensorType::Q5_0>(columns, phase);
    case TensorType::Q5_1: return quantized_shape<TensorType::Q5_1>(columns, phase);
    case TensorType::Q8_0: return quantized_shape<TensorType::Q8_0>(columns, phase);
    case TensorType::Q4_K: return quantized_shape<TensorType::Q4_K>(columns, phase);
    case TensorType::Q5_K: return quantized_shape<TensorType::Q5_K>(columns, phase);
    case TensorType::Q6_K: return quantized_shape<TensorType::Q6_K>(columns, phase);
  }
  return {0, 0, 0};
}

[[maybe_unused]] inline int64_t strip_count(int64_t rows) { return (rows + kStripRows - 1) / kStripRows; }

}  // namespace
}  // namespace shardmesh
