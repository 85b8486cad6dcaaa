// Attention over the paged KV cache and the writing of K and V into it, 16 lanes wide. Built three times: attention_{portable,avx2,avx512}.cpp include `Lanes`
// (lanes16_*.h), `Dots` (attention_dots_*.h) and then this.
//
// Unit of work: a **tile**, some adjacent rows of one sequence times query heads of one KV head. A (row, head) pair of a tile is a **lane**; all lanes share every
// load of K and V. Lanes are ordered by row, then head, so the lanes that a step of 64 keys concerns (causal border, window) are adjacent.
//
//   for each step of 64 positions:   scores (Dots, or an fp32 chain for f16 K)  ->  softmax of each lane, weights  ->  values (Dots, or an fp32 chain for f16 V)
//   at each border of 256:           the span's (m, l, o) is folded into the lane's total
//
// Masked keys: subblocks without an unmasked key are never read (they may lie beyond the block table); masked slots of others are selected away.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../include/arithmetic.h"
#include "../include/kernel_set.h"
#include "lanes16_math.h"

namespace shardmesh {
namespace {

constexpr int kTileLanes = 32;
constexpr int kTileRows = 16;
constexpr int kStepKeys = 64;
constexpr int kSpanSteps = 4;
constexpr int kSoftmaxLanes = 3;  // side by side: what registers hold

// Rows [row, row + rows) of one sequence, query heads [head, head + heads) of KV head `kv`; of these rows * heads lanes, [from, to) are this part's.
struct Tile {
  int sequence, row, rows, head, heads, kv;
  int from, to;
};

struct Scratch {
  Dots::Query* q;   // [kTileLanes][D]
  float* span;      // [kTileLanes][D] o of the running span
  float* total;     // [kTileLanes][D] o of the spans folded so far
  int32_t* dots;    // [kTileLanes][64] integer scores; fp32 chains for f16 K
  Dots::Weight* u;  // [kTileLanes][64]
  float* w;         // [kTileLanes][64] softmax weights for f16 V
};

SHARDMESH_LANES size_t scratch_at(int head_size, uint8_t* base, Scratch* out) {
  const size_t D = static_cast<size_t>(head_size), lanes = kTileLanes;
  size_t offset = 0;
  const auto take = [&](size_t bytes) {
    const size_t at = offset;
    offset += (bytes + 63) / 64 * 64;
    return at;
  };
  const size_t q = take(lanes * D * sizeof(Dots::Query)), span = take(lanes * D * 4), total = take(lanes * D * 4), dots = take(lanes * kStepKeys * 4),
               u = take(lanes * kStepKeys * sizeof(Dots::Weight)), w = take(lanes * kStepKeys * 4);
  if (out)
    *out = {reinterpret_cast<Dots::Query*>(base + q), reinterpret_cast<float*>(base + span), reinterpret_cast<float*>(base + total),
            reinterpret_cast<int32_t*>(base + dots), reinterpret_cast<Dots::Weight*>(base + u), reinterpret_cast<float*>(base + w)};
  return offset;
}

// Where the four subblocks of a step lie. Only [from, to) are set.
struct StepBlocks {
  int from, to;
  const uint8_t* keys[4];
  const uint8_t* values[4];
  const float* key_scales[4];  // int8 K only
  const float* value_scales[4];  // int8 V only
};

SHARDMESH_LANES const uint8_t* subblock_of(const KvLayout& kv, const uint8_t* cache, const int32_t* block_table, int64_t position, int head) {
  const int64_t block = position / kv.block_tokens, inside = position % kv.block_tokens;
  return cache + static_cast<int64_t>(block_table[block]) * static_cast<int64_t>(kv.block_bytes) + static_cast<int64_t>(head) * static_cast<int64_t>(kv.head_bytes) +
         inside / 16 * static_cast<int64_t>(kv.subblock_bytes);
}

SHARDMESH_LANES void find_blocks(const AttentionArguments& a, const int32_t* block_table, int kv_head, int64_t start, StepBlocks* out) {
  const KvLayout& kv = *a.layout;
  for (int b = out->from; b < out->to; b++) {
    const uint8_t* p = subblock_of(kv, a.cache, block_table, start + 16 * b, kv_head);
    out->keys[b] = p;
    out->values[b] = p + kv.key_bytes;
    const float* scales = reinterpret_cast<const float*>(p + kv.key_bytes + kv.value_bytes);
    out->key_scales[b] = scales;
    out->value_scales[b] = kv.key == KeyType::Int8 ? scales + 16 : scales;
  }
}

// Another step's first lines: hardware prefetch does not cross from one block to the next.
SHARDMESH_LANES void prefetch_step(const AttentionArguments& a, const int32_t* block_table, int kv_head, int64_t start, int64_t last) {
  for (int b = 0; b < 4 && start + 16 * b <= last; b++) {
    const uint8_t* p = subblock_of(*a.layout, a.cache, block_table, start + 16 * b, kv_head);
    for (int line = 0; line < 8; line++) __builtin_prefetch(p + 64 * line, 0, 3);
    p += a.layout->key_bytes;
    for (int line = 0; line < 8; line++) __builtin_prefetch(p + 64 * line, 0, 3);
  }
}

// chains[l * 64 + 16 * b + t] = fma(q[l][d], K[d, t], chain), d ascending from 0, K in half precision.
template <int L, int B>
SHARDMESH_LANES void half_scores_tile(const uint8_t* const* keys, int D, const float* const* q, float* chains) {
  Lanes::F acc[L][B];
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++)
    SHARDMESH_UNROLL
    for (int b = 0; b < B; b++) acc[l][b] = Lanes::set(0.0f);
  for (int d = 0; d < D; d++) {
    Lanes::F k[B];
    SHARDMESH_UNROLL
    for (int b = 0; b < B; b++) k[b] = Lanes::load_half(reinterpret_cast<const uint16_t*>(keys[b]) + 16 * d);
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++) {
      const Lanes::F x = Lanes::set(q[l][d]);
      SHARDMESH_UNROLL
      for (int b = 0; b < B; b++) acc[l][b] = Lanes::fma(x, k[b], acc[l][b]);
    }
  }
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++)
    SHARDMESH_UNROLL
    for (int b = 0; b < B; b++) Lanes::store(chains + l * kStepKeys + 16 * b, acc[l][b]);
}

