// Matrix products of many tokens with tile registers: a tile of up to 16 activation parts meets the 32 columns of a group of 16 weight rows in one instruction
// (tdpbssd, signed times signed bytes, exact in int32). What follows, scale and sum of each group, is that of linear_lanes16.h, in the same order: the same bits.
//
//   A  parts x 32 bytes, rows of TokenGroup as they lie     B  8 x 64 bytes, the weights of a panel as they lie, with their sign     C  parts x 16 int32
//
// A tile's integers leave through memory. Tile and vector instructions do not run beside each other on Sapphire Rapids, and each change between them costs some
// 30 cycles: so the products of up to kBurst groups are made together, then their sums. ARCHITECTURE.md, "Kernels and their ceilings", says when that is faster.
//                                                                                                                      Intel SDM volume 1, chapter 18 (AMX)
#pragma once
#include "weight_lanes_avx512.h"

#include "linear_lanes16.h"

namespace shardmesh {
namespace {

// The operand of ldtilecfg.
struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Tiles16 : Lanes16 {
  static constexpr int kTileRegistersFrom = 13;
  static constexpr int kBurst = 8;

  // How the panel of a format is read: with minima, with half scales, or plain.
  template <TensorType type>
  using PanelOf = Panel<Format<type>::minimum ? TensorType::Q4_1 : Format<type>::half_scales ? TensorType::Q6_K : TensorType::Q4_0>;

  // A panel with signed weights.
  template <TensorType type>
  SHARDMESH_LANES void expand(const uint8_t* record, const uint8_t* head, uint8_t* panel) { Lanes16::expand<type, true>(record, head, panel); }

  // A strip on its way into products, and the strip after it, which is fetched meanwhile.
  struct Source {
    Strip strip;
    void (*expand)(const Strip& strip, int64_t first, int64_t count, uint8_t* panel);
    uint8_t* panel;       // of the whole strip, or of one burst
    bool whole;
    const uint8_t* next;  // null: none
    size_t record_bytes;
  };

  static void shape_tiles(int parts, int weight_rows) {
    TileShapes shapes;
    for (int i = 0; i < 8; i++) {
      shapes.row_bytes[i] = static_cast<uint16_t>(i < 2 ? 4 * weight_rows : 64);
      shapes.rows[i] = static_cast<uint8_t>(i == 2 || i == 3 ? weight_rows : parts);
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory");  // gcc 12 sees only the first bytes read
    _tile_loadconfig(&shapes);
  }

  // Products of `count` groups: sums [count][halves of a group][parts][16].
  template <class W, int N>
  SHARDMESH_LANES void multiply_groups(const uint8_t* panel, const TokenGroup* in, int count, int32_t* sums) {
    constexpr int kHalves = W::half_scales ? 2 : 1;
    const auto a = [&](int i) { return reinterpret_cast<const uint8_t*>(in + i / kHalves * N) + i % kHalves * 16; };
    const auto b = [&](int i) { return panel + static_cast<size_t>(i / kHalves) * kPanelBytes + kPanelWeightsAt + i % kHalves * 256; };
    __asm__ volatile("" : : : "memory");  // the panel is written; tile loads do not say that they read
    for (int i = 0; i < count * kHalves; i += 4, sums += 4 * N * 16) {
      const int four = count * kHalves - i;
      _tile_loadd(0, a(i), sizeof(TokenGroup));
      _tile_loadd(2, b(i), 64);
      _tile_zero(4);
      _tile_dpbssd(4, 0, 2);
      if (four > 1) {
        _tile_loadd(1, a(i + 1), sizeof(TokenGroup));
        _tile_loadd(3, b(i + 1), 64);
        _tile_zero(5);
        _tile_dpbssd(5, 1, 3);
      }
      if (four > 2) {
        _tile_loadd(0, a(i + 2), sizeof(TokenGroup));
        _tile_loadd(2, b(i + 2), 64);
        _tile_zero(6);
        _tile_dpbssd(6, 0, 2);
      }
      if (four > 3) {
        _tile_loadd(1, a(i + 3), sizeof(TokenGroup));
        _tile_loadd(3, b(i + 3), 64);
        _tile_zero(7);
        _tile_dpbssd(7, 1, 3);
      }
      _tile_stored(4, sums, 64);
      if (four > 1) _tile_stored(5, sums + N * 16, 64);
      if (four > 2) _tile_stored(6, sums + 2 * N * 16, 64);
      if (four > 3) _tile_stored(7, sums + 3 * N * 16, 64);
    }
  }

  // One strip times the M tokens of one tile; `in` [groups][M][P].
  template <class W, int P, int M>
  static __attribute__((noinline)) void multiply_strip(const Source& source, const TokenGroup* in, const LinearArguments& a, int64_t row, int64_t token) {
    constexpr int N = M * P, kHalves = W::half_scales ? 2 : 1;
    alignas(64) int32_t sums[kBurst * kHalves * N * 16];
    F segments[kSegmentsMax * M], acc[M];
    SHARDMESH_UNROLL
    for (int t = 0; t < M; t++) acc[t] = zero();
    const int groups = a.segment_ends[a.segment_count - 1];
    const int bursts = (groups + kBurst - 1) / kBurst;
    int segment = 0;
    for (int burst = 0; burst < bursts; burst++) {
      const int first = groups * burst / bursts, count = groups * (burst + 1) / bursts - first;
      const uint8_t* record = source.panel;
      if (source.whole) record += static_cast<size_t>(first) * kPanelBytes;
      else source.expand(source.strip, first, count, source.panel);
      multiply_groups<W, N>(record, in, count, sums);
      for (int g = 0; g < count; g++, in += N, record += kPanelBytes) {
        if (source.next)
          for (size_t z = 0; z < source.record_bytes; z += 64) __builtin_prefetch(source.next + static_cast<size_t>(first + g) * source.record_bytes + z, 0, 2);
        if (source.whole)
          for (size_t z = 0; z < N * sizeof(TokenGroup); z += 64) __builtin_prefetch(reinterpret_cast<const uint8_t*>(in + kBurst * N) + z, 0, 3);
        const int32_t* of_group = sums + g * kHalves * N * 16;
        I dot[M], second_dot[M];
        SHARDMESH_UNROLL
        for (int t = 0; t < M; t++) dot[t] = joined<P>(of_group + t * P * 16);
        if constexpr (W::half_scales) {
          I scales[2];
          half_scales<W>(record, &scales[0], &scales[1]);
          SHARDMESH_UNROLL
          for (int t = 0; t < M; t++) {
            dot[t] = L::mul_int(dot[t], scales[0]);
            second_dot[t] = L::mul_int(joined<P>(of_group + (N + t * P) * 16), scales[1]);
            if constexpr (P == 1) dot[t] = L::add_int(dot[t], second_dot[t]);
          }
        }
        add_dots<W, M, P, false>(record, nullptr, in, dot, second_dot, acc);
        if (first + g + 1 == a.segment_ends[segment]) {
          SHARDMESH_UNROLL
          for (int t = 0; t < M; t++) {
            segments[segment * M + t] = acc[t];
            acc[t] = zero();
          }
          segment++;
        }
      }
    }
    finish_segments<Tiles16>(segments, 1, M, a, row, token);
  }

  // The parts of a token, each a row of a C tile in memory, as one.
  template <int P>
  SHARDMESH_LANES I joined(const int32_t* rows) {
    I parts[P];
    for (int p = 0; p < P; p++) parts[p] = L::load_int(rows + 16 * p);
    return join_parts<P>(parts);
  }

  template <class W, int P, int M = kTileRows / P>
  static void multiply_tile_of(int tokens, const Source& source, const TokenGroup* in, const LinearArguments& a, int64_t row, int64_t token) {
    if (tokens == M) return multiply_strip<W, P, M>(source, in, a, row, token);
    if constexpr ((M - 1) * P >= kTileRows / 2) multiply_tile_of<W, P, M - 1>(tokens, source, in, a, row, token);
  }

  // Strips [from, to), all tokens.
  template <int P, TensorType type>
  static void multiply_tile_registers(const LinearArguments& a, int64_t from, int64_t to) {
    using W = PanelOf<type>;
    const PackedMatrix& matrix = *a.weight;
    const int tokens = a.in.tokens, tiles = tile_count<Tiles16, P>(tokens);
    const int64_t groups = matrix.columns / 32, tile_bytes = kTileRows * groups * static_cast<int64_t>(sizeof(TokenGroup));
    const int block_tiles = tile_bytes * 2 > static_cast<int64_t>(kTokenBlockBytes) ? 2 : static_cast<int>(static_cast<int64_t>(kTokenBlockBytes) / tile_bytes);
    const TokenGroup* in = input_of<Tiles16, Panel<type>>(a.in);
    Source source{{}, expand_groups<Tiles16, type>, panel_buffer<1>, false, nullptr, Format<type>::record_bytes};
    int shaped = 0;
    for (int first = 0; first < tiles; first += block_tiles) {
      const int last = first + block_tiles < tiles ? first + block_tiles : tiles;
      source.whole = last - first > 1 && groups <= kPanelGroupsMax;
      for (int64_t s = from; s < to; s++) {
        source.strip = strip_at<type>(matrix, s);
        if (source.whole) source.expand(source.strip, 0, groups, source.panel);
        for (int i = first; i < last; i++) {
          const Tile tile = tile_at<Tiles16, P>(tokens, i);
          if (tile.count != shaped) shape_tiles((shaped = tile.count) * P, W::half_scales ? 4 : 8);
          source.next = i == first && s + 1 < to ? strip_at<type>(matrix, s + 1).records : nullptr;
          multiply_tile_of<W, P>(tile.count, source, in + tile_offset(tile, groups) * P, a, s * kStripRows, tile.first);
        }
      }
    }
    _tile_release();
  }
};

}  // namespace
}  // namespace shardmesh
