// Repacks a weight slice from the file's blocks into strips, and reads rows back. One layout for all CPU sets: strip_layout.h.
#include <cstring>

#include "../reference/blocks.h"
#include "operations.h"
#include "strip_layout.h"

namespace shardmesh {
namespace {

int phase_of(TensorType type, int64_t skip) {
  const bool k_format = type == TensorType::Q4_K || type == TensorType::Q5_K || type == TensorType::Q6_K;
  return k_format ? static_cast<int>(skip / 32 % 8) : 0;
}

void put_half(uint8_t* p, int index, uint16_t h) { std::memcpy(p + 2 * index, &h, 2); }
uint16_t get_half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return h;
}

// The file's own bytes of d and the minimum's factor; both are kept as they are, so nothing is rounded.
struct BlockScales {
  uint16_t d, minimum;
};
BlockScales block_scales(TensorType type, const uint8_t* block) {
  switch (type) {
    case TensorType::Q4_1:
    case TensorType::Q5_1:
    case TensorType::Q4_K:
    case TensorType::Q5_K: return {get_half(block), get_half(block + 2)};
    case TensorType::Q6_K: return {get_half(block + 208), 0};
    default: return {get_half(block), 0};
  }
}

// Where column k of the group lies in the weight registers of row r: register, byte.
int register_of(int k) { return k / 4; }
int byte_of(int r, int k) { return 4 * r + k % 4; }

template <TensorType type>
void put_weight(uint8_t* record, int r, int k, int value) {
  using F = Format<type>;
  uint8_t* weights = record + F::weights_at;
  const unsigned w = static_cast<unsigned>(F::zero_shift >= 0 ? value + (1 << F::zero_shift) : value);
  const int j = register_of(k), byte = byte_of(r, k);
  if constexpr (F::bits == 8) {
    weights[64 * j + byte] = static_cast<uint8_t>(w);
  } else {
    weights[64 * (j % 4) + byte] = static_cast<uint8_t>(weights[64 * (j % 4) + byte] | (w & 15u) << (j < 4 ? 0 : 4));
    uint8_t* planes = record + F::scale_bytes;
    if constexpr (F::bits == 5) planes[byte] = static_cast<uint8_t>(planes[byte] | (w >> 4) << j);
    if constexpr (F::bits == 6) planes[64 * (j / 4) + byte] = static_cast<uint8_t>(planes[64 * (j / 4) + byte] | (w >> 4) << (2 * (j % 4)));
  }
}

template <TensorType type>
int get_weight(const uint8_t* record, int r, int k) {
  using F = Format<type>;
  const uint8_t* weights = record + F::weights_at;
  const int j = register_of(k), byte = byte_of(r, k);
  int w;
  if constexpr (F::bits == 8) {
    w = weights[64 * j + byte];
  } else {
    w = (weights[64 * (j % 4) + byte] >> (j < 4 ? 0 : 4)) & 15;
    const uint8_t* planes = record + F::scale_bytes;
    if constexpr (F::bits == 5) w |= ((planes[byte] >> j) & 1) << 4;
    if constexpr (F::bits == 6) w |= ((planes[64 * (j / 4) + byte] >> (2 * (j % 4))) & 3) << 4;
  }
  return F::zero_shift >= 0 ? w - (1 << F::zero_shift) : w;
}

// Strips [from, to) of a quantised matrix.
template <TensorType type>
void pack_quantized(const MatrixSource& source, uint8_t* data, int64_t from, int64_t to) {
  using F = Format<type>;
  const int phase = phase_of(type, source.skip);
  const StripShape shape = quantized_shape<type>(source.columns, phase);
  const BlockSize block = block_size(type);
  const int64_t first_group = source.skip / 32;
  for (int64_t s = from; s < to; s++) {
    uint8_t* strip = data + static_cast<size_t>(s) * shape.strip_bytes;
    uint8_t* records = strip + static_cast<size_t>(shape.heads) * F::head_bytes;
    std::memset(strip, 0, shape.strip_bytes);
    for (int r = 0; r < kStripRows && s * kStripRows + r < source.rows; r++) {
      const uint8_t* row = source.data + (s * kStripRows + r) * source.row_bytes;
      for (int64_t g = 0; g < shape.groups; g++) {
        uint8_t* record = records + static_cast<size_t>(g) * F::record_bytes;
        const uint8_t* at = row + ((first_group + g) * 32 / block.values) * block.bytes;
        const BlockScales scales = block_scales(type, at);
        if constexpr (F::k_format) {
          uint8_t* head = strip + static_cast<size_t>((phase + g) / 8) * F::head_bytes;
          put_half(head, r, scales.d);
          if constexpr (F::minimum) {
            int scale, minimum;
            scale_and_minimum(at + 4, static_cast<int>((first_group + g) % 8), &scale, &minimum);
            put_half(head + 32, r, static_cast<uint16_t>(scales.minimum ^ 0x8000u));  // M = (-dmin) * mn
            record[r] = static_cast<uint8_t>(scale);
            record[16 + r] = static_cast<uint8_t>(minimum);
          }
        } else {
          put_half(record, r, scales.d);
          if constexpr (F::minimum) put_half(record + 32, r, scales.minimum);
        }
        Group group;
        unpack_group(type, row, first_group + g, &group);
        if constexpr (F::half_scales) std::memcpy(record + 2 * r, group.half_scale, 2);
        for (int k = 0; k < 32; k++) put_weight<type>(record, r, k, group.q[k]);
      }
    }
  }
}

template <TensorType type>
void read_quantized_row(const PackedMatrix& matrix, int64_t row, float* out) {
  using F = Format<type>;
  const StripShape shape = quantized_shape<type>(matrix.columns, matrix.layout);
  const uint8_t* strip = matrix.data + static_cast<size_t>(row / kStripRows) * shape.strip_bytes;
  const int r = static_cast<int>(row % kStripRows);
  for (int64_t g = 0; g < shape.groups; g++) {
    const uint8_t* head = strip + static_cast<size_t>((matrix.layout + g) / 8) * F::head_bytes;
    const uint8_t* record = strip + static_cast<size_t>(shape.heads) * F::head_bytes + static_cast<size_t>(g) * F::record_bytes;
    float s = half_to_float(get_half((F::k_format ? head : record) + 2 * r)), m = 0.0f;
    if constexpr (F::k_format && F::minimum) {
      s = s * static_cast<float>(record[r]);
      m = half_to_float(get_half(head + 32 + 2 * r)) * static_cast<float>(record[16 + r]);
    } else if constexpr (F::minimum) {
      m = half_to_float(get_half(record + 32 + 2 * r));
    }
    for (int k = 0; k < 32; k++) {
      int w = get_weight<type>(record, r, k);
      if constexpr (F::half_scales) w *= reinterpret_cast<const int8_t*>(record)[2 * r + k / 16];
      const float value = s * static_cast<float>(w);  // exact
      out[g * 32 + k] = F::minimum ? value + m : value;
    }
  }
}

// Strips [from, to) of a float matrix: [K][16] values as the file has them.
void pack_floats(const MatrixSource& source, uint8_t* data, int64_t from, int64_t to) {
  const size_t value_bytes = source.type == TensorType::F32 ? 4 : 2;
  const size_t strip_bytes = static_cast<size_t>(source.columns) * kStripRows * value_bytes;
  for (int64_t s = from; s < to; s++) {
    uint8_t* strip = data + static_cast<size_t>(s) * strip_bytes;
    std::memset(strip, 0, strip_bytes);
    for (int r = 0; r < kStripRows && s * kStripRows + r < source.rows; r++) {
      const uint8_t* values = source.data + (s * kStripRows + r) * source.row_bytes + static_cast<size_t>(source.skip) * value_bytes;
      for (int64_t k = 0; k < source.columns; k++)
        std::memcpy(strip + (static_cast<size_t>(k) * kStripRows + static_cast<size_t>(r)) * value_bytes, values + static_cast<size_t>(k) * value_bytes, value_bytes);
    }
  }
}

}  // namespace

