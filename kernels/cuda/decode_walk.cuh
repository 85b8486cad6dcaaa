// A warp's walks over the groups of one segment, for the products of few tokens (linear_decode, linear_fused).
#pragma once
#include "device.cuh"
#include "group_product.cuh"
#include "product_plan.h"

namespace shardmesh::cuda {

constexpr int kManyStrips = 1536;  // from here on blocks of two strips leave enough of them for every card

// Straight into registers, some groups at once: for up to 16 tokens, whose operands are few. More groups would take registers that a second block of 16 warps has a better use for.
// acc[s][i] += the products of strip s and tile i over groups [begin, end). records, heads: of each strip; x: of each tile, group 0.
template <typename F, typename X, int tiles, int strips, int columns>
__device__ __forceinline__ void walk_groups(const uint8_t* const (&records)[strips], const uint8_t* const (&heads)[strips], int phase, const X* const (&x)[tiles], int begin, int end, int lane,
                                            float (&acc)[strips][tiles][4]) {
#pragma unroll(tiles * strips == 1 ? 4 : 2)
  for (int group = begin; group < end; group++) {
    StripGroup<F> w[strips];
#pragma unroll
    for (int s = 0; s < strips; s++) w[s] = load_strip_group<F>(records[s] + group * F::record_bytes, heads[s] + (phase + group) / 8 * F::head_bytes, lane);
#pragma unroll
    for (int i = 0; i < tiles; i++)
#pragma unroll
      for (int s = 0; s < strips; s++) add_group<columns>(acc[s][i], w[s], x[i][group], lane);
  }
}

// Through shared memory, which is the warp's own: for more tokens, whose operands would not fit into registers ahead of their products.
constexpr int kChunkBytesMax = 2560;

// Chunks of whole groups: of each strip, then of each tile.
template <typename F, typename X, int tiles, int strips>
struct DecodeChunk {
  static constexpr int group_bytes = strips * F::record_bytes + tiles * static_cast<int>(sizeof(X));
  static constexpr int fitting = kChunkBytesMax / group_bytes;
  static constexpr int groups = fitting >= 8 ? 8 : fitting >= 4 ? 4 : fitting >= 2 ? 2 : 1;
  static_assert(fitting >= 1);
};

// Chunks of a warp that are on their way at once: as many as blocks of up to 16 warps have room for in the 99 KB of the smallest cards.
inline int ring_stages(int warps) { return warps <= 8 ? 4 : 2; }
inline size_t ring_bytes(int warps) { return static_cast<size_t>(warps) * static_cast<size_t>(ring_stages(warps) * kChunkBytesMax); }

// Copies `bytes` of at most most_bytes, both multiples of 16.
template <int most_bytes>
__device__ __forceinline__ void copy_by_warp(uint8_t* shared, const uint8_t* global, int bytes, int lane) {
#pragma unroll
  for (int at = 0; at < most_bytes; at += 512)
    if (at + lane * 16 < bytes) copy_async<16>(shared + at + lane * 16, global + at + lane * 16);
}

// As walk_groups(). ring: `stages` chunks.
template <typename F, typename X, int tiles, int strips, int stages>
__device__ __forceinline__ void walk_staged(const uint8_t* const (&records)[strips], const uint8_t* const (&heads)[strips], int phase, const X* const (&x)[tiles], int begin, int end, uint8_t* ring,
                                            int lane, float (&acc)[strips][tiles][4]) {
  using Chunk = DecodeChunk<F, X, tiles, strips>;
  constexpr int groups = Chunk::groups, strip_bytes = groups * F::record_bytes, tile_bytes = groups * static_cast<int>(sizeof(X));
  const auto copy_chunk = [&](int first, uint8_t* to) {
    if (first < end) {
      const int count = min(groups, end - first);
#pragma unroll
      for (int s = 0; s < strips; s++) copy_by_warp<strip_bytes>(to + s * strip_bytes, records[s] + first * F::record_bytes, count * F::record_bytes, lane);
#pragma unroll
      for (int i = 0; i < tiles; i++)
        copy_by_warp<tile_bytes>(to + strips * strip_bytes + i * tile_bytes, reinterpret_cast<const uint8_t*>(x[i] + first), count * static_cast<int>(sizeof(X)), lane);
    }
    commit_copies();  // an empty group too, so that counting them stays simple
  };
  for (int i = 0; i < stages - 1; i++) copy_chunk(begin + i * groups, ring + i * kChunkBytesMax);
  uint8_t *from = ring, *to = ring + (stages - 1) * kChunkBytesMax;
  const auto next = [&](uint8_t* chunk) { return chunk == ring + (stages - 1) * kChunkBytesMax ? ring : chunk + kChunkBytesMax; };
  for (int first = begin; first < end; first += groups) {
    wait_copies<stages - 2>();
    __syncwarp();  // this chunk is here for all lanes, and the one before has been read by all
    copy_chunk(first + (stages - 1) * groups, to);
    to = next(to);
#pragma unroll
    for (int j = 0; j < groups; j++) {
      if (groups > 1 && first + j >= end) break;
      StripGroup<F> w[strips];
#pragma unroll
      for (int s = 0; s < strips; s++) w[s] = load_strip_group<F>(from + s * strip_bytes + j * F::record_bytes, heads[s] + (phase + first + j) / 8 * F::head_bytes, lane);
#pragma unroll
      for (int i = 0; i < tiles; i++) {
        const X& of_tile = reinterpret_cast<const X*>(from + strips * strip_bytes + i * tile_bytes)[j];
#pragma unroll
        for (int s = 0; s < strips; s++) add_group(acc[s][i], w[s], of_tile, lane);
      }
    }
    from = next(from);
  }
  wait_copies<0>();
}

}  // namespace shardmesh::cuda
