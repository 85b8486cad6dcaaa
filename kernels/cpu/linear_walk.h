// The walk of a matrix product over strips, token tiles, segments and the tree; the same for every instruction set. What happens to one record is the
// instruction set's, a class `Isa` with:
//   F                                          16 fp32 lanes, one row each
//   zero() load(p) store(p, f) add(a, b)
//   Input<W>                                   what an activation group is to W: P TokenGroups or a WideGroup; W is Direct<type> or Panel<type>
//   accumulate<W, M, P, S>(records, heads, in, acc) one group of 32 columns of S strips and M tokens into acc[S][M]
//   accumulate_float<type, M>(w, x, stride, count, acc)
//   kExpands<W>                                whether many tokens are multiplied with Panel<type>
//   expand<type>(record, head, panel)          one record as Panel<type> has it
//   kPanelStrips                               strips multiplied at once when they are expanded
//   kStreams                                   whether several strips may be read at once (linear_tuning.h)
//   kWholeParts                                up to so many parts are one tile
//   kTileRegistersFrom                         from so many parts on tiles are those of tile registers; INT_MAX where there are none
//   multiply_tile_registers<P, type>(a, from, to) then does strips [from, to), all tokens
//   kPairParts                                 most parts of a tile that two strips are multiplied with at once: what registers hold
// and the macro SHARDMESH_UNROLL before a loop: registers need it, plain C++ lanes must not (their code would grow out of hand).
//
// Order inside one (row, token, segment): groups ascending into one accumulator. Tiles, strips and parts never change it.
#pragma once
#include <climits>
#include <type_traits>

#include "../include/arithmetic.h"
#include "linear_tuning.h"
#include "strip_layout.h"