template <int L, int B>
SHARDMESH_LANES void half_scores_range(const StepBlocks& blocks, int D, const float* const* q, float* chains) {
  int b = blocks.from;
  for (; b + B <= blocks.to; b += B) half_scores_tile<L, B>(blocks.keys + b, D, q, chains + 16 * b);
  for (; b < blocks.to; b++) half_scores_tile<L, 1>(blocks.keys + b, D, q, chains + 16 * b);
}

static __attribute__((noinline)) void half_scores(const StepBlocks& blocks, int D, const float* const* q, int lanes, float* chains) {
  int l = 0;
  for (; l + 4 <= lanes; l += 4) half_scores_range<4, 1>(blocks, D, q + l, chains + l * kStepKeys);
  for (; l + 2 <= lanes; l += 2) half_scores_range<2, 2>(blocks, D, q + l, chains + l * kStepKeys);
  if (l < lanes) half_scores_range<1, 4>(blocks, D, q + l, chains + l * kStepKeys);
}

// Lanes in groups of equal size, at most Dots::lanes_max, so that no group is left with a single lane.
struct LaneGroups {
  int lanes, groups;
  explicit LaneGroups(int count) : lanes(count), groups((count + Dots::lanes_max - 1) / Dots::lanes_max) {}
  int start(int group) const { return lanes * group / groups; }
};

template <int L>
static __attribute__((noinline)) void integer_scores_of(const StepBlocks& blocks, int D, const Dots::Query* q, const int32_t* sums, int32_t* dots) {
  Dots::scores<L>(blocks.keys, blocks.from, blocks.to, D, q, sums, dots);
}

