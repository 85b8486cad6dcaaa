// The product of float weights for many tokens; formula, operands and result as in linear_float_decode.cu, and the same bits.
// A block is 64 rows x 64 tokens, a thread 4 x 8 of them, each a chain of its own: an fp32 product in registers as on any card, whose order of k is the written one.
// Groups pass through shared memory three deep. A thread's rows are those with its index in the block's four strips, its tokens are 8 apart, so that neither operand
// meets a bank conflict (rows of x are 4 words longer than a group for that); a piece of 8 columns costs 20 loads of 16 bytes for 256 fma.
// A thread walks the segments in order and keeps the finished left sides of the tree on a stack in local memory, which is touched once a segment.
// Limits: K a multiple of 32, 1 to 16 segments.
#include "device.cuh"
#include "float_weights.cuh"
#include "operations.h"
#include "product_plan.h"

namespace shardmesh::cuda {
namespace {

constexpr int kStripsOfBlock = 4, kTokensOfBlock = 64, kThreads = 128, kStages = 3, kStackDepth = 4;
constexpr int kTokensOfThread = 8, kTokensApart = 8;  // thread / 16 + 8 j
constexpr int kRowFloats = 36;
constexpr int kXBytes = kTokensOfBlock * kRowFloats * 4;
template <typename F>
constexpr int kStageBytes = kStripsOfBlock * F::record_bytes + kXBytes;

template <typename F>
__global__ void __launch_bounds__(kThreads) linear_float_prefill_kernel(const ProductPlan plan) {
  grid_dependency_wait();
  uint8_t* shared = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), own_row = thread % kStripRows, own_token = thread / kStripRows;
  const int first_strip = static_cast<int>(blockIdx.x) * kStripsOfBlock, first_token = static_cast<int>(blockIdx.y) * kTokensOfBlock;

  // What lies behind the matrix or the batch repeats the last strip or token and is not stored.
  const auto copy_group = [&](int group) {
    if (group < plan.groups) {
      uint8_t* to = shared + group % kStages * kStageBytes<F>;
      constexpr int kPieces = F::record_bytes / 16;
      for (int i = thread; i < kStripsOfBlock * kPieces; i += kThreads)
        copy_async<16>(to + i * 16, plan.weight + min(first_strip + i / kPieces, plan.strips - 1) * plan.strip_bytes + static_cast<int64_t>(group) * F::record_bytes + i % kPieces * 16);
      float* x = reinterpret_cast<float*>(to + kStripsOfBlock * F::record_bytes);
      for (int i = thread; i < kTokensOfBlock * 8; i += kThreads)
        copy_async<16>(x + i / 8 * kRowFloats + i % 8 * 4, plan.x + min(first_token + i / 8, plan.tokens - 1) * plan.x_stride + group * 32 + i % 8 * 4);
    }
    commit_copies();  // an empty one too, so that counting them stays simple
  };
  for (int i = 0; i < kStages - 1; i++) copy_group(i);

  float acc[kStripsOfBlock][kTokensOfThread] = {};
  float stack[kStackDepth][kStripsOfBlock][kTokensOfThread];
  int depth = 0, segment = 0;
  for (int group = 0; group < plan.groups; group++) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this group is here for all, and the one before has been read by all
    copy_group(group + kStages - 1);
    const uint8_t* from = shared + group % kStages * kStageBytes<F>;
    const float* x = reinterpret_cast<const float*>(from + kStripsOfBlock * F::record_bytes) + own_token * kRowFloats;
#pragma unroll
    for (int c = 0; c < F::pieces; c++) {
      float w[kStripsOfBlock][F::piece_values];
#pragma unroll
      for (int s = 0; s < kStripsOfBlock; s++) widen_piece<F>(*reinterpret_cast<const uint4*>(from + s * F::record_bytes + float_piece_at(c, own_row)), w[s]);
#pragma unroll
      for (int j = 0; j < kTokensOfThread; j++)
#pragma unroll
        for (int k = 0; k < F::piece_values; k += 4) {
          const float4 four = *reinterpret_cast<const float4*>(x + j * kTokensApart * kRowFloats + c * F::piece_values + k);
#pragma unroll
          for (int s = 0; s < kStripsOfBlock; s++) {
            acc[s][j] = __fmaf_rn(w[s][k], four.x, acc[s][j]);
            acc[s][j] = __fmaf_rn(w[s][k + 1], four.y, acc[s][j]);
            acc[s][j] = __fmaf_rn(w[s][k + 2], four.z, acc[s][j]);
            acc[s][j] = __fmaf_rn(w[s][k + 3], four.w, acc[s][j]);
          }
        }
    }
    if (group + 1 < plan.segment_end[segment]) continue;

    for (int m = 0; m < plan.merges[segment]; m++) {
      depth--;
#pragma unroll
      for (int s = 0; s < kStripsOfBlock; s++)
#pragma unroll
        for (int j = 0; j < kTokensOfThread; j++) acc[s][j] = __fadd_rn(stack[depth][s][j], acc[s][j]);
    }
    const int subtree = plan.finishes[segment++];
#pragma unroll
    for (int s = 0; s < kStripsOfBlock; s++)
#pragma unroll
      for (int j = 0; j < kTokensOfThread; j++) {
        const int row = (first_strip + s) * kStripRows + own_row, token = first_token + own_token + j * kTokensApart;
        if (subtree < 0) stack[depth][s][j] = acc[s][j];
        else if (row < plan.rows && token < plan.tokens)
          plan.out[subtree * plan.subtree_stride + token * plan.out_stride + row] = plan.bias ? __fadd_rn(acc[s][j], plan.bias[row]) : acc[s][j];
        acc[s][j] = 0.0f;
      }
    if (subtree < 0) depth++;
  }
  wait_copies<0>();
}

}  // namespace

Problem linear_float_prefill(const Product& product, Stream stream) {
  ProductPlan plan;
  if (const Problem problem = make_product_plan(product, &plan, Products::Float)) return problem;
  Problem problem = nullptr;
  with_float_format(product.type, [&](auto format) {
    using F = decltype(format);
    const dim3 grid(static_cast<unsigned>((plan.strips + kStripsOfBlock - 1) / kStripsOfBlock), static_cast<unsigned>((plan.tokens + kTokensOfBlock - 1) / kTokensOfBlock));
    problem = launch(linear_float_prefill_kernel<F>, grid, kThreads, static_cast<size_t>(kStages) * kStageBytes<F>, stream, plan);
  });
  return problem;
}

}  // namespace shardmesh::cuda
