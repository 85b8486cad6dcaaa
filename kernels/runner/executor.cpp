#include "../include/executor.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <variant>

#include "device.h"
#include "sampler.h"
#include "shard.h"
#include "step_run.h"
#include "thread_team.h"

namespace shardmesh {
namespace {

std::string number(int64_t value) { return std::to_string(value); }

void expect(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

SamplingParameters sampling_of(const SlotSampling& s) {
  SamplingParameters p;
  p.temperature = static_cast<float>(s.temperature);
  p.top_p = s.top_p >= 1 ? 1ull << 32 : static_cast<uint64_t>(s.top_p * 4294967296.0);
  p.top_k = s.top_k;
  p.min_p = static_cast<float>(s.min_p);
  p.seed = s.seed;
  p.choice = s.choice;
  p.repetition_penalty = static_cast<float>(s.repetition_penalty);
  p.presence_penalty = static_cast<float>(s.presence_penalty);
  p.frequency_penalty = static_cast<float>(s.frequency_penalty);
  p.logprobs = s.logprobs;
  return p;
}

class ShardExecutor final : public Executor {
 public:
  ShardExecutor(ExecutorConfig config, ExecutorEvents events)
      : shard_(std::move(config)), events_(std::move(events)), open_(static_cast<size_t>(shard_.config().sequences_max), false) {
    const Program& p = shard_.program();
    const bool last_stage = p.stage + 1 == p.stages;
    slots_.resize(last_stage ? open_.size() : 0);
    board_.latest.resize(open_.size());
    if (last_stage)
      for (int i = 0; i < shard_.config().threads; i++) samplers_.emplace_back(p.vocabulary_size);
    // The pinned cores are copied: the team's helpers read them as they start.
    team_ = std::make_unique<ThreadTeam>(shard_.config().threads, shard_.config().cores, shard_.config().spin);
    device_ = make_device(shard_, *team_);
    shard_.load_into(*device_);
    leader_ = std::thread([this] { lead(); });
  }

  ~ShardExecutor() override { stop(); }

  const char* isa() const override { return device_->name(); }
  size_t bytes() const override { return device_->bytes(); }
  std::string note() const override { return device_->note(); }
  WeightReport load_weight(int index, const uint8_t* data, size_t length) override { return shard_.load_weight(index, data, length); }

  uint64_t tables_checksum() const override {
    expect_weights("the rope tables");
    return shard_.tables_checksum();
  }

  Links::Segment open_segment() override {
    expect_idle("openSegment");
    disconnect();
    links_ = new_links();
    const Links::Segment segment = links_->open_segment();
    own_fd_ = segment.fd;
    return segment;
  }

  std::vector<PeerMemory> peer_memory() override { return device_->peer_memory(); }

  void connect(const std::vector<PeerLink>& peers) override {
    expect_weights("connect");
    expect_idle("connect");
    if (connected_) disconnect();  // connected before: that epoch is over
    const std::string card_group = card_group_of(peers);
    if (!links_) links_ = new_links();
    links_->connect(peers);
    if (card_group.empty()) connect_memory(peers);
    else device_->join_card(card_group);
    connected_ = true;
    device_->clear_kv();
    std::fill(open_.begin(), open_.end(), false);
    std::fill(slots_.begin(), slots_.end(), SlotState());
    std::fill(board_.latest.begin(), board_.latest.end(), TokenBoard::Entry());
    board_.expected.clear();
    last_step_ = 0;
    step_behind_ = 0;
    waiting_.clear();
    std::lock_guard lock(mutex_);
    state_ = State::Ready;
    totals_.last_step = 0;
    reason_.clear();
    aborted_ = false;
  }

  void open_slots(std::vector<SlotOpen> slots) override {
    expect_connected("openSlots");
    std::vector<bool> open = open_;
    for (const SlotOpen& slot : slots) {
      check_slot(slot.slot);
      expect(!open[static_cast<size_t>(slot.slot)], "slot " + number(slot.slot) + " is open already; close it first");
      check_sampling(slot);
      open[static_cast<size_t>(slot.slot)] = true;
    }
    open_ = std::move(open);
    enqueue(std::move(slots));
  }

  void close_slots(const std::vector<int>& slots) override {
    expect_connected("closeSlots");
    std::vector<bool> open = open_;
    for (const int slot : slots) {
      check_slot(slot);
      expect(open[static_cast<size_t>(slot)], "slot " + number(slot) + " is not open");
      open[static_cast<size_t>(slot)] = false;
    }
    open_ = std::move(open);
    enqueue(slots);
  }

  void submit(StepInput step) override {
    expect_connected("submit");
    check_step(step);
    last_step_ = step.step;
    const uint32_t number_of_step = step.step;
    std::string reason;
    {
      std::lock_guard lock(mutex_);
      if (state_ == State::Ready) {
        queue_.emplace_back(std::move(step));
        queue_changed_.notify_one();
        return;
      }
      reason = reason_;
    }
    StepFailure failure{number_of_step, FailureCode::Aborted, "step " + number(number_of_step) + " was not run: " + reason};
    events_.failed(std::move(failure));
  }

  bool deliver(PeerAddress source, const FrameKey& key, int rows, const void* data, size_t bytes) override {
    return connected_ && links_->deliver(source, key, rows, data, bytes);
  }

  void abort(const std::string& reason) override {
    std::lock_guard lock(mutex_);
    if (state_ == State::Unconnected) return;  // nothing runs
    if (state_ == State::Ready) {
      state_ = State::Failed;
      reason_ = reason;
    }
    aborted_ = true;
    links_->abort();
    device_->abort();
    queue_changed_.notify_one();
  }

  StepTotals totals() const override {
    std::lock_guard lock(mutex_);
    return totals_;
  }

  std::vector<GraphFacts> graphs() const override { return device_->graphs(); }

  void trace(bool on) override { trace_ = on; }

  void wait_idle() override {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [&] { return queue_.empty() && !busy_; });
  }

  void stop() override {
    if (!leader_.joinable()) return;
    abort("the executor was disposed of");
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      queue_changed_.notify_one();
    }
    leader_.join();
    team_.reset();
    links_.reset();
    connected_ = false;
  }

