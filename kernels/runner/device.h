// The border between a step and its arithmetic. StepRun walks the actions of a shard; a Device holds the shard's memory (weights, KV pool, buffers) and runs
// operations over it. What is not arithmetic stays in StepRun: the order of actions, exchanges, wire types, deadlines, drafts, sampling, tracing.
//
// A device computes before it returns (CpuDevice), or queues work and returns (CudaDevice, `queues()`). What a queueing device has found or computed for the host
// is there after wait(); until then the host writes nothing that it has handed over. After a fault everything does nothing, and wait() says so.
//
// load_matrix() is called from several loading threads at once, everything else by the compute thread, or by the control thread while that one is idle.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../include/executor.h"
#include "../include/kernel_set.h"
#include "../include/links.h"
#include "../include/program.h"
#include "sampler.h"
#include "sampler_loops.h"
#include "shard.h"

namespace shardmesh {

class ThreadTeam;

// What was found wrong: values in front of `action` that are not finite, first in `row` of its input, or, with no action, a fault of the device itself; or a rank of the
// stage that operation `reduction` waited for until its deadline, or until abort().
struct DeviceProblem {
  int action = -1;
  int row = -1;
  std::string fault;
  bool lost = false;  // the device answers this process no more
  int peer = -1;
  int reduction = -1;    // none: for that rank's step
  bool aborted = false;
  bool left = false;     // the rank has gone
};

// How a row's best candidate is looked for. temperature 0: by its logit alone.
struct CandidateRow {
  float temperature;
  NoiseKey key;
};

// The token of a row that takes it from the best candidate of output row r of the step that runs.
constexpr int32_t token_of_candidate(int r) { return -2 - r; }

// A whole step for a device that has not ended the one before. Everything it points at may go when it was taken.
struct StepBehind {
  StepRows rows;
  const int32_t* tokens;           // [rows.tokens], ids or token_of_candidate()
  int output_rows;
  const OutputRow* outputs;        // [output_rows]
  const CandidateRow* candidates;  // [output_rows]
};

class Device {
 public:
  virtual ~Device() = default;

  // What Executor::isa() says.
  virtual const char* name() const = 0;
  virtual size_t bytes() const = 0;
  // One line on how it computes, for people; empty: nothing to say.
  virtual std::string note() const { return ""; }

  // --- weights and K/V
  virtual WeightReport load_matrix(int weight, const MatrixSource& source) = 0;
  // Every weight is here: vectors and rope tables of the shard do not change any more. Once.
  virtual void finish_loading() = 0;
  virtual void clear_kv() = 0;

  // --- the host's view of rows
  bool queues() const { return queues_; }
  // Where the host reads and writes rows of a buffer. Only of buffers with Buffer::host.
  float* row(int buffer, int r) const { return host_[static_cast<size_t>(buffer)].data + r * host_[static_cast<size_t>(buffer)].stride; }
  // Rows that the host wants to read after wait(), and rows that it has written.
  virtual void fetch_rows(int buffer, int first, int count) = 0;
  virtual void push_rows(int buffer, int first, int count) = 0;
  // Host memory of Shard::staging_bytes(): hidden states on their way, and own subtree sums that did not go into an exchange.
  float* staging() const { return staging_; }
  // Host memory of Shard::received_bytes(): the sums of all ranks, taken back from the wire.
  float* received() const { return received_; }
  // Own subtree sums of the last partial product as the host sees them, [subtree][token][width].
  const float* partial() const { return partial_; }

  // --- reductions by the device itself, where those of all ranks of the stage read each other's memory
  // What peers need to open this device's, one of each place that it has.
  virtual std::vector<PeerMemory> peer_memory() { return {}; }
  // The coming epoch's, by rank, the own one too; empty: sums travel through an Exchange. Throws std::runtime_error naming the rank whose memory cannot be had.
  virtual void connect_peers(const std::vector<PeerMemory>& by_rank, uint32_t epoch) {
    (void)by_rank, (void)epoch;
  }
  // The same where the ranks of the stage are devices of this process on one card: those that come with this name, one for each rank, do each step together from then on, and wait
  // for each other in run_ahead(). The next connect_peers() or join_card() leaves them. Throws std::runtime_error.
  virtual void join_card(const std::string& name) {
    (void)name;
    throw std::runtime_error("this executor is on no card that ranks could share");
  }
  // Then partial_product() gets no block, and reduce() no sums but all rows.
  bool reduces_with_peers() const { return reduces_with_peers_; }
  // Ends waits of the device, now and until the next connect_peers() or join_card(). Any thread.
  virtual void abort() {}

