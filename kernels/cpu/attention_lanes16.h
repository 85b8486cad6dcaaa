// Attention over the paged KV cache and the writing of K and V into it, 16 lanes wide. Built three times: attention_{portable,avx2,avx512}.cpp include `Lanes`
// (lanes16_*.h), `Dots` (attention_dots_*.h) and then this.
//
// Unit of work: a **tile**, either some adjacent rows of one sequence times query heads of one KV head, or one row times the query heads of several KV heads. A
// (row, head) pair of a tile is a **lane**; lanes of one KV head share every load of K and V. Lanes are ordered by row, then head, so the lanes that a step of 64
// keys concerns (causal border, window) are adjacent, and so are those of a KV head.
//
//   for each step of 64 positions:   scores (Dots, or an fp32 chain for f16 K)  ->  softmax of all lanes, weights  ->  values (Dots, or an fp32 chain for f16 V)
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
constexpr float kBelowQuantizableMin = 0x1.fffffep-101f;  // the float before it
constexpr int kBatchLanes = 16;  // lanes whose maxima, sums and scales are one register
constexpr int kRowHeads = 16;    // query heads of a tile of one row
constexpr size_t kRowStepBytes = 40 << 10;  // K and V of a step of a tile of one row, so that the next step's have room beside them

// Rows [row, row + rows) of one sequence, query heads [head, head + heads) of one KV head, or of several when rows is 1; of these rows * heads lanes, [from, to) are
// this part's.
struct Tile {
  int sequence, row, rows, head, heads;
  int from, to;
};

struct Scratch {
  Dots::Query* q;   // [kTileLanes][D]
  float* span;      // [kTileLanes][D] o of the running span
  float* total;     // [kTileLanes][D] o of the spans folded so far
  float* s;         // [kTileLanes][64] of a step: int32 dots or fp32 chains, then scores, then weights times value scales (f16 V: weights)
  Dots::Weight* u;  // [kTileLanes][64] in the order of Dots
};

SHARDMESH_LANES size_t scratch_at(int head_size, uint8_t* base, Scratch* out) {
  const size_t D = static_cast<size_t>(head_size), lanes = kTileLanes;
  size_t offset = 0;
  const auto take = [&](size_t bytes) {
    const size_t at = offset;
    offset += (bytes + 63) / 64 * 64;
    return at;
  };
  const size_t q = take(lanes * D * sizeof(Dots::Query)), span = take(lanes * D * 4), total = take(lanes * D * 4), scores = take(lanes * kStepKeys * 4),
               u = take(lanes * kStepKeys * sizeof(Dots::Weight));
  if (out)
    *out = {reinterpret_cast<Dots::Query*>(base + q), reinterpret_cast<float*>(base + span), reinterpret_cast<float*>(base + total),
            reinterpret_cast<float*>(base + scores), reinterpret_cast<Dots::Weight*>(base + u)};
  return offset;
}

SHARDMESH_LANES const uint8_t* subblock_of(const KvLayout& kv, const uint8_t* cache, const int32_t* block_table, int64_t position, int head) {
  const int64_t block = position / kv.block_tokens, inside = position % kv.block_tokens;
  return cache + static_cast<int64_t>(block_table[block]) * static_cast<int64_t>(kv.block_bytes) + static_cast<int64_t>(head) * static_cast<int64_t>(kv.head_bytes) +
         inside / 16 * static_cast<int64_t>(kv.subblock_bytes);
}

// Where the four subblocks of a step lie.
struct Step {
  int from, to;          // those with an unmasked key
  const uint8_t* at[4];  // of KV head 0; outside [from, to) as at[from], whose scales may be read
};

SHARDMESH_LANES Step find_step(const AttentionArguments& a, const int32_t* block_table, int64_t start, int from, int to) {
  const KvLayout& kv = *a.layout;
  Step step{from, to, {}};
  const uint32_t first = static_cast<uint32_t>(start) + 16u * static_cast<uint32_t>(from), tokens = static_cast<uint32_t>(kv.block_tokens);
  uint32_t block = first / tokens, inside = first % tokens;
  for (int b = from; b < to; b++) {
    step.at[b] = a.cache + static_cast<int64_t>(block_table[block]) * static_cast<int64_t>(kv.block_bytes) + inside / 16 * kv.subblock_bytes;
    inside += 16;
    if (inside == tokens) {
      block++;
      inside = 0;
    }
  }
  for (int b = 0; b < 4; b++)
    if (b < from || b >= to) step.at[b] = step.at[from];
  return step;
}

