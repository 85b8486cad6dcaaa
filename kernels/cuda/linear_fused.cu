// Products of one input for at most 8 tokens in one launch, with what follows them (operations.h, FusedProducts): a step at the pace of memory is a row of short kernels,
// and each launch less is time. Formula, operands and bits of each product as in linear_decode.cu; of what follows as in rope_store_kv, gated_activation, finish_tree, rms_norm.
//   A block is a strip of 16 rows of one of the products (two, where there are many and one token), a warp one of its segments; formats may differ, all threads of a block have one.
//   What follows is done by the block that comes last of those it needs (arrivals.cuh): the strips of a head, two strips of gate and of up, all strips for a norm.
// Limits: up to 3 products with as many segments each, whole trees; 1 to 8 tokens.
#include "arrivals.cuh"
#include "decode_leaves.cuh"
#include "decode_walk.cuh"
#include "device.cuh"
#include "finite.cuh"
#include "gated_value.cuh"
#include "group_product.cuh"
#include "norm_rows.cuh"
#include "operations.h"
#include "product_plan.h"
#include "quantize_group.cuh"
#include "rope_head.cuh"

namespace shardmesh::cuda {
namespace {

struct FusedPlan {
  ProductPlan product[kFusedProductsMax];
  TensorType type[kFusedProductsMax];
  int first_block[kFusedProductsMax + 1];
  int count, activation;
  Then then;
  RopeStore rope;
  ActivationGroup* quantized;
  NormAfter norm;
  FiniteCheck check;
  uint32_t* arrivals;
};

template <typename F, int columns, int strips>
__device__ __forceinline__ void multiply(const ProductPlan& plan, int first_strip, int segment, int lane, float (&acc)[strips][1][4]) {
  const uint8_t *heads[strips], *records[strips];
  for (int s = 0; s < strips; s++) {
    heads[s] = plan.weight + min(first_strip + s, plan.strips - 1) * plan.strip_bytes;  // a strip too many repeats the last one, and is not stored
    records[s] = heads[s] + plan.heads * F::head_bytes;
  }
  const ActivationGroup* const x[1] = {plan.in};
  const int begin = plan.segment_begin(segment), end = plan.segment_end[segment];
  for (int s = 0; s < strips; s++) prefetch_groups<F>(records[s], heads[s], plan.phase, begin, end, lane);
  grid_dependency_wait();
  walk_groups<F, ActivationGroup, 1, strips, columns>(records, heads, plan.phase, x, begin, end, lane, acc);
}

// The formats of with_format().
template <int columns, int strips>
__device__ __forceinline__ void multiply(TensorType type, const ProductPlan& plan, int first_strip, int segment, int lane, float (&acc)[strips][1][4]) {
  switch (type) {
    case TensorType::Q4_0: return multiply<Format<4, Scales::Half, 8>, columns, strips>(plan, first_strip, segment, lane, acc);
    case TensorType::Q4_1: return multiply<Format<4, Scales::HalfMin, 0>, columns, strips>(plan, first_strip, segment, lane, acc);
    case TensorType::Q4_K: return multiply<Format<4, Scales::Super, 0>, columns, strips>(plan, first_strip, segment, lane, acc);
    case TensorType::Q5_1: return multiply<Format<8, Scales::HalfMin, 0>, columns, strips>(plan, first_strip, segment, lane, acc);
    case TensorType::Q5_K: return multiply<Format<8, Scales::Super, 0>, columns, strips>(plan, first_strip, segment, lane, acc);
    case TensorType::Q6_K: return multiply<Format<8, Scales::Halves, 0>, columns, strips>(plan, first_strip, segment, lane, acc);
    default: return multiply<Format<8, Scales::Half, 0>, columns, strips>(plan, first_strip, segment, lane, acc);  // Q5_0, Q8_0
  }
}

// columns: 1 for one token. strips: of a block. follows: whether anything but a residual follows; then a block has one strip.
template <int columns, int strips, bool follows>
__global__ void __maxnreg__(follows ? 128 : strips == 2 ? 88 : 80) linear_fused_kernel(const __grid_constant__ FusedPlan plan) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, block = static_cast<int>(blockIdx.x);
  int number = 0;
  while (number + 1 < plan.count && block >= plan.first_block[number + 1]) number++;
  const ProductPlan& product = plan.product[number];
  const int first_strip = (block - plan.first_block[number]) * strips;
  float acc[strips][1][4] = {};
  multiply<columns, strips>(plan.type[number], product, first_strip, warp, lane, acc);

  uint32_t* flag = reinterpret_cast<uint32_t*>(dynamic_shared());
  float* leaves = reinterpret_cast<float*>(dynamic_shared() + 16);
  const bool adds = plan.then == Then::Residual || plan.then == Then::ResidualNorm;
#pragma unroll
  for (int s = 0; s < strips; s++) {
    if (s > 0) __syncthreads();  // the strip before has been read
    for (int c = 0; c < 4; c++) leaves[warp * kLeafStride + leaf_place(lane, c)] = acc[s][0][c];
    __syncthreads();
    for (int at = thread; at < kStripRows * product.tokens; at += static_cast<int>(blockDim.x)) {
      const int token = at / kStripRows, row = (first_strip + s) * kStripRows + at % kStripRows;
      if (row >= product.rows) continue;
      float y = tree_sum(leaves + token * kLeafToken + at % kStripRows, product.segment_count, kLeafStride);
      if (product.bias) y = __fadd_rn(y, product.bias[row]);
      float* out = product.out + token * product.out_stride + row;
      *out = adds ? __fadd_rn(*out, y) : y;
    }
  }