SHARDMESH_LANES void integer_scores(const StepBlocks& blocks, int D, const Dots::Query* q, const int32_t* sums, int lanes, int32_t* dots) {
  const LaneGroups groups(lanes);
  for (int g = 0; g < groups.groups; g++) {
    const int l = groups.start(g), count = groups.start(g + 1) - l;
    const Dots::Query* query = q + static_cast<int64_t>(l) * D;
    int32_t* out = dots + l * kStepKeys;
    switch (count) {
      case 1: integer_scores_of<1>(blocks, D, query, sums + l, out); break;
      case 2: integer_scores_of<2>(blocks, D, query, sums + l, out); break;
      case 3: integer_scores_of<3>(blocks, D, query, sums + l, out); break;
      case 4: integer_scores_of<4>(blocks, D, query, sums + l, out); break;
      case 5: integer_scores_of<5>(blocks, D, query, sums + l, out); break;
      default: integer_scores_of<6>(blocks, D, query, sums + l, out); break;
    }
  }
}

template <int L>
static __attribute__((noinline)) void weighted_values_of(const StepBlocks& blocks, int D, const Dots::Weight* u, const float* sw, const float* c, float* o) {
  Dots::values<L>(blocks.values, blocks.from, blocks.to, D, u, sw, c, o);
}

SHARDMESH_LANES void weighted_values(const StepBlocks& blocks, int D, const Dots::Weight* u, const float* sw, const float* c, int lanes, float* o) {
  const LaneGroups groups(lanes);
  for (int g = 0; g < groups.groups; g++) {
    const int l = groups.start(g), count = groups.start(g + 1) - l;
    const Dots::Weight* weights = u + l * kStepKeys;
    float* out = o + static_cast<int64_t>(l) * D;
    switch (count) {
      case 1: weighted_values_of<1>(blocks, D, weights, sw + l, c + l, out); break;
      case 2: weighted_values_of<2>(blocks, D, weights, sw + l, c + l, out); break;
      case 3: weighted_values_of<3>(blocks, D, weights, sw + l, c + l, out); break;
      case 4: weighted_values_of<4>(blocks, D, weights, sw + l, c + l, out); break;
      case 5: weighted_values_of<5>(blocks, D, weights, sw + l, c + l, out); break;
      default: weighted_values_of<6>(blocks, D, weights, sw + l, c + l, out); break;
    }
  }
}

// o[l * D + d] = fma(w[l * 64 + j], V[j, d], o[l * D + d]) over the keys [from[l], to[l]) of the step, ascending, o times c[l] before; V in half precision. Lanes
// share the loads of the keys that all of them see.
template <int L>
static __attribute__((noinline)) void half_values_of(const StepBlocks& blocks, int D, const float* w, const int* from, const int* to, const float* c, float* o) {
  constexpr int V = L <= 2 ? 2 : 1;
  int low = 0, high = kStepKeys;
  for (int l = 0; l < L; l++) {
    low = from[l] > low ? from[l] : low;
    high = to[l] < high ? to[l] : high;
  }
  if (high < low) high = low;
  for (int d = 0; d < D; d += 16 * V) {
    const auto load = [&](int j, int v) { return Lanes::load_half(reinterpret_cast<const uint16_t*>(blocks.values[j / 16]) + static_cast<int64_t>(j % 16) * D + d + 16 * v); };
    Lanes::F acc[L][V];
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++) {
      SHARDMESH_UNROLL
      for (int v = 0; v < V; v++) {
        acc[l][v] = Lanes::mul(Lanes::load(o + l * D + d + 16 * v), Lanes::set(c[l]));
        for (int j = from[l]; j < to[l] && j < low; j++) acc[l][v] = Lanes::fma(Lanes::set(w[l * kStepKeys + j]), load(j, v), acc[l][v]);
      }
    }
    for (int j = low; j < high; j++) {
      Lanes::F x[V];
      SHARDMESH_UNROLL
      for (int v = 0; v < V; v++) x[v] = load(j, v);
      SHARDMESH_UNROLL
      for (int l = 0; l < L; l++) {
        const Lanes::F by = Lanes::set(w[l * kStepKeys + j]);
        SHARDMESH_UNROLL
        for (int v = 0; v < V; v++) acc[l][v] = Lanes::fma(by, x[v], acc[l][v]);
      }
    }
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++) {
      SHARDMESH_UNROLL
      for (int v = 0; v < V; v++) {
        for (int j = from[l] > high ? from[l] : high; j < to[l]; j++) acc[l][v] = Lanes::fma(Lanes::set(w[l * kStepKeys + j]), load(j, v), acc[l][v]);
        Lanes::store(o + l * D + d + 16 * v, acc[l][v]);
      }
    }
  }
}

