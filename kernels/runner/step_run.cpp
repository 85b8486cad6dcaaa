#include "step_run.h"

#include <time.h>

#include <algorithm>
#include <cstring>

namespace shardmesh {
namespace {

constexpr int64_t kFirstTryNs = 100'000;     // spin of a first try, when spinning is allowed
constexpr double kShareCost = 30'000;        // below this many operations a second thread costs more than it brings

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
    case ActionKind::SelectRows: return "select rows";
    case ActionKind::GatherLogits: return "gather logits";
    case ActionKind::Sample: return "sample";
    case ActionKind::SendTokens: return "send tokens";
  }
  return "action";
}

// What sampling found of an output row; rejected: the row before it gave another token than this row's own.
enum class RowState : uint8_t { Done, Rejected, NotFinite };

}  // namespace

int64_t monotonic_now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

StepRun::StepRun(const RunContext& context, const StepInput& input)
    : context_(context), shard_(context.shard), program_(context.shard.program()), kernels_(context.shard.kernels()), wire_(context.shard.config().wire), input_(input), token_ids_(input.token_ids) {
  const int tokens = static_cast<int>(input.positions.size()), sequences = static_cast<int>(input.slots.size());
  first_row_.assign(static_cast<size_t>(sequences) + 1, tokens);
  for (int t = tokens; t-- > 0;) first_row_[static_cast<size_t>(input.row_sequence[static_cast<size_t>(t)])] = t;
  rows_ = {tokens, input.positions.data(), input.row_sequence.data(), sequences, first_row_.data(), input.block_table_offsets.data(), input.block_tables.data()};
  failure_.step = input.step;
  tail_rows_ = std::min<int>(shard_.output_rows(), static_cast<int>(input.outputs.size()));
}

StepRun::Status StepRun::advance(bool block) {
  block_ = block;
  while (action_ < shard_.actions().size()) {
    if (context_.aborted.load(std::memory_order_relaxed)) return fail(FailureCode::Aborted, "step " + std::to_string(input_.step) + " was aborted");
    if (action_ == shard_.tail_begin() && tail_rows_ == 0) {  // no output rows
      action_ = shard_.tail_end();
      continue;
    }
    const Action& action = shard_.actions()[action_];
    if (context_.trace && action_began_ns_ == 0) action_began_ns_ = monotonic_now_ns();
    const Status status = run_action(action);
    if (status != Status::Done) return status;
    if (context_.trace) {
      span(action_name(action.kind), action_began_ns_);
      action_began_ns_ = 0;
    }
    action_++;
    const bool tail_ended = action_ == shard_.tail_end() && tail_rows_ > 0 && shard_.tail_begin() < shard_.tail_end();
    if (tail_ended) {
      const int done = tail_from_ + tail_rows_, left = static_cast<int>(input_.outputs.size()) - done;
      tail_from_ = done;
      tail_rows_ = std::min(shard_.output_rows(), left);
      if (tail_rows_ > 0) action_ = shard_.tail_begin();
    }
  }
  return Status::Done;
}

StepDone StepRun::take_result() {
  return {input_.step, std::move(outputs_), timings_, 0, 0, std::move(spans_)};
}

