// One head of one token of rope_store_kv: a head of q is rotated in place, one of k is rotated and stored, one of v stored. Shared by the kernels that end with it:
// rope_store_kv, linear_fused.
#pragma once
#include "device.cuh"
#include "finite.cuh"
#include "kv_place.cuh"
#include "operations.h"

namespace shardmesh::cuda {

constexpr int kHeadSizeMax = 256;

// Rotates the head of D values in `row`; whole warps call it.
__device__ __forceinline__ void rotate(float* row, const RopeTable& table, int position, int lane) {
  const int pairs = table.dimensions / 2;
  const float* cosine = table.cosine + static_cast<int64_t>(position) * pairs;
  const float* sine = table.sine + static_cast<int64_t>(position) * pairs;
  for (int i = lane; i < pairs; i += 32) {
    const int first = table.half_style ? i : 2 * i, second = table.half_style ? i + pairs : 2 * i + 1;
    const float a = row[first], b = row[second], c = cosine[i], s = sine[i];
    row[first] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
    row[second] = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
  }
  __syncwarp();
}

__device__ __forceinline__ float row_magnitude(const float* row, int head_size, int lane) {
  float amax = 0.0f;
  for (int d = lane; d < head_size; d += 32) amax = larger(amax, row[d] < 0.0f ? -row[d] : row[d]);
  return warp_magnitude(amax);
}

// item: heads of q, then of k, then of v. row: room for a head in shared memory, the warp's own; its values pass through there, since a pair's halves lie D / 2 apart or
// side by side. A whole warp calls it; rows that pad the step are left alone.
__device__ __forceinline__ void rope_store_head(const RopeStore& s, int item, int token, int lane, float* row) {
  const int D = s.layout.head_size;
  if (s.rows.row_sequence[token] < 0) return;
  const bool is_q = item < s.q_heads, is_k = !is_q && item < s.q_heads + s.layout.heads;
  const int head = is_q ? item : is_k ? item - s.q_heads : item - s.q_heads - s.layout.heads, position = s.rows.positions[token];
  const float* source = (is_q ? s.q + token * s.q_stride : is_k ? s.k + token * s.k_stride : s.v + token * s.v_stride) + head * D;
  for (int d = lane; d < D; d += 32) row[d] = source[d];
  __syncwarp();
  if (is_q || is_k) rotate(row, s.table, position, lane);
  if (is_q) {
    for (int d = lane; d < D; d += 32) s.q[token * s.q_stride + head * D + d] = row[d];
    return;
  }

  for (int d = lane; d < D; d += 32) note_unless_finite(row[d], s.check, token);
  const int32_t* block_table = s.rows.block_tables + s.rows.block_offsets[s.rows.row_sequence[token]];
  uint8_t* subblock = s.cache + subblock_offset(s.layout, block_table, position, head);
  const int column = position % 16;
  float* scales = reinterpret_cast<float*>(subblock + s.layout.key_bytes + s.layout.value_bytes);
  if (is_k && s.layout.key == KeyType::F16) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(subblock);
    for (int d = lane; d < D; d += 32) keys[d * 16 + column] = float_to_half(row[d]);
    return;
  }
  if (!is_k && s.layout.value == ValueType::F16) {
    uint16_t* values = reinterpret_cast<uint16_t*>(subblock + s.layout.key_bytes) + column * D;
    for (int d = lane; d < D; d += 32) values[d] = float_to_half(row[d]);
    return;
  }
  const float amax = row_magnitude(row, D, lane);
  if (is_k) {
    for (int d = lane; d < D; d += 32) subblock[d / 4 * 64 + column * 4 + d % 4] = static_cast<uint8_t>(quantized(row[d], amax));
    if (lane == 0) scales[column] = quantized_scale(amax);
  } else {
    uint8_t* values = subblock + s.layout.key_bytes + column / 4 * D * 4 + column % 4;
    for (int d = lane; d < D; d += 32) values[d * 4] = static_cast<uint8_t>(quantized(row[d], amax));
    if (lane == 0) scales[(s.layout.key == KeyType::Int8 ? 16 : 0) + column] = quantized_scale(amax);
  }
}

// Null, or the constraint that is broken.
inline Problem check_rope_store(const RopeStore& s) {
  if (s.layout.head_size % 32 != 0 || s.layout.head_size < 32 || s.layout.head_size > kHeadSizeMax) return "rope_store_kv: the head size must be a multiple of 32, at most 256";
  if (s.layout.key == KeyType::F32) return "rope_store_kv: keys are int8 or f16";
  if (s.layout.value == ValueType::F32) return "rope_store_kv: values are int8 or f16";
  if (s.table.dimensions % 2 != 0 || s.table.dimensions > s.layout.head_size) return "rope_store_kv: an even number of dimensions of a head can be rotated";
  if (s.rows.tokens < 1 || s.rows.tokens > 65535) return "rope_store_kv: tokens must be in 1..65535";
  return nullptr;
}

}  // namespace shardmesh::cuda
