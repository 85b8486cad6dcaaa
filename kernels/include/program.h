// A program as C++ sees it: the records of kernels/programs/program.ts, with buffer names turned into indexes and every shape checked once.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernel_set.h"

namespace shardmesh {

// Half-open [from, to).
struct Range {
  int64_t from, to;
  int64_t size() const { return to - from; }
};

enum class WeightUse { Matrix, Vector, Embedding };

struct WeightSlice {
  std::string tensor;
  TensorType type;
  Range rows, columns;
  WeightUse use;
};

struct BufferSpec {
  std::string name;
  int64_t width;
  bool per_output;  // rows are output rows, not the step's tokens
};

// Units of a row-parallel product and their owners (program.ts, UnitCut).
struct UnitCut {
  int units = 0;
  std::vector<Range> ranks;
};

enum class OperationKind {
  Embed, GatherRows, ReceiveHidden, SendHidden, RmsNorm, Linear, LinearPartial, AllReduce, Rope, StoreKv, Attention, GatedActivation, SelectRows, GatherLogits, Sample
};

// One record for all kinds; each kind uses the fields named beside it. Buffers and weights are indexes, -1: none.
struct Operation {
  OperationKind kind;
  int in = -1;       // linear, linear_partial, rms_norm, select_rows, gather_logits, sample (logits), attention (q), gated_activation (gate), store_kv (k), send_hidden
  int in2 = -1;      // gated_activation (up), store_kv (v)
  int out = -1;      // embed, gather_rows, receive_hidden, rms_norm, linear, rope, attention, gated_activation, select_rows, gather_logits, all_reduce (residual)
  int weight = -1;   // embed, rms_norm, linear, linear_partial
  int bias = -1;     // linear, all_reduce
  int factors = -1;  // rope
  std::vector<Range> vocabulary;  // embed, gather_rows, gather_logits
  UnitCut cut;                    // linear_partial, all_reduce
  std::vector<int> segments;      // linear, linear_partial
  int64_t width = 0;              // linear_partial
  float epsilon = 0;              // rms_norm
  int layer = -1;                 // store_kv, attention
  int heads = 0, head_size = 0;   // rope, attention
  int dimensions = 0;             // rope
  bool half_style = false;        // rope
  double base = 0, scale = 0;     // rope; attention (scale)
  std::vector<int32_t> kv_head;   // attention
  int window = 0;                 // attention, 0: whole context
  int activation = 0;             // gated_activation, 0: silu, 1: gelu_tanh
};

struct KvSpec {
  int layers, heads, head_size;
  KeyType key;
  ValueType value;
};

// Exact: any executor gives the reference's. PerKind: others are allowed, as long as executors of one kind agree. Free: a token's may hang on what else is in its step.
enum class Bits { Exact, PerKind, Free };

struct Program {
  std::string architecture;
  int stage, stages, rank, ranks;
  int64_t hidden_size, vocabulary_size, context_tokens_max;
  std::vector<BufferSpec> buffers;
  std::vector<WeightSlice> weights;
  Bits bits;
  ActivationType activations;
  KvSpec kv;
  std::vector<Operation> operations;
};

constexpr int kRanksMax = 64;

// Reads and checks a program. Throws std::runtime_error naming the field, its value and the limit.
Program parse_program(std::string_view json);

const char* operation_name(OperationKind kind);
const char* tensor_type_name(TensorType type);
// False when there is no type of that name.
bool tensor_type_of(std::string_view name, TensorType* type);

// Bytes a slice has in the file and where its values lie in each row.
struct SliceShape {
  int64_t rows, columns;
  int64_t skip;       // leading values of each row that are not part of the slice
  int64_t row_bytes;
};
SliceShape slice_shape(const WeightSlice& slice);

// Maximal subtrees of the tree over `units` that lie inside [from, to), ascending; `first` counts from 0 over all units.
std::vector<Subtree> maximal_subtrees(int units, int from, int to);

}  // namespace shardmesh
