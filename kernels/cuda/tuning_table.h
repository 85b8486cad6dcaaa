// The numbers of tuning.h that are built in, as JSON; `shardmesh tune` writes the same for one card, and its file goes first. Cards are tried in order, and in a card its
// rows: the first that fits is taken. `sm`, `card` (its name), `type`, `arithmetic`, `bytesMax` (of a packed matrix) and `headSize` that are null or missing fit all. `arithmetic`
// is of products: "quantised", "float" (F32, F16 and BF16 weights with the reference's bits) or "bf16" (by tensor cores). `measured`: a date, or null where nobody has measured.
// `fusedTokensMax`, `fusion` and `graphEdges` that are null or missing: as the next card has it. `fusion` is "whole" or "products" (tuning.h), `graphEdges` "plain" or "programmatic"
// (runtime.h; of use from sm_90 on). No value here can change a bit of a result.
#pragma once

namespace shardmesh::cuda {

constexpr const char* kTuningTable = R"json({
  "version": 1,
  "cards": [
    {
      "sm": 90, "card": "NVIDIA H200", "measured": "2026-11-27",
      "products": [
        {"type": null, "arithmetic": "bf16", "bytesMax": null, "decodeTokensMax": 128, "decodeTiles": 4},
        {"type": null, "arithmetic": "float", "bytesMax": 16777216, "decodeTokensMax": 128, "decodeTiles": 4},
        {"type": "F32", "arithmetic": "float", "bytesMax": null, "decodeTokensMax": 64, "decodeTiles": 4},
        {"type": null, "arithmetic": "float", "bytesMax": null, "decodeTokensMax": 32, "decodeTiles": 4},
        {"type": "Q4_K", "arithmetic": null, "bytesMax": 4194304, "decodeTokensMax": 128, "decodeTiles": 2},
        {"type": "Q5_K", "arithmetic": null, "bytesMax": 16777216, "decodeTokensMax": 128, "decodeTiles": 2},
        {"type": null, "arithmetic": null, "bytesMax": 4194304, "decodeTokensMax": 128, "decodeTiles": 1},
        {"type": "Q4_1", "arithmetic": null, "bytesMax": 16777216, "decodeTokensMax": 128, "decodeTiles": 1},
        {"type": "Q5_1", "arithmetic": null, "bytesMax": 16777216, "decodeTokensMax": 128, "decodeTiles": 1},
        {"type": "Q4_K", "arithmetic": null, "bytesMax": 16777216, "decodeTokensMax": 128, "decodeTiles": 4},
        {"type": null, "arithmetic": null, "bytesMax": 16777216, "decodeTokensMax": 128, "decodeTiles": 2},
        {"type": "Q5_K", "arithmetic": null, "bytesMax": null, "decodeTokensMax": 64, "decodeTiles": 4},
        {"type": "Q6_K", "arithmetic": null, "bytesMax": null, "decodeTokensMax": 64, "decodeTiles": 2},
        {"type": "Q4_1", "arithmetic": null, "bytesMax": null, "decodeTokensMax": 32, "decodeTiles": 4},
        {"type": "Q4_K", "arithmetic": null, "bytesMax": null, "decodeTokensMax": 32, "decodeTiles": 4},
        {"type": null, "arithmetic": null, "bytesMax": null, "decodeTokensMax": 32, "decodeTiles": 2}
      ],
      "attention": [
        {"headSize": 64, "splitRowsMax": 32, "warps": 16},
        {"headSize": 128, "splitRowsMax": 16, "warps": 32},
        {"headSize": 256, "splitRowsMax": 4, "warps": 8},
        {"headSize": null, "splitRowsMax": 16, "warps": 16}
      ],
      "fusedTokensMax": 8,
      "fusion": "products",
      "graphEdges": "programmatic"
    },
    {
      "sm": null, "card": null, "measured": null,
      "products": [
        {"type": null, "arithmetic": "float", "bytesMax": null, "decodeTokensMax": 16, "decodeTiles": 4},
        {"type": null, "arithmetic": null, "bytesMax": null, "decodeTokensMax": 64, "decodeTiles": 4}
      ],
      "attention": [{"headSize": null, "splitRowsMax": 8, "warps": 16}],
      "fusedTokensMax": 8,
      "fusion": "whole",
      "graphEdges": "plain"
    }
  ]
})json";

}  // namespace shardmesh::cuda
