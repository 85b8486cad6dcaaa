// The numbers of tuning.h that are built in, as JSON; `shardmesh tune` writes the same for one card, and its file goes first. Cards are tried in order, and in a card its
// rows: the first that fits is taken. `sm`, `card` (its name), `type`, `arithmetic`, `bytesMax` (of a packed matrix) and `headSize` that are null or missing fit all. `arithmetic`
// is of products: "quantised", "float" (F32, F16 and BF16 weights with the reference's bits) or "bf16" (by tensor cores). `measured`: a date, or null where nobody has measured.
// `fusedTokensMax` and `graphEdges` that are null or missing: as the next card has it. `graphEdges` is "plain" or "programmatic" (runtime.h; of use from sm_90 on). Plain is built
// in: what a programmatic edge gains is the start of a kernel and its first weights, which nobody has measured here, and what it risks is a race that no test on a CPU can provoke
// on a card. No value here can change a bit of a result.
#pragma once

namespace shardmesh::cuda {

constexpr const char* kTuningTable = R"json({
  "version": 1,
  "cards": [
    {
      "sm": null, "card": null, "measured": null,
      "products": [
        {"type": null, "arithmetic": "float", "bytesMax": null, "decodeTokensMax": 16, "decodeTiles": 4},
        {"type": null, "arithmetic": null, "bytesMax": null, "decodeTokensMax": 64, "decodeTiles": 4}
      ],
      "attention": [{"headSize": null, "splitRowsMax": 8, "warps": 16}],
      "fusedTokensMax": 8,
      "graphEdges": "plain"
    }
  ]
})json";

}  // namespace shardmesh::cuda