// K or V of one KV head in a step.
struct StepOperand {
  int from, to;
  const uint8_t* at[4];
};

SHARDMESH_LANES StepOperand operand_of(const Step& step, size_t offset) {
  StepOperand x{step.from, step.to, {}};
  for (int b = 0; b < 4; b++) x.at[b] = step.at[b] + offset;
  return x;
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
SHARDMESH_LANES void half_scores_range(const StepOperand& keys, int D, const float* const* q, float* chains) {
  int b = keys.from;
  for (; b + B <= keys.to; b += B) half_scores_tile<L, B>(keys.at + b, D, q, chains + 16 * b);
  for (; b < keys.to; b++) half_scores_tile<L, 1>(keys.at + b, D, q, chains + 16 * b);
}

static __attribute__((noinline)) void half_scores(const StepOperand& keys, int D, const float* const* q, int lanes, float* chains) {
  int l = 0;
  for (; l + 4 <= lanes; l += 4) half_scores_range<4, 1>(keys, D, q + l, chains + l * kStepKeys);
  for (; l + 2 <= lanes; l += 2) half_scores_range<2, 2>(keys, D, q + l, chains + l * kStepKeys);
  if (l < lanes) half_scores_range<1, 4>(keys, D, q + l, chains + l * kStepKeys);
}

// Lanes in groups of equal size, at most Dots::lanes_max, so that no group is left with a single lane.
struct LaneGroups {
  int lanes, groups;
  explicit LaneGroups(int count) : lanes(count), groups((count + Dots::lanes_max - 1) / Dots::lanes_max) {}
  int start(int group) const { return lanes * group / groups; }
};

template <int L>
static __attribute__((noinline)) void integer_scores_of(const StepOperand& keys, int D, const Dots::Query* q, const int32_t* sums, int32_t* dots, LinesAhead* ahead) {
  Dots::scores<L>(keys.at, keys.from, keys.to, D, q, sums, dots, ahead);
}

static __attribute__((noinline)) void integer_scores(const StepOperand& keys, int D, const Dots::Query* q, int lanes, int32_t* dots, LinesAhead* ahead) {
  alignas(64) int32_t sums[kStepKeys];
  Dots::sum_keys(keys.at, keys.from, keys.to, D, sums);
  const LaneGroups groups(lanes);
  for (int g = 0; g < groups.groups; g++) {
    const int l = groups.start(g), count = groups.start(g + 1) - l;
    const Dots::Query* query = q + static_cast<int64_t>(l) * D;
    int32_t* out = dots + l * kStepKeys;
    switch (count) {
      case 1: integer_scores_of<1>(keys, D, query, sums, out, ahead); break;
      case 2: integer_scores_of<2>(keys, D, query, sums, out, ahead); break;
      case 3: integer_scores_of<3>(keys, D, query, sums, out, ahead); break;
      case 4: integer_scores_of<4>(keys, D, query, sums, out, ahead); break;
      case 5: integer_scores_of<5>(keys, D, query, sums, out, ahead); break;
      default: integer_scores_of<6>(keys, D, query, sums, out, ahead); break;
    }
  }
}

template <int L>
static __attribute__((noinline)) void weighted_values_of(const StepOperand& values, int D, const Dots::Weight* u, const float* sw, const float* c, float* o, LinesAhead* ahead) {
  Dots::values<L>(values.at, values.from, values.to, D, u, sw, c, o, ahead);
}

SHARDMESH_LANES void weighted_values(const StepOperand& values, int D, const Dots::Weight* u, const float* sw, const float* c, int lanes, float* o, LinesAhead* ahead) {
  const LaneGroups groups(lanes);
  for (int g = 0; g < groups.groups; g++) {
    const int l = groups.start(g), count = groups.start(g + 1) - l;
    const Dots::Weight* weights = u + l * kStepKeys;
    float* out = o + static_cast<int64_t>(l) * D;
    switch (count) {
      case 1: weighted_values_of<1>(values, D, weights, sw + l, c + l, out, ahead); break;
      case 2: weighted_values_of<2>(values, D, weights, sw + l, c + l, out, ahead); break;
      case 3: weighted_values_of<3>(values, D, weights, sw + l, c + l, out, ahead); break;
      case 4: weighted_values_of<4>(values, D, weights, sw + l, c + l, out, ahead); break;
      case 5: weighted_values_of<5>(values, D, weights, sw + l, c + l, out, ahead); break;
      default: weighted_values_of<6>(values, D, weights, sw + l, c + l, out, ahead); break;
    }
  }
}

// o[l * D + d] = fma(w[l * 64 + j], V[j, d], o[l * D + d]) over the keys [from[l], to[l]) of the step, ascending, o times c[l] before; V in half precision. Lanes
// share the loads of the keys that all of them see.
template <int L>
static __attribute__((noinline)) void half_values_of(const StepOperand& values, int D, const float* w, const int* from, const int* to, const float* c, float* o) {
  constexpr int V = L <= 2 ? 2 : 1;
  int low = 0, high = kStepKeys;
  for (int l = 0; l < L; l++) {
    low = from[l] > low ? from[l] : low;
    high = to[l] < high ? to[l] : high;
  }
  if (high < low) high = low;
  for (int d = 0; d < D; d += 16 * V) {
    const auto load = [&](int j, int v) { return Lanes::load_half(reinterpret_cast<const uint16_t*>(values.at[j / 16]) + static_cast<int64_t>(j % 16) * D + d + 16 * v); };
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

static __attribute__((noinline)) void half_values(const StepOperand& values, int D, const float* w, const int* from, const int* to, const float* c, int lanes, float* o) {
  int l = 0;
  for (; l + 4 <= lanes; l += 4) half_values_of<4>(values, D, w + l * kStepKeys, from + l, to + l, c + l, o + static_cast<int64_t>(l) * D);
  for (; l + 2 <= lanes; l += 2) half_values_of<2>(values, D, w + l * kStepKeys, from + l, to + l, c + l, o + static_cast<int64_t>(l) * D);
  if (l < lanes) half_values_of<1>(values, D, w + l * kStepKeys, from + l, to + l, c + l, o + static_cast<int64_t>(l) * D);
}

// Softmax of the running span and totals of the spans before it, of each lane. Batches of kBatchLanes may reach behind the last lane.
struct alignas(64) LaneStates {
  float m[kTileLanes + kBatchLanes], l[kTileLanes + kBatchLanes];
  float total_m[kTileLanes + kBatchLanes], total_l[kTileLanes + kBatchLanes];  // -inf and 0 before the first span
  float decay[kTileLanes + kBatchLanes];   // of the last step: factor on o
  float sw[kTileLanes + kBatchLanes];      // of the last step: scale of the u8 weights
  float factor[kTileLanes + kBatchLanes];  // of scores: rn(sq * scale) for int8 K, scale for f16 K
  uint64_t open[kTileLanes];               // of the step: bit j is set where key j is unmasked
  size_t head_bytes[kTileLanes];           // offset of the lane's KV head in a block
};

// What a step has for its lanes: where scales lie in a subblock, from the head's start.
struct StepScales {
  const Step& step;
  size_t key, value;
};

// Scores of L adjacent lanes in place of their dots (or chains); top[l]: their maxima, lane by lane. All: every key of the step is unmasked.
template <bool IntegerKeys, bool All, int L>
SHARDMESH_LANES void score_lanes(const StepScales& scales, const LaneStates& state, int lane, float* s, Lanes::F* top) {
  using F = Lanes::F;
  const F none = Lanes::set(-INFINITY);
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++) {
    const F factor = Lanes::set(state.factor[lane + l]);
    F score[4];
    SHARDMESH_UNROLL
    for (int b = 0; b < 4; b++) {
      float* at = s + (lane + l) * kStepKeys + 16 * b;
      if (IntegerKeys) {
        const F key_scales = Lanes::load(reinterpret_cast<const float*>(scales.step.at[b] + state.head_bytes[lane + l] + scales.key));
        score[b] = Lanes::mul(Lanes::to_float(Lanes::load_int(at)), Lanes::mul(key_scales, factor));
      } else {
        score[b] = Lanes::mul(Lanes::load(at), factor);
      }
      if (!All) score[b] = Lanes::select(Lanes::mask_of(static_cast<uint32_t>(state.open[lane + l] >> (16 * b)) & 0xffff), score[b], none);
      Lanes::store(at, score[b]);
    }
    top[l] = Lanes::max(Lanes::max(score[0], score[1]), Lanes::max(score[2], score[3]));
  }
}

// Weights of L adjacent lanes in place of their scores, times value scales for int8 V; sum[l]: the weights' sum, lane by lane, top[l]: maxima of what is left in place.
template <bool IntegerValues, bool All, int L>
SHARDMESH_LANES void weigh_lanes(const StepScales& scales, const LaneStates& state, int lane, float* s, Lanes::F* sum, Lanes::F* top) {
  using F = Lanes::F;
  F w[L][4];
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++) {
    const F m = Lanes::set(state.m[lane + l]);
    SHARDMESH_UNROLL
    for (int b = 0; b < 4; b++) w[l][b] = Lanes::sub(Lanes::load(s + (lane + l) * kStepKeys + 16 * b), m);
  }
  exp_each<4 * L>(w[0]);  // 0 for -inf
  SHARDMESH_UNROLL
  for (int l = 0; l < L; l++) {
    sum[l] = Lanes::add(Lanes::add(w[l][0], w[l][2]), Lanes::add(w[l][1], w[l][3]));
    SHARDMESH_UNROLL
    for (int b = 0; b < 4; b++) {
      if (IntegerValues) {
        w[l][b] = Lanes::mul(w[l][b], Lanes::load(reinterpret_cast<const float*>(scales.step.at[b] + state.head_bytes[lane + l] + scales.value)));
        if (!All) w[l][b] = Lanes::select(Lanes::mask_of(static_cast<uint32_t>(state.open[lane + l] >> (16 * b)) & 0xffff), w[l][b], Lanes::set(0.0f));
      }
      Lanes::store(s + (lane + l) * kStepKeys + 16 * b, w[l][b]);
    }
    if (IntegerValues) top[l] = Lanes::max(Lanes::max(w[l][0], w[l][1]), Lanes::max(w[l][2], w[l][3]));
  }
}

// Softmax of one step of lanes [lane, lane + count), count <= kBatchLanes, each with an unmasked key: updates m and l, sets decay, and for int8 V writes u and sw.
// One lane is a long chain of instructions (scores, maximum, exp, sum, maximum, weights), so all lanes take each part of it together, and what is one number a lane
// is one register for all.
template <bool IntegerKeys, bool IntegerValues>
static __attribute__((noinline)) void softmax_step(const StepScales& scales, LaneStates& state, int lane, int count, float* s, Dots::Weight* u) {
  using F = Lanes::F;
  const F zero = Lanes::set(0.0f);
  F pairs[kBatchLanes / 2], sums[kBatchLanes / 2];
  for (int i = (count + 1) / 2; i < kBatchLanes / 2; i++) pairs[i] = sums[i] = zero;
  const auto whole = [&](int i) { return state.open[i] == ~uint64_t{0}; };

  for (int i = 0; i < count; i += 2) {
    F top[2];
    const int at = lane + i;
    if (i + 1 == count) {
      if (whole(at)) score_lanes<IntegerKeys, true, 1>(scales, state, at, s, top);
      else score_lanes<IntegerKeys, false, 1>(scales, state, at, s, top);
      top[1] = top[0];
    } else if (whole(at) && whole(at + 1)) {
      score_lanes<IntegerKeys, true, 2>(scales, state, at, s, top);
    } else {
      score_lanes<IntegerKeys, false, 2>(scales, state, at, s, top);
    }
    pairs[i / 2] = Lanes::pair_max(top[0], top[1]);
  }
  {
    const F highest = Lanes::each_max(pairs), m = Lanes::load(state.m + lane), next = Lanes::select(Lanes::greater(highest, m), highest, m);
    const F c = exp_of_negative(Lanes::sub(m, next));  // exactly 1 where m stays
    Lanes::store(state.m + lane, next);
    Lanes::store(state.l + lane, Lanes::mul(Lanes::load(state.l + lane), c));
    Lanes::store(state.decay + lane, c);
  }

  for (int i = 0; i < count; i += 2) {
    F sum[2], top[2];
    const int at = lane + i;
    if (i + 1 == count) {
      if (whole(at)) weigh_lanes<IntegerValues, true, 1>(scales, state, at, s, sum, top);
      else weigh_lanes<IntegerValues, false, 1>(scales, state, at, s, sum, top);
      sum[1] = sum[0];
      if (IntegerValues) top[1] = top[0];
    } else if (whole(at) && whole(at + 1)) {
      weigh_lanes<IntegerValues, true, 2>(scales, state, at, s, sum, top);
    } else {
      weigh_lanes<IntegerValues, false, 2>(scales, state, at, s, sum, top);
    }
    sums[i / 2] = Lanes::pair_sum(sum[0], sum[1]);
    if (IntegerValues) pairs[i / 2] = Lanes::pair_max(top[0], top[1]);
  }
  Lanes::store(state.l + lane, Lanes::add(Lanes::load(state.l + lane), Lanes::each_sum(sums)));
  if (!IntegerValues) return;

  const F largest = Lanes::each_max(pairs);
  const Lanes::M counts = Lanes::greater(largest, Lanes::set(kBelowQuantizableMin));
  // Where nothing counts: u = 0, and fma(0, -0, o) is o, whatever its sign.
  Lanes::store(state.sw + lane, Lanes::select(counts, Lanes::div(largest, Lanes::set(255.0f)), Lanes::set(-0.0f)));
  alignas(64) float inverse[kBatchLanes];
  Lanes::store(inverse, Lanes::select(counts, Lanes::div(Lanes::set(255.0f), largest), zero));
  for (int i = 0; i < count; i++) {
    const F by = Lanes::set(inverse[i]);
    const float* x = s + (lane + i) * kStepKeys;
    Lanes::I v[4];
    SHARDMESH_UNROLL
    for (int b = 0; b < 4; b++) v[b] = Lanes::to_int(Lanes::mul(Lanes::load(x + 16 * b), by));
    Dots::store_weights(u + (lane + i) * kStepKeys, v);
  }
}

// Left fold of lanes [from, to): (m, l, o) of the spans so far with those of the running one. `first`: bit i is set where lane i has none so far.
SHARDMESH_LANES void fold_spans(LaneStates& state, int from, int to, uint32_t first, float* total, const float* span, int D) {
  using F = Lanes::F;
  for (int lane = from; lane < to; lane += kBatchLanes) {
    alignas(64) float decay[2][kBatchLanes];
    const int count = to - lane < kBatchLanes ? to - lane : kBatchLanes;
    const F m = Lanes::load(state.total_m + lane), next_m = Lanes::load(state.m + lane), n = Lanes::select(Lanes::greater(next_m, m), next_m, m);
    const F a = exp_of_negative(Lanes::sub(m, n)), b = exp_of_negative(Lanes::sub(next_m, n));
    Lanes::store_first(state.total_l + lane, Lanes::add(Lanes::mul(Lanes::load(state.total_l + lane), a), Lanes::mul(Lanes::load(state.l + lane), b)), count);
    Lanes::store_first(state.total_m + lane, n, count);
    Lanes::store(decay[0], a);
    Lanes::store(decay[1], b);
    for (int i = 0; i < count; i++) {
      float* o = total + static_cast<int64_t>(lane + i) * D;
      const float* next_o = span + static_cast<int64_t>(lane + i) * D;
      if (first >> (lane + i) & 1) {
        for (int d = 0; d < D; d += 16) Lanes::store(o + d, Lanes::load(next_o + d));
        continue;
      }
      const F fa = Lanes::set(decay[0][i]), fb = Lanes::set(decay[1][i]);
      for (int d = 0; d < D; d += 16) Lanes::store(o + d, Lanes::add(Lanes::mul(Lanes::load(o + d), fa), Lanes::mul(Lanes::load(next_o + d), fb)));
    }
  }
}

// Quantises `lanes` heads of q and sets their factors: rn(sq * scale), sq = 0 where all values count as zero.
static __attribute__((noinline)) void quantize_queries(const float* const* x, int lanes, int D, float scale, Dots::Query* q, LaneStates& state) {
  using F = Lanes::F;
  for (int lane = 0; lane < lanes; lane += kBatchLanes) {
    const int count = lanes - lane < kBatchLanes ? lanes - lane : kBatchLanes;
    F pairs[kBatchLanes / 2];
    for (int i = 0; i < kBatchLanes; i += 2) {
      F top[2];
      SHARDMESH_UNROLL
      for (int l = 0; l < 2; l++) {
        const float* values = x[lane + (i + l < count ? i + l : 0)];
        top[l] = Lanes::abs(Lanes::load(values));
        for (int d = 16; d < D; d += 16) top[l] = Lanes::max(top[l], Lanes::abs(Lanes::load(values + d)));
      }
      pairs[i / 2] = Lanes::pair_max(top[0], top[1]);
    }
    const F amax = Lanes::each_max(pairs), most = Lanes::set(127.0f), zero = Lanes::set(0.0f);
    const Lanes::M counts = Lanes::greater(amax, Lanes::set(kBelowQuantizableMin));
    Lanes::store(state.factor + lane, Lanes::mul(Lanes::select(counts, Lanes::div(amax, most), zero), Lanes::set(scale)));
    alignas(64) float inverse[kBatchLanes];
    Lanes::store(inverse, Lanes::select(counts, Lanes::div(most, amax), zero));
    for (int i = 0; i < count; i++) {
      const F by = Lanes::set(inverse[i]);
      for (int d = 0; d < D; d += 16) Dots::store_query(q + static_cast<int64_t>(lane + i) * D + d, Lanes::to_int(Lanes::mul(Lanes::load(x[lane + i] + d), by)));
    }
  }
}

SHARDMESH_LANES int64_t oldest_key(int64_t position, int window) { return window > 0 && position >= window ? position - window + 1 : 0; }

// The tile's step at `start`, as far as its rows reach.
SHARDMESH_LANES Step step_ahead(const AttentionArguments& a, const Tile& tile, int64_t start, int64_t last) {
  const int64_t left = last - start;
  return find_step(a, a.rows->block_tables + a.rows->block_offsets[tile.sequence], start, 0, left >= kStepKeys ? 4 : static_cast<int>(left / 16) + 1);
}

SHARDMESH_LANES Step first_step_of(const AttentionArguments& a, const Tile& tile) {
  const int64_t row = tile.row + tile.from / tile.heads, last = tile.row + (tile.to - 1) / tile.heads;
  return step_ahead(a, tile, oldest_key(a.rows->positions[row], a.window) / kStepKeys * kStepKeys, a.rows->positions[last]);
}

// Where the KV head of the tile's first lane lies in a block.
SHARDMESH_LANES size_t first_head_bytes(const AttentionArguments& a, const Tile& tile) {
  return static_cast<size_t>(a.kv_head[tile.head + tile.from % tile.heads]) * a.layout->head_bytes;
}

// Adjacent lanes of one KV head.
struct Bundle {
  int from, to;
  size_t head_bytes;  // offset of the KV head in a block
};

// Lines of K, V and scales of the bundles' heads in `step`, `shift` bytes on, block by block.
SHARDMESH_LANES void ask_ahead(const KvLayout& kv, const Step& step, const Bundle* bundles, int bundle_count, size_t shift, LinesAhead* ahead) {
  for (int b = step.from; b < step.to;) {
    int end = b + 1;
    while (end < step.to && step.at[end] == step.at[end - 1] + kv.subblock_bytes) end++;
    for (int n = 0; n < bundle_count; n++) ahead->add(step.at[b] + bundles[n].head_bytes + shift, static_cast<size_t>(end - b) * kv.subblock_bytes);
    b = end;
  }
}

// `next`: the tile that this thread takes after this one, or null; its first keys and values are asked for in good time.
static __attribute__((noinline)) void attend_tile(const AttentionArguments& a, const Tile& tile, const Tile* next, const Scratch& scratch) {
  const KvLayout& layout = *a.layout;
  const bool int8_keys = layout.key == KeyType::Int8, int8_values = layout.value == ValueType::Int8;
  const int D = layout.head_size, lanes = tile.to - tile.from;
  if (lanes < 1) return;
  const int32_t* block_table = a.rows->block_tables + a.rows->block_offsets[tile.sequence];

  int64_t position[kTileLanes], oldest[kTileLanes];
  const float* q[kTileLanes];
  LaneStates state;
  Bundle bundles[kRowHeads];
  int bundle_count = 0;
  for (int i = 0; i < lanes; i++) {
    const int64_t row = tile.row + (tile.from + i) / tile.heads, head = tile.head + (tile.from + i) % tile.heads;
    position[i] = a.rows->positions[row];
    oldest[i] = oldest_key(position[i], a.window);
    q[i] = a.q + row * a.q_stride + head * D;
    if (!int8_keys) state.factor[i] = a.scale;
    state.total_m[i] = -INFINITY;
    state.total_l[i] = 0.0f;
    state.head_bytes[i] = static_cast<size_t>(a.kv_head[head]) * layout.head_bytes;
    if (i == 0 || state.head_bytes[i] != bundles[bundle_count - 1].head_bytes) bundles[bundle_count++] = {i, i, state.head_bytes[i]};
    bundles[bundle_count - 1].to = i + 1;
  }
  if (int8_keys) quantize_queries(q, lanes, D, a.scale, scratch.q, state);
  const Lanes::F zero = Lanes::set(0.0f);
  Lanes::store(state.m + lanes, zero);  // batches reach behind the last lane
  Lanes::store(state.l + lanes, zero);
  Lanes::store(state.total_m + lanes, zero);
  Lanes::store(state.total_l + lanes, zero);

  const int64_t first_step = oldest[0] / kStepKeys, last_step = position[lanes - 1] / kStepKeys;
  const size_t key_scales = layout.key_bytes + layout.value_bytes, value_scales = int8_keys ? key_scales + 64 : key_scales;
  int first_key[kTileLanes], end_key[kTileLanes];  // unmasked keys of the step
  int begin = 0, end = 0;  // lanes with an unmasked key in the step
  int open = 0;            // the first lane with a span that is not folded
  uint32_t unfolded = 0xffffffffu;  // bit i: lane i has folded no span
  const auto fold = [&](int to) {
    fold_spans(state, open, to, unfolded, scratch.total, scratch.span, D);
    for (int i = open; i < to; i++) unfolded &= ~(1u << i);
  };
  for (int64_t step = first_step; step <= last_step; step++) {
    const int64_t start = step * kStepKeys;
    const bool border = step % kSpanSteps == 0;
    if (border) fold(end);
    while (position[begin] < start) begin++;
    int fresh = border ? begin : end;  // lanes from here on begin a span
    while (end < lanes && oldest[end] < start + kStepKeys) end++;
    if (border) open = begin;

    const int64_t low = oldest[begin] > start ? oldest[begin] - start : 0, high = position[end - 1] - start;
    const Step here = find_step(a, block_table, start, static_cast<int>(low / 16), high >= kStepKeys ? 4 : static_cast<int>(high / 16) + 1);
    LinesAhead ahead;
    if (step < last_step) ask_ahead(layout, step_ahead(a, tile, start + kStepKeys, position[lanes - 1]), bundles, bundle_count, 0, &ahead);
    else if (next) ask_ahead(layout, first_step_of(a, *next), bundles, bundle_count, first_head_bytes(a, *next) - state.head_bytes[0], &ahead);
    if (!int8_keys || !int8_values) ahead.take_all();  // only Dots take lines between their products
    for (; fresh < end; fresh++) {
      state.m[fresh] = -INFINITY;
      state.l[fresh] = 0.0f;
      float* o = scratch.span + static_cast<int64_t>(fresh) * D;
      for (int d = 0; d < D; d += 16) Lanes::store(o + d, zero);
    }
    for (int i = begin; i < end; i++) {
      first_key[i] = oldest[i] > start ? static_cast<int>(oldest[i] - start) : 0;
      end_key[i] = position[i] - start >= kStepKeys ? kStepKeys : static_cast<int>(position[i] - start) + 1;
      state.open[i] = ~uint64_t{0} << first_key[i] & ~uint64_t{0} >> (kStepKeys - end_key[i]);
    }

    // visit(operand at `offset` of a subblock, first lane, lanes) for each bundle's active lanes.
    const auto each_bundle = [&](size_t offset, auto visit) {
      for (int n = 0; n < bundle_count; n++) {
        const int from = bundles[n].from > begin ? bundles[n].from : begin, to = bundles[n].to < end ? bundles[n].to : end;
        if (from < to) visit(operand_of(here, bundles[n].head_bytes + offset), from, to - from);
      }
    };
    each_bundle(0, [&](const StepOperand& keys, int lane, int count) {
      if (int8_keys) integer_scores(keys, D, scratch.q + static_cast<int64_t>(lane) * D, count, reinterpret_cast<int32_t*>(scratch.s) + lane * kStepKeys, &ahead);
      else half_scores(keys, D, q + lane, count, scratch.s + lane * kStepKeys);
    });
    const StepScales scales{here, key_scales, value_scales};
    for (int lane = begin; lane < end; lane += kBatchLanes) {
      const int count = end - lane < kBatchLanes ? end - lane : kBatchLanes;
      if (int8_keys && int8_values) softmax_step<true, true>(scales, state, lane, count, scratch.s, scratch.u);
      else if (int8_keys) softmax_step<true, false>(scales, state, lane, count, scratch.s, scratch.u);
      else if (int8_values) softmax_step<false, true>(scales, state, lane, count, scratch.s, scratch.u);
      else softmax_step<false, false>(scales, state, lane, count, scratch.s, scratch.u);
    }
    each_bundle(layout.key_bytes, [&](const StepOperand& values, int lane, int count) {
      float* o = scratch.span + static_cast<int64_t>(lane) * D;
      if (int8_values) weighted_values(values, D, scratch.u + lane * kStepKeys, state.sw + lane, state.decay + lane, count, o, &ahead);
      else half_values(values, D, scratch.s + lane * kStepKeys, first_key + lane, end_key + lane, state.decay + lane, count, o);
    });
    ahead.take_all();
  }

  fold(lanes);
  alignas(64) float inverses[kTileLanes + kBatchLanes];
  for (int i = 0; i < lanes; i += kBatchLanes) Lanes::store(inverses + i, Lanes::div(Lanes::set(1.0f), Lanes::load(state.total_l + i)));
  for (int i = 0; i < lanes; i++) {
    const float* o = scratch.total + static_cast<int64_t>(i) * D;
    const int64_t row = tile.row + (tile.from + i) / tile.heads, head = tile.head + (tile.from + i) % tile.heads;
    float* out = a.out + row * a.out_stride + head * D;
    const Lanes::F inverse = Lanes::set(inverses[i]);
    for (int d = 0; d < D; d += 16) Lanes::store(out + d, Lanes::mul(Lanes::load(o + d), inverse));
  }
}

// Calls visit(tile) for every tile: sequences, then KV heads, then rows.
template <typename Visit>
SHARDMESH_LANES void each_tile(const AttentionArguments& a, Visit visit) {
  const auto heads_of_kv = [&](int head) {
    int heads = 1;
    while (head + heads < a.heads && heads < kTileLanes && a.kv_head[head + heads] == a.kv_head[head]) heads++;
    return heads;
  };
  const size_t step_bytes = kStepKeys / 16 * a.layout->subblock_bytes;
  for (int s = 0; s < a.rows->sequences; s++) {
    const bool one_row = a.rows->first_row[s + 1] - a.rows->first_row[s] == 1;
    for (int head = 0; head < a.heads;) {
      int heads = heads_of_kv(head);
      if (one_row)
        for (size_t bytes = 2 * step_bytes; head + heads < a.heads && bytes <= kRowStepBytes; bytes += step_bytes) {
          const int more = heads_of_kv(head + heads);
          if (heads + more > kRowHeads) break;
          heads += more;
        }
      int rows = kTileLanes / heads;
      if (rows > kTileRows) rows = kTileRows;
      for (int row = a.rows->first_row[s]; row < a.rows->first_row[s + 1]; row += rows) {
        const int left = a.rows->first_row[s + 1] - row, count = left < rows ? left : rows;
        visit(Tile{s, row, count, head, heads, 0, count * heads});
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
