// What does not change from step to step: the program, its vectors and rope tables, the shape of its buffers and of its KV pool, and the plan of actions made
// from its operations. The memory itself, and the matrices, belong to a Device.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../include/executor.h"
#include "../include/kernel_set.h"
#include "../include/program.h"
#include "rope_table.h"

namespace shardmesh {

class Device;

constexpr size_t kLineBytes = 64;
constexpr size_t align_to_line(size_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }

// The part of a weight that every device finds here: values of a vector.
struct Weight {
  std::vector<float> vector;
  bool loaded = false, loading = false;
};

// [rows, width] fp32 with a stride.
struct Buffer {
  int64_t width = 0, stride = 0;
  int rows = 0;             // most of a step
  bool per_output = false;  // output rows of a pass of the tail, not the step's tokens
  bool quantized = false;   // a quantised product reads it
  bool host = false;        // rows of it are read or written by the host
};

// What the runner does, in order. Most actions are one operation; products that read the same buffer run as one piece of work, and a buffer is quantised once
// until it is written again. On processors the two products of a gated activation run together with it (GatedProducts, operation: the activation) where only
// quantised products read its output: then none of the three outputs exists as a whole.
enum class ActionKind {
  ResolveTokens, Embed, GatherRows, ReceiveHidden, SendHidden, RmsNorm, Quantize, Linear, LinearPartial, AllReduce, Rope, StoreKv, Attention, GatedActivation,
  GatedProducts, SelectRows, GatherLogits, Sample, SendTokens
};

struct Action {
  ActionKind kind;
  int operation = -1;           // index in the program
  std::vector<int> products = {};  // Linear, GatedProducts: indexes of the operations
  int buffer = -1;              // Quantize; RmsNorm, GatedActivation and GatedProducts whose output is quantised next: theirs
  bool meets_bytes = false;     // what is quantised: Activations::meets_bytes
};

// Exchanges are cut into pieces of rows so that a piece stays about this large, whatever the step.
constexpr size_t kExchangePieceBytes = size_t{2} << 20;
// Output rows (logits) are computed this many at a time, bounded by the bytes of their logits.
constexpr int kOutputRowsMax = 64;
constexpr size_t kOutputBytes = size_t{16} << 20;

class Shard {
 public:
  explicit Shard(ExecutorConfig config);

  const ExecutorConfig& config() const { return config_; }
  const Program& program() const { return config_.program; }
  // What the host computes with; a CpuDevice computes everything with it.
  const KernelSet& kernels() const { return *kernels_; }

  // Matrices go to `device`, which outlives the shard's last load_weight(), and which hears of the end of loading. Call first, once.
  void load_into(Device& device);
  WeightReport load_weight(int index, const uint8_t* data, size_t length);
  // Slice `index` with its bytes at `data`, which may be null.
  MatrixSource source_of(int index, const uint8_t* data) const;
  // Null when everything is loaded, else the name of a tensor that is missing.
  const std::string* missing_weight() const;
  uint64_t tables_checksum() const;

  const std::vector<Action>& actions() const { return actions_; }
  // First action of the output tail; actions().size() when this stage has none. `tail_end`: the action after it.
  size_t tail_begin() const { return tail_begin_; }
  size_t tail_end() const { return tail_end_; }
  int output_rows() const { return output_rows_; }

  const Buffer& buffer(int index) const { return buffers_[static_cast<size_t>(index)]; }
  // Null for -1.
  const float* vector(int weight) const { return weight < 0 ? nullptr : weights_[static_cast<size_t>(weight)].vector.data(); }
  bool is_quantized(int weight) const;
  // Rope operations of one number turn alike.
  int rope_table_number(int operation) const { return table_of_[static_cast<size_t>(operation)]; }
  int rope_tables() const { return static_cast<int>(table_parameters_.size()); }
  RopeTable rope_table_of(int number) const { return tables_[static_cast<size_t>(number)]->view(); }
  RopeTable rope_table(int operation) const { return rope_table_of(rope_table_number(operation)); }

  const KvLayout& kv_layout() const { return kv_layout_; }

  // Room for the subtree sums of this rank between a partial product and its reduction, [subtree][token][width], when they are not written into the exchange;
  // also where hidden states are laid close together for a frame.
  size_t staging_bytes() const { return staging_bytes_; }
  // Room for the sums of all ranks for one piece, taken back from the wire; 0 when they travel as they are.
  size_t received_bytes() const { return received_bytes_; }
  // Rows of one exchange piece of operation `index` (all_reduce, gather_rows, gather_logits): the same on all ranks.
  int piece_rows(int index) const { return piece_rows_[static_cast<size_t>(index)]; }
  // Maximal subtrees of each rank in the cut of operation `index` (linear_partial, all_reduce), `first` counted over all units.
  const std::vector<std::vector<Subtree>>& subtrees(int index) const { return subtrees_[static_cast<size_t>(index)]; }
  // Those of this rank, `first` counted over its own units.
  const std::vector<Subtree>& own_subtrees(int index) const { return own_subtrees_[static_cast<size_t>(index)]; }
  size_t exchange_bytes() const { return exchange_bytes_; }

 private:
  void check_config() const;
  void choose_kernels();
  void plan_actions();
  void join_gated_products();
  void plan_exchanges();
  void plan_buffers();
  void plan_rope();
  void finish_loading();

  ExecutorConfig config_;
  const KernelSet* kernels_ = nullptr;
  std::vector<Action> actions_;
  size_t tail_begin_ = 0, tail_end_ = 0;
  int output_rows_ = 0;
  std::vector<Buffer> buffers_;
  std::vector<Weight> weights_;
  Device* device_ = nullptr;
  KvLayout kv_layout_{};
  size_t staging_bytes_ = 0, received_bytes_ = 0, exchange_bytes_ = 64;
  std::vector<int> piece_rows_;                             // per operation
  std::vector<std::vector<std::vector<Subtree>>> subtrees_;  // per operation, per rank
  std::vector<std::vector<Subtree>> own_subtrees_;           // per operation
  std::vector<int> table_of_;  // per operation: index into tables_, -1
  std::vector<RopeParameters> table_parameters_;
  std::vector<int> table_factors_;  // weight index of the factors, -1
  std::vector<std::unique_ptr<RopeTables>> tables_;
  mutable std::mutex loading_;
  size_t loaded_ = 0;
};

}  // namespace shardmesh
