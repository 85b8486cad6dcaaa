// Rotates q in place, rotates k, quantises k and v, and writes both into the cache: three operations of a program in one pass over q, k and v.
//   (a, b) of a pair becomes (a c - b s, a s + b c), c and s from the table at the token's position        Su et al. 2021
//   q [T, q_heads * D]    k, v [T, layout.heads * D]    cache: layout in kernels/include/kernel_set.h, K int8 or f16, V int8
// A warp is one head of one token. Values pass through shared memory, since a pair's halves lie D / 2 apart or side by side.
// Limits: D a multiple of 32, at most 256.
#include "device.cuh"
#include "finite.cuh"
#include "kv_place.cuh"
#include "operations.h"

namespace shardmesh::cuda {
namespace {

constexpr int kWarps = 4, kHeadSizeMax = 256;

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

__global__ void __launch_bounds__(kWarps * 32) rope_store_kv_kernel(float* q, int64_t q_stride, int q_heads, const float* k, int64_t k_stride, const float* v, int64_t v_stride,
                                                                    const RopeTable table, const KvLayout layout, uint8_t* cache, const DeviceRows rows,
                                                                    const FiniteCheck check) {
  const int lane = static_cast<int>(threadIdx.x % 32), D = layout.head_size, token = static_cast<int>(blockIdx.y);
  const int item = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);  // heads of q, then of k, then of v
  if (item >= q_heads + 2 * layout.heads || rows.row_sequence[token] < 0) return;
  const bool is_q = item < q_heads, is_k = !is_q && item < q_heads + layout.heads;
  const int head = is_q ? item : is_k ? item - q_heads : item - q_heads - layout.heads, position = rows.positions[token];
  const float* source = (is_q ? q + token * q_stride : is_k ? k + token * k_stride : v + token * v_stride) + head * D;
  float* row = reinterpret_cast<float*>(dynamic_shared()) + threadIdx.x / 32 * kHeadSizeMax;
  for (int d = lane; d < D; d += 32) row[d] = source[d];
  __syncwarp();
  if (is_q || is_k) rotate(row, table, position, lane);
  if (is_q) {
    for (int d = lane; d < D; d += 32) q[token * q_stride + head * D + d] = row[d];
    return;
  }

  for (int d = lane; d < D; d += 32) note_unless_finite(row[d], check, token);
  const int32_t* block_table = rows.block_tables + rows.block_offsets[rows.row_sequence[token]];
  uint8_t* subblock = cache + subblock_offset(layout, block_table, position, head);
  const int column = position % 16;
  float* scales = reinterpret_cast<float*>(subblock + layout.key_bytes + layout.value_bytes);
  if (is_k && layout.key == KeyType::F16) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(subblock);
    for (int d = lane; d < D; d += 32) keys[d * 16 + column] = float_to_half(row[d]);
    return;
  }
  const float amax = row_magnitude(row, D, lane);
  if (is_k) {
    for (int d = lane; d < D; d += 32) subblock[d / 4 * 64 + column * 4 + d % 4] = static_cast<uint8_t>(quantized(row[d], amax));
    if (lane == 0) scales[column] = quantized_scale(amax);
  } else {
    uint8_t* values = subblock + layout.key_bytes + column / 4 * D * 4 + column % 4;
    for (int d = lane; d < D; d += 32) values[d * 4] = static_cast<uint8_t>(quantized(row[d], amax));
    if (lane == 0) scales[(layout.key == KeyType::Int8 ? 16 : 0) + column] = quantized_scale(amax);
  }
}

}  // namespace

Problem rope_store_kv(float* q, int64_t q_stride, int q_heads, const float* k, int64_t k_stride, const float* v, int64_t v_stride, const RopeTable& table, const KvLayout& layout,
                      uint8_t* cache, const DeviceRows& rows, Stream stream, const FiniteCheck& check) {
  if (layout.head_size % 32 != 0 || layout.head_size < 32 || layout.head_size > kHeadSizeMax) return "rope_store_kv: the head size must be a multiple of 32, at most 256";
  if (layout.key == KeyType::F32) return "rope_store_kv: keys are int8 or f16";
  if (layout.value != ValueType::Int8) return "rope_store_kv: values must be int8";
  if (table.dimensions % 2 != 0 || table.dimensions > layout.head_size) return "rope_store_kv: an even number of dimensions of a head can be rotated";
  if (rows.tokens < 1 || rows.tokens > 65535) return "rope_store_kv: tokens must be in 1..65535";
  const dim3 grid(static_cast<unsigned>((q_heads + 2 * layout.heads + kWarps - 1) / kWarps), static_cast<unsigned>(rows.tokens));
  return launch(rope_store_kv_kernel, grid, kWarps * 32, kWarps * kHeadSizeMax * 4, stream, q, q_stride, q_heads, k, k_stride, v, v_stride, table, layout, cache, rows, check);
}

}  // namespace shardmesh::cuda