size_t packed_bytes(const MatrixSource& source) {
  const StripShape shape = strip_shape(source.type, source.columns, phase_of(source.type, source.skip));
  return static_cast<size_t>(strip_count(source.rows)) * shape.strip_bytes;
}

void pack(const MatrixSource& source, PackedMatrix* out, Part part) {
  const int64_t strips = strip_count(source.rows), from = strips * part.index / part.count, to = strips * (part.index + 1) / part.count;
  if (part.index == 0) {
    out->layout = phase_of(source.type, source.skip);
    out->repack_error = 0.0;
  }
  switch (source.type) {
    case TensorType::F32:
    case TensorType::F16:
    case TensorType::BF16: return pack_floats(source, out->data, from, to);
    case TensorType::Q4_0: return pack_quantized<TensorType::Q4_0>(source, out->data, from, to);
    case TensorType::Q4_1: return pack_quantized<TensorType::Q4_1>(source, out->data, from, to);
    case TensorType::Q5_0: return pack_quantized<TensorType::Q5_0>(source, out->data, from, to);
    case TensorType::Q5_1: return pack_quantized<TensorType::Q5_1>(source, out->data, from, to);
    case TensorType::Q8_0: return pack_quantized<TensorType::Q8_0>(source, out->data, from, to);
    case TensorType::Q4_K: return pack_quantized<TensorType::Q4_K>(source, out->data, from, to);
    case TensorType::Q5_K: return pack_quantized<TensorType::Q5_K>(source, out->data, from, to);
    case TensorType::Q6_K: return pack_quantized<TensorType::Q6_K>(source, out->data, from, to);
  }
}

void read_row(const PackedMatrix& matrix, int64_t row, float* out) {
  switch (matrix.type) {
    case TensorType::F32:
    case TensorType::F16:
    case TensorType::BF16: {
      const size_t value_bytes = matrix.type == TensorType::F32 ? 4 : 2;
      const uint8_t* strip = matrix.data + static_cast<size_t>(row / kStripRows) * static_cast<size_t>(matrix.columns) * kStripRows * value_bytes;
      for (int64_t k = 0; k < matrix.columns; k++) read_floats(matrix.type, strip, k * kStripRows + row % kStripRows, 1, out + k);
      return;
    }
    case TensorType::Q4_0: return read_quantized_row<TensorType::Q4_0>(matrix, row, out);
    case TensorType::Q4_1: return read_quantized_row<TensorType::Q4_1>(matrix, row, out);
    case TensorType::Q5_0: return read_quantized_row<TensorType::Q5_0>(matrix, row, out);
    case TensorType::Q5_1: return read_quantized_row<TensorType::Q5_1>(matrix, row, out);
    case TensorType::Q8_0: return read_quantized_row<TensorType::Q8_0>(matrix, row, out);
    case TensorType::Q4_K: return read_quantized_row<TensorType::Q4_K>(matrix, row, out);
    case TensorType::Q5_K: return read_quantized_row<TensorType::Q5_K>(matrix, row, out);
    case TensorType::Q6_K: return read_quantized_row<TensorType::Q6_K>(matrix, row, out);
  }
}

size_t activation_bytes(ActivationType type, int tokens_max, int64_t columns) {
  return wide_offset(type, tokens_max, columns / 32) + static_cast<size_t>(tokens_max) * static_cast<size_t>(columns / 32) * sizeof(WideGroup);
}

}  // namespace shardmesh