 private:
  enum class State { Unconnected, Ready, Failed };
  using Command = std::variant<StepInput, std::vector<SlotOpen>, std::vector<int>>;

  // ---------------------------------------------------------------- control thread

  std::unique_ptr<Links> new_links() {
    const Program& p = shard_.program();
    const ExecutorConfig& c = shard_.config();
    LinksOptions options;
    options.self = {p.stage, p.rank};
    options.stages = p.stages;
    options.ranks_per_stage = c.ranks_per_stage.empty() ? std::vector<int>(static_cast<size_t>(p.stages), p.ranks) : c.ranks_per_stage;
    options.exchange_bytes = shard_.exchange_bytes();
    options.hidden_bytes = std::min(static_cast<size_t>(c.step_tokens_max) * static_cast<size_t>(p.hidden_size) * 4,
                                    std::max(kExchangePieceBytes, static_cast<size_t>(p.hidden_size) * 4));
    options.tokens_bytes = static_cast<size_t>(c.sequences_max) * 8;
    return make_links(options, events_.frame);
  }

  void connect_memory(const std::vector<PeerLink>& peers) {
    const Program& p = shard_.program();
    std::vector<PeerMemory> by_rank(static_cast<size_t>(p.ranks));
    int given = 0;
    uint32_t epoch = 0;
    for (const PeerLink& link : peers) {
      if (!link.memory || link.peer.stage != p.stage) continue;
      by_rank[static_cast<size_t>(link.peer.rank)] = *link.memory;
      by_rank[static_cast<size_t>(p.rank)].place = link.memory->place;
      epoch = link.epoch;
      given++;
    }
    expect(given == 0 || given == p.ranks - 1, "connect: the memory of " + number(given) + " peers is given; reductions need that of all " + number(p.ranks - 1) + " or none");
    expect(given == 0 || shard_.config().wire == WireType::F32, "connect: sums that are read in a peer's memory are f32, but the wire is not");
    device_->connect_peers(given > 0 ? by_rank : std::vector<PeerMemory>(), epoch);
  }