  // --- a step. `rows` stays where it is to the end of the step. output_rows: of all passes of the tail, 0 without one. A queueing device gives up at the timeout.
  virtual void begin_step(uint32_t step, const StepRows& rows, int output_rows, int64_t wait_timeout_ms) = 0;
  // Output rows of the pass of the tail that begins, and, where the device finds candidates, how; both stay to the end of the pass.
  void begin_tail(int rows, const OutputRow* outputs, const CandidateRow* candidates) {
    tail_rows_ = rows;
    outputs_ = outputs;
    candidate_rows_ = candidates;
  }
  // Queues the actions from `action` on that the device has as one piece, and returns the first behind them; `action` itself when there is none. The caller goes on there,
  // and calls for that action what it would call else: the device knows what it has done of it.
  virtual size_t run_ahead(size_t action, const int32_t* tokens) {
    (void)tokens;
    return action;
  }
  virtual std::vector<GraphFacts> graphs() const { return {}; }
  // Of a step that was queued behind another, when it is done: how long the device did nothing in front of it, by its own clock.
  virtual double idle_us() const { return 0; }
  // False when anything was wrong since the step began. Calls `meanwhile`, if there is one, now and then as long as another step can be taken.
  virtual bool wait(const std::function<void()>& meanwhile = {}) = 0;
  // Inside of `meanwhile`: queues a step behind the one that is waited for, if the device can have two. begin_step() must then be called next for that same step, if for any; it
  // finds the step under way. clear_kv() forgets it.
  virtual bool queue_behind(const StepBehind& step) {
    (void)step;
    return false;
  }
  const DeviceProblem& problem() const { return problem_; }

  // Of own tokens only; the other rows stay as they are.
  virtual void embed(const Operation& o, const int32_t* tokens) = 0;
  virtual void norm(const Operation& o) = 0;
  // The next three look at what they read: false when it is not finite. A queueing device finds out by the next wait().
  virtual bool quantize(int action, int buffer) = 0;
  virtual bool store_kv(int action, const Operation& o) = 0;
  virtual bool check_rows(int action, int buffer) = 0;
  // An operation whose output is quantised next, in one.
  virtual bool norm_quantized(int action, const Operation& o) {
    norm(o);
    return quantize(action, o.out);
  }
  virtual bool activation_quantized(int action, const Operation& o) {
    gated_activation(o);
    return quantize(action, o.out);
  }
  // Products of one action: indexes of its operations.
  virtual void products(const std::vector<int>& operations) = 0;
  // The products `gate_and_up` and the activation `o` of their outputs, quantised, nothing of it kept as values. False as above.
  virtual bool gated_products(int action, const std::vector<int>& gate_and_up, const Operation& o) {
    products(gate_and_up);
    return activation_quantized(action, o);
  }
  // Own subtree sums of operation `index`, into `block` of an exchange, or when null to where partial() says.
  virtual void partial_product(int index, uint8_t* block) = 0;
  // Finishes the tree of all_reduce `index` for `rows` rows from first_row on. sums[r]: of rank r, [subtree][rows][width], in host memory; null for the own ones
  // where they are what partial_product() left.
  virtual void reduce(int index, int first_row, int rows, const float* const* sums) = 0;
  virtual void rope(int index) = 0;
  virtual void attention(const Operation& o) = 0;
  virtual void gated_activation(const Operation& o) = 0;
  // The output rows of the pass.
  virtual void select_rows(const Operation& o) = 0;

  // Whether the device looks for the best candidates of a pass itself. They are there after wait(); token -1: the row's logits are not finite.
  bool finds_candidates() const { return finds_candidates_; }
  virtual void find_candidates(int buffer, int32_t first_token) = 0;
  virtual Candidate candidate(int r) const = 0;

 protected:
  explicit Device(const Shard& shard) : shard_(shard) {}
  int rows_of(int buffer) const { return shard_.buffer(buffer).per_output ? tail_rows_ : rows_->tokens; }

  struct HostRows {
    float* data = nullptr;
    int64_t stride = 0;
  };

  const Shard& shard_;
  bool queues_ = false, finds_candidates_ = false, reduces_with_peers_ = false;
  std::vector<HostRows> host_;  // by buffer
  float *staging_ = nullptr, *received_ = nullptr, *partial_ = nullptr;
  const StepRows* rows_ = nullptr;
  int tail_rows_ = 0;
  const OutputRow* outputs_ = nullptr;
  const CandidateRow* candidate_rows_ = nullptr;
  DeviceProblem problem_;
};

// The device of the shard's executor kind. `team` computes where a processor does. Throws std::runtime_error when it cannot be had, or cannot run the program.
std::unique_ptr<Device> make_device(const Shard& shard, ThreadTeam& team);

}  // namespace shardmesh