static __attribute__((noinline)) void half_values(const StepBlocks& blocks, int D, const float* w, const int* from, const int* to, const float* c, int lanes, float* o) {
  int l = 0;
  for (; l + 4 <= lanes; l += 4) half_values_of<4>(blocks, D, w + l * kStepKeys, from + l, to + l, c + l, o + static_cast<int64_t>(l) * D);
  for (; l + 2 <= lanes; l += 2) half_values_of<2>(blocks, D, w + l * kStepKeys, from + l, to + l, c + l, o + static_cast<int64_t>(l) * D);
  if (l < lanes) half_values_of<1>(blocks, D, w + l * kStepKeys, from + l, to + l, c + l, o + static_cast<int64_t>(l) * D);
}

// Running softmax of one lane within a span.
struct LaneState {
  float m, l;
  float sw, decay;  // of the last step: scale of the u8 weights, factor on o
};

// Softmax over a step of L adjacent lanes, whose keys [begin, end) of the step's 64 are unmasked (begin < end): updates m and l, writes the u8 weights and their scale,
// or for f16 V the weights as they are into `half_weights`. All: begin = 0 and end = 64. A lane is one long chain of instructions (scores, maximum, exp, sum, maximum,
// weights), so several go side by side.
template <bool All, int L>
SHARDMESH_LANES void softmax_step(const StepBlocks& blocks, bool int8_keys, int begin, int end, const int32_t* dots, const float* scale, LaneState* state, Dots::Weight* u,
                                  float* half_weights) {
  using F = Lanes::F;
  const F none = Lanes::set(-INFINITY), zero = Lanes::set(0.0f);
  const auto absent = [&](int b) { return !All && (b < blocks.from || b >= blocks.to); };  // nothing there to be read
  Lanes::M open[4];
  F s[L][4], top[L];
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++) top[l] = none;
  SHARDMESH_UNROLL
  for (int b = 0; b < 4; b++) {
    if (!All) open[b] = Lanes::range(begin - 16 * b, end - 16 * b);
    if (absent(b)) {
      SHARDMESH_UNROLL
      for (int l = 0; l < L; l++) s[l][b] = none;
      continue;
    }
    F key_scales = zero;
    if (int8_keys) key_scales = Lanes::load(blocks.key_scales[b]);
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++) {
      const int32_t* from = dots + l * kStepKeys + 16 * b;
      const F factor = Lanes::set(scale[l]);
      if (int8_keys)
        s[l][b] = Lanes::mul(Lanes::to_float(Lanes::load_int(from)), Lanes::mul(key_scales, factor));
      else
        s[l][b] = Lanes::mul(Lanes::load(reinterpret_cast<const float*>(from)), factor);
      if (!All) s[l][b] = Lanes::select(open[b], s[l][b], none);
      top[l] = Lanes::max(top[l], s[l][b]);
    }
  }
  float highest[L];
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++) highest[l] = Lanes::highest(top[l]);
  for (int l = 0; l < L; l++) {
    state[l].decay = 1.0f;
    if (highest[l] > state[l].m) {
      const float c = exp_fixed(state[l].m - highest[l]);
      state[l].l = state[l].l * c;
      state[l].decay = c;
      state[l].m = highest[l];
    }
  }
  F w[L][4];
  SHARDMESH_UNROLL
  for (int b = 0; b < 4; b++)
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++) {
      w[l][b] = zero;
      if (absent(b)) continue;
      w[l][b] = exp_lanes(Lanes::sub(s[l][b], Lanes::set(state[l].m)));
      if (!All) w[l][b] = Lanes::select(open[b], w[l][b], zero);
    }
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++) state[l].l = state[l].l + Lanes::halving_sum(Lanes::add(Lanes::add(w[l][0], w[l][2]), Lanes::add(w[l][1], w[l][3])));
  if (half_weights) {
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++)
      SHARDMESH_UNROLL
      for (int b = 0; b < 4; b++) Lanes::store(half_weights + l * kStepKeys + 16 * b, w[l][b]);
    return;
  }
  F largest[L];
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++) largest[l] = zero;
  SHARDMESH_UNROLL
  for (int b = 0; b < 4; b++) {
    if (absent(b)) continue;
    const F value_scales = Lanes::load(blocks.value_scales[b]);
    SHARDMESH_UNROLL
    for (int l = 0; l < L; l++) {
      w[l][b] = Lanes::mul(w[l][b], value_scales);
      if (!All) w[l][b] = Lanes::select(open[b], w[l][b], zero);
      largest[l] = Lanes::max(largest[l], w[l][b]);
    }
  }
  float X[L];
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++) X[l] = Lanes::highest(largest[l]);
  for (int l = 0; l < L; l++) {
    if (!(X[l] >= kQuantizableMin)) {
      state[l].sw = -0.0f;  // fma(0, -0, o) is o, whatever its sign
      std::memset(u + l * kStepKeys, 0, kStepKeys * sizeof(Dots::Weight));
      continue;
    }
    state[l].sw = X[l] / 255.0f;
    const F inverse = Lanes::set(255.0f / X[l]);
    SHARDMESH_UNROLL
    for (int b = 0; b < 4; b++) Dots::store_weight(u + l * kStepKeys + 16 * b, Lanes::to_int(Lanes::mul(w[l][b], inverse)));
  }
}