  // A name that the ranks of the stage have in common, and no others of this process: their segments in this epoch. "": they are not to share a card.
  std::string card_group_of(const std::vector<PeerLink>& peers) const {
    const Program& p = shard_.program();
    std::vector<int> descriptors(static_cast<size_t>(p.ranks), -1);
    descriptors[static_cast<size_t>(p.rank)] = own_fd_;
    int given = 0;
    uint32_t epoch = 0;
    for (const PeerLink& link : peers) {
      if (!link.same_card || link.peer.stage != p.stage) continue;
      expect(link.pid == static_cast<int>(::getpid()), "connect: rank " + number(link.peer.rank) + " is in process " + number(link.pid) + ", this one in " + number(::getpid()) + "; ranks share a card in one process");
      descriptors[static_cast<size_t>(link.peer.rank)] = link.fd;
      epoch = link.epoch;
      given++;
    }
    if (given == 0) return "";
    expect(given == p.ranks - 1, "connect: " + number(given) + " peers share this card; all other " + number(p.ranks - 1) + " ranks of the stage must, or none");
    expect(own_fd_ >= 0, "connect: ranks that share a card know each other by their segments; call openSegment first");
    expect(shard_.config().wire == WireType::F32, "connect: sums that stay on a card are f32, but the wire is not");
    std::string name = "epoch " + number(epoch) + ", stage " + number(p.stage) + ", segments";
    for (const int fd : descriptors) name += " " + number(fd);
    return name;
  }

  void disconnect() {
    connected_ = false;
    own_fd_ = -1;
    std::lock_guard lock(mutex_);  // abort() and the leader look at links_ under the lock
    links_.reset();
    state_ = State::Unconnected;
    aborted_ = false;
  }

  void expect_idle(const char* what) {
    std::lock_guard lock(mutex_);
    expect(queue_.empty() && !busy_, std::string(what) + ": a step is running or queued; abort() and wait for it first");
  }

  void expect_weights(const char* what) const {
    const std::string* missing = shard_.missing_weight();
    expect(missing == nullptr, std::string(what) + ": weight '" + (missing ? *missing : "") + "' is not loaded yet");
  }

  void expect_connected(const char* what) const { expect(connected_, std::string(what) + ": the executor is not connected; call connect first"); }

  void enqueue(Command command) {
    std::lock_guard lock(mutex_);
    if (state_ != State::Ready) return;  // failed: the next connect() forgets all slots anyway
    queue_.push_back(std::move(command));
    queue_changed_.notify_one();
  }

  void check_slot(int slot) const {
    expect(slot >= 0 && static_cast<size_t>(slot) < open_.size(), "slot " + number(slot) + " is not in 0.." + number(static_cast<int64_t>(open_.size()) - 1) + " (sequencesMax)");
  }

  void check_token(int32_t token, const char* what) const {
    expect(token >= 0 && token < shard_.program().vocabulary_size,
           std::string(what) + " " + number(token) + " is not in 0.." + number(shard_.program().vocabulary_size - 1));
  }

  static void check_number(double value, double min, double max, const char* what) {
    expect(value >= min && value <= max, std::string(what) + " " + std::to_string(value) + " is not in " + std::to_string(min) + ".." + std::to_string(max));
  }

