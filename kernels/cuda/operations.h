// Launchers of the CUDA kernels. All pointers are device memory unless they say "host"; each call queues work on `stream` and returns at once.
//
// A Problem is null when the work is queued; else it says which constraint a shape breaks (nothing is queued) or what the CUDA runtime answered.
// The arithmetic is kernels/reference/operations.h, bit for bit. Letters as there: T tokens, K input features, D head size.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../include/kernel_set.h"

namespace shardmesh::cuda {

using Stream = void*;  // a cudaStream_t, or a graph that this thread builds (runtime.h): there a launch becomes a node
using Problem = const char*;

struct ActivationGroup;
struct Bf16Group;

// Quantised activations and their form: ActivationGroup for int8, WideGroup (weight_layout.h) for int16.
struct ActivationTiles {
  ActivationGroup* groups;
  ActivationType type;
#if defined(__CUDACC__)
  __host__ __device__
#endif
  ActivationTiles(ActivationGroup* groups_, ActivationType type_ = ActivationType::Int8) : groups(groups_), type(type_) {}
};

// ---------------------------------------------------------------- weights: host functions, for the layout in weight_layout.h

// Bytes of a matrix in the CUDA layout.
size_t packed_bytes(const MatrixSource& source);
// Packs this part's strips into host memory of packed_bytes(); `out->layout` is the phase.
void pack(const MatrixSource& source, PackedMatrix* out, Part part);
// The same bytes for BF16 weights row after row, rows of zeros up to a whole strip: for cuBLASLt, and for linear_bf16_decode with Product::by_rows.
void pack_rows(const MatrixSource& source, PackedMatrix* out, Part part);
// Bytes of the quantised activations of T tokens.
size_t activation_bytes(int tokens, int64_t columns, ActivationType type = ActivationType::Int8);
// The same of their bf16 form.
size_t bf16_bytes(int tokens, int64_t columns);

// ---------------------------------------------------------------- rows

// Where a kernel says that row r of what it read is not finite: *least becomes the smaller of itself and mark + r. Null: nobody looks. Quantising turns a NaN into
// a zero, so that it must be noticed there. Rows from *live_rows on (device memory; null: none) pad the step to the rows of its graph and hold anything.
struct FiniteCheck {
  uint32_t* least = nullptr;
  uint32_t mark = 0;
  const int32_t* live_rows = nullptr;
};
// x [rows, width].
Problem check_rows(const float* x, int64_t x_stride, int rows, int64_t width, const FiniteCheck& check, Stream stream);
// The best token of a row (head_candidates).
struct Candidate {
  float value;     // rn(logit / temperature + noise), or the logit when temperature is 0
  int32_t token;
};
// out[t] = row tokens[t] - first_token of a packed matrix, as exact fp32; rows of other tokens stay as they are. A token below -1 is that of before[-2 - tokens[t]], which a step
// has found that the host has not read yet. *began, unless null: when this ran, by the card's clock.
Problem embed(TensorType type, int64_t rows, int64_t columns, int phase, const uint8_t* weight, const int32_t* tokens, const Candidate* before, uint64_t* began, int token_count,
              int32_t first_token, float* out, int64_t out_stride, Stream stream);
// out[r] = x[from[r]], [rows, width].
Problem select_rows(const float* x, int64_t x_stride, const int32_t* from, int rows, int64_t width, float* out, int64_t out_stride, Stream stream);

// ---------------------------------------------------------------- products

// q, sa, ms and sums of x [T, K], x_stride apart. K: multiple of 32.
Problem quantize(const float* x, int64_t x_stride, int tokens, int64_t columns, ActivationTiles out, Stream stream, const FiniteCheck& check = {});
// x rounded to bf16 (to nearest even), for linear_bf16_decode and _prefill.
Problem round_bf16(const float* x, int64_t x_stride, int tokens, int64_t columns, Bf16Group* out, Stream stream);
// The same row after row, [T, columns], for cuBLASLt; it takes no more than bf16_bytes().
Problem round_bf16_rows(const float* x, int64_t x_stride, int tokens, int64_t columns, uint16_t* out, Stream stream);

struct Product {
  TensorType type;
  int64_t rows, columns;
  int phase;
  const uint8_t* weight;
  const ActivationGroup* in;
  int tokens;
  int segment_count;
  const int* segment_ends;   // host
  int subtree_count;
  const Subtree* subtrees;   // host
  const float* bias;         // [rows] or null
  float* out;                // as LinearArguments::out
  int64_t out_stride, subtree_stride;
  int decode_tiles = 4;      // tiles of 8 tokens that a block of linear_decode walks at most: 1, 2 or 4 (tuning.h)
  ActivationType activations = ActivationType::Int8;  // of `in`
  const float* x = nullptr;  // [T, x_stride] fp32, for float weights; 16-byte aligned, x_stride a multiple of 4
  int64_t x_stride = 0;
  const Bf16Group* bf16 = nullptr;  // x rounded to bf16, for linear_bf16_decode and _prefill
  bool by_rows = false;             // weights as pack_rows() lays them down, for linear_bf16_decode
};
// Quantised weights. For few tokens: a block is a strip of 16 rows, a warp a segment.
Problem linear_decode(const Product& product, Stream stream);
// For many: tiles of 64 rows x 64 tokens, a warp walks the segments of 32 x 32.
Problem linear_prefill(const Product& product, Stream stream);
// Float weights as the reference defines them, for few tokens and for many.
Problem linear_float_decode(const Product& product, Stream stream);
Problem linear_float_prefill(const Product& product, Stream stream);
// BF16 weights and x rounded to bf16 by tensor cores, for few tokens and for many: both give the same bits on one architecture, which are not the reference's.
Problem linear_bf16_decode(const Product& product, Stream stream);
Problem linear_bf16_prefill(const Product& product, Stream stream);

// ---------------------------------------------------------------- along a token

// out [T, width] or null, quantized or null (not both); width a multiple of 32 for `quantized`, whose values `check` looks at.
Problem rms_norm(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride, ActivationTiles quantized, Stream stream,
                 const FiniteCheck& check = {});
// activation 0: silu, 1: gelu (tanh form). Outputs as for rms_norm.
Problem gated_activation(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int tokens, int activation, float* out, int64_t out_stride,
                         ActivationTiles quantized, Stream stream, const FiniteCheck& check = {});
// A norm in the launch that completes its input, for few rows; its output is quantised, and `check` looks at it. first_row: what the launch's first row is in the step.
constexpr int kFusedTokensMax = 8;
struct NormAfter {
  const float* weight;
  float epsilon;
  ActivationGroup* quantized;
  int first_row;
  FiniteCheck check;
};
// residual[t, r] += tree of the nodes + bias[r]; the nodes as in KernelSet::finish_tree, `lo` and `hi` and the arrays of pointers and strides on the host.
Problem finish_tree(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                    int64_t residual_stride, int64_t width, int tokens, Stream stream);
// With the norm of the residual behind it: at most kFusedTokensMax tokens, width a multiple of 32. arrivals: one counter, 0 before and after.
Problem finish_tree_norm(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual,
                         int64_t residual_stride, int64_t width, int tokens, const NormAfter& norm, uint32_t* arrivals, Stream stream);

// ---------------------------------------------------------------- attention

constexpr int kSpanTokens = 256;

// Rows of a step in device memory; fields as in StepRows. Rows that pad the step to the rows of its graph have sequence -1 and position 0: they read and write rows of
// buffers, never the cache, and no piece of attention is theirs.
struct DeviceRows {
  int tokens;
  const int32_t* positions;
  const int32_t* row_sequence;
  const int32_t* block_offsets;
  const int32_t* block_tables;
};

// Rotates q [T, q_heads * D] in place, and writes rotated k and v [T, layout.heads * D] into the cache. k itself is left as it was.
struct RopeStore {
  float* q;
  int64_t q_stride;
  int q_heads;
  const float* k;
  int64_t k_stride;
  const float* v;
  int64_t v_stride;
  RopeTable table;     // cosine and sine: device memory
  KvLayout layout;     // K and V int8 or f16; D a multiple of 32, at most 256
  uint8_t* cache;
  DeviceRows rows;
  FiniteCheck check;   // looks at rotated k and at v
};
Problem rope_store_kv(const RopeStore& step, Stream stream);

// Most pairs (row, query head) of a piece of attention: of all spans, of all spans with f16 K or V, of a single span.
constexpr int kWholePairsMax = 64, kHalfPairsMax = 16, kSplitPairsMax = 8;
// One piece of attention: the query heads of `run` for rows [row, row + rows) of one sequence.
// span >= 0: only that span of 256 positions, the partial result goes to the rows' slots. span < 0: all spans, the result goes to `out`.
struct AttentionWork {
  int32_t row, rows, run, span;
};
// Adjacent query heads that read one KV head.
struct HeadRun {
  int32_t first, count, kv_head;
};

struct AttentionStep {
  const float* q;   // [T, q_stride], after rope
  int64_t q_stride;
  float* out;       // [T, out_stride]
  int64_t out_stride;
  int heads;
  float scale;
  int window;       // 0: whole context
  KvLayout layout;  // K and V int8 or f16; D = 32, 64, 96, 128 or 256
  const uint8_t* cache;
  DeviceRows rows;
  const HeadRun* runs;
  const AttentionWork* work;
  const int32_t* work_count;     // device, so that one launch fits every step: how many pieces, and the first of them in `work`
  float* partials;               // [slots][heads][D + 2]: values, then maximum and sum of weights
  const int32_t* first_slot;     // [T + 1]: the slots of row t, a span each; none for rows that are done in one piece
};
// warps: that share the list, in blocks of four.
Problem attention(const AttentionStep& step, int warps, Stream stream);
// blocks: of four warps.
Problem attention_f16(const AttentionStep& step, int blocks, Stream stream);
// Joins the spans of every row that has slots.
Problem attention_join(const AttentionStep& step, Stream stream);

// As attention() where every piece is one span, with the join: the last piece of a row and run of heads folds their spans, and quantises the result into `quantized`
// [T, heads * D], whose values `check` looks at. `arrivals`: T * runs counters, 0 before and after.
Problem attention_fused(const AttentionStep& step, int runs, ActivationGroup* quantized, uint32_t* arrivals, int warps, Stream stream, const FiniteCheck& check);

// ---------------------------------------------------------------- products with what comes before or after them, for few tokens

constexpr int kFusedProductsMax = 3;

enum class Then { Nothing, RopeStoreKv, Activation, Residual, ResidualNorm };

// Products of one input in one launch, and what is made of them by the block that comes last of those it needs.
//   RopeStoreKv    products q, k, v: a head whose rows are all there is rotated and stored
//   Activation     products gate, up: 32 rows that are there in both become a group of quantised activations
//   Residual       one product, one subtree: residual[t, r] += the product, in the place of `out`
//   ResidualNorm   the same, and the norm of the residual, quantised, when all of it is there
struct FusedProducts {
  int count;
  Product product[kFusedProductsMax];  // tokens at most kFusedTokensMax, as many segments each, one subtree
  Then then;
  RopeStore rope;          // RopeStoreKv
  int activation;          // Activation, as for gated_activation()
  ActivationGroup* quantized;  // Activation
  FiniteCheck check;       // of what is quantised there
  NormAfter norm;          // ResidualNorm
  uint32_t* arrivals;      // fused_arrivals() counters, 0 before and after
};
size_t fused_arrivals(const FusedProducts& fused);
Problem linear_fused(const FusedProducts& fused, Stream stream);

// ---------------------------------------------------------------- head

struct HeadRow {
  float temperature;      // 0: greedy
  uint32_t noise_low, noise_high;  // noise_key() of the row's seed, choice and position
};
// What blocks of one row leave for the one that comes last: head_part_count() of each for every row, and an arrival counter a row, 0 before and after.
struct HeadParts {
  Candidate* candidates;
  float* maxima;
  uint32_t* arrivals;
};
size_t head_part_count(int64_t count);
// The best candidate of each row among the tokens [first_token, first_token + count), ties to the lower id, and the largest logit. Token -1: a logit of the row is
// not finite.
Problem head_candidates(const float* logits, int64_t stride, int rows, int64_t count, int32_t first_token, const HeadRow* settings, Candidate* best, float* maximum, const HeadParts& parts, Stream stream);
// sums[row, s] = sum of exp(logit - maximum[row]) over slice s of 1,024 tokens, as SamplerLoops::sum_exp makes it.
Problem head_sums(const float* logits, int64_t stride, int rows, int64_t count, const float* maximum, float* sums, int64_t sums_stride, Stream stream);

// ---------------------------------------------------------------- for the host

// Reports take turns with their places: the host reads one while the card, which may be a step ahead, writes the other.
constexpr uint32_t kReportPlaces = 2;
// By the card's clock, in nanoseconds.
struct StepTimes {
  uint64_t began, ended;
};
// What goes to memory of the host that the card writes directly: `least` of FiniteCheck, the first candidates, and the times *began and now, to place n % kReportPlaces of
// report n = *reports + 1; then *word becomes n, as does *reports.
struct Report {
  const uint32_t* least;
  const Candidate* candidates;
  int candidate_count;
  const uint64_t* began;
  StepTimes* host_times;       // [kReportPlaces]
  uint32_t* host_least;        // [kReportPlaces]
  Candidate* host_candidates;  // [kReportPlaces][candidates_max]
  int candidates_max;
  uint32_t* reports;
  uint32_t* word;
};
Problem send_report(const Report& report, Stream stream);

}  // namespace shardmesh::cuda
