// The end of a step: the best candidate of each row in this shard's part of the vocabulary, and the sums behind log-probabilities.
//   candidate: argmax of rn(logit / temperature + noise), ties to the lower id; noise = -log(-log(u)), u a hash of (key, token)      Gumbel-max: Gumbel 1954
//   sums: of exp(logit - maximum) over slices of 1,024 tokens; 128 interleaved partial sums, halved. Slices are joined by the tree on the host.
// A block looks at 2,048 tokens of a row; the one that comes last of a row's blocks takes the best of what they have found.
// logits [rows, count] fp32, of tokens first_token and up. The arithmetic of noise and logarithm is kernels/runner/sampler_math.h.
// top-k, top-p, min-p and penalties are not here: such rows go through the host's sampler.
#include "arrivals.cuh"
#include "device.cuh"
#include "finite.cuh"
#include "operations.h"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 256, kSlice = 1024, kPartTokens = 2048;

__device__ __forceinline__ float log_core(float r, float e) {
  const float z = __fmul_rn(r, r);
  float p = 7.0376836292e-2f;
  p = __fmaf_rn(p, r, -1.1514610310e-1f);
  p = __fmaf_rn(p, r, 1.1676998740e-1f);
  p = __fmaf_rn(p, r, -1.2420140846e-1f);
  p = __fmaf_rn(p, r, 1.4249322787e-1f);
  p = __fmaf_rn(p, r, -1.6668057665e-1f);
  p = __fmaf_rn(p, r, 2.0000714765e-1f);
  p = __fmaf_rn(p, r, -2.4999993993e-1f);
  p = __fmaf_rn(p, r, 3.3333331174e-1f);
  float y = __fmul_rn(__fmul_rn(p, r), z);
  y = __fmaf_rn(e, -2.12194440e-4f, y);
  y = __fmaf_rn(z, -0.5f, y);
  return __fmaf_rn(e, 0.693359375f, __fadd_rn(r, y));
}

__device__ __forceinline__ float log_fixed(float x) {
  const uint32_t bits = __float_as_uint(x);
  int exponent = static_cast<int>(bits >> 23) - 126;
  float m = __uint_as_float((bits & 0x7fffffu) | 0x3f000000u);
  if (m < 0.70710678f) {
    m = __fadd_rn(m, m);
    exponent--;
  }
  return log_core(__fsub_rn(m, 1.0f), __int2float_rn(exponent));
}

__device__ __forceinline__ uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

__device__ __forceinline__ float gumbel_noise(uint32_t bits) {
  const uint32_t distance = ~bits;
  const float e = distance < (1u << 30) ? -log_core(-__fmul_rn(__ll2float_rn(static_cast<long long>(distance) * 2 + 1), 0x1p-33f), 0.0f)
                                        : -log_fixed(__fmul_rn(__ll2float_rn(static_cast<long long>(bits) * 2 + 1), 0x1p-33f));
  return -log_fixed(e);
}

__device__ __forceinline__ Candidate better(const Candidate& a, const Candidate& b) { return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a; }

// Best of a block's candidates and largest of its maxima, in thread 0. `shared`: kThreads of each.
__device__ __forceinline__ void best_of_block(Candidate& own, float& largest, Candidate* candidates, float* maxima) {
  const int thread = static_cast<int>(threadIdx.x);
  candidates[thread] = own;
  maxima[thread] = largest;
  for (int distance = kThreads / 2; distance; distance /= 2) {
    __syncthreads();
    if (thread >= distance) continue;
    candidates[thread] = better(candidates[thread], candidates[thread + distance]);
    maxima[thread] = larger(maxima[thread], maxima[thread + distance]);
  }
  if (thread == 0) {
    own = candidates[0];
    largest = maxima[0];
  }
}

__global__ void __launch_bounds__(kThreads) head_candidates_kernel(const float* logits, int64_t stride, int64_t count, int32_t first_token, const HeadRow* settings, Candidate* best,
                                                                   float* maximum, const HeadParts parts) {
  grid_dependency_wait();
  uint32_t* flag = reinterpret_cast<uint32_t*>(dynamic_shared());
  Candidate* candidates = reinterpret_cast<Candidate*>(dynamic_shared() + 16);
  float* maxima = reinterpret_cast<float*>(candidates + kThreads);
  const int thread = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.y), part = static_cast<int>(blockIdx.x), part_count = static_cast<int>(gridDim.x);
  const HeadRow setting = settings[row];
  const float* x = logits + row * stride;
  const int64_t first = static_cast<int64_t>(part) * kPartTokens + thread;
  float values[kPartTokens / kThreads];