  void check_sampling(const SlotOpen& open) const {
    const SlotSampling& s = open.sampling;
    check_number(s.temperature, 0, 100, "temperature");
    check_number(s.top_p, 0, 1, "topP");
    check_number(s.min_p, 0, 1, "minP");
    check_number(s.repetition_penalty, 0.01, 100, "repetitionPenalty");
    check_number(s.presence_penalty, -100, 100, "presencePenalty");
    check_number(s.frequency_penalty, -100, 100, "frequencyPenalty");
    expect(s.top_k >= 0, "topK " + number(s.top_k) + " is below 0");
    expect(s.logprobs >= -1 && s.logprobs <= kLogprobsMax, "logprobs " + number(s.logprobs) + " is not in 0.." + number(kLogprobsMax));
    for (const auto& [token, bias] : s.logit_bias) {
      check_token(token, "logitBias token");
      check_number(static_cast<double>(bias), -1000, 1000, "logitBias");
    }
    for (const int32_t token : open.prompt_tokens) check_token(token, "prompt token");
    for (const int32_t token : open.output_tokens) check_token(token, "output token");
  }

  void check_step(const StepInput& s) const {
    const ExecutorConfig& c = shard_.config();
    const int64_t T = static_cast<int64_t>(s.token_ids.size()), S = static_cast<int64_t>(s.slots.size());
    const auto length = [&](const std::vector<int32_t>& v, int64_t expected, const char* what) {
      expect(static_cast<int64_t>(v.size()) == expected, std::string(what) + " has " + number(static_cast<int64_t>(v.size())) + " entries, needed are " + number(expected));
    };
    expect(s.step > last_step_, "step " + number(s.step) + " does not come after step " + number(last_step_));
    expect(T >= 1 && T <= c.step_tokens_max, number(T) + " tokens are not in 1.." + number(c.step_tokens_max) + " (stepTokensMax)");
    expect(S >= 1 && S <= T, number(S) + " sequences are not in 1.." + number(T));
    length(s.token_steps, T, "tokenSteps");
    length(s.positions, T, "positions");
    length(s.row_sequence, T, "rowSequence");
    length(s.block_table_offsets, S + 1, "blockTableOffsets");
    expect(s.wait_timeout_ms >= 1 && s.wait_timeout_ms <= 3'600'000, "waitTimeoutMs " + number(s.wait_timeout_ms) + " is not in 1..3600000");
    std::vector<bool> used(open_.size(), false);
    for (const int32_t slot : s.slots) {
      check_slot(slot);
      expect(open_[static_cast<size_t>(slot)], "slot " + number(slot) + " is not open");
      expect(!used[static_cast<size_t>(slot)], "slot " + number(slot) + " is in the step twice");
      used[static_cast<size_t>(slot)] = true;
    }
    expect(s.block_table_offsets[0] == 0 && s.block_table_offsets.back() == static_cast<int64_t>(s.block_tables.size()), "blockTableOffsets do not span blockTables");
    for (int64_t i = 0; i < S; i++)
      expect(s.block_table_offsets[static_cast<size_t>(i)] <= s.block_table_offsets[static_cast<size_t>(i) + 1], "blockTableOffsets descend at " + number(i));
    for (const int32_t block : s.block_tables) expect(block >= 0 && block < c.kv_blocks, "block " + number(block) + " is not in 0.." + number(c.kv_blocks - 1) + " (kvBlocks)");
    for (int64_t t = 0; t < T; t++) {
      const size_t i = static_cast<size_t>(t);
      const int32_t sequence = s.row_sequence[i], before = t ? s.row_sequence[i - 1] : -1;
      expect(sequence == before || sequence == before + 1, "rowSequence: row " + number(t) + " is of sequence " + number(sequence) + " after " + number(before));
      expect(sequence >= 0 && sequence < S, "rowSequence " + number(sequence) + " is not in 0.." + number(S - 1));
      const int32_t position = s.positions[i];
      expect(position >= 0 && position < shard_.program().context_tokens_max,
             "position " + number(position) + " is not in 0.." + number(shard_.program().context_tokens_max - 1) + " (contextTokensMax)");
      expect(sequence != before || position == s.positions[i - 1] + 1, "row " + number(t) + ": position " + number(position) + " does not follow " + number(t ? s.positions[i - 1] : 0));
      const int64_t blocks = s.block_table_offsets[static_cast<size_t>(sequence) + 1] - s.block_table_offsets[static_cast<size_t>(sequence)];
      expect(position / c.block_tokens < blocks, "row " + number(t) + ": position " + number(position) + " needs block " + number(position / c.block_tokens) + " of a table of " + number(blocks));
      const int32_t token = s.token_ids[i];
      if (token == -1)
        expect(s.token_steps[i] >= 1 && static_cast<uint32_t>(s.token_steps[i]) < s.step, "tokenSteps " + number(s.token_steps[i]) + " is not a step before " + number(s.step));
      else
        check_token(token, "token id");
    }
    expect(s.row_sequence.back() == S - 1, "the last sequence has no rows");
    std::fill(used.begin(), used.end(), false);
    expect(static_cast<int64_t>(s.outputs.size()) <= T, number(static_cast<int64_t>(s.outputs.size())) + " outputs for " + number(T) + " rows");
    for (size_t i = 0; i < s.outputs.size(); i++) {
      const OutputRow& o = s.outputs[i];
      expect(o.row >= 0 && o.row < T, "output row " + number(o.row) + " is not in 0.." + number(T - 1));
      const int32_t slot = s.slots[static_cast<size_t>(s.row_sequence[static_cast<size_t>(o.row)])];
      expect(o.slot == slot, "output row " + number(o.row) + " belongs to slot " + number(slot) + ", not " + number(o.slot));
      for (const int32_t token : o.banned) check_token(token, "banned token");
      if (o.score >= 0) {
        check_token(o.score, "score token");
        continue;
      }
      if (used[static_cast<size_t>(slot)]) {
        const bool follows = s.outputs[i - 1].slot == slot && s.outputs[i - 1].score < 0 && s.outputs[i - 1].row == o.row - 1;
        expect(follows, "slot " + number(slot) + " samples again at row " + number(o.row) + ", which does not follow the row that it sampled before");
      }
      used[static_cast<size_t>(slot)] = true;
    }
  }

