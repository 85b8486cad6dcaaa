// One implementation of every operation of a program: reference, portable, avx2, avx512, amx. The step runner (kernels/runner) walks a program
// and calls these; it alone knows buffers, threads and links.
//
// Every operation is SPMD: all compute threads call it with the same arguments and their own `part` of `parts`; it computes its share and
// returns. The runner puts a barrier after it. An operation allocates nothing, locks nothing, throws nothing.
// Arithmetic: ARCHITECTURE.md "Arithmetic". Bits must not depend on part, parts, tokens of the batch, or which set runs.
//
// Letters: T tokens (rows of the call), K input features, N output features (rows of the weight slice), G groups of 32 along K, D head size.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shardmesh {

struct Part {
  int index;
  int count;
};

enum class TensorType : int { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

// A weight slice as the model file has it: `rows` rows of `columns` values in raw blocks, row after row, no padding. Where a slice border lies inside a
// 256-wide super-block the row holds whole blocks and `skip` says how many leading values of each row are not part of the slice (multiple of 32).
struct MatrixSource {
  TensorType type;
  int64_t rows;
  int64_t columns;  // values of the slice (without `skip`), multiple of 32 for quantised types
  int64_t skip;
  int64_t row_bytes;
  const uint8_t* data;
};

constexpr int64_t kColumnBlock = 64;

// A repacked matrix; only its own kernel set knows the layout behind it.
struct PackedMatrix {
  TensorType type;
  int64_t rows, columns;
  size_t bytes;        // of `data`
  uint8_t* data;       // 64-byte aligned, huge pages advised
  int layout;          // private to the kernel set
  double repack_error; // largest relative error against the file's own values; 0 when exact
};

// Maximal subtree of the own unit range (or, for a column-parallel product, the only one: all segments). Its leaves are `count` consecutive segments
// from `first`, joined top-down: tree(n) = tree(ceil(n/2)) + tree(rest).
struct Subtree {
  int first;
  int count;
};
constexpr int kSegmentsMax = 16;

// Activations of T tokens, quantised in groups of 32 for integer products: q, sa, ms = sa * float(sum q). int8: |q| <= 127. int16: |q| <= 32512 = 127 * 256, so
// that q = 256 * high + low with both halves int8. The layout of `data` is private to the kernel set; `activation_bytes` sizes it. `x` stays valid beside it for
// float weights.
enum class ActivationType : int { Int8, Int16 };
constexpr int kInt16Max = 127 * 256;
struct Activations {
  const float* x;     // [T, x_stride]
  int64_t x_stride;
  int tokens;
  int64_t columns;    // K
  uint8_t* data;
  ActivationType type;
  // The columns to quantise, multiples of 32; none: all. `x` begins at the first of them.
  int64_t first_column = 0, column_count = 0;
  bool meets_bytes = true;  // some weight that multiplies them has 8 bits: a set may keep a form of its own for that
};

struct LinearArguments {
  const PackedMatrix* weight;
  Activations in;
  int segment_count;
  const int* segment_ends;   // [segment_count] in groups of 32, ascending, last = K / 32
  int subtree_count;
  const Subtree* subtrees;
  const float* bias;         // [N] or null; added after the tree (column-parallel only)
  float* out;                // subtree s, token t, row r at out[s * subtree_stride + t * out_stride + r]
  int64_t out_stride;
  int64_t subtree_stride;
  // The rows to compute, from a multiple of 16 on; none: all. `out` begins at the first of them.
  int64_t first_row = 0, row_count = 0;
};

// KV cache of one layer: blocks of `block_tokens` tokens (multiple of 16), cut into subblocks of 16 tokens. For each KV head of a block, its subblocks
// lie one after the other; one subblock of one head is, in this order:
//   K int8: [D/4][16 tokens][4] int8        or K f16: [D][16 tokens] IEEE half        or (reference-f32 only) [D][16] fp32
//   V int8: [16/4][D][4 tokens] int8           or V f16: [16 tokens][D] IEEE half     or (reference-f32 only) [16][D] fp32
//   key scales [16] fp32 (int8 K only), value scales [16] fp32 (int8 V only)
// Values never written may be anything, NaN scales included: they are selected away, never multiplied.
enum class KeyType : int { Int8, F16, F32 };
enum class ValueType : int { Int8, F16, F32 };
struct KvLayout {
  KeyType key;
  ValueType value;
  int heads;
  int head_size;     // D, multiple of 32
  int block_tokens;
  size_t key_bytes, value_bytes, scale_bytes, subblock_bytes, head_bytes, block_bytes;  // of one layer
};
KvLayout make_kv_layout(KeyType key, ValueType value, int heads, int head_size, int block_tokens);

// Rows of a step, shared by all operations of it.
struct StepRows {
  int tokens;
  const int32_t* positions;      // [T]
  const int32_t* row_sequence;   // [T] ascending; rows of a sequence are adjacent with consecutive positions
  int sequences;
  const int32_t* first_row;      // [sequences + 1]
  const int32_t* block_offsets;  // [sequences + 1] into block_tables
  const int32_t* block_tables;
};

struct RopeTable {
  int dimensions;       // values rotated in each head
  int half_style;       // 0: pairs (2i, 2i+1), 1: pairs (i, i + dimensions/2)
  const float* cosine;  // [context, dimensions / 2]
  const float* sine;
};

struct AttentionArguments {
  const float* q;  // [T, q_stride], after rope
  int64_t q_stride;
  float* out;      // [T, out_stride]
  int64_t out_stride;
  int heads;
  const int32_t* kv_head;  // [heads]; query heads of one KV head are adjacent
  float scale;
  int window;              // 0: whole context
  const KvLayout* layout;
  const uint8_t* cache;    // this layer's pool: block b starts at cache + b * block_bytes
  const StepRows* rows;
  uint8_t* scratch;        // attention_scratch_bytes() per part, private to this part
};

struct KernelSet {
  const char* name;

