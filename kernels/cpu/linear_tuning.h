// How matrix products walk memory on this make of CPU. Bit-neutral: every value gives the same results, only the speed differs.
#pragma once

namespace shardmesh {

struct LinearTuning {
  int strips_one;      // 16-row strips read at once for one token: 1 or 4
  int strips_few;      // for 2 to 4 tokens: 1 or 2
  int prefetch_bytes;  // distance of the software prefetch in a strip's stream; 0: none
  int panel_tokens;    // from this many tokens on a strip is expanded to bytes once and reused
};

// Chosen from a table by the processor's vendor. Tests and benchmarks may write to it while no product runs.
LinearTuning& linear_tuning();

}  // namespace shardmesh
