// What the device can run, its epochs, and a step: what is laid down for it, sent ahead, launched and waited for.
#include "cuda_device.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../runner/cuda_part.h"
#include "../runner/step_run.h"

namespace shardmesh::cuda {
namespace {

// A card that is late by its step's deadline may take so much longer before it counts as lost.
constexpr int64_t kSettleNs = 5'000'000'000;
constexpr uint32_t kNothingFound = 0xffffffffu;

}  // namespace

CudaDevice::CudaDevice(const Shard& shard) : Device(shard) {
  if (const std::string absent = find_card(&card_facts_); !absent.empty()) refuse(absent);
  queues_ = finds_candidates_ = true;
  check_program();
  try {
    tuning_.emplace(card_facts_.sm, card_facts_.name, shard.config().cuda_tuning);
    if (card_facts_.sm >= kProgrammaticEdgesSm) edges_ = tuning_->edges();
  } catch (const std::exception& error) {
    refuse(std::string(error.what()) + " (run `shardmesh tune` again, or remove its file)");
  }
  plan_attention_shapes();
  try {
    plan_memory();
  } catch (const std::runtime_error& error) {
    refuse(std::string(error.what()) + kSmallerShard);
  }
  allocate_kv();
  if (const Problem problem = open_stream(&own_stream_)) refuse(std::string("no stream: ") + problem);
  to_ = stream_ = own_stream_;
}

// What a lost card holds ends with the process; asking it to let go of it could take for ever.
CudaDevice::~CudaDevice() {
  if (problem_.lost) {
    if (group_) group_->leave(program().rank);
    return;
  }
  leave_card();
  synchronise(stream_);
  graphs_.clear();
  close_stream(own_stream_);
}

// ---------------------------------------------------------------- what it can run

void CudaDevice::check_program() const {
  const Program& p = program();
  const int D = p.kv.head_size;
  if (D != 32 && D != 64 && D != 96 && D != 128 && D != 256) refuse("the head size is " + std::to_string(D) + "; supported: 32, 64, 96, 128, 256");
  if (shard_.config().step_tokens_max > 65535) refuse("stepTokensMax is " + std::to_string(shard_.config().step_tokens_max) + "; at most 65535 are supported");
  if (shard_.actions().size() > 65534) refuse("the program has " + std::to_string(shard_.actions().size()) + " actions; at most 65534 are supported");
  for (size_t i = 0; i < p.weights.size(); i++)
    if (p.weights[i].use != WeightUse::Vector) check_matrix(static_cast<int>(i));
  for (size_t i = 0; i < p.operations.size(); i++)
    if (p.operations[i].kind == OperationKind::Rope || p.operations[i].kind == OperationKind::StoreKv) check_rope(static_cast<int>(i));
}

void CudaDevice::check_matrix(int weight) const {
  const WeightSlice& slice = program().weights[static_cast<size_t>(weight)];
  if (slice.rows.size() > 1 << 27 || slice.columns.size() > 1 << 24)
    refuse("tensor '" + slice.tensor + "' has a slice of " + std::to_string(slice.rows.size()) + " x " + std::to_string(slice.columns.size()) + "; at most 2^27 x 2^24 are supported");
}

// Rope stands where one launch can do it: rope of q, rope of k, store_kv and attention of one layer, one after the other, and nobody else reads k, which is left unrotated.
void CudaDevice::check_rope(int index) const {
  const std::vector<Operation>& all = program().operations;
  const auto is = [&](int i, OperationKind kind) { return i >= 0 && i < static_cast<int>(all.size()) && all[static_cast<size_t>(i)].kind == kind; };
  int store = index;
  while (is(store, OperationKind::Rope)) store++;
  bool fits = is(store, OperationKind::StoreKv) && is(store - 1, OperationKind::Rope) && is(store - 2, OperationKind::Rope) && !is(store - 3, OperationKind::Rope) &&
              is(store + 1, OperationKind::Attention);
  if (fits) {
    const Operation &q = operation(store - 2), &k = operation(store - 1), &kv = operation(store), &attention = operation(store + 1);
    fits = q.out == attention.in && k.out == kv.in && kv.layer == attention.layer && k.heads == program().kv.heads && q.head_size == program().kv.head_size &&
           k.head_size == program().kv.head_size && shard_.rope_table_number(store - 2) == shard_.rope_table_number(store - 1);
    for (const Operation& o : all) fits = fits && (o.kind == OperationKind::StoreKv || (o.in != kv.in && o.in2 != kv.in));
  }
  if (!fits)
    refuse("operation " + std::to_string(index) + " (" + operation_name(operation(index).kind) + ") stands alone; supported: rope of q, rope of k by the same table, store_kv and attention of one layer in a row");
}

// Nothing reads what an epoch has not written; still no epoch leaves its K and V to the next.
void CudaDevice::clear_kv() {
  synchronise(stream_);
  problem_ = {};
  behind_ = {};
  reports_sent_ = *word_host_.as<uint32_t>();
  queue(fill(arrivals_.as<void>(), 0, arrivals_.size(), stream_));
  if (kv_.size() > 0) queue(fill(kv_.as<void>(), 0, kv_.size(), stream_));
}

std::vector<PeerMemory> CudaDevice::peer_memory() {
  return peers_ ? peers_->offers() : std::vector<PeerMemory>();
}

void CudaDevice::connect_peers(const std::vector<PeerMemory>& by_rank, uint32_t epoch) {
  leave_card();
  synchronise(stream_);
  problem_ = {};
  const bool were_peers = std::exchange(reduces_with_peers_, false);
  if (!by_rank.empty() && !peers_) refuse("it has no memory for sums that other ranks read");
  if (!by_rank.empty()) {
    peers_->connect(by_rank, epoch);
    peers_->place_step(reinterpret_cast<const PeerStep*>(step_card_.as<uint32_t>() + kPeerStep));
  } else if (peers_) {
    peers_->disconnect();
  }
  reduces_with_peers_ = !by_rank.empty();
  // Their nodes hold where sums lie.
  if (!were_peers && !reduces_with_peers_ && !graphs_.empty()) return;
  build_graphs({this});
  if (reduces_with_peers_) peers_->follow({});
}

// ---------------------------------------------------------------- together with other ranks of this card

void CudaDevice::join_card(const std::string& name) {
  leave_card();
  synchronise(stream_);
  problem_ = {};
  if (!peers_) refuse("it has no memory for sums that other ranks read");
  peers_->disconnect();
  graphs_.clear();
  try {
    group_ = CardGroup::named(name, program().ranks);
    reduces_with_peers_ = true;
    to_ = stream_ = group_->stream();
    group_->join(program().rank, this, [](const Ranks& ranks) -> std::string {
      try {
        check_alike(ranks);
        build_graphs(ranks);
      } catch (const std::runtime_error& error) {
        return error.what();
      }
      return "";
    });
  } catch (const std::runtime_error&) {
    graphs_.clear();
    reduces_with_peers_ = false;
    to_ = stream_ = own_stream_;
    group_.reset();
    throw;
  }
}

// What others have queued may still read this one's sums.
void CudaDevice::leave_card() {
  if (!group_) return;
  synchronise(stream_);
  group_->leave(program().rank);
  graphs_.clear();
  reduces_with_peers_ = false;
  to_ = stream_ = own_stream_;
  group_.reset();
}

void CudaDevice::check_alike(const Ranks& ranks) {
  const auto refuse_rank = [](const CudaDevice& rank, const std::string& what) { refuse("rank " + std::to_string(rank.program().rank) + " of this card has " + what + " than rank 0"); };
  const CudaDevice& first = *ranks.front();
  for (const CudaDevice* rank : ranks) {
    if (rank->shard_.config().step_tokens_max != first.shard_.config().step_tokens_max) refuse_rank(*rank, "another stepTokensMax");
    const std::vector<Action> &all = first.shard_.actions(), &own = rank->shard_.actions();
    // Rank 0 samples, behind all that is done together.
    if (!std::equal(own.begin(), own.begin() + static_cast<std::ptrdiff_t>(std::min(own.size(), all.size())), all.begin(), [](const Action& a, const Action& b) { return a.kind == b.kind; }))
      refuse_rank(*rank, "other operations");
  }
}

// Where own sums lie for a reduction of the step, by turns in two blocks: one is written again behind the next reduction, which comes after all ranks have read it.
float* CudaDevice::sums_of(uint64_t reduction) const { return peers_->block_of(reduction % 2); }

std::string CudaDevice::fault_of(const Ranks& ranks) {
  const auto found = std::find_if(ranks.begin(), ranks.end(), [](const CudaDevice* rank) { return rank->broken(); });
  return found == ranks.end() ? "" : (*found)->problem_.fault;
}

void CudaDevice::note(const CardGroup::Outcome& outcome) {
  using Kind = CardGroup::Outcome::Kind;
  queue(nullptr);
  if (outcome.kind == Kind::Done || broken()) return;
  problem_.fault = outcome.fault;
  problem_.peer = outcome.rank;
  problem_.aborted = outcome.kind == Kind::Aborted;
  problem_.left = outcome.kind == Kind::Left;
}

// The step's actions from `action` on, which the rank that comes last does for all.
void CudaDevice::meet_ranks(size_t action, const int32_t* tokens, const CardGroup::Together& together) {
  uint64_t digest = 14695981039346656037ull;  // FNV-1a over words
  for (int t = 0; t < rows_->tokens; t++)
    for (const int32_t word : {tokens[t], rows_->positions[t]}) digest = (digest ^ static_cast<uint32_t>(word)) * 1099511628211ull;
  note(group_->meet(program().rank, {step_, action, rows_->tokens, step_outputs_, digest}, meeting_deadline_ns_, together));
}

// ---------------------------------------------------------------- a step

void CudaDevice::begin_step(uint32_t step, const StepRows& rows, int output_rows, int64_t wait_timeout_ms) {
  meeting_deadline_ns_ = monotonic_now_ns() + wait_timeout_ms * 1'000'000;
  if (group_ && !broken()) note(group_->await_ranks(program().rank, meeting_deadline_ns_));
  rows_ = &rows;
  step_ = step;
  step_outputs_ = output_rows;
  reductions_ = 0;
  // A wait for other ranks, in a kernel or in front of the launch, begins later than the step, and ends by itself.
  deadline_ns_ = monotonic_now_ns() + wait_timeout_ms * 1'000'000 * (reduces_with_peers_ ? 2 : 1);
  ahead_ = nullptr;
  sent_ = false;
  begun_ = std::exchange(behind_, {});
  StepGraphs* const graphs = begun_.graphs ? begun_.graphs : graphs_of(rows.tokens, output_rows);
  step_graphs_ = graphs;
  if (graphs) graphs->steps++;
  sum_rows_ = graphs ? graphs->rows : rows.tokens;
  if (begun_.graphs) {
    graphs->steps_behind++;
    queue(begun_.problem);
  } else if (!broken()) {
    plan_step(rows, graphs, wait_timeout_ms);
  }
}

// Null: no graph has room for the step. Rows and output rows of a decode step pad to the same number.
CudaDevice::StepGraphs* CudaDevice::graphs_of(int rows, int output_rows) {
  const auto fitting = [&](int count) { return std::find_if(graphs_.begin(), graphs_.end(), [&](const StepGraphs& g) { return g.rows >= count; }); };
  const auto found = fitting(rows);
  const bool has_tail = shard_.tail_begin() < shard_.tail_end();
  return found != graphs_.end() && (!has_tail || (output_rows > 0 && fitting(output_rows) == found)) ? &*found : nullptr;
}

// Places on the card, for a step of at most so many rows: header, rows, then for graphs tokens, selected rows and settings of the head, then each kind of attention; every list
// begins at a multiple of 16 bytes. What has no place of its own follows: block tables and attention work, which are found by numbers in here.
size_t CudaDevice::lay_out(size_t rows, size_t sequences, bool graph) {
  const uint8_t* const card = step_card_.as<uint8_t>();
  size_t at = kHeaderWords * 4;
  const auto place = [&](const auto** where, size_t count) {
    *where = reinterpret_cast<std::remove_reference_t<decltype(*where)>>(card + at);
    at = (at + count * sizeof **where + 15) / 16 * 16;
  };
  place(&device_rows_.positions, rows);
  place(&device_rows_.row_sequence, rows);
  place(&device_rows_.block_offsets, sequences);
  device_rows_.block_tables = reinterpret_cast<const int32_t*>(card);
  tokens_ = tokens_card_.as<int32_t>();
  selected_ = select_card_.as<int32_t>();
  settings_ = settings_card_.as<HeadRow>();
  if (graph) {
    place(&tokens_, rows);
    place(&selected_, rows);
    place(&settings_, rows);
  }
  for (AttentionShape& shape : shapes_) {
    place(&shape.first_slot, rows + 1);
    place(&shape.work_count, 2);
    shape.work = reinterpret_cast<const AttentionWork*>(card);
  }
  return at;
}

// Lays down what the step's kernels look up. A sequence's block table goes as far as its rows. A step that is no graph sends it at once, in one piece; of a graph's step
// tokens are still missing.
void CudaDevice::plan_step(const StepRows& rows, const StepGraphs* graphs, int64_t wait_timeout_ms) {
  const size_t T = static_cast<size_t>(rows.tokens), padded = graphs ? kGraphRowsMax : T;
  size_t at = lay_out(padded, graphs ? padded : static_cast<size_t>(rows.sequences), graphs != nullptr);
  place_ = place_ ^ 1;
  uint8_t* const host = step_host();
  const auto put = [&](const int32_t* there, const int32_t* values, int32_t padding) {
    int32_t* here = on_host(there);
    std::memcpy(here, values, T * 4);
    std::fill(here + T, here + padded, padding);
  };
  int32_t* const header = reinterpret_cast<int32_t*>(host);
  header[kLeast] = static_cast<int32_t>(kNothingFound);
  header[kLiveRows] = rows.tokens;
  header[kLiveOutputs] = 0;
  if (spins_with_peers()) {
    const PeerStep record = peers_->begin_step(wait_timeout_ms, stream_);
    std::memcpy(header + kPeerStep, &record, sizeof record);
    if (graphs) peers_->follow(graphs->reductions);
  }
  device_rows_.tokens = rows.tokens;
  put(device_rows_.positions, rows.positions, 0);
  put(device_rows_.row_sequence, rows.row_sequence, -1);
  int32_t* const offsets = on_host(device_rows_.block_offsets);
  for (int s = 0; s < rows.sequences; s++) {
    const size_t needed = static_cast<size_t>(rows.positions[rows.first_row[s + 1] - 1] / shard_.config().block_tokens + 1);
    offsets[s] = static_cast<int32_t>(at / 4);
    std::memcpy(host + at, rows.block_tables + rows.block_offsets[s], needed * 4);
    at += needed * 4;
  }
  const int whole_pairs_max = has_integer_kv() ? kWholePairsMax : kHalfPairsMax;
  for (AttentionShape& shape : shapes_) {
    plan_attention(rows, shape.host_runs, shape.like->window, {shape.tuning.split_rows_max, slots_, graphs && fuses(graphs->rows), whole_pairs_max}, &shape.plan);
    const std::vector<AttentionWork>& work = shape.plan.work;
    at = (at + 15) / 16 * 16;
    std::memcpy(host + at, work.data(), work.size() * sizeof work[0]);
    int32_t* const count = on_host(shape.work_count);
    count[0] = static_cast<int32_t>(work.size());
    count[1] = static_cast<int32_t>(at / sizeof work[0]);
    at += work.size() * sizeof work[0];
    put(shape.first_slot, shape.plan.first_slot.data(), shape.plan.first_slot[T]);
    on_host(shape.first_slot)[padded] = shape.plan.first_slot[T];
  }
  step_bytes_ = at;
  if (!graphs) queue(copy_to_card(step_card_.as<void>(), host, at, stream_));
}

// Completes what a graph's step needs to know, and sends it.
Problem CudaDevice::send_step(const StepBehind& step) {
  int32_t *const ids = on_host(tokens_), *const which = on_host(selected_);
  HeadRow* const settings = on_host(settings_);
  for (int r = 0; r < kGraphRowsMax; r++) {
    ids[r] = r < step.rows.tokens ? step.tokens[r] : -1;
    const bool selected = r < step.output_rows;
    which[r] = selected ? step.outputs[r].row : 0;
    settings[r] = selected ? HeadRow{step.candidates[r].temperature, step.candidates[r].key.low, step.candidates[r].key.high} : HeadRow{};
  }
  reinterpret_cast<int32_t*>(step_host())[kLiveOutputs] = step.output_rows;
  return copy_to_card(step_card_.as<void>(), step_host(), step_bytes_, stream_);
}

size_t CudaDevice::run_ahead(size_t action, const int32_t* tokens) {
  if (broken()) return action;
  if (!step_graphs_) {
    const size_t end = group_ ? piece_end(action, false) : action;
    if (end == action) return action;
    if (program().stage == 0) send_tokens(tokens);
    meet_ranks(action, tokens, [&](const Ranks& ranks) {
      run_actions(ranks, action, end, nullptr, nullptr);
      return fault_of(ranks);
    });
    return end;
  }
  const auto found = std::find_if(step_graphs_->pieces.begin(), step_graphs_->pieces.end(), [&](const Piece& p) { return p.begin == action; });
  if (found == step_graphs_->pieces.end()) return action;
  if (!begun_.graphs) {
    if (!std::exchange(sent_, true)) queue(send_step({*rows_, tokens, tail_rows_, outputs_, candidate_rows_}));
    const auto launch = [&] { return launch_graph(found->graph.get(), stream_); };
    if (!broken() && !group_) queue(launch());
    if (!broken() && group_)
      meet_ranks(action, tokens, [&](const Ranks&) {
        const Problem problem = launch();
        return std::string(problem ? problem : "");
      });
  }
  ahead_ = &*found;
  if (found->reports) {
    report_ = report_of_candidates_ = begun_.graphs ? begun_.report : ++reports_sent_;
    reported_ = true;
  }
  return found->end;
}

// One graph behind another: what the first has reported lies in its own place, and what tells the second its tokens stays on the card until its first node is done.
bool CudaDevice::queue_behind(const StepBehind& step) {
  if (broken() || behind_.graphs) return false;
  StepGraphs* const graphs = graphs_of(step.rows.tokens, step.output_rows);
  if (!graphs || !graphs->is_whole()) return false;
  plan_step(step.rows, graphs, 0);
  Problem problem = send_step(step);
  if (!problem) problem = launch_graph(graphs->pieces[0].graph.get(), stream_);
  behind_ = {graphs, ++reports_sent_, problem};
  return true;
}

void CudaDevice::report() {
  queue(send_report({step_card_.as<uint32_t>() + kLeast, candidates_.as<cuda::Candidate>(), reported_candidates_, began_.as<uint64_t>(), times_host_.as<StepTimes>(),
                     least_host_.as<uint32_t>(), candidates_host_.as<cuda::Candidate>(), report_rows(), reports_.as<uint32_t>(), word_host_.as<uint32_t>()},
                    to_));
  reported_candidates_ = 0;
}

// After a fault: the host may use again what the card was given; and whether only a new process has a card again.
void CudaDevice::give_up() {
  if (problem_.lost) return;
  const bool settled = settles(stream_, monotonic_now_ns() + kSettleNs, shard_.config().spin);
  const std::string why = settled ? lost_card() : problem_.fault;
  if (why.empty()) return;
  problem_.lost = true;
  abandon_card();
  problem_.fault = "the card (" + card_facts_.name + ") does nothing more for this process: " + why;
}

bool CudaDevice::wait(const std::function<void()>& meanwhile) {
  if (!waited_) {
    const bool can_queue = reported_ && step_graphs_ && step_graphs_->is_whole();
    if (!broken() && !reported_) {
      report_ = ++reports_sent_;
      if (reported_candidates_ > 0) report_of_candidates_ = report_;
      report();
    }
    if (!broken()) queue(wait_for(word_host_.as<uint32_t>(), report_, stream_, deadline_ns_, shard_.config().spin, can_queue ? meanwhile : nullptr));
    if (broken()) give_up();
    waited_ = true;
    const StepTimes& times = times_host_.as<StepTimes>()[report_ % kReportPlaces];
    idle_us_ = begun_.graphs && times.began > card_ended_ns_ ? static_cast<double>(times.began - card_ended_ns_) / 1000.0 : 0;
    card_ended_ns_ = times.ended;
    const uint32_t found = least_host_.as<uint32_t>()[report_ % kReportPlaces];
    if (spins_with_peers() && !problem_.lost) {
      const PeerDriver::Fault fault = peers_->fault();
      if (fault.kind != PeerFault::None) {
        problem_ = {};
        problem_.peer = fault.rank;
        problem_.reduction = fault.operation;
        problem_.aborted = fault.kind == PeerFault::Aborted;
        return false;
      }
    }
    if (!broken() && found != kNothingFound) problem_ = {static_cast<int>(found >> 16), static_cast<int>(found & 0xffff), ""};
  }
  return !broken() && problem_.action < 0 && problem_.peer < 0;
}

shardmesh::Candidate CudaDevice::candidate(int r) const {
  const size_t place = report_of_candidates_ % kReportPlaces;
  const cuda::Candidate& found = candidates_host_.as<cuda::Candidate>()[place * static_cast<size_t>(report_rows()) + static_cast<size_t>(r)];
  return {found.token, found.value};
}

}  // namespace shardmesh::cuda

namespace shardmesh {

CudaFacts cuda_facts() {
  CudaFacts facts;
  cuda::Card card{};
  facts.absent = cuda::find_card(&card);
  if (facts.absent.empty()) {
    facts.name = card.name;
    facts.sm = card.sm;
    facts.memory_bytes = card.memory_bytes;
    facts.multiprocessors = card.multiprocessors;
    facts.bandwidth_bytes = card.bandwidth_bytes;
    facts.power_watts = card.power_watts;
    facts.driver = card.driver;
  }
  return facts;
}

std::unique_ptr<Device> make_cuda_device(const Shard& shard) { return std::make_unique<cuda::CudaDevice>(shard); }

}  // namespace shardmesh
