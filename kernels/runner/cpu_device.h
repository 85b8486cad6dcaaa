// The device that is this machine's processor: a kernel set over a team of threads, one barrier an operation. What the host reads is what it computed.
#pragma once
#include "device.h"
#include "memory.h"
#include "thread_team.h"

namespace shardmesh {

class CpuDevice final : public Device {
 public:
  CpuDevice(const Shard& shard, ThreadTeam& team);

  const char* name() const override { return kernels_.name; }
  size_t bytes() const override { return weight_memory_.size() + kv_memory_.size() + buffer_memory_.size() + scratch_bytes_; }
  WeightReport load_matrix(int weight, const MatrixSource& source) override;
  void finish_loading() override {}
  void clear_kv() override { kv_memory_.clear(); }
  void fetch_rows(int, int, int) override {}
  void push_rows(int, int, int) override {}
  void begin_step(uint32_t, const StepRows& rows, int, int64_t) override { rows_ = &rows; }
  bool wait(const std::function<void()>&) override { return true; }
  void embed(const Operation& o, const int32_t* tokens) override;
  void norm(const Operation& o) override;
  bool quantize(int action, int buffer) override;
  bool store_kv(int action, const Operation& o) override;
  bool check_rows(int action, int buffer) override;
  bool norm_quantized(int action, const Operation& o) override;
  void products(const std::vector<int>& operations) override;
  bool gated_products(int action, const std::vector<int>& gate_and_up, const Operation& o) override;
  void partial_product(int index, uint8_t* block) override;
  void reduce(int index, int first_row, int rows, const float* const* sums) override;
  void rope(int index) override;
  void attention(const Operation& o) override;
  void gated_activation(const Operation& o) override;
  void select_rows(const Operation& o) override;
  void find_candidates(int, int32_t) override {}
  Candidate candidate(int) const override { return {-1, 0}; }

 private:
  Activations activations(int buffer) const;
  Activations quantized_by(int action, int buffer) const;
  // Operation `index`, a whole product; all rows.
  LinearArguments whole_product(int index, const Subtree& all) const;
  uint8_t* kv_layer(int layer) const;
  // Shares work that says whether all it read is finite; notes the problem of `action` when not.
  template <typename Work>
  bool share_finite(int action, double cost, const Work& work);
  bool note_finite(int action, bool finite);

  const KernelSet& kernels_;
  ThreadTeam& team_;
  Memory weight_memory_, kv_memory_, buffer_memory_;
  std::vector<PackedMatrix> matrices_;    // by weight
  std::vector<uint8_t*> quantized_;       // by buffer; null: never quantised
  std::unique_ptr<uint8_t[]> scratch_storage_;
  uint8_t* scratch_ = nullptr;
  size_t scratch_stride_ = 0, scratch_bytes_ = 0;
};

}  // namespace shardmesh