  // ---------------------------------------------------------------- compute thread

  void lead() {
    team_->lead();
    std::unique_lock lock(mutex_);
    for (;;) {
      while (queue_.empty() && !stopping_) {
        // Sampled ids that nobody waits for yet are taken in now and then, so that the sampler's ring never fills.
        if (board_.expected.empty() || state_ != State::Ready) {
          queue_changed_.wait(lock);
        } else if (queue_changed_.wait_for(lock, std::chrono::milliseconds(1)) == std::cv_status::timeout && queue_.empty() && state_ == State::Ready) {
          StepRun::drain_tokens(context());
        }
      }
      if (queue_.empty()) return;
      Command command = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      lock.unlock();
      std::visit([&](auto& c) { execute(c); }, command);
      lock.lock();
      busy_ = false;
      if (queue_.empty()) idle_.notify_all();
    }
  }

  RunContext context() { return {shard_, *device_, *team_, links_.get(), board_, slots_, samplers_, aborted_, trace_.load(std::memory_order_relaxed), [this] { return next_step(); }}; }

  // Commands in front of a step come first: they change slots that the running step may still use.
  const StepInput* next_step() {
    std::lock_guard lock(mutex_);
    return state_ == State::Ready && !queue_.empty() ? std::get_if<StepInput>(&queue_.front()) : nullptr;
  }

  void execute(std::vector<SlotOpen>& slots) {
    if (slots_.empty()) return;
    for (const SlotOpen& open : slots)
      slots_[static_cast<size_t>(open.slot)] = SlotState(sampling_of(open.sampling), open.sampling.logit_bias, open.prompt_tokens, open.output_tokens);
  }

  void execute(std::vector<int>& slots) {
    for (const int slot : slots) {
      if (!slots_.empty()) slots_[static_cast<size_t>(slot)] = SlotState();
      board_.latest[static_cast<size_t>(slot)] = {};
    }
  }

