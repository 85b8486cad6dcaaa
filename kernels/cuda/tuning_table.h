// The numbers of tuning.h that are built in, as JSON; `shardmesh tune` writes the same for one card, and its file goes first. Cards are tried in order, and in a card its
// rows: the first that fits is taken. `sm`, `card` (its name), `type`, `bytesMax` (of a packed matrix) and `headSize` that are null fit all. `measured`: a date, or null
// where nobody has measured. No value here can change a bit of a result.
#pragma once

namespace shardmesh::cuda {

constexpr const char* kTuningTable = R"json({
  "version": 1,
  "cards": [
    {
      "sm": null, "card": null, "measured": null,
      "products": [{"type": null, "bytesMax": null, "decodeTokensMax": 64, "decodeTiles": 8}],
      "attention": [{"headSize": null, "splitRowsMax": 8, "warps": 16}]
    }
  ]
})json";

}  // namespace shardmesh::cuda
