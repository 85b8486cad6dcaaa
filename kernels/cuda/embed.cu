// Rows of a packed matrix as fp32, by token: S * w, exact for every format, and with a minimum rn(S * w + M); float weights as they are.
//   W  strips of 16 rows, weight_layout.h        out [T, columns] fp32
// A warp is one group of one token, a lane one column. The matrix is the one that the output head multiplies by, so a tied model holds it once; a row's bytes are
// scattered over its strip, which costs nothing beside the layers for the few rows of a step.
#include "device.cuh"
#include "operations.h"
#include "system_scope.cuh"
#include "weight_layout.h"

namespace shardmesh::cuda {
namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ float half_at(const uint8_t* halves, int index) { return half_to_float(reinterpret_cast<const uint16_t*>(halves)[index]); }

// Column k of group `group`, row r of the strip.
template <typename F>
__device__ __forceinline__ float value_at(const uint8_t* heads, const uint8_t* record, int head, int r, int k) {
  const int g = r % 8, upper = r / 8, lane = 4 * g + k % 16 / 4, byte = k % 4, high = k / 16;
  int w;
  if constexpr (F::bits == 4) {
    const int both = record[8 * lane + 4 * upper + byte];
    w = (high ? both >> 4 : both & 15) - F::zero;
  } else {
    w = static_cast<int8_t>(record[16 * lane + 4 * (upper + 2 * high) + byte]) - F::zero;
  }
  const uint8_t* scales = record + F::weight_bytes + g * F::scale_bytes;
  if constexpr (F::scales == Scales::Half) {
    return __fmul_rn(half_at(scales, upper), __int2float_rn(w));
  } else if constexpr (F::scales == Scales::HalfMin) {
    return __fadd_rn(__fmul_rn(half_at(scales, upper), __int2float_rn(w)), half_at(scales, 2 + upper));
  } else if constexpr (F::scales == Scales::Super) {
    const uint8_t* d = heads + head * F::head_bytes + g * 8;
    const float s = __fmul_rn(half_at(d, upper), __int2float_rn(scales[upper])), m = __fmul_rn(half_at(d, 2 + upper), __int2float_rn(scales[2 + upper]));
    return __fadd_rn(__fmul_rn(s, __int2float_rn(w)), m);
  } else {
    const int scale = static_cast<int8_t>(scales[2 * upper + high]);
    return __fmul_rn(half_at(heads + head * F::head_bytes + g * 4, upper), __int2float_rn(scale * w));
  }
}

// Column k of a float record, row r of the strip.
template <typename F>
__device__ __forceinline__ float float_value_at(const uint8_t* record, int r, int k) {
  const uint8_t* piece = record + float_piece_at(k / F::piece_values, r);
  if constexpr (F::type == TensorType::F32) return reinterpret_cast<const float*>(piece)[k % 4];
  else if constexpr (F::type == TensorType::F16) return half_at(piece, k % 8);
  else return low_bf16(reinterpret_cast<const uint16_t*>(piece)[k % 8]);
}

// A row's own token, or one that the step before has found.
__device__ __forceinline__ int32_t token_of(int32_t token, const Candidate* before) { return token < -1 ? before[-2 - token].token : token; }

__device__ __forceinline__ void note_begin(uint64_t* began) {
  if (began && threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) *began = global_timer();
}

struct Strips {
  const uint8_t* data;
  int64_t bytes;  // of a strip
  int heads, phase, groups;
};

template <typename F>
__global__ void __launch_bounds__(kWarps * 32) embed_kernel(const Strips strips, const int32_t* tokens, const Candidate* before, uint64_t* began, int32_t first_token, int64_t rows,
                                                             float* out, int64_t out_stride) {
  grid_dependency_wait();
  note_begin(began);
  const int lane = static_cast<int>(threadIdx.x % 32), group = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  const int64_t row = static_cast<int64_t>(token_of(tokens[blockIdx.y], before)) - first_token;
  if (group >= strips.groups || row < 0 || row >= rows) return;
  const uint8_t* heads = strips.data + row / kStripRows * strips.bytes;
  const uint8_t* record = heads + strips.heads * F::head_bytes + static_cast<int64_t>(group) * F::record_bytes;
  out[blockIdx.y * out_stride + static_cast<int64_t>(group) * 32 + lane] = value_at<F>(heads, record, (strips.phase + group) / 8, static_cast<int>(row % kStripRows), lane);
}

template <typename F>
__global__ void __launch_bounds__(kWarps * 32) embed_float_kernel(const Strips strips, const int32_t* tokens, const Candidate* before, uint64_t* began, int32_t first_token, int64_t rows,
                                                             float* out, int64_t out_stride) {
  grid_dependency_wait();
  note_begin(began);
  const int lane = static_cast<int>(threadIdx.x % 32), group = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  const int64_t row = static_cast<int64_t>(token_of(tokens[blockIdx.y], before)) - first_token;
  if (group >= strips.groups || row < 0 || row >= rows) return;
  const uint8_t* record = strips.data + row / kStripRows * strips.bytes + static_cast<int64_t>(group) * F::record_bytes;
  out[blockIdx.y * out_stride + static_cast<int64_t>(group) * 32 + lane] = float_value_at<F>(record, static_cast<int>(row % kStripRows), lane);
}

}  // namespace

Problem embed(TensorType type, int64_t rows, int64_t columns, int phase, const uint8_t* weight, const int32_t* tokens, const Candidate* before, uint64_t* began,
              int token_count, int32_t first_token, float* out, int64_t out_stride, Stream stream) {
  if (rows < 1 || columns < 32 || columns % 32 != 0 || columns > (1 << 24)) return "embed: rows must be positive, columns a multiple of 32 up to 2^24";
  if (token_count < 1 || token_count > 65535) return "embed: tokens must be in 1..65535";
  if (phase < 0 || phase > 7) return "embed: phase must be in 0..7";
  Problem problem = nullptr;
  Strips strips{weight, 0, 0, phase, static_cast<int>(columns / 32)};
  const dim3 grid(static_cast<unsigned>((strips.groups + kWarps - 1) / kWarps), static_cast<unsigned>(token_count));
  with_format(type, [&](auto format) {
    using F = decltype(format);
    strips.heads = F::heads ? (phase + strips.groups + 7) / 8 : 0;
    strips.bytes = static_cast<int64_t>(strips.heads) * F::head_bytes + static_cast<int64_t>(strips.groups) * F::record_bytes;
    problem = launch(embed_kernel<F>, grid, kWarps * 32, 0, stream, strips, tokens, before, began, first_token, rows, out, out_stride);
  });
  with_float_format(type, [&](auto format) {
    using F = decltype(format);
    strips.bytes = static_cast<int64_t>(strips.groups) * F::record_bytes;
    problem = launch(embed_float_kernel<F>, grid, kWarps * 32, 0, stream, strips, tokens, before, began, first_token, rows, out, out_stride);
  });
  return problem;
}

}  // namespace shardmesh::cuda