  if constexpr (!follows) return;
  const int strip = first_strip;
  if (plan.then == Then::RopeStoreKv) {
    const int D = plan.rope.layout.head_size, of_head = D / kStripRows;
    const int item = strip / of_head + (number == 0 ? 0 : number == 1 ? plan.rope.q_heads : plan.rope.q_heads + plan.rope.layout.heads);
    if (!comes_last(plan.arrivals + item, static_cast<uint32_t>(of_head), flag)) return;
    for (int token = warp; token < product.tokens; token += static_cast<int>(blockDim.x / 32)) rope_store_head(plan.rope, item, token, lane, leaves + warp * kHeadSizeMax);
  } else if (plan.then == Then::Activation) {
    if (!comes_last(plan.arrivals + strip / 2, 4, flag)) return;
    const ProductPlan &gate = plan.product[0], &up = plan.product[1];
    const int group = strip / 2, k = group * 32 + lane;
    for (int token = warp; token < product.tokens; token += static_cast<int>(blockDim.x / 32)) {
      const float y = gated_value(gate.out[token * gate.out_stride + k], up.out[token * up.out_stride + k], plan.activation);
      note_unless_finite(y, plan.check, token);
      quantize_group(y, token, group, product.rows / 32, lane, plan.quantized);
    }
  } else if (plan.then == Then::ResidualNorm) {
    if (comes_last(plan.arrivals, gridDim.x, flag)) norm_rows(plan.norm, product.out, product.out_stride, product.rows, product.tokens, leaves);
  }
}

Problem check(const FusedProducts& f, const FusedPlan& plan) {
  for (int i = 0; i < f.count; i++) {
    if (f.product[i].tokens > kFusedTokensMax || f.product[i].tokens != f.product[0].tokens) return "linear_fused: 1 to 8 tokens, the same for all products";
    if (f.product[i].in != f.product[0].in || f.product[i].segment_count != f.product[0].segment_count) return "linear_fused: products share their input and number of segments";
    if (f.product[i].subtree_count != 1) return "linear_fused: products are whole trees";
  }
  if (f.then == Then::Nothing) return nullptr;
  if (f.then == Then::RopeStoreKv) {
    const KvLayout& layout = f.rope.layout;
    const bool heads = f.count == 3 && plan.product[0].rows == f.rope.q_heads * layout.head_size && plan.product[1].rows == layout.heads * layout.head_size &&
                       plan.product[2].rows == plan.product[1].rows && f.product[0].out == f.rope.q && f.product[1].out == f.rope.k && f.product[2].out == f.rope.v;
    return heads ? check_rope_store(f.rope) : "linear_fused: the products are not q, k and v";
  }
  if (f.then == Then::Activation)
    return f.count == 2 && plan.product[0].rows == plan.product[1].rows && plan.product[0].rows % 32 == 0 && (f.activation == 0 || f.activation == 1)
               ? nullptr
               : "linear_fused: gate and up have as many rows, a multiple of 32, and an activation is 0 or 1";
  if (f.count != 1) return "linear_fused: one product goes into a residual";
  return f.then == Then::Residual || plan.product[0].rows % 32 == 0 ? nullptr : "linear_fused: the width of quantised output must be a multiple of 32";
}

}  // namespace

size_t fused_arrivals(const FusedProducts& f) {
  switch (f.then) {
    case Then::RopeStoreKv: return static_cast<size_t>(f.rope.q_heads + 2 * f.rope.layout.heads);
    case Then::Activation: return static_cast<size_t>(f.product[0].rows / 32);
    case Then::ResidualNorm: return 1;
    default: return 0;
  }
}

Problem linear_fused(const FusedProducts& f, Stream stream) {
  if (f.count < 1 || f.count > kFusedProductsMax) return "linear_fused: 1 to 3 products are possible";
  FusedPlan plan{};
  for (int i = 0; i < f.count; i++) {
    if (const Problem problem = make_product_plan(f.product[i], &plan.product[i])) return problem;
    plan.type[i] = f.product[i].type;
  }
  if (const Problem problem = check(f, plan)) return problem;
  plan.count = f.count;
  plan.activation = f.activation;
  plan.then = f.then;
  plan.rope = f.rope;
  plan.quantized = f.quantized;
  plan.norm = f.norm;
  plan.check = f.check;
  plan.arrivals = f.arrivals;
  const int warps = f.product[0].segment_count;
  const int floats = warps * (f.then == Then::RopeStoreKv && kHeadSizeMax > kLeafStride ? kHeadSizeMax : kLeafStride), of_norm = f.then == Then::ResidualNorm ? kFusedTokensMax * kPartials : 0;
  const bool follows = f.then != Then::Nothing && f.then != Then::Residual, one = f.product[0].tokens == 1;
  int strips = 0;
  for (int i = 0; i < f.count; i++) strips += plan.product[i].strips;
  const int of_block = !follows && one && strips >= kManyStrips ? 2 : 1;
  for (int i = 0; i < f.count; i++) plan.first_block[i + 1] = plan.first_block[i] + (plan.product[i].strips + of_block - 1) / of_block;
  const auto run = [&](auto kernel) {
    return launch(kernel, static_cast<unsigned>(plan.first_block[f.count]), static_cast<unsigned>(warps * 32), static_cast<size_t>(floats > of_norm ? floats : of_norm) * 4 + 16, stream, plan);
  };
  if (follows) return one ? run(linear_fused_kernel<1, 1, true>) : run(linear_fused_kernel<2, 1, true>);
  if (of_block == 2) return run(linear_fused_kernel<1, 2, false>);
  return one ? run(linear_fused_kernel<1, 1, false>) : run(linear_fused_kernel<2, 1, false>);
}

}  // namespace shardmesh::cuda
