// Repacks a weight slice from the file's blocks into the fragment order of weight_layout.h. Runs on the host; no CUDA.
#include <cstring>

#include "../reference/blocks.h"
#include "operations.h"
#include "weight_layout.h"

namespace shardmesh::cuda {
namespace {

bool has_heads(TensorType type) { return type == TensorType::Q4_K || type == TensorType::Q5_K || type == TensorType::Q6_K; }
int phase_of(const MatrixSource& source) { return has_heads(source.type) ? static_cast<int>(source.skip / 32 % 8) : 0; }

template <typename F>
size_t strip_bytes(int64_t groups, int phase) {
  return static_cast<size_t>(F::heads ? (phase + groups + 7) / 8 : 0) * F::head_bytes + static_cast<size_t>(groups) * F::record_bytes;
}

uint16_t half_at_bytes(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return h;
}
void put_half(uint8_t* p, int index, uint16_t h) { std::memcpy(p + 2 * index, &h, 2); }

// Row r (0..15) of the strip: which of 8 places, and 0 or 1 for rows g and g + 8.
template <typename F>
void put_weights(uint8_t* record, int r, const int8_t* q) {
  const int g = r % 8, upper = r / 8;
  for (int k = 0; k < 32; k++) {
    const int lane = 4 * g + k % 16 / 4, byte = k % 4, high = k / 16;
    const unsigned w = static_cast<unsigned>(q[k] + F::zero);
    if constexpr (F::bits == 4) {
      uint8_t& at = record[8 * lane + 4 * upper + byte];
      at = static_cast<uint8_t>(at | (w & 15) << 4 * high);
    } else {
      record[16 * lane + 4 * (upper + 2 * high) + byte] = static_cast<uint8_t>(w);
    }
  }
}

template <typename F>
void pack_strips(const MatrixSource& source, uint8_t* data, int64_t from, int64_t to) {
  const int phase = phase_of(source);
  const int64_t groups = source.columns / 32, heads = F::heads ? (phase + groups + 7) / 8 : 0, first_group = source.skip / 32;
  const size_t bytes = strip_bytes<F>(groups, phase);
  const BlockSize block = block_size(source.type);
  for (int64_t s = from; s < to; s++) {
    uint8_t* strip = data + static_cast<size_t>(s) * bytes;
    std::memset(strip, 0, bytes);
    for (int r = 0; r < kStripRows && s * kStripRows + r < source.rows; r++) {
      const uint8_t* row = source.data + (s * kStripRows + r) * source.row_bytes;
      const int g = r % 8, upper = r / 8;
      for (int64_t group = 0; group < groups; group++) {
        uint8_t* record = strip + static_cast<size_t>(heads) * F::head_bytes + static_cast<size_t>(group) * F::record_bytes;
        uint8_t* scales = record + F::weight_bytes + g * F::scale_bytes;
        const uint8_t* at = row + ((first_group + group) * 32 / block.values) * block.bytes;
        Group values;
        unpack_group(source.type, row, first_group + group, &values);
        put_weights<F>(record, r, values.q);
        if constexpr (F::scales == Scales::Half) {
          put_half(scales, upper, half_at_bytes(at));
        } else if constexpr (F::scales == Scales::HalfMin) {
          put_half(scales, upper, half_at_bytes(at));
          put_half(scales, 2 + upper, half_at_bytes(at + 2));
        } else if constexpr (F::scales == Scales::Super) {
          uint8_t* head = strip + static_cast<size_t>((phase + group) / 8) * F::head_bytes + g * 8;
          int scale, minimum;
          scale_and_minimum(at + 4, static_cast<int>((first_group + group) % 8), &scale, &minimum);
          put_half(head, upper, half_at_bytes(at));
          put_half(head, 2 + upper, static_cast<uint16_t>(half_at_bytes(at + 2) ^ 0x8000u));
          scales[upper] = static_cast<uint8_t>(scale);
          scales[2 + upper] = static_cast<uint8_t>(minimum);
        } else {
          uint8_t* head = strip + static_cast<size_t>((phase + group) / 8) * F::head_bytes + g * 4;
          put_half(head, upper, half_at_bytes(at + 208));
          std::memcpy(scales + 2 * upper, values.half_scale, 2);
        }
      }
    }
  }
}

template <typename F>
size_t float_strip_bytes(int64_t columns) {
  return static_cast<size_t>(columns / 32) * F::record_bytes;
}

template <typename F>
void pack_float_strips(const MatrixSource& source, uint8_t* data, int64_t from, int64_t to) {
  const size_t bytes = float_strip_bytes<F>(source.columns);
  for (int64_t s = from; s < to; s++) {
    uint8_t* strip = data + static_cast<size_t>(s) * bytes;
    std::memset(strip, 0, bytes);
    for (int r = 0; r < kStripRows && s * kStripRows + r < source.rows; r++) {
      const uint8_t* row = source.data + (s * kStripRows + r) * source.row_bytes + source.skip * F::value_bytes;
      for (int64_t piece = 0; piece < source.columns / F::piece_values; piece++)
        std::memcpy(strip + piece / F::pieces * F::record_bytes + float_piece_at(static_cast<int>(piece % F::pieces), r), row + piece * 16, 16);
    }
  }
}

void copy_rows(const MatrixSource& source, uint8_t* data, int64_t from, int64_t to) {
  const size_t bytes = static_cast<size_t>(source.columns) * 2;
  for (int64_t r = from; r < to; r++) {
    uint8_t* row = data + static_cast<size_t>(r) * bytes;
    if (r < source.rows) std::memcpy(row, source.data + r * source.row_bytes + source.skip * 2, bytes);
    else std::memset(row, 0, bytes);
  }
}

int64_t strip_count(int64_t rows) { return (rows + kStripRows - 1) / kStripRows; }

}  // namespace

size_t packed_bytes(const MatrixSource& source) {
  size_t bytes = 0;
  with_format(source.type, [&](auto format) { bytes = static_cast<size_t>(strip_count(source.rows)) * strip_bytes<decltype(format)>(source.columns / 32, phase_of(source)); });
  with_float_format(source.type, [&](auto format) { bytes = static_cast<size_t>(strip_count(source.rows)) * float_strip_bytes<decltype(format)>(source.columns); });
  return bytes;
}

void pack(const MatrixSource& source, PackedMatrix* out, Part part) {
  const int64_t strips = strip_count(source.rows);
  if (part.index == 0) {
    out->layout = phase_of(source);
    out->repack_error = 0.0;
  }
  const int64_t from = strips * part.index / part.count, to = strips * (part.index + 1) / part.count;
  with_format(source.type, [&](auto format) { pack_strips<decltype(format)>(source, out->data, from, to); });
  with_float_format(source.type, [&](auto format) { pack_float_strips<decltype(format)>(source, out->data, from, to); });
}

void pack_rows(const MatrixSource& source, PackedMatrix* out, Part part) {
  const int64_t rows = strip_count(source.rows) * kStripRows;
  if (part.index == 0) {
    out->layout = 0;
    out->repack_error = 0.0;
  }
  copy_rows(source, out->data, rows * part.index / part.count, rows * (part.index + 1) / part.count);
}

size_t activation_bytes(int tokens, int64_t columns, ActivationType type) {
  return static_cast<size_t>((tokens + kTileTokens - 1) / kTileTokens) * static_cast<size_t>(columns / 32) * (type == ActivationType::Int8 ? sizeof(ActivationGroup) : sizeof(WideGroup));
}

size_t bf16_bytes(int tokens, int64_t columns) { return static_cast<size_t>((tokens + kTileTokens - 1) / kTileTokens) * static_cast<size_t>(columns / 32) * sizeof(Bf16Group); }

}  // namespace shardmesh::cuda
