// How partial sums and hidden states travel between ranks: as they are, or rounded to fewer bytes. The choice is part of the placement, and a rank uses its own
// contribution as the others receive it, so all ranks of a stage compute with the same numbers, whatever carries them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shardmesh {

// Bf16: rounded to nearest even. Q8: groups of 32, a half as scale (amax / 127, rounded) and 32 signed bytes (x / scale, to nearest even); the last group of a row
// may be short. Values that are not finite stay so.
enum class WireType { F32, Bf16, Q8 };

size_t wire_bytes(WireType type, int64_t width);  // of one row
void to_wire(WireType type, const float* x, int64_t width, uint8_t* out);
void from_wire(WireType type, const uint8_t* in, int64_t width, float* x);

}  // namespace shardmesh