  void execute(StepInput& input) {
    const bool is_behind = std::exchange(step_behind_, 0) == input.step;
    int64_t began = monotonic_now_ns();
    {
      std::lock_guard lock(mutex_);
      if (state_ != State::Ready) {
        events_.failed({input.step, FailureCode::Aborted, "step " + number(input.step) + " was not run: " + reason_});
        return;
      }
    }
    const RunContext run_context = context();
    StepRun run(run_context, input);
    StepRun::Status status = run.advance(false);
    while (status == StepRun::Status::Waiting) status = run.advance(true);
    const int64_t ended = monotonic_now_ns();
    step_behind_ = run.step_behind();
    if (status == StepRun::Status::Done) {
      if (is_behind) began = std::min(ended, last_end_ns_ + static_cast<int64_t>(device_->idle_us() * 1000));  // without a word of the host
      StepDone done = run.take_result();
      done.timings.total_us = static_cast<double>(ended - began) / 1000.0;
      done.timings.idle_us = last_end_ns_ ? static_cast<double>(began - last_end_ns_) / 1000.0 : 0;
      done.began_ns = began;
      done.ended_ns = ended;
      last_end_ns_ = ended;
      count(done);
      if (!shard_.config().quiet_steps || !done.spans.empty()) report(std::move(done), input.result_waits);
      return;
    }
    StepFailure failure = run.failure();
    {
      std::lock_guard lock(mutex_);
      if (failure.code == FailureCode::Aborted && !reason_.empty()) failure.message += ": " + reason_;
      if (state_ == State::Ready) {
        state_ = State::Failed;
        reason_ = "step " + number(input.step) + " failed before it";
      }
    }
    last_end_ns_ = 0;
    report_waiting();
    events_.failed(std::move(failure));
  }

  void report(StepDone&& done, bool waits) {
    waiting_.push_back(std::move(done));
    if (!waits) report_waiting();
  }

  void report_waiting() {
    if (!waiting_.empty()) events_.done(std::exchange(waiting_, {}));
  }

  void count(const StepDone& done) {
    std::lock_guard lock(mutex_);
    totals_.steps++;
    totals_.last_step = done.step;
    StepTimings& sum = totals_.timings;
    sum.total_us += done.timings.total_us;
    sum.collective_us += done.timings.collective_us;
    sum.receive_us += done.timings.receive_us;
    sum.sample_us += done.timings.sample_us;
    sum.idle_us += done.timings.idle_us;
  }

  Shard shard_;
  const ExecutorEvents events_;
  std::unique_ptr<ThreadTeam> team_;
  std::unique_ptr<Device> device_;

  // Control thread only.
  std::vector<bool> open_;
  int own_fd_ = -1;  // of the segment
  uint32_t last_step_ = 0;
  bool connected_ = false;

  // Compute thread, and connect() while it is idle.
  std::vector<SlotState> slots_;
  std::vector<Sampler> samplers_;
  TokenBoard board_;
  int64_t last_end_ns_ = 0;
  std::vector<StepDone> waiting_;  // what is told of together with the step after
  uint32_t step_behind_ = 0;  // that the device was given while the step before it ran; 0: none

  mutable std::mutex mutex_;
  std::condition_variable queue_changed_, idle_;
  std::deque<Command> queue_;
  bool busy_ = false, stopping_ = false;
  State state_ = State::Unconnected;
  std::string reason_;
  StepTotals totals_;
  std::atomic<bool> aborted_{false};
  std::atomic<bool> trace_{false};
  std::unique_ptr<Links> links_;
  std::thread leader_;
};

}  // namespace

std::unique_ptr<Executor> Executor::make(ExecutorConfig config, ExecutorEvents events) {
  return std::make_unique<ShardExecutor>(std::move(config), std::move(events));
}

size_t kv_bytes_per_block(const Program& program, int block_tokens) {
  expect(block_tokens >= 16 && block_tokens % 16 == 0 && block_tokens <= 4096, "blockTokens " + number(block_tokens) + " is not a multiple of 16 in 16..4096");
  return static_cast<size_t>(program.kv.layers) * make_kv_layout(program.kv.key, program.kv.value, program.kv.heads, program.kv.head_size, block_tokens).block_bytes;
}

const char* arithmetic_version() { return "shardmesh-arithmetic-2"; }

}  // namespace shardmesh