// One lane over its whole context.
struct LaneTotal {
  float m, l;
  bool any;      // `total` holds folded spans
  bool started;  // the running span has had a step
};

// Left fold: (m, l, o) of the spans so far with those of the next.
SHARDMESH_LANES void fold_span(LaneTotal* total, const LaneState& next, float* o, const float* next_o, int D) {
  if (!total->any) {
    total->m = next.m;
    total->l = next.l;
    total->any = true;
    std::memcpy(o, next_o, static_cast<size_t>(D) * 4);
    return;
  }
  const float n = total->m < next.m ? next.m : total->m, a = exp_fixed(total->m - n), b = exp_fixed(next.m - n);
  total->l = total->l * a + next.l * b;
  total->m = n;
  const Lanes::F fa = Lanes::set(a), fb = Lanes::set(b);
  for (int d = 0; d < D; d += 16) Lanes::store(o + d, Lanes::add(Lanes::mul(Lanes::load(o + d), fa), Lanes::mul(Lanes::load(next_o + d), fb)));
}

// Quantises one head of q; returns the scale (0 when all values count as zero), *sum = sum of the integers.
SHARDMESH_LANES float quantize_query(const float* x, int D, Dots::Query* q, int32_t* sum) {
  const float amax = largest_magnitude(x, D);
  *sum = 0;
  if (!(amax >= kQuantizableMin)) {
    std::memset(q, 0, static_cast<size_t>(D) * sizeof(Dots::Query));
    return 0.0f;
  }
  const Lanes::F inverse = Lanes::set(127.0f / amax);
  for (int d = 0; d < D; d += 16) {
    const Lanes::I v = Lanes::to_int(Lanes::mul(Lanes::load(x + d), inverse));
    *sum += Lanes::sum_int(v);
    Dots::store_query(q + d, v);
  }
  return amax / 127.0f;
}

SHARDMESH_LANES int64_t oldest_key(int64_t position, int window) { return window > 0 && position >= window ? position - window + 1 : 0; }

// The first step of a tile.
SHARDMESH_LANES void prefetch_tile(const AttentionArguments& a, const Tile& tile) {
  const int64_t row = tile.row + tile.from / tile.heads, last = tile.row + (tile.to - 1) / tile.heads;
  prefetch_step(a, a.rows->block_tables + a.rows->block_offsets[tile.sequence], tile.kv, oldest_key(a.rows->positions[row], a.window) / kStepKeys * kStepKeys, a.rows->positions[last]);
}

