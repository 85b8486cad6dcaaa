// Weights and activations as the CUDA products read them: in the order of the registers of mma.m16n8k32, so that a lane's operands are one load.
//
// Weights: strips of 16 rows (operand A), padded with zero rows. A strip is its heads, then one record for each group of 32 columns. g = lane / 4 (0..7),
// t = lane % 4; a lane owns rows g and g + 8 of the strip and columns 4t..4t+3 and 16+4t..16+4t+3 of the group.
//
//   record, 4 bits   lane l has 8 bytes at 8 l: word 0 is row g, word 1 is row g + 8; byte i holds column 4t + i low, column 16 + 4t + i high, unsigned
//   record, 8 bits   lane l has 16 bytes at 16 l: words are (g, 4t..), (g + 8, 4t..), (g, 16 + 4t..), (g + 8, 16 + 4t..), signed
//   then, 8 times for g = 0..7, the scales of rows g and g + 8:
//     Half     d d          halves                 Q4_0, Q5_0, Q8_0
//     HalfMin  d d m m      halves                 Q4_1, Q5_1
//     Super    sc sc mn mn  unsigned bytes         Q4_K, Q5_K: S = d * sc, M = -dmin * mn
//     Halves   sc0 sc1 of g, sc0 sc1 of g + 8      Q6_K: signed bytes, one for each half of the group
//   head, one for 256 columns of the file, 8 times for g = 0..7: d d -dmin -dmin (Super) or d d (Halves), halves. `phase` (0..7) is the slice's first group
//   within its first head.
//
// 5- and 6-bit weights are kept as 8 bits: same integers, so the same bits of the result.
//
// Float weights: strips of 16 rows as well, a record for each 32 columns, in pieces of 16 bytes: 8 columns of a row, 4 of F32. Piece c of row r lies at
// 256 c + 16 (r xor (2 c mod 8)): a warp whose lanes are rows reads 256 bytes in a row, and one whose lanes are (row g, piece t) of an mma finds each of 8 lanes
// on banks of its own. One layout for both arithmetics.
//
// Activations: tiles of 8 tokens (operand B), in a tile one ActivationGroup for each group, or a WideGroup where activations are int16. Places of tokens that
// do not exist are never written; what they hold reaches no result, since a column of a product knows only its own token.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../include/kernel_set.h"

namespace shardmesh::cuda {

constexpr int kStripRows = 16, kTileTokens = 8;

enum class Scales { Half, HalfMin, Super, Halves };

template <int bits_, Scales scales_, int zero_>
struct Format {
  static constexpr int bits = bits_;
  static constexpr Scales scales = scales_;
  static constexpr int zero = zero_;  // what a stored weight is above the true one
  static constexpr bool minimum = scales == Scales::HalfMin || scales == Scales::Super;
  static constexpr bool heads = scales == Scales::Super || scales == Scales::Halves;
  static constexpr int lane_bytes = bits == 4 ? 8 : 16;
  static constexpr int weight_bytes = 32 * lane_bytes;
  static constexpr int scale_bytes = scales == Scales::HalfMin ? 8 : 4;  // of rows g and g + 8
  static constexpr int record_bytes = weight_bytes + 8 * scale_bytes;
  static constexpr int head_bytes = scales == Scales::Super ? 64 : scales == Scales::Halves ? 32 : 0;
};

// Calls `use` with the Format of a tensor type; false for float types.
template <typename Use>
bool with_format(TensorType type, const Use& use) {
  switch (type) {
    case TensorType::Q4_0: use(Format<4, Scales::Half, 8>{}); return true;
    case TensorType::Q4_1: use(Format<4, Scales::HalfMin, 0>{}); return true;
    case TensorType::Q4_K: use(Format<4, Scales::Super, 0>{}); return true;
    case TensorType::Q5_0:
    case TensorType::Q8_0: use(Format<8, Scales::Half, 0>{}); return true;
    case TensorType::Q5_1: use(Format<8, Scales::HalfMin, 0>{}); return true;
    case TensorType::Q5_K: use(Format<8, Scales::Super, 0>{}); return true;
    case TensorType::Q6_K: use(Format<8, Scales::Halves, 0>{}); return true;
    default: return false;
  }
}

template <TensorType type_>
struct FloatFormat {
  static constexpr TensorType type = type_;
  static constexpr int value_bytes = type == TensorType::F32 ? 4 : 2;
  static constexpr int piece_values = 16 / value_bytes, pieces = 32 / piece_values;
  static constexpr int record_bytes = kStripRows * 32 * value_bytes;
};
// Where piece c of row r lies in a record.
#if defined(__CUDACC__)
__host__ __device__
#endif
constexpr int float_piece_at(int c, int r) { return 256 * c + 16 * (r ^ (2 * c & 6)); }

// Calls `use` with the FloatFormat of a tensor type; false for quantised types.
template <typename Use>
bool with_float_format(TensorType type, const Use& use) {
  switch (type) {
    case TensorType::F32: use(FloatFormat<TensorType::F32>{}); return true;
    case TensorType::F16: use(FloatFormat<TensorType::F16>{}); return true;
    case TensorType::BF16: use(FloatFormat<TensorType::BF16>{}); return true;
    default: return false;
  }
}

struct alignas(8) LaneWords {
  uint32_t x, y;
};
struct TokenScale {
  float sa, ms;
};
struct alignas(16) ActivationGroup {
  LaneWords q[32];   // lane l: word 0 is columns 4t.. of token g, word 1 is columns 16 + 4t..
  TokenScale scale[8];
};
static_assert(sizeof(ActivationGroup) == 320);
// int16 activations, q = 256 * high + low with both halves int8: `high.q` and `low` are the halves, the rest of `high` is that of the whole q.
struct WideGroup {
  ActivationGroup high;
  LaneWords low[32];
};
static_assert(sizeof(WideGroup) == 576);
// Activations rounded to bf16: 32 columns of 8 tokens, row after row, so that lane l finds columns 8t .. 8t+7 of token g at 16 l.
struct Bf16Group {
  uint32_t x[8][16];  // pairs of columns
};
static_assert(sizeof(Bf16Group) == 512);

}  // namespace shardmesh::cuda