#pragma unroll
  for (int k = 0; k < kPartTokens / kThreads; k++) values[k] = first + k * kThreads < count ? x[first + k * kThreads] : kNegativeInfinity;
  Candidate own{kNegativeInfinity, 0x7fffffff};
  float largest = kNegativeInfinity;
  bool finite = true;
#pragma unroll
  for (int k = 0; k < kPartTokens / kThreads; k++) {
    if (first + k * kThreads >= count) break;
    const uint32_t token = static_cast<uint32_t>(first_token + first + k * kThreads);
    float value = values[k];
    finite = finite && is_finite(value);
    largest = larger(largest, value);
    if (setting.temperature != 0.0f) value = __fadd_rn(__fdiv_rn(value, setting.temperature), gumbel_noise(mix32(mix32(token * 0x9e3779b1u + setting.noise_low) + setting.noise_high)));
    own = better(own, {value, static_cast<int32_t>(token)});
  }
  if (!finite) own = {__int_as_float(0x7f800000), -1};  // before all others, also before those of other threads
  best_of_block(own, largest, candidates, maxima);
  Candidate* const of_row = parts.candidates + static_cast<int64_t>(row) * part_count;
  float* const maxima_of_row = parts.maxima + static_cast<int64_t>(row) * part_count;
  if (thread == 0) {
    of_row[part] = own;
    maxima_of_row[part] = largest;
  }
  if (!comes_last(parts.arrivals + row, static_cast<uint32_t>(part_count), flag)) return;
  own = {kNegativeInfinity, 0x7fffffff};
  largest = kNegativeInfinity;
  for (int i = thread; i < part_count; i += kThreads) {
    own = better(own, of_row[i]);
    largest = larger(largest, maxima_of_row[i]);
  }
  best_of_block(own, largest, candidates, maxima);
  if (thread == 0) {
    best[row] = own;
    maximum[row] = largest;
  }
}

__global__ void __launch_bounds__(kPartials) head_sums_kernel(const float* logits, int64_t stride, int64_t count, const float* maximum, float* sums, int64_t sums_stride) {
  grid_dependency_wait();
  const int64_t slice = blockIdx.x, row = blockIdx.y;
  const int length = static_cast<int>(count - slice * kSlice < kSlice ? count - slice * kSlice : kSlice);
  const float* x = logits + row * stride + slice * kSlice;
  float partial = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < length; i += kPartials) partial = __fadd_rn(partial, exp_fixed(__fsub_rn(x[i], maximum[row])));
  const float sum = halving_sum_128(partial, reinterpret_cast<float*>(dynamic_shared()));
  if (threadIdx.x == 0) sums[row * sums_stride + slice] = sum;
}

}  // namespace

size_t head_part_count(int64_t count) { return static_cast<size_t>((count + kPartTokens - 1) / kPartTokens); }

Problem head_candidates(const float* logits, int64_t stride, int rows, int64_t count, int32_t first_token, const HeadRow* settings, Candidate* best, float* maximum, const HeadParts& parts, Stream stream) {
  if (rows < 1 || rows > 65535 || count < 1 || first_token < 0) return "head_candidates: rows must be in 1..65535, count positive, tokens not negative";
  const dim3 grid(static_cast<unsigned>(head_part_count(count)), static_cast<unsigned>(rows));
  return launch(head_candidates_kernel, grid, kThreads, kThreads * (sizeof(Candidate) + 4) + 16, stream, logits, stride, count, first_token, settings, best, maximum, parts);
}

Problem head_sums(const float* logits, int64_t stride, int rows, int64_t count, const float* maximum, float* sums, int64_t sums_stride, Stream stream) {
  if (rows < 1 || rows > 65535 || count < 1) return "head_sums: rows must be in 1..65535, count positive";
  const dim3 grid(static_cast<unsigned>((count + kSlice - 1) / kSlice), static_cast<unsigned>(rows));
  return launch(head_sums_kernel, grid, kPartials, (kPartials + 1) * 4, stream, logits, stride, count, maximum, sums, sums_stride);
}

}  // namespace shardmesh::cuda