// `next`: the tile that this thread takes after this one, or null; its first keys and values are asked for in good time.
static __attribute__((noinline)) void attend_tile(const AttentionArguments& a, const Tile& tile, const Tile* next, const Scratch& scratch) {
  const bool int8_keys = a.layout->key == KeyType::Int8, int8_values = a.layout->value == ValueType::Int8;
  const int D = a.layout->head_size, lanes = tile.to - tile.from;
  if (lanes < 1) return;
  const int32_t* block_table = a.rows->block_tables + a.rows->block_offsets[tile.sequence];

  int64_t position[kTileLanes], oldest[kTileLanes];
  const float* q[kTileLanes];
  float scale[kTileLanes];  // rn(sq * scale) for int8 K, scale for f16 K
  int32_t sums[kTileLanes];
  LaneState state[kTileLanes];
  LaneTotal total[kTileLanes];
  float sw[kTileLanes], decay[kTileLanes];
  int first_key[kTileLanes], end_key[kTileLanes];  // unmasked keys of the step
  for (int i = 0; i < lanes; i++) {
    const int64_t row = tile.row + (tile.from + i) / tile.heads, head = tile.head + (tile.from + i) % tile.heads;
    position[i] = a.rows->positions[row];
    oldest[i] = oldest_key(position[i], a.window);
    q[i] = a.q + row * a.q_stride + head * D;
    scale[i] = int8_keys ? quantize_query(q[i], D, scratch.q + static_cast<int64_t>(i) * D, &sums[i]) * a.scale : a.scale;
    total[i] = {-INFINITY, 0.0f, false, false};
  }

  const int64_t first_step = oldest[0] / kStepKeys, last_step = position[lanes - 1] / kStepKeys;
  int begin = 0, end = 0;  // lanes with an unmasked key in the step
  for (int64_t step = first_step; step <= last_step; step++) {
    if (step % kSpanSteps == 0) {
      for (int i = begin; i < end; i++) {
        if (total[i].started) fold_span(&total[i], state[i], scratch.total + static_cast<int64_t>(i) * D, scratch.span + static_cast<int64_t>(i) * D, D);
        total[i].started = false;
      }
    }
    const int64_t start = step * kStepKeys;
    while (position[begin] < start) begin++;
    while (end < lanes && oldest[end] < start + kStepKeys) end++;

    StepBlocks blocks;
    const int64_t low = oldest[begin] > start ? oldest[begin] - start : 0, high = position[end - 1] - start;
    blocks.from = static_cast<int>(low / 16);
    blocks.to = high >= kStepKeys ? 4 : static_cast<int>(high / 16) + 1;
    find_blocks(a, block_table, tile.kv, start, &blocks);
    if (step < last_step) prefetch_step(a, block_table, tile.kv, start + kStepKeys, position[lanes - 1]);
    else if (next) prefetch_tile(a, *next);

    const int active = end - begin;
    int32_t* dots = scratch.dots + begin * kStepKeys;
    if (int8_keys)
      integer_scores(blocks, D, scratch.q + static_cast<int64_t>(begin) * D, sums + begin, active, dots);
    else
      half_scores(blocks, D, q + begin, active, reinterpret_cast<float*>(dots));

    for (int i = begin; i < end; i++) {
      if (!total[i].started) {
        state[i] = {-INFINITY, 0.0f, 0.0f, 1.0f};
        std::memset(scratch.span + static_cast<int64_t>(i) * D, 0, static_cast<size_t>(D) * 4);
        total[i].started = true;
      }
      first_key[i] = oldest[i] > start ? static_cast<int>(oldest[i] - start) : 0;
      end_key[i] = position[i] - start >= kStepKeys ? kStepKeys : static_cast<int>(position[i] - start) + 1;
    }
    for (int i = begin; i < end;) {
      const auto sees_all = [&](int lane) { return lane < end && first_key[lane] == 0 && end_key[lane] == kStepKeys; };
      const int32_t* lane_dots = scratch.dots + i * kStepKeys;
      Dots::Weight* u = scratch.u + i * kStepKeys;
      float* w = int8_values ? nullptr : scratch.w + i * kStepKeys;
      int run = 0;
      while (run < kSoftmaxLanes + 2 && sees_all(i + run)) run++;
      const int count = run == 0 ? 1 : run == kSoftmaxLanes + 1 ? 2 : run < kSoftmaxLanes ? run : kSoftmaxLanes;  // four go two and two
      if (run == 0) softmax_step<false, 1>(blocks, int8_keys, first_key[i], end_key[i], lane_dots, scale + i, state + i, u, w);
      else if (count == 1) softmax_step<true, 1>(blocks, int8_keys, 0, kStepKeys, lane_dots, scale + i, state + i, u, w);
      else if (count == 2) softmax_step<true, 2>(blocks, int8_keys, 0, kStepKeys, lane_dots, scale + i, state + i, u, w);
      else softmax_step<true, 3>(blocks, int8_keys, 0, kStepKeys, lane_dots, scale + i, state + i, u, w);
      i += count;
    }
    for (int i = begin; i < end; i++) {
      sw[i] = state[i].sw;
      decay[i] = state[i].decay;
    }
    float* o = scratch.span + static_cast<int64_t>(begin) * D;
    if (int8_values)
      weighted_values(blocks, D, scratch.u + begin * kStepKeys, sw + begin, decay + begin, active, o);
    else
      half_values(blocks, D, scratch.w + begin * kStepKeys, first_key + begin, end_key + begin, decay + begin, active, o);
  }

  for (int i = 0; i < lanes; i++) {
    float* o = scratch.total + static_cast<int64_t>(i) * D;
    if (total[i].started) fold_span(&total[i], state[i], o, scratch.span + static_cast<int64_t>(i) * D, D);
    const int64_t row = tile.row + (tile.from + i) / tile.heads, head = tile.head + (tile.from + i) % tile.heads;
    float* out = a.out + row * a.out_stride + head * D;
    const Lanes::F inverse = Lanes::set(1.0f / total[i].l);
    for (int d = 0; d < D; d += 16) Lanes::store(out + d, Lanes::mul(Lanes::load(o + d), inverse));
  }
}

