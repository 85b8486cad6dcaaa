// One step on its way through a shard's actions. Resumable in form: advance() runs until the step is done, has failed, or has to wait for a peer; the caller
// decides what happens meanwhile.
#pragma once
#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "../include/executor.h"
#include "../include/links.h"
#include "device.h"
#include "sampler.h"
#include "shard.h"
#include "thread_team.h"

namespace shardmesh {

int64_t monotonic_now_ns();

// Sampled ids that stage 0 has received, by slot, and the steps whose ids are still to come.
struct TokenBoard {
  struct Entry { uint32_t step = 0; int32_t token = -1; };
  std::vector<Entry> latest;            // by slot
  std::deque<uint32_t> expected;        // ascending
};

// What the steps of one epoch share.
struct RunContext {
  const Shard& shard;
  Device& device;
  ThreadTeam& team;
  Links* links;                         // null: one worker alone
  TokenBoard& tokens;
  std::vector<SlotState>& slots;        // ranks of the last stage; by slot
  std::vector<Sampler>& samplers;       // the same; one a thread
  const std::atomic<bool>& aborted;
  bool trace;                           // record spans
  // The step that is queued next, if one is: to be given to a device that can have two. It stays where it is as long as the running one does.
  std::function<const StepInput*()> next_step;
};

class StepRun {
 public:
  enum class Status { Done, Waiting, Failed };

  StepRun(const RunContext& context, const StepInput& input);
  // `block`: wait for a peer to the end of its deadline; otherwise give up after a short spin and return Waiting.
  Status advance(bool block);
  // After Done.
  StepDone take_result();
  // After Failed.
  const StepFailure& failure() const { return failure_; }
  // The step that the device was given behind this one, 0: none.
  uint32_t step_behind() const { return step_behind_; }

  // Takes in the sampled ids that have arrived, without waiting. Also between steps, so that the sender's ring never stays full.
  static void drain_tokens(const RunContext& context);

 private:
  using Payloads = std::array<const uint8_t*, kRanksMax>;

  void begin_pass();
  Status run_action(const Action& action);
  Status resolve_tokens();
  Status gather_rows(int index);
  Status receive_hidden(int index);
  Status send_hidden(int index);
  void linear_partial(int index);
  Status all_reduce(int index);
  void take_from_wire(int index, int rows, Payloads* payloads);
  Status select_rows(const Operation& o);
  Status gather_logits(int index);
  Status look_at_logits(int buffer, Range own);
  bool by_candidates(int r) const { return by_candidates(output_of(r)); }
  bool by_candidates(const OutputRow& output) const;
  CandidateRow candidate_row(const StepInput& input, const OutputRow& output) const;
  void offer_next_step();
  bool queue_behind(const StepInput& next);
  int candidate_of(int slot) const;
  void find_candidates(int buffer, Range own);
  Status sample(const Operation& o);
  bool is_draft(size_t index) const;
  Status send_tokens();

  // One piece of an exchange with the ranks of the own stage; `piece` numbers them within the operation. Own bytes are written by `fill` unless the piece was
  // begun before. After Done, *payloads has every rank's block, the own included.
  template <typename Fill, typename Bytes>
  Status exchange(FrameKind kind, int index, int piece, int rows, const Fill& fill, const Bytes& bytes_of, Payloads* payloads);

  // Tries `wait(options)` once; turns its result into a status, keeps the deadline over repeated tries.
  template <typename Wait>
  Status attempt(const Wait& wait, PeerAddress peer, const char* what, int index, double* spent_us);

  // Of a traced step: [began_ns, now) was spent on `name`.
  void span(const char* name, int64_t began_ns) { spans_.push_back({name, began_ns, monotonic_now_ns()}); }

  Status fail(FailureCode code, std::string message);
  // A wait for `what` `peer` has ended with `result`.
  Status fail_by_peer(PeerAddress peer, const char* what, int index, WaitResult result);
  // What the device says of itself or of the values in front of an action.
  Status fail_by_device();
  Status done_unless(bool wrong) { return wrong ? fail_by_device() : Status::Done; }
  std::string where(int index) const;
  const OutputRow& output_of(int r) const { return input_.outputs[static_cast<size_t>(tail_from_ + r)]; }
  // Absolute position of the token that is sampled.
  static uint32_t sampled_position(const StepInput& input, const OutputRow& output) { return static_cast<uint32_t>(input.positions[static_cast<size_t>(output.row)]) + 1; }
  uint32_t sampled_position(const OutputRow& output) const { return sampled_position(input_, output); }
  float* row(int buffer, int r) const { return device_.row(buffer, r); }
  PeerAddress self() const { return {program_.stage, program_.rank}; }
  int ranks_of(int stage) const;
  int hidden_piece_rows() const;
  void apply_sampled(uint32_t step, int slot, int32_t token);

  const RunContext& context_;
  const Shard& shard_;
  Device& device_;
  const Program& program_;
  const KernelSet& kernels_;
  const WireType wire_;
  const StepInput& input_;
  StepRows rows_{};
  std::vector<int32_t> first_row_;
  std::vector<int32_t> token_ids_;

  size_t action_ = 0;
  int64_t action_began_ns_ = 0;            // of a traced step, while the action waits; 0: not begun
  int tail_from_ = 0, tail_rows_ = 0;     // output rows of the pass of the tail that is running
  // Progress inside an action that waits.
  int piece_ = 0, peer_ = -1;
  bool begun_ = false;                    // exchange->begin() was called for the coming piece
  uint8_t* own_block_ = nullptr;
  Payloads payloads_{};
  bool waiting_ = false, block_ = false;
  int64_t wait_began_ns_ = 0;
  bool logits_here_ = false;              // look_at_logits() was called for this pass
  uint32_t step_offered_ = 0, step_behind_ = 0;  // the last that was offered to the device, and the one that it took
  std::vector<CandidateRow> candidate_rows_;
  std::vector<Candidate> candidates_;     // by output row of the pass: the best known, of rows that need no more; token -1: logits are not finite
  std::vector<int32_t> chosen_;           // by output row: the token sampled there, else -1
  std::vector<int32_t> sampled_;          // pairs slot, token of this step

  std::vector<OutputResult> outputs_;
  StepTimings timings_;
  std::vector<StepSpan> spans_;
  StepFailure failure_{};
};

}  // namespace shardmesh
