#include "step_run.h"

#include <time.h>

#include <algorithm>
#include <cstring>

#include "sampler_math.h"

namespace shardmesh {
namespace {

constexpr int64_t kFirstTryNs = 100'000;     // spin of a first try, when spinning is allowed

const char* action_name(ActionKind kind) {
  switch (kind) {
    case ActionKind::ResolveTokens: return "resolve tokens";
    case ActionKind::Embed: return "embed";
    case ActionKind::GatherRows: return "gather rows";
    case ActionKind::ReceiveHidden: return "receive hidden";
    case ActionKind::SendHidden: return "send hidden";
    case ActionKind::RmsNorm: return "norm";
    case ActionKind::Quantize: return "quantise";
    case ActionKind::Linear: return "products";
    case ActionKind::LinearPartial: return "partial products";
    case ActionKind::AllReduce: return "reduce";
    case ActionKind::Rope: return "rope";
    case ActionKind::StoreKv: return "store k/v";
    case ActionKind::Attention: return "attention";
    case ActionKind::GatedActivation: return "activation";
    case ActionKind::GatedProducts: return "gated products";
    case ActionKind::SelectRows: return "select rows";
    case ActionKind::GatherLogits: return "gather logits";
    case ActionKind::Sample: return "sample";
    case ActionKind::SendTokens: return "send tokens";
  }
  return "action";
}

// What sampling found of an output row; rejected: the row before it gave another token than this row's own.
enum class RowState : uint8_t { Done, Rejected, NotFinite };

// `first_row` becomes what the rows point at.
StepRows rows_of(const StepInput& input, std::vector<int32_t>* first_row) {
  const int tokens = static_cast<int>(input.positions.size()), sequences = static_cast<int>(input.slots.size());
  first_row->assign(static_cast<size_t>(sequences) + 1, tokens);
  for (int t = tokens; t-- > 0;) (*first_row)[static_cast<size_t>(input.row_sequence[static_cast<size_t>(t)])] = t;
  return {tokens, input.positions.data(), input.row_sequence.data(), sequences, first_row->data(), input.block_table_offsets.data(), input.block_tables.data()};
}

}  // namespace

int64_t monotonic_now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

StepRun::StepRun(const RunContext& context, const StepInput& input)
    : context_(context), shard_(context.shard), device_(context.device), program_(context.shard.program()), kernels_(context.shard.kernels()), wire_(context.shard.config().wire), input_(input), token_ids_(input.token_ids) {
  rows_ = rows_of(input, &first_row_);
  failure_.step = input.step;
  device_.begin_step(input.step, rows_, shard_.tail_begin() < shard_.tail_end() ? static_cast<int>(input.outputs.size()) : 0, input.wait_timeout_ms);
  begin_pass();
}

// Of the output rows from tail_from_ on, as many as a pass of the tail takes.
void StepRun::begin_pass() {
  tail_rows_ = std::min(shard_.output_rows(), static_cast<int>(input_.outputs.size()) - tail_from_);
  logits_here_ = false;
  candidate_rows_.assign(static_cast<size_t>(tail_rows_), {});
  if (device_.finds_candidates() && shard_.tail_begin() < shard_.tail_end()) {
    for (int r = 0; r < tail_rows_; r++)
      if (by_candidates(r)) candidate_rows_[static_cast<size_t>(r)] = candidate_row(input_, output_of(r));
  }
  device_.begin_tail(tail_rows_, input_.outputs.data() + tail_from_, candidate_rows_.data());
}

StepRun::Status StepRun::advance(bool block) {
  block_ = block;
  while (action_ < shard_.actions().size()) {
    if (context_.aborted.load(std::memory_order_relaxed)) return fail(FailureCode::Aborted, "step " + std::to_string(input_.step) + " was aborted");
    if (action_ == shard_.tail_begin() && tail_rows_ == 0) {  // no output rows
      action_ = shard_.tail_end();
      continue;
    }
    if (context_.trace && action_began_ns_ == 0) action_began_ns_ = monotonic_now_ns();
    if (const size_t next = device_.run_ahead(action_, token_ids_.data()); next != action_) {
      if (context_.trace) span("graph", action_began_ns_);
      action_began_ns_ = 0;
      action_ = next;
      continue;
    }
    const Action& action = shard_.actions()[action_];
    const Status status = run_action(action);
    if (status != Status::Done) return status;
    if (context_.trace) {
      span(action_name(action.kind), action_began_ns_);
      action_began_ns_ = 0;
    }
    action_++;
    const bool tail_ended = action_ == shard_.tail_end() && tail_rows_ > 0 && shard_.tail_begin() < shard_.tail_end();
    if (tail_ended) {
      tail_from_ += tail_rows_;
      begin_pass();
      if (tail_rows_ > 0) action_ = shard_.tail_begin();
    }
  }
  return done_unless(!device_.wait());
}

StepDone StepRun::take_result() {
  return {input_.step, std::move(outputs_), timings_, 0, 0, std::move(spans_)};
}

StepRun::Status StepRun::run_action(const Action& action) {
  static const Operation none{};
  const Operation& o = action.operation < 0 ? none : program_.operations[static_cast<size_t>(action.operation)];
  switch (action.kind) {
    case ActionKind::ResolveTokens: return resolve_tokens();
    case ActionKind::Embed: device_.embed(o, token_ids_.data()); return Status::Done;
    case ActionKind::GatherRows: return gather_rows(action.operation);
    case ActionKind::ReceiveHidden: return receive_hidden(action.operation);
    case ActionKind::SendHidden: return send_hidden(action.operation);
    case ActionKind::RmsNorm:
      if (action.buffer >= 0) return done_unless(!device_.norm_quantized(static_cast<int>(action_), o));
      device_.norm(o);
      return Status::Done;
    case ActionKind::Quantize: return done_unless(!device_.quantize(static_cast<int>(action_), action.buffer));
    case ActionKind::Linear: device_.products(action.products); return Status::Done;
    case ActionKind::LinearPartial: linear_partial(action.operation); return Status::Done;
    case ActionKind::AllReduce: return all_reduce(action.operation);
    case ActionKind::Rope: device_.rope(action.operation); return Status::Done;
    case ActionKind::StoreKv: return done_unless(!device_.store_kv(static_cast<int>(action_), o));
    case ActionKind::Attention: device_.attention(o); return Status::Done;
    case ActionKind::GatedActivation:
      if (action.buffer >= 0) return done_unless(!device_.activation_quantized(static_cast<int>(action_), o));
      device_.gated_activation(o);
      return Status::Done;
    case ActionKind::GatedProducts: return done_unless(!device_.gated_products(static_cast<int>(action_), action.products, o));
    case ActionKind::SelectRows: return select_rows(o);
    case ActionKind::GatherLogits: return gather_logits(action.operation);
    case ActionKind::Sample: return sample(o);
    case ActionKind::SendTokens: return send_tokens();
  }
  return fail(FailureCode::Internal, "unknown action");
}

// ---------------------------------------------------------------- waiting

StepRun::Status StepRun::fail(FailureCode code, std::string message) {
  failure_.code = code;
  failure_.message = std::move(message);
  return Status::Failed;
}

StepRun::Status StepRun::fail_by_device() {
  const DeviceProblem& problem = device_.problem();
  if (problem.peer >= 0 && problem.left) {
    failure_.has_peer = true;
    failure_.peer = {program_.stage, problem.peer};
    return fail(FailureCode::LinkLost, where(-1) + ": stage " + std::to_string(program_.stage) + " rank " + std::to_string(problem.peer) + " has left the card that both compute on");
  }
  if (problem.peer >= 0)
    return fail_by_peer({program_.stage, problem.peer}, problem.reduction < 0 ? "the step of" : "the block of", problem.reduction, problem.aborted ? WaitResult::Aborted : WaitResult::Deadline);
  if (problem.action < 0) return fail(problem.lost ? FailureCode::DeviceLost : FailureCode::Internal, where(-1) + ": " + problem.fault);
  const Action& action = shard_.actions()[static_cast<size_t>(problem.action)];
  const std::string row = problem.row < 0 ? "" : " of row " + std::to_string(problem.row);
  switch (action.kind) {
    case ActionKind::Quantize:
      return fail(FailureCode::NonFinite, where(action.operation) + ": its input '" + program_.buffers[static_cast<size_t>(action.buffer)].name + "' is not finite");
    case ActionKind::RmsNorm:
    case ActionKind::GatedActivation:
    case ActionKind::GatedProducts: return fail(FailureCode::NonFinite, where(action.operation) + ": its output '" + program_.buffers[static_cast<size_t>(action.buffer)].name + "' is not finite");
    case ActionKind::StoreKv: return fail(FailureCode::NonFinite, where(action.operation) + ": k or v is not finite");
    case ActionKind::SelectRows: return fail(FailureCode::NonFinite, where(-1) + ": the hidden state" + row + " is not finite");
    default: return fail(FailureCode::NonFinite, where(action.operation) + ": the hidden state" + row + " is not finite");
  }
}

std::string StepRun::where(int index) const {
  if (index < 0) return "step " + std::to_string(input_.step);
  return "step " + std::to_string(input_.step) + ", operation " + std::to_string(index) + " (" +
         operation_name(program_.operations[static_cast<size_t>(index)].kind) + ")";
}

template <typename Wait>
StepRun::Status StepRun::attempt(const Wait& wait, PeerAddress peer, const char* what, int index, double* spent_us) {
  const int64_t now = monotonic_now_ns();
  if (!waiting_) {
    waiting_ = true;
    wait_began_ns_ = now;
  }
  const int64_t deadline = wait_began_ns_ + input_.wait_timeout_ms * 1'000'000;
  const bool spin = shard_.config().spin;
  const WaitResult result = wait(WaitOptions{block_ ? deadline : std::min(deadline, spin ? now + kFirstTryNs : now), spin});
  if (result == WaitResult::Deadline && !block_ && monotonic_now_ns() < deadline) return Status::Waiting;
  waiting_ = false;
  if (context_.trace) span("wait", wait_began_ns_);
  *spent_us += static_cast<double>(monotonic_now_ns() - wait_began_ns_) / 1000.0;
  return result == WaitResult::Done ? Status::Done : fail_by_peer(peer, what, index, result);
}

StepRun::Status StepRun::fail_by_peer(PeerAddress peer, const char* what, int index, WaitResult result) {
  const std::string name = "stage " + std::to_string(peer.stage) + " rank " + std::to_string(peer.rank);
  if (result == WaitResult::Aborted) return fail(FailureCode::Aborted, where(index) + " was aborted while waiting for " + what + " " + name);
  failure_.has_peer = true;
  failure_.peer = peer;
  if (result == WaitResult::Mismatch) return fail(FailureCode::Internal, where(index) + ": ranks do not run the same step: " + context_.links->problem());
  if (result == WaitResult::Lost) return fail(FailureCode::LinkLost, where(index) + ": waiting for " + what + " " + name + ", lost " + context_.links->problem());
  return fail(FailureCode::WaitTimeout, where(index) + ": waited " + std::to_string(input_.wait_timeout_ms) + " ms for " + what + " " + name);
}

template <typename Fill, typename Bytes>
StepRun::Status StepRun::exchange(FrameKind kind, int index, int piece, int rows, const Fill& fill, const Bytes& bytes_of, Payloads* payloads) {
  Exchange* exchange = context_.links->exchange();
  if (peer_ < 0) {
    if (!begun_) {
      const FrameKey key{kind, input_.step, static_cast<uint16_t>(index), static_cast<uint16_t>(piece)};
      const size_t bytes = bytes_of(program_.rank);
      own_block_ = exchange->begin(key, bytes);
      if (!own_block_) return fail(FailureCode::Internal, where(index) + ": " + std::to_string(bytes) + " bytes do not fit into an exchange");
      fill(own_block_);
    }
    begun_ = false;
    exchange->publish(rows);
    peer_ = 0;
  }
  for (; peer_ < program_.ranks; peer_++) {
    if (peer_ == program_.rank) {
      payloads_[static_cast<size_t>(peer_)] = own_block_;
      continue;
    }
    const auto wait = [&](const WaitOptions& options) { return exchange->wait(peer_, bytes_of(peer_), &payloads_[static_cast<size_t>(peer_)], options); };
    const Status status = attempt(wait, {program_.stage, peer_}, "the block of", index, &timings_.collective_us);
    if (status != Status::Done) return status;
  }
  peer_ = -1;
  *payloads = payloads_;
  return Status::Done;
}

int StepRun::ranks_of(int stage) const {
  const std::vector<int>& ranks = shard_.config().ranks_per_stage;
  return ranks.empty() ? program_.ranks : ranks[static_cast<size_t>(stage)];
}

// ---------------------------------------------------------------- sampled ids, on stage 0

void StepRun::apply_sampled(uint32_t step, int slot, int32_t token) {
  if (static_cast<size_t>(slot) < context_.tokens.latest.size()) context_.tokens.latest[static_cast<size_t>(slot)] = {step, token};
}

namespace {

// Receives the ids of `step` into the board. The frame: pairs slot u32, token u32.
WaitResult receive_tokens(const RunContext& context, uint32_t step, const WaitOptions& options) {
  const Program& p = context.shard.program();
  const PeerAddress sampler{p.stages - 1, 0};
  TensorLink* link = context.links->from(sampler);
  if (!link) return WaitResult::Mismatch;
  std::vector<uint32_t> pairs(static_cast<size_t>(context.shard.config().sequences_max) * 2);
  size_t bytes = 0;
  const WaitResult result = link->receive({FrameKind::Tokens, step, 0, 0}, pairs.data(), pairs.size() * 4, &bytes, options);
  if (result != WaitResult::Done) return result;
  for (size_t i = 0; i + 1 < bytes / 4; i += 2)
    if (pairs[i] < context.tokens.latest.size()) context.tokens.latest[pairs[i]] = {step, static_cast<int32_t>(pairs[i + 1])};
  return result;
}

}  // namespace

void StepRun::drain_tokens(const RunContext& context) {
  std::deque<uint32_t>& expected = context.tokens.expected;
  while (!expected.empty() && receive_tokens(context, expected.front(), {0, false}) == WaitResult::Done) expected.pop_front();
}

StepRun::Status StepRun::resolve_tokens() {
  const bool is_sampler = program_.stages == 1 && program_.rank == 0;
  std::deque<uint32_t>& expected = context_.tokens.expected;
  if (!is_sampler && piece_ == 0) drain_tokens(context_);
  for (; piece_ < rows_.tokens; piece_++) {
    const size_t t = static_cast<size_t>(piece_);
    if (token_ids_[t] >= 0) continue;
    const int slot = input_.slots[static_cast<size_t>(input_.row_sequence[t])];
    const uint32_t step = static_cast<uint32_t>(input_.token_steps[t]);
    const TokenBoard::Entry& entry = context_.tokens.latest[static_cast<size_t>(slot)];
    if (entry.step != step && !is_sampler) {
      const auto at = std::find(expected.begin(), expected.end(), step);
      if (at != expected.end()) {
        const auto wait = [&](const WaitOptions& options) { return receive_tokens(context_, step, options); };
        const Status status = attempt(wait, {program_.stages - 1, 0}, "the sampled ids of", -1, &timings_.receive_us);
        if (status != Status::Done) return status;
        expected.erase(at);
      }
    }
    if (entry.step != step)
      return fail(FailureCode::Internal, where(-1) + ": row " + std::to_string(t) + " wants the token that step " + std::to_string(step) + " sampled for slot " +
                                             std::to_string(slot) + ", but that step sampled none");
    if (entry.token < 0 || entry.token >= program_.vocabulary_size)
      return fail(FailureCode::Internal, where(-1) + ": sampled id " + std::to_string(entry.token) + " is outside the vocabulary");
    token_ids_[t] = entry.token;
  }
  piece_ = 0;
  const bool samples = std::any_of(input_.outputs.begin(), input_.outputs.end(), [](const OutputRow& o) { return o.score < 0; });
  if (samples && !is_sampler) expected.push_back(input_.step);
  return Status::Done;
}

// ---------------------------------------------------------------- embedding and hidden states

StepRun::Status StepRun::gather_rows(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const int piece_rows = shard_.piece_rows(index);
  const size_t row_bytes = static_cast<size_t>(shard_.buffer(o.out).width) * 4;
  const auto owner = [&](int t) {
    int r = 0;
    while (token_ids_[static_cast<size_t>(t)] >= o.vocabulary[static_cast<size_t>(r)].to) r++;
    return r;
  };
  // Hands the device the longest runs of rows that the own rank has, or has not.
  const auto each_run = [&](int from, int to, bool own, const auto& use) {
    for (int t = from, first = from; t < to; t++) {
      if ((owner(t) == program_.rank) != own) first = t + 1;
      else if (t + 1 == to || (owner(t + 1) == program_.rank) != own) use(first, t + 1 - first);
    }
  };
  for (; piece_ * piece_rows < rows_.tokens; piece_++) {
    const int from = piece_ * piece_rows, to = std::min(rows_.tokens, from + piece_rows);
    if (device_.queues() && peer_ < 0) {
      each_run(from, to, true, [&](int first, int count) { device_.fetch_rows(o.out, first, count); });
      if (!device_.wait()) return fail_by_device();
    }
    std::array<int, kRanksMax> counts{};
    for (int t = from; t < to; t++) counts[static_cast<size_t>(owner(t))]++;
    const auto bytes_of = [&](int r) { return std::max<size_t>(4, static_cast<size_t>(counts[static_cast<size_t>(r)]) * row_bytes); };
    const auto fill = [&](uint8_t* block) {
      std::memset(block, 0, 4);
      for (int t = from; t < to; t++) {
        if (owner(t) != program_.rank) continue;
        std::memcpy(block, row(o.out, t), row_bytes);
        block += row_bytes;
      }
    };
    Payloads payloads;
    const Status status = exchange(FrameKind::Rows, index, piece_, to - from, fill, bytes_of, &payloads);
    if (status != Status::Done) return status;
    for (int t = from; t < to; t++) {
      const int r = owner(t);
      if (r == program_.rank) continue;
      std::memcpy(row(o.out, t), payloads[static_cast<size_t>(r)], row_bytes);
      payloads[static_cast<size_t>(r)] += row_bytes;
    }
    if (device_.queues()) each_run(from, to, false, [&](int first, int count) { device_.push_rows(o.out, first, count); });
  }
  piece_ = 0;
  return Status::Done;
}

// Hidden states travel in pieces of rows, as exchanges do; rows lie close together in a frame.
int StepRun::hidden_piece_rows() const { return static_cast<int>(std::max<size_t>(1, kExchangePieceBytes / (static_cast<size_t>(program_.hidden_size) * 4))); }

StepRun::Status StepRun::receive_hidden(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const PeerAddress source{program_.stage - 1, program_.rank % ranks_of(program_.stage - 1)};
  const size_t row_bytes = wire_bytes(wire_, program_.hidden_size);
  const int piece_rows = hidden_piece_rows();
  TensorLink* link = context_.links ? context_.links->from(source) : nullptr;
  if (!link) return fail(FailureCode::Internal, where(index) + ": no link from stage " + std::to_string(source.stage) + " rank " + std::to_string(source.rank));
  uint8_t* staging = reinterpret_cast<uint8_t*>(device_.staging());
  for (; piece_ * piece_rows < rows_.tokens; piece_++) {
    const int from = piece_ * piece_rows, count = std::min(piece_rows, rows_.tokens - from);
    const size_t bytes = static_cast<size_t>(count) * row_bytes;
    size_t got = 0;
    const FrameKey key{FrameKind::Hidden, input_.step, 0, static_cast<uint16_t>(piece_)};
    const auto wait = [&](const WaitOptions& options) { return link->receive(key, staging, bytes, &got, options); };
    const Status status = attempt(wait, source, "the hidden states of", index, &timings_.receive_us);
    if (status != Status::Done) return status;
    if (got != bytes) {
      failure_.has_peer = true;
      failure_.peer = source;
      return fail(FailureCode::Internal, where(index) + ": a hidden frame of " + std::to_string(got) + " bytes, expected " + std::to_string(bytes));
    }
    for (int t = 0; t < count; t++) from_wire(wire_, staging + static_cast<size_t>(t) * row_bytes, program_.hidden_size, row(o.out, from + t));
    device_.push_rows(o.out, from, count);
  }
  piece_ = 0;
  return Status::Done;
}

StepRun::Status StepRun::send_hidden(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const size_t row_bytes = wire_bytes(wire_, program_.hidden_size);
  const int piece_rows = hidden_piece_rows();
  const int pieces = (rows_.tokens + piece_rows - 1) / piece_rows, own_ranks = program_.ranks, next_ranks = ranks_of(program_.stage + 1);
  if (piece_ == 0 && peer_ < 0) {
    device_.fetch_rows(o.in, 0, rows_.tokens);
    if (!device_.check_rows(static_cast<int>(action_), o.in) || !device_.wait()) return fail_by_device();
  }
  uint8_t* staging = reinterpret_cast<uint8_t*>(device_.staging());
  if (peer_ < 0) peer_ = program_.rank;
  for (; piece_ < pieces; piece_++) {
    const int from = piece_ * piece_rows, count = std::min(piece_rows, rows_.tokens - from);
    for (int t = 0; t < count; t++) to_wire(wire_, row(o.in, from + t), program_.hidden_size, staging + static_cast<size_t>(t) * row_bytes);
    for (; peer_ < next_ranks; peer_ += own_ranks) {  // rank r of the next stage is served by rank r mod tp
      const PeerAddress peer{program_.stage + 1, peer_};
      TensorLink* link = context_.links ? context_.links->to(peer) : nullptr;
      if (!link) return fail(FailureCode::Internal, where(index) + ": no link to stage " + std::to_string(peer.stage) + " rank " + std::to_string(peer.rank));
      const FrameKey key{FrameKind::Hidden, input_.step, 0, static_cast<uint16_t>(piece_)};
      const auto wait = [&](const WaitOptions& options) { return link->send(key, count, staging, static_cast<size_t>(count) * row_bytes, options); };
      const Status status = attempt(wait, peer, "room at", index, &timings_.receive_us);
      if (status != Status::Done) return status;
    }
    peer_ = program_.rank;
  }
  piece_ = 0;
  peer_ = -1;
  return Status::Done;
}

// ---------------------------------------------------------------- reductions

// The sums go straight into the exchange when one piece holds them all and they travel as they are, else into a buffer of their own.
void StepRun::linear_partial(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  if (program_.ranks > 1 && !device_.reduces_with_peers() && wire_ == WireType::F32 && rows_.tokens <= shard_.piece_rows(index + 1)) {
    const FrameKey key{FrameKind::Reduce, input_.step, static_cast<uint16_t>(index + 1), 0};
    own_block_ = context_.links->exchange()->begin(key, shard_.own_subtrees(index).size() * static_cast<size_t>(rows_.tokens) * static_cast<size_t>(o.width) * 4);
    begun_ = own_block_ != nullptr;
  }
  device_.partial_product(index, begun_ ? own_block_ : nullptr);
}

StepRun::Status StepRun::all_reduce(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const int64_t width = shard_.buffer(o.out).width;
  std::array<const float*, kRanksMax> sums{};  // null: the own ones, as they were computed
  if (program_.ranks == 1 || device_.reduces_with_peers()) {
    device_.reduce(index, 0, rows_.tokens, sums.data());
    return Status::Done;
  }
  const int piece_rows = shard_.piece_rows(index);
  const size_t own_subtrees = shard_.own_subtrees(index).size();
  for (; piece_ * piece_rows < rows_.tokens; piece_++) {
    if (peer_ < 0 && !device_.wait()) return fail_by_device();  // own sums are here, and those of the piece before are not read any more
    const int from = piece_ * piece_rows, count = std::min(piece_rows, rows_.tokens - from);
    const size_t row_bytes = wire_bytes(wire_, width), piece_bytes = static_cast<size_t>(count) * row_bytes;
    const auto bytes_of = [&](int r) { return shard_.subtrees(index)[static_cast<size_t>(r)].size() * piece_bytes; };
    const auto fill = [&](uint8_t* block) {
      for (size_t s = 0; s < own_subtrees; s++)
        for (int t = 0; t < count; t++, block += row_bytes) to_wire(wire_, device_.partial() + (static_cast<int64_t>(s) * rows_.tokens + from + t) * width, width, block);
    };
    Payloads payloads;
    const Status status = exchange(FrameKind::Reduce, index, piece_, count, fill, bytes_of, &payloads);
    if (status != Status::Done) return status;
    if (wire_ != WireType::F32) take_from_wire(index, count, &payloads);
    for (int r = 0; r < program_.ranks; r++)
      sums[static_cast<size_t>(r)] = r == program_.rank && wire_ == WireType::F32 ? nullptr : reinterpret_cast<const float*>(payloads[static_cast<size_t>(r)]);
    device_.reduce(index, from, count, sums.data());
  }
  piece_ = 0;
  return Status::Done;
}

// Every rank's sums, the own ones included, become the fp32 values that all ranks see.
void StepRun::take_from_wire(int index, int rows, Payloads* payloads) {
  const int64_t width = shard_.buffer(program_.operations[static_cast<size_t>(index)].out).width;
  const size_t row_bytes = wire_bytes(wire_, width);
  float* out = device_.received();
  for (int r = 0; r < program_.ranks; r++) {
    const uint8_t* in = (*payloads)[static_cast<size_t>(r)];
    (*payloads)[static_cast<size_t>(r)] = reinterpret_cast<const uint8_t*>(out);
    const int64_t sums = static_cast<int64_t>(shard_.subtrees(index)[static_cast<size_t>(r)].size()) * rows;
    for (int64_t i = 0; i < sums; i++, in += row_bytes, out += width) from_wire(wire_, in, width, out);
  }
}

// ---------------------------------------------------------------- output

StepRun::Status StepRun::select_rows(const Operation& o) {
  if (tail_from_ == 0 && !device_.check_rows(static_cast<int>(action_), o.in)) return fail_by_device();
  device_.select_rows(o);
  return Status::Done;
}

namespace {

// A candidate of another rank; logits that are not finite anywhere leave no token.
void join_candidate(const uint8_t* source, Candidate* best) {
  Candidate other;
  std::memcpy(&other, source, sizeof other);
  if (other.token < 0 || (best->token >= 0 && is_better(other, *best))) *best = other;
}

}  // namespace

StepRun::Status StepRun::gather_logits(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const auto own_of = [&](int r) { return o.vocabulary[static_cast<size_t>(r)]; };
  if (piece_ == 0 && peer_ < 0) {
    const Status status = look_at_logits(o.in, own_of(program_.rank));
    if (status != Status::Done) return status;
  }
  if (program_.ranks == 1) {
    for (int r = 0; r < tail_rows_; r++)
      if (!by_candidates(r)) std::memcpy(row(o.out, r), row(o.in, r), static_cast<size_t>(shard_.buffer(o.in).width) * 4);
    return Status::Done;
  }
  const int piece_rows = shard_.piece_rows(index);
  const auto row_bytes_of = [&](int rank, int r) { return by_candidates(r) ? sizeof(Candidate) : static_cast<size_t>(own_of(rank).size()) * 4; };
  for (; piece_ * piece_rows < tail_rows_; piece_++) {
    const int from = piece_ * piece_rows, count = std::min(piece_rows, tail_rows_ - from);
    // Rank 0 needs everybody's logits or candidates, nobody needs its own: it publishes four bytes.
    const auto bytes_of = [&](int rank) {
      size_t bytes = 0;
      for (int r = from; rank != 0 && r < from + count; r++) bytes += row_bytes_of(rank, r);
      return std::max<size_t>(4, bytes);
    };
    const auto fill = [&](uint8_t* block) {
      std::memset(block, 0, 4);
      if (program_.rank == 0) return;
      for (int r = from; r < from + count; r++) {
        const size_t bytes = row_bytes_of(program_.rank, r);
        std::memcpy(block, by_candidates(r) ? static_cast<const void*>(&candidates_[static_cast<size_t>(r)]) : row(o.in, r), bytes);
        block += bytes;
      }
    };
    Payloads payloads;
    // Pieces are numbered through all passes of the tail, so that keys ascend.
    const int number = tail_from_ / shard_.output_rows() * ((shard_.output_rows() + piece_rows - 1) / piece_rows) + piece_;
    const Status status = exchange(FrameKind::Logits, index, number, count, fill, bytes_of, &payloads);
    if (status != Status::Done) return status;
    if (program_.rank != 0) continue;
    for (int r = from; r < from + count; r++) {
      const bool candidates = by_candidates(r);
      if (!candidates) std::memcpy(row(o.out, r) + own_of(0).from, row(o.in, r), static_cast<size_t>(own_of(0).size()) * 4);
      for (int rank = 1; rank < program_.ranks; rank++) {
        const size_t bytes = row_bytes_of(rank, r);
        const uint8_t*& source = payloads[static_cast<size_t>(rank)];
        if (candidates) join_candidate(source, &candidates_[static_cast<size_t>(r)]);
        else std::memcpy(row(o.out, r) + own_of(rank).from, source, bytes);
        source += bytes;
      }
    }
  }
  piece_ = 0;
  return Status::Done;
}

// Whether the best candidate of each rank tells the token of an output row, so that its logits stay where they are. With one rank that is worth a look for only where
// they would have to leave a device.
bool StepRun::by_candidates(const OutputRow& output) const {
  const bool worth = program_.ranks > 1 || device_.finds_candidates();
  return worth && output.score < 0 && output.banned.empty() && context_.slots[static_cast<size_t>(output.slot)].by_candidates();
}

// How the device looks for it.
CandidateRow StepRun::candidate_row(const StepInput& input, const OutputRow& output) const {
  const SamplingParameters& p = context_.slots[static_cast<size_t>(output.slot)].parameters();
  if (p.temperature < kTemperatureMin) return {};
  return {p.temperature, noise_key(p.seed, p.choice, sampled_position(input, output))};
}

// ---------------------------------------------------------------- the next step on the device

void StepRun::offer_next_step() {
  const StepInput* next = step_behind_ ? nullptr : context_.next_step();
  if (!next || next->step == step_offered_) return;
  step_offered_ = next->step;  // what is refused once is refused again
  if (queue_behind(*next)) step_behind_ = next->step;
}

// Gives the device the next step while this one runs there, if it needs nothing that the host has yet to make: one worker is the whole mesh, its tokens are known or those that
// candidates of this step tell, and so are those that it samples.
bool StepRun::queue_behind(const StepInput& next) {
  if (program_.stages > 1 || program_.ranks > 1 || next.outputs.empty()) return false;
  std::vector<int32_t> tokens = next.token_ids;
  for (size_t t = 0; t < tokens.size(); t++) {
    if (tokens[t] >= 0) continue;
    const int slot = next.slots[static_cast<size_t>(next.row_sequence[t])];
    const uint32_t step = static_cast<uint32_t>(next.token_steps[t]);
    const TokenBoard::Entry& entry = context_.tokens.latest[static_cast<size_t>(slot)];
    if (step == input_.step) {
      const int r = candidate_of(slot);
      if (r < 0) return false;
      tokens[t] = token_of_candidate(r);
    } else if (entry.step == step && entry.token >= 0 && entry.token < program_.vocabulary_size) {
      tokens[t] = entry.token;
    } else {
      return false;  // it fails where it is told
    }
  }
  std::vector<CandidateRow> candidates;
  for (const OutputRow& output : next.outputs) {
    if (!by_candidates(output)) return false;
    candidates.push_back(candidate_row(next, output));
  }
  std::vector<int32_t> first_row;
  return device_.queue_behind({rows_of(next, &first_row), tokens.data(), static_cast<int>(next.outputs.size()), next.outputs.data(), candidates.data()});
}

// The output row whose candidate is the token that this step samples for a slot; -1: none tells it, or the host has to choose between a row and its drafts.
int StepRun::candidate_of(int slot) const {
  int found = -1;
  for (int r = 0; r < static_cast<int>(input_.outputs.size()); r++) {
    const OutputRow& output = input_.outputs[static_cast<size_t>(r)];
    if (output.slot != slot || output.score >= 0) continue;
    if (found >= 0 || !by_candidates(output)) return -1;
    found = r;
  }
  return found;
}

// ---------------------------------------------------------------- sampling

// What the host needs of this pass's logits, which are those of tokens `own`: the best candidate where that is enough, else all.
StepRun::Status StepRun::look_at_logits(int buffer, Range own) {
  logits_here_ = true;
  candidates_.assign(static_cast<size_t>(tail_rows_), {-1, 0});
  if (!device_.queues()) {
    if (program_.ranks > 1) find_candidates(buffer, own);
    return Status::Done;
  }
  bool some = false;
  for (int r = 0; r < tail_rows_; r++) {
    if (!device_.finds_candidates() || !by_candidates(r)) {
      device_.fetch_rows(buffer, r, 1);
      continue;
    }
    some = true;
  }
  if (some) device_.find_candidates(buffer, static_cast<int32_t>(own.from));
  if (!device_.wait([this] { offer_next_step(); })) return fail_by_device();
  if (!device_.finds_candidates()) find_candidates(buffer, own);
  for (int r = 0; some && r < tail_rows_; r++)
    if (by_candidates(r)) candidates_[static_cast<size_t>(r)] = device_.candidate(r);
  return Status::Done;
}

void StepRun::find_candidates(int buffer, Range own) {
  const int64_t began = monotonic_now_ns();
  share(context_.team, tail_rows_ == 1 ? 0 : static_cast<double>(tail_rows_) * static_cast<double>(own.size()), [&](Part part) {
    for (int r = part.index; r < tail_rows_; r += part.count) {
      const float* logits = row(buffer, r);
      if (!by_candidates(r) || !kernels_.all_finite(logits, own.size())) continue;
      const OutputRow& output = output_of(r);
      candidates_[static_cast<size_t>(r)] = context_.samplers[static_cast<size_t>(part.index)].candidate(
          logits, static_cast<int32_t>(own.from), own.size(), context_.slots[static_cast<size_t>(output.slot)], sampled_position(output));
    }
  });
  timings_.sample_us += static_cast<double>(monotonic_now_ns() - began) / 1000.0;
}

// Output `index` samples behind a row of the same sequence that samples too: its own token is a draft of what that row gives.
bool StepRun::is_draft(size_t index) const {
  if (index == 0) return false;
  const OutputRow &o = input_.outputs[index], &before = input_.outputs[index - 1];
  return o.score < 0 && before.score < 0 && o.slot == before.slot;
}

StepRun::Status StepRun::sample(const Operation& o) {
  if (!logits_here_) {  // one rank: nothing was gathered
    const Status status = look_at_logits(o.in, {0, program_.vocabulary_size});
    if (status != Status::Done) return status;
  }
  const int64_t began = monotonic_now_ns();
  std::vector<SampledToken> results(static_cast<size_t>(tail_rows_));
  std::vector<RowState> states(static_cast<size_t>(tail_rows_), RowState::Done);
  chosen_.resize(input_.outputs.size(), -1);
  const auto one = [&](int r, Sampler& sampler) {
    const size_t index = static_cast<size_t>(tail_from_ + r);
    const OutputRow& output = input_.outputs[index];
    if (is_draft(index) && chosen_[index - 1] != input_.token_ids[static_cast<size_t>(output.row)]) {
      states[static_cast<size_t>(r)] = RowState::Rejected;
      return;
    }
    const float* logits = row(o.in, r);
    const bool candidates = by_candidates(r);
    if (candidates ? candidates_[static_cast<size_t>(r)].token < 0 : !kernels_.all_finite(logits, program_.vocabulary_size)) {
      states[static_cast<size_t>(r)] = RowState::NotFinite;
      return;
    }
    SlotState& state = context_.slots[static_cast<size_t>(output.slot)];
    SampledToken& result = results[static_cast<size_t>(r)];
    if (output.score >= 0) {
      result = sampler.score(logits, output.score, std::max(0, state.parameters().logprobs));
      return;
    }
    if (candidates) result.token = candidates_[static_cast<size_t>(r)].token;
    else result = sampler.sample(logits, state, sampled_position(output), output.banned.data(), output.banned.size());
    state.count(result.token);
    chosen_[index] = result.token;
  };
  // A thread takes a row with the drafts behind it: whether and how those are sampled hangs on the rows before them.
  share(context_.team, tail_rows_ == 1 ? 0 : static_cast<double>(tail_rows_) * static_cast<double>(program_.vocabulary_size), [&](Part part) {
    int turn = -1;
    for (int r = 0; r < tail_rows_; r++) {
      if (r == 0 || !is_draft(static_cast<size_t>(tail_from_ + r))) turn++;
      if (turn % part.count == part.index) one(r, context_.samplers[static_cast<size_t>(part.index)]);
    }
  });
  for (int r = 0; r < tail_rows_; r++) {
    const OutputRow& output = input_.outputs[static_cast<size_t>(tail_from_ + r)];
    if (states[static_cast<size_t>(r)] == RowState::Rejected) continue;
    if (states[static_cast<size_t>(r)] == RowState::NotFinite)
      return fail(FailureCode::NonFinite, where(-1) + ": the logits of row " + std::to_string(output.row) + " (slot " + std::to_string(output.slot) + ") are not finite");
    SampledToken& sampled = results[static_cast<size_t>(r)];
    OutputResult result{output.slot, sampled.token, sampled.has_logprob, sampled.logprob, {}};
    for (const TokenLogprob& t : sampled.top) result.top.emplace_back(t.token, t.logprob);
    outputs_.push_back(std::move(result));
    if (output.score >= 0) continue;
    // Of a row and its drafts the last sampled token is the one that later steps ask for.
    if (!is_draft(static_cast<size_t>(tail_from_ + r))) sampled_.insert(sampled_.end(), {output.slot, -1});
    sampled_.back() = sampled.token;
    if (program_.stages == 1) apply_sampled(input_.step, output.slot, sampled.token);
  }
  timings_.sample_us += static_cast<double>(monotonic_now_ns() - began) / 1000.0;
  return Status::Done;
}

StepRun::Status StepRun::send_tokens() {
  if (sampled_.empty()) return Status::Done;
  for (; piece_ < ranks_of(0); piece_++) {
    const PeerAddress peer{0, piece_};
    if (peer == self()) continue;
    TensorLink* link = context_.links ? context_.links->to(peer) : nullptr;
    if (!link) return fail(FailureCode::Internal, where(-1) + ": no link to stage 0 rank " + std::to_string(piece_));
    const auto wait = [&](const WaitOptions& options) {
      return link->send({FrameKind::Tokens, input_.step, 0, 0}, static_cast<int>(sampled_.size() / 2), sampled_.data(), sampled_.size() * 4, options);
    };
    const Status status = attempt(wait, peer, "room at", -1, &timings_.collective_us);
    if (status != Status::Done) return status;
  }
  piece_ = 0;
  return Status::Done;
}

}  // namespace shardmesh