// Calls visit(tile) for every tile: sequences, then KV heads, then rows.
template <typename Visit>
SHARDMESH_LANES void each_tile(const AttentionArguments& a, Visit visit) {
  for (int s = 0; s < a.rows->sequences; s++) {
    for (int head = 0; head < a.heads;) {
      int heads = 1;
      while (head + heads < a.heads && heads < kTileLanes && a.kv_head[head + heads] == a.kv_head[head]) heads++;
      int rows = kTileLanes / heads;
      if (rows > kTileRows) rows = kTileRows;
      for (int row = a.rows->first_row[s]; row < a.rows->first_row[s + 1]; row += rows) {
        const int left = a.rows->first_row[s + 1] - row, count = left < rows ? left : rows;
        visit(Tile{s, row, count, head, heads, a.kv_head[head], 0, count * heads});
      }
      head += heads;
    }
  }
}

// Steps of 64 that one lane of the tile walks, about.
SHARDMESH_LANES int64_t tile_steps(const AttentionArguments& a, const Tile& tile) {
  const int64_t last = a.rows->positions[tile.row + tile.rows - 1], first = oldest_key(a.rows->positions[tile.row], a.window);
  return last / kStepKeys - first / kStepKeys + 1;
}

// Each part takes an equal share of lanes * steps, in the order of each_tile; a border may fall between the lanes of a tile.
SHARDMESH_LANES void attention_parts(const AttentionArguments& a, Part part) {
  int64_t all = 0;
  each_tile(a, [&](const Tile& tile) { all += tile.to * tile_steps(a, tile); });
  const int64_t from = all * part.index / part.count, to = all * (part.index + 1) / part.count;
  Scratch scratch;
  scratch_at(a.layout->head_size, a.scratch, &scratch);
  int64_t before = 0;
  Tile waiting{};  // attended when the one after it is known
  each_tile(a, [&](Tile tile) {
    const int64_t steps = tile_steps(a, tile), lanes = tile.to;
    // First lane whose middle lies at or behind `border`.
    const auto lane_at = [&](int64_t border) {
      const int64_t lane = (border - before + steps / 2) / steps;
      return static_cast<int>(border <= before ? 0 : lane > lanes ? lanes : lane);
    };
    tile.from = part.index == 0 ? 0 : lane_at(from);
    tile.to = part.index == part.count - 1 ? static_cast<int>(lanes) : lane_at(to);
    before += lanes * steps;
    if (tile.from >= tile.to) return;
    if (waiting.from < waiting.to) attend_tile(a, waiting, &tile, scratch);
    waiting = tile;
  });
  if (waiting.from < waiting.to) attend_tile(a, waiting, nullptr, scratch);
}

