// The work list of a step's attention, made on the host from positions alone.
#pragma once
#include <vector>

#include "operations.h"

namespace shardmesh::cuda {

// Runs of query heads that share a KV head, each small enough for a piece of one span; kv_head: of each query head, equal ones adjacent.
inline std::vector<HeadRun> head_runs(int heads, const int32_t* kv_head) {
  std::vector<HeadRun> runs;
  for (int h = 0; h < heads; h++) {
    const bool joins = !runs.empty() && runs.back().kv_head == kv_head[h] && runs.back().count < kSplitPairsMax;
    if (joins) runs.back().count++;
    else runs.push_back({h, 1, kv_head[h]});
  }
  return runs;
}

// What decides how a context is split. Any values give the same bits.
struct SplitLimits {
  int rows_max;   // a sequence with at most so many rows in this step has its context split into spans, even where that is one: four warps share a span, and one long context
                  // fills the card. With more rows than that, the rows themselves fill it, and each piece folds its spans
  int slots_max;  // partial results that there is room for: sequences beyond it are not split
  bool all = false;  // every sequence is split, also one that a single span holds: for attention_fused(), which needs slots for all
  int whole_pairs_max = kWholePairsMax;  // of a piece that is not split
};

// A plan keeps its memory from step to step: with room for most_work() and T + 1 slots it allocates nothing.
struct AttentionPlan {
  std::vector<AttentionWork> work;
  std::vector<int32_t> first_slot;  // [T + 1]

  static size_t most_work(size_t tokens, size_t slots, size_t runs) { return (tokens + slots) * runs; }
};

inline void plan_attention(const StepRows& rows, const std::vector<HeadRun>& runs, int window, const SplitLimits& limits, AttentionPlan* plan) {
  plan->work.clear();
  plan->first_slot.clear();
  const auto first_span = [&](int row) { return window > 0 && rows.positions[row] >= window ? (rows.positions[row] - window + 1) / kSpanTokens : 0; };
  const auto last_span = [&](int row) { return rows.positions[row] / kSpanTokens; };
  int slots = 0;
  for (int s = 0; s < rows.sequences; s++) {
    const int begin = rows.first_row[s], end = rows.first_row[s + 1];
    bool split = limits.all || end - begin <= limits.rows_max;
    int needed = 0;
    for (int row = begin; split && row < end; row++) needed += last_span(row) - first_span(row) + 1;
    if (slots + needed > limits.slots_max && !limits.all) split = false;
    for (int row = begin; row < end; row++) {
      plan->first_slot.push_back(slots);
      if (split) slots += last_span(row) - first_span(row) + 1;
    }
    for (int r = 0; r < static_cast<int>(runs.size()); r++) {
      const int rows_max = (split ? kSplitPairsMax : limits.whole_pairs_max) / runs[static_cast<size_t>(r)].count;
      for (int row = begin; row < end; row += rows_max) {
        const int count = end - row < rows_max ? end - row : rows_max;
        if (!split) plan->work.push_back({row, count, r, -1});
        else
          for (int span = first_span(row); span <= last_span(row + count - 1); span++) plan->work.push_back({row, count, r, span});
      }
    }
  }
  plan->first_slot.push_back(slots);
}

}  // namespace shardmesh::cuda