namespace shardmesh {
namespace {

template <TensorType type_>
struct Direct : Format<type_> {
  static constexpr TensorType type = type_;
  static constexpr bool panel = false;
};

template <TensorType type_>
struct Panel : Format<type_> {
  static constexpr TensorType type = type_;
  static constexpr bool panel = true;
  static constexpr bool k_format = false;  // no heads: S and M are ready
  static constexpr size_t head_bytes = 0;
  static constexpr size_t record_bytes = kPanelBytes;
};

struct Strip {
  const uint8_t* records;
  const uint8_t* heads;
  int phase;
};

// What a tile asks memory for while it multiplies: lines of its own stream `distance` bytes ahead (0: none), and `bytes` from `next` on, which whoever comes after
// it will read.
struct Prefetch {
  int distance = 0;
  const uint8_t* next = nullptr;
  size_t bytes = 0;
};

// Activations beyond this leave the second-level cache of a small core; more tokens are walked in blocks.
constexpr size_t kTokenBlockBytes = 192 * 1024;

template <class Isa, class W>
using InputOf = typename Isa::template Input<W>;

template <class Isa, class W>
constexpr bool kWideInput = std::is_same_v<InputOf<Isa, W>, WideGroup>;

// Groups that stand for one token.
template <class Isa, class W, int P>
constexpr int kGroupsPerToken = kWideInput<Isa, W> ? 1 : P;

template <class Isa, class W>
const InputOf<Isa, W>* input_of(const Activations& in) {
  return reinterpret_cast<const InputOf<Isa, W>*>(in.data + (kWideInput<Isa, W> ? wide_offset(in.type, in.tokens, in.columns / 32) : 0));
}

// The tree over N segments of one vector, `width` vectors apart.
template <class Isa, int N>
inline __attribute__((always_inline)) typename Isa::F tree_of(const typename Isa::F* p, int width) {
  if constexpr (N == 1) return p[0];
  else return Isa::add(tree_of<Isa, tree_left(N)>(p, width), tree_of<Isa, N - tree_left(N)>(p + tree_left(N) * width, width));
}

// The same for n segments, N or more, of `width` vectors side by side: put(sum) for each.
template <class Isa, int N = 1, class Put>
inline __attribute__((always_inline)) void each_tree(const typename Isa::F* p, int n, int width, Put put) {
  if constexpr (N < kSegmentsMax) {
    if (n > N) return each_tree<Isa, N + 1>(p, n, width, put);
  }
  for (int i = 0; i < width; i++) put(tree_of<Isa, N>(p + i, width));
}

// Joins the segment sums segments[segment_count][strips][tokens] to subtrees, adds the bias and writes rows [row, row + 16 strips) of tokens [token, token + tokens).
template <class Isa>
__attribute__((noinline)) void finish_segments(const typename Isa::F* segments, int strips, int tokens, const LinearArguments& a, int64_t row, int64_t token) {
  const int width = strips * tokens;
  for (int tree = 0; tree < a.subtree_count; tree++) {
    float* out = a.out + tree * a.subtree_stride + token * a.out_stride + row - a.first_row;
    int s = 0, t = 0;
    each_tree<Isa>(segments + a.subtrees[tree].first * width, a.subtrees[tree].count, width, [&](typename Isa::F y) {
      const int64_t rows = a.weight->rows - row - s * kStripRows;
      float* to = out + t * a.out_stride + s * kStripRows;
      if (rows >= kStripRows) {
        if (a.bias) y = Isa::add(y, Isa::load(a.bias + row + s * kStripRows));
        Isa::store(to, y);
      } else {
        float lanes[kStripRows] = {};
        if (a.bias) std::memcpy(lanes, a.bias + row + s * kStripRows, sizeof(float) * static_cast<size_t>(rows));
        if (a.bias) y = Isa::add(y, Isa::load(lanes));
        Isa::store(lanes, y);
        std::memcpy(to, lanes, sizeof(float) * static_cast<size_t>(rows));
      }
      if (++t == tokens) t = 0, s++;
    });
  }
}

// S strips times the M tokens of one tile. `in` [groups][M][groups per token].
template <class Isa, class W, int P, int M, int S>
__attribute__((noinline)) void multiply_tile(const Strip* strips, const InputOf<Isa, W>* in, const LinearArguments& a, int64_t row, int64_t token, Prefetch prefetch) {
  typename Isa::F segments[kSegmentsMax * S * M];
  // The software prefetch goes on in the strips of the next run: S strips further on.
  const size_t strip_bytes = S == 1 ? 0 : static_cast<size_t>(strips[S - 1].records - strips[0].records), records_bytes = static_cast<size_t>(a.segment_ends[a.segment_count - 1]) * W::record_bytes;
  [[maybe_unused]] const size_t next_bytes = prefetch.bytes / static_cast<size_t>(a.segment_ends[a.segment_count - 1]) + 1;  // a group
  [[maybe_unused]] const uint8_t* next = prefetch.next;
  int group = 0;
  for (int segment = 0; segment < a.segment_count; segment++) {
    typename Isa::F acc[S][M];
    SHARDMESH_UNROLL
    for (int s = 0; s < S; s++)
      SHARDMESH_UNROLL
      for (int t = 0; t < M; t++) acc[s][t] = Isa::zero();
    for (const int end = a.segment_ends[segment]; group < end; group++, in += M * kGroupsPerToken<Isa, W, P>) {
      const uint8_t* records[S];
      const uint8_t* heads[S];
      SHARDMESH_UNROLL
      for (int s = 0; s < S; s++) {
        records[s] = strips[s].records + static_cast<size_t>(group) * W::record_bytes;
        heads[s] = nullptr;
        if constexpr (W::k_format) heads[s] = strips[s].heads + static_cast<size_t>((strips[s].phase + group) >> 3) * W::head_bytes;
        if constexpr (!W::panel) {
          if (prefetch.distance) {
            const uint8_t* ahead = records[s] + prefetch.distance;
            if (S > 1 && ahead >= strips[s].records + records_bytes) ahead += strip_bytes;
            for (size_t z = 0; z < W::record_bytes; z += 64) __builtin_prefetch(ahead + z, 0, 3);
          }
        }
      }
      if constexpr (W::panel) {
        if (next) {
          for (size_t z = 0; z < next_bytes; z += 64) __builtin_prefetch(next + z, 0, 2);
          next += next_bytes;
        }
      }
      Isa::template accumulate<W, M, P, S>(records, heads, in, acc);
    }
    SHARDMESH_UNROLL
    for (int s = 0; s < S; s++)
      SHARDMESH_UNROLL
      for (int t = 0; t < M; t++) segments[(segment * S + s) * M + t] = acc[s][t];
  }
  finish_segments<Isa>(segments, S, M, a, row, token);
}

template <class Isa, class W, int P, int S>
void multiply_strips(const Strip* strips, const InputOf<Isa, W>* in, const LinearArguments& a, int64_t row, Tile tile, Prefetch prefetch) {
  switch (tile.count) {
    case 1: return multiply_tile<Isa, W, P, 1, S>(strips, in, a, row, tile.first, prefetch);
    case 2: return multiply_tile<Isa, W, P, 2, S>(strips, in, a, row, tile.first, prefetch);
    case 3: return multiply_tile<Isa, W, P, 3, S>(strips, in, a, row, tile.first, prefetch);
  }
  if constexpr (P == 1) {
    switch (tile.count) {
      case 4: return multiply_tile<Isa, W, P, 4, S>(strips, in, a, row, tile.first, prefetch);
      case 5: return multiply_tile<Isa, W, P, 5, S>(strips, in, a, row, tile.first, prefetch);
      case 6: return multiply_tile<Isa, W, P, 6, S>(strips, in, a, row, tile.first, prefetch);
    }
  }
  if constexpr (S == 1 && Isa::kWholeParts > kTilePartsMax) {
    if constexpr (P == 1) {
      if (tile.count == 7) return multiply_tile<Isa, W, P, 7, S>(strips, in, a, row, tile.first, prefetch);
      return multiply_tile<Isa, W, P, 8, S>(strips, in, a, row, tile.first, prefetch);
    } else {
      return multiply_tile<Isa, W, P, 4, S>(strips, in, a, row, tile.first, prefetch);
    }
  }
}

// Panels hold tiles of 4 to 6 parts only (many tokens, tiles as equal as can be).
template <class Isa, class W, int P, int S>
void multiply_panel(const Strip* strips, const InputOf<Isa, W>* in, const LinearArguments& a, int64_t row, Tile tile, Prefetch prefetch) {
  if constexpr (P == 1) {
    switch (tile.count) {
      case 4: return multiply_tile<Isa, W, P, 4, S>(strips, in, a, row, tile.first, prefetch);
      case 5: return multiply_tile<Isa, W, P, 5, S>(strips, in, a, row, tile.first, prefetch);
      case 6: return multiply_tile<Isa, W, P, 6, S>(strips, in, a, row, tile.first, prefetch);
    }
  } else {
    switch (tile.count) {
      case 2: return multiply_tile<Isa, W, P, 2, S>(strips, in, a, row, tile.first, prefetch);
      case 3: return multiply_tile<Isa, W, P, 3, S>(strips, in, a, row, tile.first, prefetch);
    }
  }
}

constexpr int kPanelTokensMin = 16;  // from here on every tile has 4 parts or more
template <int strips>
alignas(64) thread_local uint8_t panel_buffer[strips * kPanelGroupsMax * kPanelBytes];

template <TensorType type>
Strip strip_at(const PackedMatrix& matrix, int64_t index) {
  const StripShape shape = quantized_shape<type>(matrix.columns, matrix.layout);
  const uint8_t* base = matrix.data + static_cast<size_t>(index) * shape.strip_bytes;
  return {base + static_cast<size_t>(shape.heads) * Format<type>::head_bytes, base, matrix.layout};
}

// Groups [first, first + count) of a strip as the set's panel.
template <class Isa, TensorType type>
__attribute__((noinline)) void expand_groups(const Strip& strip, int64_t first, int64_t count, uint8_t* panel) {
  using W = Direct<type>;
  for (int64_t g = first; g < first + count; g++, panel += kPanelBytes) {
    const uint8_t* head = W::k_format ? strip.heads + static_cast<size_t>((strip.phase + g) >> 3) * W::head_bytes : nullptr;
    Isa::template expand<type>(strip.records + static_cast<size_t>(g) * W::record_bytes, head, panel);
  }
}

// One tile on processors that want several streams of memory: strips from `from` on, as many as fill whole runs. Returns the first not done.
template <class Isa, class W, int P>
int64_t multiply_streams(const LinearArguments& a, int64_t from, int64_t to, const InputOf<Isa, W>* in) {
  const LinearTuning& tuning = linear_tuning();
  const PackedMatrix& matrix = *a.weight;
  const int tokens = a.in.tokens;
  int64_t s = from;
  if (tokens * P == 1 && tuning.strips_one == 4) {
    for (; s + 4 <= to; s += 4) {
      Strip strips[4];
      for (int i = 0; i < 4; i++) strips[i] = strip_at<W::type>(matrix, s + i);
      multiply_tile<Isa, W, P, 1, 4>(strips, in, a, s * kStripRows, 0, {tuning.prefetch_bytes});
    }
  } else if (tokens * P >= 2 && tokens * P <= Isa::kPairParts && tuning.strips_few == 2) {
    for (; s + 2 <= to; s += 2) {
      const Strip strips[2] = {strip_at<W::type>(matrix, s), strip_at<W::type>(matrix, s + 1)};
      multiply_strips<Isa, W, P, 2>(strips, in, a, s * kStripRows, {0, tokens}, {tuning.prefetch_bytes});
    }
  }
  return s;
}

// Strips [from, to), all tokens.
template <class Isa, int P, TensorType type>
void multiply_quantized(const LinearArguments& a, int64_t from, int64_t to) {
  using W = Direct<type>;
  if constexpr (Isa::kTileRegistersFrom < INT_MAX) {
    if (a.in.tokens * P >= Isa::kTileRegistersFrom) return Isa::template multiply_tile_registers<P, type>(a, from, to);
  }
  const LinearTuning& tuning = linear_tuning();
  const PackedMatrix& matrix = *a.weight;
  const int tokens = a.in.tokens, tiles = tile_count<Isa, P>(tokens);
  const int64_t groups = matrix.columns / 32;
  const InputOf<Isa, W>* in = input_of<Isa, W>(a.in);
  const auto tile_input = [&](Tile tile) { return in + tile_offset(tile, groups) * kGroupsPerToken<Isa, W, P>; };

  if (tiles == 1) {
    const Tile tile = tile_at<Isa, P>(tokens, 0);
    int64_t s = from;
    if constexpr (Isa::kStreams) s = multiply_streams<Isa, W, P>(a, from, to, in);
    for (; s < to; s++) {
      const Strip strip = strip_at<type>(matrix, s);
      multiply_strips<Isa, W, P, 1>(&strip, in, a, s * kStripRows, tile, {tuning.prefetch_bytes});
    }
    return;
  }

  [[maybe_unused]] const bool expand = tokens >= tuning.panel_tokens && tokens >= kPanelTokensMin && groups <= kPanelGroupsMax;
  const int64_t tile_bytes = kTilePartsMax * groups * static_cast<int64_t>(sizeof(*in));
  const int block_tiles = tile_bytes * 2 > static_cast<int64_t>(kTokenBlockBytes) ? 2 : static_cast<int>(static_cast<int64_t>(kTokenBlockBytes) / tile_bytes);
  for (int first = 0; first < tiles; first += block_tiles) {
    const int last = first + block_tiles < tiles ? first + block_tiles : tiles;
    int64_t s = from;
    if constexpr (Isa::template kExpands<W>) {
      constexpr int kStrips = Isa::kPanelStrips;
      for (; expand && s + kStrips <= to; s += kStrips) {
        Strip strips[kStrips];
        for (int i = 0; i < kStrips; i++) {
          uint8_t* panel = panel_buffer<kStrips> + static_cast<size_t>(i) * kPanelGroupsMax * kPanelBytes;
          expand_groups<Isa, type>(strip_at<type>(matrix, s + i), 0, groups, panel);
          strips[i] = {panel, nullptr, 0};
        }
        // The strips after these are fetched meanwhile, some by each tile.
        const uint8_t* next = s + 2 * kStrips <= strip_count(matrix.rows) ? strip_at<type>(matrix, s + kStrips).heads : nullptr;
        const size_t share = kStrips * quantized_shape<type>(matrix.columns, matrix.layout).strip_bytes / static_cast<size_t>(last - first);
        for (int i = first; i < last; i++) {
          const Tile tile = tile_at<Isa, P>(tokens, i);
          multiply_panel<Isa, Panel<type>, P, kStrips>(strips, tile_input(tile), a, s * kStripRows, tile, {0, next, share});
          if (next) next += share;
        }
      }
    }
    const auto multiply_runs = [&]<int S>() {
      for (; s + S <= to; s += S) {
        Strip strips[S];
        for (int i = 0; i < S; i++) strips[i] = strip_at<type>(matrix, s + i);
        for (int i = first; i < last; i++) {
          const Tile tile = tile_at<Isa, P>(tokens, i);
          multiply_strips<Isa, W, P, S>(strips, tile_input(tile), a, s * kStripRows, tile, {i == first ? tuning.prefetch_bytes : 0});
        }
      }
    };
    if constexpr (Isa::kPairParts == kTilePartsMax) multiply_runs.template operator()<2>();
    multiply_runs.template operator()<1>();
  }
}

// One strip of a float matrix times M tokens from `token` on; `x` is not quantised.
template <class Isa, TensorType type, int M>
void multiply_float_tile(const uint8_t* strip, const LinearArguments& a, int64_t row, int64_t token) {
  constexpr size_t value_bytes = type == TensorType::F32 ? 4 : 2;
  typename Isa::F segments[kSegmentsMax * M];
  int64_t k = 0;
  for (int segment = 0; segment < a.segment_count; segment++) {
    typename Isa::F* acc = segments + segment * M;
    for (int t = 0; t < M; t++) acc[t] = Isa::zero();
    const int64_t end = int64_t{a.segment_ends[segment]} * 32;
    Isa::template accumulate_float<type, M>(strip + static_cast<size_t>(k) * kStripRows * value_bytes, a.in.x + token * a.in.x_stride + k, a.in.x_stride, end - k, acc);
    k = end;
  }
  finish_segments<Isa>(segments, 1, M, a, row, token);
}

struct FloatTiles {
  static constexpr int kWholeParts = kTilePartsMax, kTileRegistersFrom = INT_MAX;
};

template <class Isa, TensorType type>
void multiply_float(const LinearArguments& a, int64_t from, int64_t to) {
  const size_t strip_bytes = strip_shape(type, a.weight->columns, 0).strip_bytes;
  const int tiles = tile_count<FloatTiles, 1>(a.in.tokens);
  for (int64_t s = from; s < to; s++) {
    const uint8_t* strip = a.weight->data + static_cast<size_t>(s) * strip_bytes;
    const int64_t row = s * kStripRows;
    for (int i = 0; i < tiles; i++) {
      const Tile tile = tile_at<FloatTiles, 1>(a.in.tokens, i);
      switch (tile.count) {
        case 1: multiply_float_tile<Isa, type, 1>(strip, a, row, tile.first); break;
        case 2: multiply_float_tile<Isa, type, 2>(strip, a, row, tile.first); break;
        case 3: multiply_float_tile<Isa, type, 3>(strip, a, row, tile.first); break;
        case 4: multiply_float_tile<Isa, type, 4>(strip, a, row, tile.first); break;
        case 5: multiply_float_tile<Isa, type, 5>(strip, a, row, tile.first); break;
        case 6: multiply_float_tile<Isa, type, 6>(strip, a, row, tile.first); break;
      }
    }
  }
}

// This part's share: a contiguous range of strips. Float weights take no notice of P and are built with P = 1.
template <class Isa, int P>
void multiply(const LinearArguments& a, Part part) {
  if (a.in.tokens < 1) return;
  const int64_t first = a.first_row / kStripRows, strips = strip_count(a.row_count ? a.row_count : a.weight->rows);
  const int64_t from = first + strips * part.index / part.count, to = first + strips * (part.index + 1) / part.count;
  switch (a.weight->type) {
    case TensorType::Q4_0: return multiply_quantized<Isa, P, TensorType::Q4_0>(a, from, to);
    case TensorType::Q4_1: return multiply_quantized<Isa, P, TensorType::Q4_1>(a, from, to);
    case TensorType::Q5_0: return multiply_quantized<Isa, P, TensorType::Q5_0>(a, from, to);
    case TensorType::Q5_1: return multiply_quantized<Isa, P, TensorType::Q5_1>(a, from, to);
    case TensorType::Q8_0: return multiply_quantized<Isa, P, TensorType::Q8_0>(a, from, to);
    case TensorType::Q4_K: return multiply_quantized<Isa, P, TensorType::Q4_K>(a, from, to);
    case TensorType::Q5_K: return multiply_quantized<Isa, P, TensorType::Q5_K>(a, from, to);
    case TensorType::Q6_K: return multiply_quantized<Isa, P, TensorType::Q6_K>(a, from, to);
    default: break;
  }
  if constexpr (P == 1) {
    switch (a.weight->type) {
      case TensorType::F32: return multiply_float<Isa, TensorType::F32>(a, from, to);
      case TensorType::F16: return multiply_float<Isa, TensorType::F16>(a, from, to);
      case TensorType::BF16: return multiply_float<Isa, TensorType::BF16>(a, from, to);
      default: break;
    }
  }
}

// Of fp32 without its sign: from here on up a value is not finite, and magnitudes are ordered as integers are.
constexpr int32_t kInfinityBits = 0x7f800000;

// This part's share of the T x G groups: `quantize_group(x, out)` for each, which writes P TokenGroups, or returns false for a value that is not finite.
template <class Isa, int P, class QuantizeGroup>
bool quantize_each(const Activations& in, Part part, QuantizeGroup quantize_group) {
  const int64_t groups = in.columns / 32;
  TokenGroup* out = reinterpret_cast<TokenGroup*>(in.data);
  bool finite = true;
  const auto quantize = [&](int64_t token, int64_t first, int64_t last) {
    const Tile tile = tile_of_token<Isa, P>(in.tokens, static_cast<int>(token));
    TokenGroup* column = out + (tile_offset(tile, groups) + (token - tile.first)) * P;
    for (int64_t g = first; g < last; g++) finite &= quantize_group(in.x + token * in.x_stride + g * 32 - in.first_column, column + g * tile.count * P);
  };
  const int64_t first_group = in.first_column / 32, own_groups = in.column_count ? in.column_count / 32 : groups;
  const int64_t count = in.tokens * own_groups, from = count * part.index / part.count, to = count * (part.index + 1) / part.count;
  for (int64_t i = from; i < to;) {
    const int64_t token = i / own_groups, row_end = (token + 1) * own_groups < to ? (token + 1) * own_groups : to;
    quantize(token, first_group + i - token * own_groups, first_group + row_end - token * own_groups);
    i = row_end;
  }
  return finite;
}

}  // namespace
}  // namespace shardmesh