// ---------------------------------------------------------------- writing K and V

// Quantises one head of k or v, store(d, sixteen integers from d on), and returns its scale.
template <typename Store>
SHARDMESH_LANES float quantize_head(const float* x, int D, Store store) {
  const float amax = largest_magnitude(x, D);
  if (!(amax >= kQuantizableMin)) {
    for (int d = 0; d < D; d += 16) store(d, Lanes::set_int(0));
    return 0.0f;
  }
  const Lanes::F inverse = Lanes::set(127.0f / amax);
  for (int d = 0; d < D; d += 16) store(d, Lanes::to_int(Lanes::mul(Lanes::load(x + d), inverse)));
  return amax / 127.0f;
}

constexpr int kHeadSizeMax = 1024;

// One token and KV head: column `position % 16` of its subblock.
SHARDMESH_LANES void store_token(const float* k, const float* v, const KvLayout& kv, uint8_t* subblock, int column) {
  const int D = kv.head_size;
  int8_t q[kHeadSizeMax];
  float* scales = reinterpret_cast<float*>(subblock + kv.key_bytes + kv.value_bytes) + column;
  if (kv.key == KeyType::Int8) {
    scales[0] = quantize_head(k, D, [&](int d, Lanes::I x) { Lanes::store_int8(q + d, x); });
    uint8_t* at = subblock + 4 * column;
    for (int d = 0; d < D; d += 4, at += 64) std::memcpy(at, q + d, 4);
    scales += 16;
  } else {
    uint16_t half[16];
    uint16_t* at = reinterpret_cast<uint16_t*>(subblock) + column;
    for (int d = 0; d < D; d += 16) {
      Lanes::store_half(half, Lanes::load(k + d));
      for (int i = 0; i < 16; i++, at += 16) *at = half[i];
    }
  }
  if (kv.value == ValueType::F16) {
    uint16_t* at = reinterpret_cast<uint16_t*>(subblock + kv.key_bytes) + static_cast<int64_t>(column) * D;
    for (int d = 0; d < D; d += 16) Lanes::store_half(at + d, Lanes::load(v + d));
    return;
  }
  int8_t* at = reinterpret_cast<int8_t*>(subblock + kv.key_bytes) + static_cast<int64_t>(column / 4) * D * 4;
  scales[0] = quantize_head(v, D, [&](int d, Lanes::I x) { Lanes::store_int8_apart(at + 4 * d, column % 4, x); });
}

// Parts share (KV head, token) pairs, head by head, so that two threads seldom write the same cache line.
SHARDMESH_LANES bool store_kv_parts(const float* k, int64_t k_stride, const float* v, int64_t v_stride, const KvLayout& kv, uint8_t* cache, const StepRows& rows, Part part) {
  const Share share = share_of(static_cast<int64_t>(rows.tokens) * kv.heads, 1, part);
  const auto place_of = [&](int64_t i) {
    const int64_t t = i % rows.tokens;
    const int32_t* block_table = rows.block_tables + rows.block_offsets[rows.row_sequence[t]];
    return const_cast<uint8_t*>(subblock_of(kv, cache, block_table, rows.positions[t], static_cast<int>(i / rows.tokens)));
  };
  bool finite = true;
  for (int64_t i = share.from; i < share.to; i++) {
    const int64_t head = i / rows.tokens, t = i % rows.tokens;
    // A token's K is spread over all lines of its subblock, which decoding sequences have in memory; attention reads them next.
    if (i + 1 < share.to)
      for (const uint8_t *p = place_of(i + 1), *end = p + kv.subblock_bytes; p < end; p += 64) __builtin_prefetch(p, 1, 3);
    const float* key = k + t * k_stride + head * kv.head_size;
    const float* value = v + t * v_stride + head * kv.head_size;
    finite &= finite_values(key, kv.head_size) && finite_values(value, kv.head_size);  // quantising makes a number of what is none
    store_token(key, value, kv, place_of(i), rows.positions[t] % 16);
  }
  return finite;
}

}  // namespace
}  // namespace shardmesh