  // --- weights: called off the compute path, may use several parts; `out->data` is allocated by the caller with packed_bytes().
  size_t (*packed_bytes)(const MatrixSource& source);
  void (*pack)(const MatrixSource& source, PackedMatrix* out, Part part);
  // Row `row` of the matrix as exact fp32 (embedding look-up).
  void (*read_row)(const PackedMatrix& matrix, int64_t row, float* out);

  // --- operations
  size_t (*activation_bytes)(ActivationType type, int tokens_max, int64_t columns);
  // False when a value of this share is not finite.
  bool (*quantize_activations)(const Activations& in, Part part);
  void (*linear)(const LinearArguments& arguments, Part part);
  void (*rms_norm)(const float* x, int64_t x_stride, const float* w, float epsilon, int64_t width, int tokens, float* out, int64_t out_stride, Part part);
  void (*rope)(float* x, int64_t stride, int heads, int head_size, const RopeTable& table, const StepRows& rows, Part part);
  // False when a value of this share is not finite.
  bool (*store_kv)(const float* k, int64_t k_stride, const float* v, int64_t v_stride, const KvLayout& layout, uint8_t* cache, const StepRows& rows, Part part);
  size_t (*attention_scratch_bytes)(int heads, int head_size, int tokens_max);
  void (*attention)(const AttentionArguments& arguments, Part part);
  // activation 0: silu, 1: gelu (tanh form). Parts share blocks of kColumnBlock columns of all tokens, block after block: pair n is token n mod tokens of block n / tokens.
  void (*gated_activation)(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t width, int tokens, int activation, float* out, int64_t out_stride, Part part);
  // Finishes the tree of a row-parallel product: nodes[i] covers units [lo[i], hi[i]) and points at [T, width] values with `strides[i]`; nodes are the maximal
  // subtrees of all ranks in unit order. residual[t, r] += (tree + bias[r]).
  void (*finish_tree)(int units, int node_count, const int* lo, const int* hi, const float* const* nodes, const int64_t* strides, const float* bias, float* residual, int64_t residual_stride, int64_t width, int tokens, Part part);
  // True when every value is finite.
  bool (*all_finite)(const float* x, int64_t count);
};

// The best set of a name that this machine runs; null when it cannot (with the reason in *why).
const KernelSet* find_kernel_set(const char* name, const char** why);
// Defined by kernels/reference and kernels/cpu.
const KernelSet* reference_kernel_set();
const KernelSet* reference_f32_kernel_set();  // fp32 activations and K/V, to be held against outside figures
const KernelSet* portable_kernel_set();
const KernelSet* avx2_kernel_set();    // null when not built
const KernelSet* avx512_kernel_set();  // null when not built
const KernelSet* amx_kernel_set();     // null when not built

// Sets flush-to-zero and denormals-are-zero on this thread (every compute thread, every test thread).
void flush_denormals();

}  // namespace shardmesh
