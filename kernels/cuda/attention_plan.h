// The work list of a step's attention, made on the host from positions alone.
#pragma once
#include <vector>

#include "operations.h"

namespace shardmesh::cuda {

struct AttentionPlan {
  std::vector<HeadRun> runs;
  std::vector<AttentionWork> work;
  std::vector<int32_t> first_slot;  // [T + 1]
};

// A sequence with at most `split_rows_max` rows in this step has its context split into spans, so that one long context fills the card; with more rows than
// that, the rows themselves fill it, and each piece folds its spans. Any value gives the same bits. kv_head: of each query head, equal ones adjacent.
inline AttentionPlan plan_attention(const StepRows& rows, int heads, const int32_t* kv_head, int window, int split_rows_max) {
  constexpr int kSpan = 256, kPairsMax = 16;
  AttentionPlan plan;
  for (int h = 0; h < heads; h++) {
    const bool joins = !plan.runs.empty() && plan.runs.back().kv_head == kv_head[h] && plan.runs.back().count < kPairsMax;
    if (joins) plan.runs.back().count++;
    else plan.runs.push_back({h, 1, kv_head[h]});
  }
  const auto first_span = [&](int row) { return window > 0 && rows.positions[row] >= window ? (rows.positions[row] - window + 1) / kSpan : 0; };
  const auto last_span = [&](int row) { return rows.positions[row] / kSpan; };
  int slots = 0;
  for (int s = 0; s < rows.sequences; s++) {
    const int begin = rows.first_row[s], end = rows.first_row[s + 1];
    const bool split = end - begin <= split_rows_max && end > begin && last_span(end - 1) > first_span(begin);
    for (int row = begin; row < end; row++) {
      plan.first_slot.push_back(slots);
      if (split) slots += last_span(row) - first_span(row) + 1;
    }
    for (int r = 0; r < static_cast<int>(plan.runs.size()); r++) {
      const int rows_max = kPairsMax / plan.runs[static_cast<size_t>(r)].count;
      for (int row = begin; row < end; row += rows_max) {
        const int count = end - row < rows_max ? end - row : rows_max;
        if (!split) plan.work.push_back({row, count, r, -1});
        else
          for (int span = first_span(row); span <= last_span(row + count - 1); span++) plan.work.push_back({row, count, r, span});
      }
    }
  }
  plan.first_slot.push_back(slots);
  return plan;
}

}  // namespace shardmesh::cuda