StepRun::Status StepRun::run_action(const Action& action) {
  static const Operation none{};
  const Operation& o = action.operation < 0 ? none : program_.operations[static_cast<size_t>(action.operation)];
  switch (action.kind) {
    case ActionKind::ResolveTokens: return resolve_tokens();
    case ActionKind::Embed: embed(o); return Status::Done;
    case ActionKind::GatherRows: return gather_rows(action.operation);
    case ActionKind::ReceiveHidden: return receive_hidden(action.operation);
    case ActionKind::SendHidden: return send_hidden(action.operation);
    case ActionKind::RmsNorm: norm(o); return Status::Done;
    case ActionKind::Quantize: return quantize(action.operation, action.buffer);
    case ActionKind::Linear: linear(action); return Status::Done;
    case ActionKind::LinearPartial: linear_partial(action.operation); return Status::Done;
    case ActionKind::AllReduce: return all_reduce(action.operation);
    case ActionKind::Rope: rope(action.operation); return Status::Done;
    case ActionKind::StoreKv: return store_kv(action.operation);
    case ActionKind::Attention: attention(o); return Status::Done;
    case ActionKind::GatedActivation: gated_activation(o); return Status::Done;
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
  if (result == WaitResult::Done) return Status::Done;
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

template <typename Work>
void StepRun::share(double cost, const Work& work) {
  if (cost < kShareCost) work(Part{0, 1});
  else context_.team.run(work);
}

int StepRun::rows_of(int buffer) const { return program_.buffers[static_cast<size_t>(buffer)].per_output ? tail_rows_ : rows_.tokens; }

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

void StepRun::embed(const Operation& o) {
  const Range own = o.vocabulary[static_cast<size_t>(program_.rank)];
  const PackedMatrix& matrix = shard_.matrix(o.weight);
  share(static_cast<double>(rows_.tokens) * static_cast<double>(matrix.columns), [&](Part part) {
    for (int t = part.index; t < rows_.tokens; t += part.count) {
      const int64_t token = token_ids_[static_cast<size_t>(t)];
      if (token >= own.from && token < own.to) kernels_.read_row(matrix, token - own.from, row(o.out, t));
    }
  });
}

StepRun::Status StepRun::gather_rows(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const int piece_rows = shard_.piece_rows(index);
  const size_t row_bytes = static_cast<size_t>(shard_.buffer(o.out).width) * 4;
  const auto owner = [&](int t) {
    int r = 0;
    while (token_ids_[static_cast<size_t>(t)] >= o.vocabulary[static_cast<size_t>(r)].to) r++;
    return r;
  };
  for (; piece_ * piece_rows < rows_.tokens; piece_++) {
    const int from = piece_ * piece_rows, to = std::min(rows_.tokens, from + piece_rows);
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
  uint8_t* staging = reinterpret_cast<uint8_t*>(shard_.partial());
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
  }
  piece_ = 0;
  return Status::Done;
}

StepRun::Status StepRun::send_hidden(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const size_t row_bytes = wire_bytes(wire_, program_.hidden_size);
  const int piece_rows = hidden_piece_rows();
  const int pieces = (rows_.tokens + piece_rows - 1) / piece_rows, own_ranks = program_.ranks, next_ranks = ranks_of(program_.stage + 1);
  for (int t = 0; piece_ == 0 && peer_ < 0 && t < rows_.tokens; t++)
    if (!kernels_.all_finite(row(o.in, t), program_.hidden_size))
      return fail(FailureCode::NonFinite, where(index) + ": the hidden state of row " + std::to_string(t) + " is not finite");
  uint8_t* staging = reinterpret_cast<uint8_t*>(shard_.partial());
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

// ---------------------------------------------------------------- compute

void StepRun::norm(const Operation& o) {
  const Buffer& in = shard_.buffer(o.in);
  const Buffer& out = shard_.buffer(o.out);
  const int rows = rows_of(o.in);
  share(rows == 1 ? 0 : 2.0 * rows * static_cast<double>(in.width), [&](Part part) {
    kernels_.rms_norm(in.data, in.stride, shard_.vector(o.weight), o.epsilon, in.width, rows, out.data, out.stride, part);
  });
}

void StepRun::check_finite(int buffer, Part part, std::atomic<bool>* bad) const {
  const int rows = rows_of(buffer);
  for (int t = part.index; t < rows; t += part.count)
    if (!kernels_.all_finite(row(buffer, t), shard_.buffer(buffer).width)) bad->store(true, std::memory_order_relaxed);
}

StepRun::Status StepRun::quantize(int index, int buffer) {
  const Buffer& b = shard_.buffer(buffer);
  const Activations in{b.data, b.stride, rows_of(buffer), b.width, b.quantized, program_.activations};
  std::atomic<bool> bad{false};
  share(4.0 * in.tokens * static_cast<double>(b.width), [&](Part part) {
    check_finite(buffer, part, &bad);
    kernels_.quantize_activations(in, part);
  });
  if (bad) return fail(FailureCode::NonFinite, where(index) + ": its input '" + program_.buffers[static_cast<size_t>(buffer)].name + "' is not finite");
  return Status::Done;
}

void StepRun::linear(const Action& action) {
  double cost = 0;
  for (const int index : action.products) {
    const PackedMatrix& m = shard_.matrix(program_.operations[static_cast<size_t>(index)].weight);
    cost += static_cast<double>(m.rows) * static_cast<double>(m.columns);
  }
  share(cost, [&](Part part) {
    for (const int index : action.products) {
      const Operation& o = program_.operations[static_cast<size_t>(index)];
      const Buffer& in = shard_.buffer(o.in);
      const Buffer& out = shard_.buffer(o.out);
      const Subtree whole{0, static_cast<int>(o.segments.size())};
      const LinearArguments arguments{&shard_.matrix(o.weight), {in.data, in.stride, rows_of(o.in), in.width, in.quantized, program_.activations}, whole.count, o.segments.data(), 1, &whole,
                                      shard_.vector(o.bias), out.data, out.stride, 0};
      kernels_.linear(arguments, part);
    }
  });
}

// The sums go straight into the exchange when one piece holds them all and they travel as they are, else into a buffer of their own.
void StepRun::linear_partial(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const Buffer& in = shard_.buffer(o.in);
  Subtree subtrees[kSegmentsMax];
  size_t count = 0;
  for (const Subtree& s : shard_.subtrees(index)[static_cast<size_t>(program_.rank)])
    subtrees[count++] = {s.first - static_cast<int>(o.cut.ranks[static_cast<size_t>(program_.rank)].from), s.count};
  partial_ = shard_.partial();
  if (program_.ranks > 1 && wire_ == WireType::F32 && rows_.tokens <= shard_.piece_rows(index + 1)) {
    const FrameKey key{FrameKind::Reduce, input_.step, static_cast<uint16_t>(index + 1), 0};
    own_block_ = context_.links->exchange()->begin(key, count * static_cast<size_t>(rows_.tokens) * static_cast<size_t>(o.width) * 4);
    if (own_block_) {
      partial_ = reinterpret_cast<float*>(own_block_);
      begun_ = true;
    }
  }
  partial_subtree_stride_ = rows_.tokens * o.width;
  const LinearArguments arguments{&shard_.matrix(o.weight), {in.data, in.stride, rows_.tokens, in.width, in.quantized, program_.activations}, static_cast<int>(o.segments.size()),
                                  o.segments.data(), static_cast<int>(count), subtrees, nullptr, partial_, o.width, partial_subtree_stride_};
  share(static_cast<double>(o.width) * static_cast<double>(in.width), [&](Part part) { kernels_.linear(arguments, part); });
}

StepRun::Status StepRun::all_reduce(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const int64_t width = shard_.buffer(o.out).width;
  if (program_.ranks == 1) {
    Payloads payloads{};
    payloads[0] = reinterpret_cast<const uint8_t*>(partial_);
    finish_reduction(index, 0, rows_.tokens, payloads);
    return Status::Done;
  }
  const int piece_rows = shard_.piece_rows(index);
  const size_t own_subtrees = shard_.subtrees(index)[static_cast<size_t>(program_.rank)].size();
  for (; piece_ * piece_rows < rows_.tokens; piece_++) {
    const int from = piece_ * piece_rows, count = std::min(piece_rows, rows_.tokens - from);
    const size_t row_bytes = wire_bytes(wire_, width), piece_bytes = static_cast<size_t>(count) * row_bytes;
    const auto bytes_of = [&](int r) { return shard_.subtrees(index)[static_cast<size_t>(r)].size() * piece_bytes; };
    const auto fill = [&](uint8_t* block) {
      for (size_t s = 0; s < own_subtrees; s++)
        for (int t = 0; t < count; t++, block += row_bytes) to_wire(wire_, partial_ + static_cast<int64_t>(s) * partial_subtree_stride_ + (from + t) * width, width, block);
    };
    Payloads payloads;
    const Status status = exchange(FrameKind::Reduce, index, piece_, count, fill, bytes_of, &payloads);
    if (status != Status::Done) return status;
    if (wire_ != WireType::F32) take_from_wire(index, count, &payloads);
    finish_reduction(index, from, count, payloads);
  }
  piece_ = 0;
  return Status::Done;
}

// Every rank's sums, the own ones included, become the fp32 values that all ranks see.
void StepRun::take_from_wire(int index, int rows, Payloads* payloads) {
  const int64_t width = shard_.buffer(program_.operations[static_cast<size_t>(index)].out).width;
  const size_t row_bytes = wire_bytes(wire_, width);
  float* out = shard_.received();
  for (int r = 0; r < program_.ranks; r++) {
    const uint8_t* in = (*payloads)[static_cast<size_t>(r)];
    (*payloads)[static_cast<size_t>(r)] = reinterpret_cast<const uint8_t*>(out);
    const int64_t sums = static_cast<int64_t>(shard_.subtrees(index)[static_cast<size_t>(r)].size()) * rows;
    for (int64_t i = 0; i < sums; i++, in += row_bytes, out += width) from_wire(wire_, in, width, out);
  }
}

// Finishes the tree for rows [first_row, first_row + rows); payloads[r] holds the subtrees of rank r, [subtree][rows][width].
void StepRun::finish_reduction(int index, int first_row, int rows, const Payloads& payloads) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const Buffer& residual = shard_.buffer(o.out);
  int lo[kSegmentsMax], hi[kSegmentsMax], count = 0;
  const float* nodes[kSegmentsMax];
  int64_t strides[kSegmentsMax];
  for (int r = 0; r < program_.ranks; r++) {
    const float* values = reinterpret_cast<const float*>(payloads[static_cast<size_t>(r)]);
    for (const Subtree& s : shard_.subtrees(index)[static_cast<size_t>(r)]) {
      lo[count] = s.first;
      hi[count] = s.first + s.count;
      nodes[count] = values;
      strides[count] = residual.width;
      values += rows * residual.width;
      count++;
    }
  }
  share(static_cast<double>(rows) * static_cast<double>(residual.width) * (count + 1), [&](Part part) {
    kernels_.finish_tree(o.cut.units, count, lo, hi, nodes, strides, shard_.vector(o.bias), residual.data + first_row * residual.stride, residual.stride, residual.width,
                         rows, part);
  });
}

void StepRun::rope(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const Buffer& b = shard_.buffer(o.out);
  const RopeTable table = shard_.rope_table(index);
  share(rows_.tokens == 1 ? 0 : 4.0 * rows_.tokens * static_cast<double>(b.width),
        [&](Part part) { kernels_.rope(b.data, b.stride, o.heads, o.head_size, table, rows_, part); });
}

StepRun::Status StepRun::store_kv(int index) {
  const Operation& o = program_.operations[static_cast<size_t>(index)];
  const Buffer& k = shard_.buffer(o.in);
  const Buffer& v = shard_.buffer(o.in2);
  std::atomic<bool> bad{false};
  share(8.0 * rows_.tokens * static_cast<double>(k.width), [&](Part part) {
    check_finite(o.in, part, &bad);
    check_finite(o.in2, part, &bad);
    kernels_.store_kv(k.data, k.stride, v.data, v.stride, shard_.kv_layout(), shard_.kv_layer(o.layer), rows_, part);
  });
  if (bad) return fail(FailureCode::NonFinite, where(index) + ": k or v is not finite");
  return Status::Done;
}

void StepRun::attention(const Operation& o) {
  const Buffer& q = shard_.buffer(o.in);
  const Buffer& out = shard_.buffer(o.out);
  double keys = 0;
  for (int t = 0; t < rows_.tokens; t++) keys += rows_.positions[t] + 1;
  share(keys * static_cast<double>(q.width), [&](Part part) {
    const AttentionArguments arguments{q.data, q.stride, out.data, out.stride, o.heads, o.kv_head.data(), static_cast<float>(o.scale), o.window, &shard_.kv_layout(),
                                       shard_.kv_layer(o.layer), &rows_, shard_.attention_scratch(part.index)};
    kernels_.attention(arguments, part);
  });
}

void StepRun::gated_activation(const Operation& o) {
  const Buffer& gate = shard_.buffer(o.in);
  const Buffer& up = shard_.buffer(o.in2);
  const Buffer& out = shard_.buffer(o.out);
  const int rows = rows_of(o.in);
  share(16.0 * rows * static_cast<double>(gate.width), [&](Part part) {
    kernels_.gated_activation(gate.data, gate.stride, up.data, up.stride, gate.width, rows, o.activation, out.data, out.stride, part);
  });
}

// ---------------------------------------------------------------- output

StepRun::Status StepRun::select_rows(const Operation& o) {
  const int64_t width = shard_.buffer(o.in).width;
  for (int t = 0; tail_from_ == 0 && t < rows_.tokens; t++)
    if (!kernels_.all_finite(row(o.in, t), width)) return fail(FailureCode::NonFinite, where(-1) + ": the hidden state of row " + std::to_string(t) + " is not finite");
  for (int r = 0; r < tail_rows_; r++)
    std::memcpy(row(o.out, r), row(o.in, input_.outputs[static_cast<size_t>(tail_from_ + r)].row), static_cast<size_t>(width) * 4);
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
  if (program_.ranks == 1) {
    for (int t = 0; t < tail_rows_; t++) std::memcpy(row(o.out, t), row(o.in, t), static_cast<size_t>(shard_.buffer(o.in).width) * 4);
    return Status::Done;
  }
  if (piece_ == 0 && peer_ < 0) find_candidates(o);
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

// Whether the best candidate of each rank tells the token of row r of this pass, so that its logits stay where they are.
bool StepRun::by_candidates(int r) const {
  const OutputRow& output = output_of(r);
  return program_.ranks > 1 && output.score < 0 && output.banned.empty() && context_.slots[static_cast<size_t>(output.slot)].by_candidates();
}

// Of the own part of the vocabulary.
void StepRun::find_candidates(const Operation& o) {
  const int64_t began = monotonic_now_ns();
  const Range own = o.vocabulary[static_cast<size_t>(program_.rank)];
  candidates_.assign(static_cast<size_t>(tail_rows_), {-1, 0});
  share(tail_rows_ == 1 ? 0 : static_cast<double>(tail_rows_) * static_cast<double>(own.size()), [&](Part part) {
    for (int r = part.index; r < tail_rows_; r += part.count) {
      const float* logits = row(o.in, r);
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
  share(tail_rows_ == 1 ? 0 : static_cast<double>(tail_rows_) * static_cast<double>(program_.vocabulary_size), [&](Part part) {
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
