// The device that is a card: operations become launches on one stream, and the host waits where it needs what they made: in front of an exchange, a hand-over to the next
// stage, sampling, and the end of a step. All memory is planned when the executor is made; a step allocates none on the card, and on the host only what vectors keep.
//
// A decode step of at most kGraphRowsMax rows is a graph, or several where the host must act in between: built once for each number of rows in kGraphRows from the same
// operations as every other step, since a graph that is being built takes launches like a stream. A step takes the next larger graph; the rows that it lacks are marked as
// such in what it sends ahead, which is also all that differs from step to step. The host then waits for one word (report.cu).
//
// Weights lie packed on the card (weight_layout.h), the embedding too: tokens travel, rows do not. A step's rows, block tables and attention work go over as one copy.
// Rope of q and k and the store into the cache are one launch, at the place of store_kv; so are a norm or activation and the quantising of what it makes. In graphs of at most
// kFusedTokensMax rows a layer is five launches: q, k, v with rope and store; attention with its join; o with the residual and the next norm; gate and up with the activation; down
// like o (fuse).
#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "../runner/cuda_part.h"
#include "../runner/device.h"
#include "../runner/step_run.h"
#include "attention_plan.h"
#include "operations.h"
#include "peer_driver.h"
#include "runtime.h"
#include "tuning.h"
#include "weight_layout.h"

namespace shardmesh {
namespace {

using namespace cuda;

// Above these the prefill products of float weights take over from the decode products; either gives the same bits.
constexpr int kFloatDecodeTokensMax = 16, kBf16DecodeTokensMax = 64;
constexpr int kSlotsMax = 4096;
constexpr int kHalfAttentionBlocks = 3;  // of a multiprocessor, where K or V is f16
// A card that is late by its step's deadline may take so much longer before it counts as lost.
constexpr int64_t kSettleNs = 5'000'000'000;
constexpr uint32_t kNothingFound = 0xffffffffu;
// Rows of the graphs of decode steps.
constexpr int kGraphRows[] = {1, 2, 4, 8, 12, 16, 24, 32, 48, 64};
constexpr int kGraphRowsMax = 64;

constexpr const char* kSmallerShard = "; cut the model over more workers, or take a smaller one";

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("executor kind 'cuda': " + what); }

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const Shard& shard);
  ~CudaDevice() override;

  const char* name() const override { return "cuda"; }
  size_t bytes() const override;
  WeightReport load_matrix(int weight, const MatrixSource& source) override;
  void finish_loading() override;
  void clear_kv() override;
  std::vector<PeerMemory> peer_memory() override;
  void connect_peers(const std::vector<PeerMemory>& by_rank, uint32_t epoch) override;
  void abort() override {
    if (peers_) peers_->abort();
  }
  void fetch_rows(int buffer, int first, int count) override;
  void push_rows(int buffer, int first, int count) override;
  void begin_step(const StepRows& rows, int output_rows, int64_t wait_timeout_ms) override;
  size_t run_ahead(size_t action, const int32_t* tokens) override;
  bool wait() override;
  void embed(const Operation& o, const int32_t* tokens) override;
  void norm(const Operation& o) override;
  bool quantize(int action, int buffer) override;
  bool store_kv(int action, const Operation& o) override;
  bool check_rows(int action, int buffer) override;
  bool norm_quantized(int action, const Operation& o) override;
  bool activation_quantized(int action, const Operation& o) override;
  void products(const std::vector<int>& operations) override;
  void partial_product(int index, uint8_t* block) override;
  void reduce(int index, int first_row, int rows, const float* const* sums) override;
  void rope(int) override {}  // with store_kv
  void attention(const Operation& o) override;
  void gated_activation(const Operation& o) override;
  void select_rows(const Operation& o) override;
  void find_candidates(int buffer, int32_t first_token) override;
  shardmesh::Candidate candidate(int r) const override;
  std::vector<GraphFacts> graphs() const override;

 private:
  struct CardMatrix {
    Memory data;
    int phase = 0;
    ProductTuning tuning{};
  };
  struct CardBuffer {
    Memory values, groups, bf16;  // groups: its quantised form; bf16: rounded to bf16, of what a bf16 product reads
    bool only_groups = true;  // nobody reads the values
    float* row(int64_t stride, int r) const { return values.as<float>() + r * stride; }
  };
  struct Table {
    Memory cosine, sine;
  };
  // Attention operations that read the same heads through the same window share a plan.
  struct AttentionShape {
    const Operation* like;
    std::vector<HeadRun> host_runs;
    AttentionTuning tuning;
    Memory runs;
    AttentionPlan plan;
    const int32_t* first_slot = nullptr;  // on the card, of this step
    const AttentionWork* work = nullptr;
    const int32_t* work_count = nullptr;
  };

  // Actions [begin, end) as a graph; what the card does of action `end`, which is the host's, is in it too.
  struct Piece {
    size_t begin, end;
    Graph graph;
    bool reports;
  };
  struct StepGraphs {
    int rows;
    std::vector<Piece> pieces;
    uint64_t steps = 0;
    std::vector<int> reductions = {};  // by exchange with peers
  };

  const Program& program() const { return shard_.program(); }
  const Operation& operation(int index) const { return program().operations[static_cast<size_t>(index)]; }
  const CardBuffer& card(int buffer) const { return buffers_[static_cast<size_t>(buffer)]; }
  float* values(int buffer, int r = 0) const { return card(buffer).row(shard_.buffer(buffer).stride, r); }
  const float* vector(int weight) const { return weight < 0 ? nullptr : vectors_[static_cast<size_t>(weight)].as<float>(); }
  ActivationTiles groups(int buffer) const { return {card(buffer).groups.as<ActivationGroup>(), program().activations}; }
  // Of a buffer's rows; in a graph only those that the step has.
  FiniteCheck check_of(size_t action, int buffer) const { return check_of(static_cast<int>(action), buffer); }
  FiniteCheck check_of(int action, int buffer) const {
    return {step_card_.as<uint32_t>() + kLeast, static_cast<uint32_t>(action) << 16,
            building_ ? step_card_.as<int32_t>() + (shard_.buffer(buffer).per_output ? kLiveOutputs : kLiveRows) : nullptr};
  }

  void check_program() const;
  void check_matrix(int weight) const;
  void check_rope(int index) const;
  void plan_memory();
  void plan_attention_shapes();
  const AttentionShape& shape_of(const Operation& o) const;
  size_t lay_out(size_t rows, size_t sequences, bool graph);
  void plan_step(const StepRows& rows, int64_t wait_timeout_ms);
  // What the host lays down for a place of the step's piece on the card.
  template <typename V>
  V* on_host(const V* there) const { return reinterpret_cast<V*>(step_host_.as<uint8_t>() + (reinterpret_cast<const uint8_t*>(there) - step_card_.as<uint8_t>())); }
  void send_step(const int32_t* tokens);
  bool is_device_only(ActionKind kind) const;
  void build_graphs();
  void close_graphs();
  void build(StepGraphs* graphs);
  void run_action(size_t action);
  RopeStore rope_store(int action, const Operation& o);
  uint8_t* kv_layer(int layer) const;
  AttentionStep attention_step(const Operation& o) const;
  size_t fuse(size_t action);
  FusedProducts fused(Then then, const std::vector<int>& operations, size_t action);
  bool are_quantized(const std::vector<int>& operations) const;
  bool norms(size_t index) const;
  NormAfter norm_after(size_t action, int first_row) const;
  bool fuses(int rows) const {
    const Program& p = program();
    return rows <= kFusedTokensMax && p.activations == ActivationType::Int8 && p.kv.key == KeyType::Int8 && p.kv.value == ValueType::Int8;
  }
  const Action* action_of(size_t index, ActionKind kind) const;
  void look_up(const Operation& o);
  bool run_ahead_of_host(const Action& action);
  void report();
  void give_up();
  void allocate_kv();
  float* sums() const { return peers_ ? peers_->block() : sums_.as<float>(); }
  void reduce_with_peers(int index);

  // Takes note of what a launch or copy answered. After the first fault nothing is queued.
  void queue(Problem problem) {
    waited_ = reported_ = false;
    if (problem && problem_.fault.empty()) problem_.fault = problem;
  }
  bool broken() const { return !problem_.fault.empty(); }
  // Whether the graph that was launched last did operation `index`, whose host part comes now.
  bool is_ahead(int index) const { return !building_ && ahead_ && shard_.actions()[ahead_->end].operation == index; }
  Product product(const Operation& o, int subtree_count, const Subtree* subtrees, float* out, int64_t out_stride, int64_t subtree_stride) const;
  // Whether a product goes through the tensor cores as bf16: where the program lets executor kinds differ in their bits.
  bool is_bf16(const Operation& o) const { return program().per_kind && program().weights[static_cast<size_t>(o.weight)].type == TensorType::BF16; }
  void round_input(const Operation& o);
  void run(const Operation& o, const Product& product);

  // Words at the beginning of what a step sends ahead.
  enum { kLeast, kLiveRows, kLiveOutputs, kPeerStep = 4, kHeaderWords = 8 };
  static_assert(sizeof(PeerStep) <= 4 * (kHeaderWords - kPeerStep));

  Card card_facts_{};
  std::optional<Tuning> tuning_;  // while memory is planned
  Stream stream_ = nullptr;
  Stream to_ = nullptr;  // where operations queue: the stream, or a graph that is being built
  std::vector<CardMatrix> matrices_;  // by weight
  std::vector<Memory> vectors_;       // by weight
  std::vector<Table> tables_;         // by number
  std::vector<CardBuffer> buffers_;
  std::vector<Memory> mirrors_;       // by buffer: its rows on the host
  std::vector<AttentionShape> shapes_;
  std::unique_ptr<PeerDriver> peers_;  // null: one rank, or sums are rounded on their way
  Memory kv_, sums_, received_sums_, partials_, candidates_, maxima_, reports_, arrivals_;
  // On the host, each with its counterpart on the card: what a step needs to know, in one piece; and, of steps that are no graph, tokens, rows to select, and rows to
  // look for candidates in, which lie in the first one else.
  Memory step_host_, step_card_, tokens_host_, tokens_card_, select_host_, select_card_, settings_host_, settings_card_;
  Memory least_host_, candidates_host_, word_host_, staging_host_, received_host_, sums_host_;
  DeviceRows device_rows_{};
  // Where these lie on the card for the step, or for the graphs: in the step's piece or not.
  const int32_t *tokens_ = nullptr, *selected_ = nullptr;
  const HeadRow* settings_ = nullptr;
  int slots_ = kSlotsMax;  // of partials_
  size_t step_bytes_ = 0;  // of what the step sends ahead
  uint32_t reports_sent_ = 0;
  int reported_candidates_ = 0;  // that the next report takes along
  bool waited_ = true, reported_ = false, building_ = false, sent_ = false;
  int64_t deadline_ns_ = 0;
  std::vector<size_t> action_of_reduce_;  // by operation
  Subtree fused_trees_[kFusedProductsMax]{};
  int64_t sum_rows_ = 0;     // own sums are [subtree][so many rows][width]
  std::vector<StepGraphs> graphs_;
  const StepGraphs* step_graphs_ = nullptr;  // of this step
  const Piece* ahead_ = nullptr;             // the piece that was launched last
};

CudaDevice::CudaDevice(const Shard& shard) : Device(shard) {
  if (const std::string absent = find_card(&card_facts_); !absent.empty()) refuse(absent);
  queues_ = finds_candidates_ = true;
  check_program();
  try {
    tuning_.emplace(card_facts_.sm, card_facts_.name, shard.config().cuda_tuning);
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
  if (const Problem problem = open_stream(&stream_)) refuse(std::string("no stream: ") + problem);
  to_ = stream_;
}

// What a lost card holds ends with the process; asking it to let go of it could take for ever.
CudaDevice::~CudaDevice() {
  if (problem_.lost) return;
  synchronise(stream_);
  close_graphs();
  close_stream(stream_);
}

void CudaDevice::close_graphs() {
  for (const StepGraphs& graphs : graphs_)
    for (const Piece& piece : graphs.pieces) close_graph(piece.graph);
  graphs_.clear();
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

// ---------------------------------------------------------------- memory

void CudaDevice::plan_attention_shapes() {
  for (const Operation& o : program().operations) {
    if (o.kind != OperationKind::Attention) continue;
    const bool known = std::any_of(shapes_.begin(), shapes_.end(), [&](const AttentionShape& s) { return s.like->kv_head == o.kv_head && s.like->window == o.window; });
    if (known) continue;
    AttentionShape shape{&o, head_runs(o.heads, o.kv_head.data()), tuning_->attention(o.head_size), {}, {}, nullptr, nullptr, nullptr};
    shapes_.push_back(std::move(shape));
  }
}

const CudaDevice::AttentionShape& CudaDevice::shape_of(const Operation& o) const {
  return *std::find_if(shapes_.begin(), shapes_.end(), [&](const AttentionShape& s) { return s.like->kv_head == o.kv_head && s.like->window == o.window; });
}

void CudaDevice::plan_memory() {
  const Program& p = program();
  const ExecutorConfig& c = shard_.config();
  const size_t T = static_cast<size_t>(c.step_tokens_max), outputs = static_cast<size_t>(shard_.output_rows());
  const char* const kWeights = "the weights of this shard";
  const char* const kBuffers = "the buffers of a step (stepTokensMax)";

  matrices_.resize(p.weights.size());
  vectors_.resize(p.weights.size());
  for (size_t i = 0; i < p.weights.size(); i++) {
    const MatrixSource source = shard_.source_of(static_cast<int>(i), nullptr);
    if (p.weights[i].use == WeightUse::Vector) vectors_[i] = Memory(Place::Card, static_cast<size_t>(source.columns) * 4, kWeights);
    else {
      matrices_[i].data = Memory(Place::Card, packed_bytes(source), kWeights);
      matrices_[i].tuning = tuning_->product(source.type, static_cast<int64_t>(matrices_[i].data.size()));
    }
  }
  buffers_.resize(p.buffers.size());
  mirrors_.resize(p.buffers.size());
  host_.resize(p.buffers.size());
  std::vector<bool> gathered(p.buffers.size(), false);  // on the host only
  for (const Operation& o : p.operations)
    if (o.kind == OperationKind::GatherLogits) gathered[static_cast<size_t>(o.out)] = true;
  for (size_t i = 0; i < p.buffers.size(); i++) {
    const Buffer& b = shard_.buffer(static_cast<int>(i));
    const size_t bytes = static_cast<size_t>(b.rows) * static_cast<size_t>(b.stride) * 4;
    if (!gathered[i]) buffers_[i].values = Memory(Place::Card, bytes, kBuffers);
    buffers_[i].only_groups = b.quantized && !b.host && std::all_of(p.operations.begin(), p.operations.end(), [&](const Operation& o) {
      const bool product = o.kind == OperationKind::Linear || o.kind == OperationKind::LinearPartial;
      return (product && shard_.is_quantized(o.weight)) || (o.in != static_cast<int>(i) && o.in2 != static_cast<int>(i));
    });
    if (std::any_of(p.operations.begin(), p.operations.end(), [&](const Operation& o) {
          return (o.kind == OperationKind::Linear || o.kind == OperationKind::LinearPartial) && o.in == static_cast<int>(i) && is_bf16(o);
        }))
      buffers_[i].bf16 = Memory(Place::Card, bf16_bytes(b.rows, b.width), kBuffers);
    if (b.quantized) buffers_[i].groups = Memory(Place::Card, activation_bytes(b.rows, b.width, p.activations), kBuffers);
    if (!b.host) continue;
    mirrors_[i] = Memory(Place::Host, bytes, kBuffers);
    host_[i] = {mirrors_[i].as<float>(), b.stride};
  }

  size_t own_sums = 0, other_sums = 0;
  for (size_t i = 0; i < p.operations.size(); i++) {
    if (p.operations[i].kind != OperationKind::AllReduce) continue;
    const int index = static_cast<int>(i);
    const size_t row = static_cast<size_t>(shard_.buffer(p.operations[i].out).width) * 4;
    size_t all = 0;
    for (const auto& of_rank : shard_.subtrees(index)) all += of_rank.size();
    own_sums = std::max(own_sums, T * shard_.own_subtrees(index).size() * row);
    if (p.ranks > 1) other_sums = std::max(other_sums, std::min<size_t>(static_cast<size_t>(shard_.piece_rows(index)), T) * all * row);
  }
  if (p.ranks > 1 && p.ranks <= kPeersMax && own_sums > 0 && c.wire == WireType::F32) peers_ = std::make_unique<PeerDriver>(p.rank, p.ranks, own_sums);
  else sums_ = Memory(Place::Card, own_sums, kBuffers);
  received_sums_ = Memory(Place::Card, other_sums, kBuffers);
  if (c.wire == WireType::F32) sums_host_ = Memory(Place::Host, other_sums, kBuffers);
  staging_host_ = Memory(Place::Host, shard_.staging_bytes(), kBuffers);
  received_host_ = Memory(Place::Host, shard_.received_bytes(), kBuffers);
  staging_ = staging_host_.as<float>();
  received_ = received_host_.as<float>();

  // What a step needs to know: positions, sequences, block tables, and a work list for each kind of attention; every list begins at a multiple of 16 bytes.
  const size_t sequences = std::min<size_t>(T, static_cast<size_t>(c.sequences_max));
  const size_t blocks = (static_cast<size_t>(p.context_tokens_max) + static_cast<size_t>(c.block_tokens) - 1) / static_cast<size_t>(c.block_tokens);
  const size_t rows = std::max<size_t>(T, kGraphRowsMax);
  slots_ = std::max(kSlotsMax, kFusedTokensMax * static_cast<int>(p.context_tokens_max / kSpanTokens + 1));
  size_t words = kHeaderWords + 8 * (rows + 4) + sequences * blocks + 8;
  size_t heads = 0;
  for (AttentionShape& shape : shapes_) {
    const size_t most = AttentionPlan::most_work(T, static_cast<size_t>(slots_), shape.host_runs.size());
    shape.plan.work.reserve(most);
    shape.plan.first_slot.reserve(rows + 1);
    words += (rows + 5) + 4 * most + 8;
    heads = std::max(heads, static_cast<size_t>(shape.like->heads));
    shape.runs = Memory(Place::Card, shape.host_runs.size() * sizeof(HeadRun), kBuffers);
    if (const Problem problem = copy_now(shape.runs.as<void>(), shape.host_runs.data(), shape.runs.size())) refuse(problem);
  }
  step_host_ = Memory(Place::Host, words * 4, kBuffers);
  step_card_ = Memory(Place::Card, words * 4, kBuffers);
  partials_ = Memory(Place::Card, shapes_.empty() ? 0 : static_cast<size_t>(slots_) * heads * static_cast<size_t>(p.kv.head_size + 2) * 4, kBuffers);
  size_t arrivals = 1;
  for (const Operation& o : p.operations) {  // of fuse(): groups of an activation, heads of q, k and v
    if (o.kind == OperationKind::GatedActivation) arrivals = std::max(arrivals, static_cast<size_t>(shard_.buffer(o.out).width) / 32);
    if (o.kind == OperationKind::Attention) arrivals = std::max(arrivals, static_cast<size_t>(o.heads + 2 * p.kv.heads));
  }
  for (const AttentionShape& shape : shapes_) arrivals = std::max(arrivals, static_cast<size_t>(kFusedTokensMax) * shape.host_runs.size());
  arrivals_ = Memory(Place::Card, arrivals * 4, kBuffers);
  reports_ = Memory(Place::Card, 4, kBuffers);
  if (const Problem problem = copy_now(reports_.as<void>(), &reports_sent_, 4)) refuse(problem);
  word_host_ = Memory(Place::Host, 4, kBuffers);
  *word_host_.as<uint32_t>() = 0;
  least_host_ = Memory(Place::Host, 4, kBuffers);
  if (p.stage == 0) {
    tokens_host_ = Memory(Place::Host, T * 4, kBuffers);
    tokens_card_ = Memory(Place::Card, T * 4, kBuffers);
  }
  if (p.stage + 1 == p.stages) {
    select_host_ = Memory(Place::Host, outputs * 4, kBuffers);
    select_card_ = Memory(Place::Card, outputs * 4, kBuffers);
    settings_host_ = Memory(Place::Host, outputs * sizeof(HeadRow), kBuffers);
    settings_card_ = Memory(Place::Card, outputs * sizeof(HeadRow), kBuffers);
    candidates_ = Memory(Place::Card, outputs * sizeof(cuda::Candidate), kBuffers);
    candidates_host_ = Memory(Place::Host, outputs * sizeof(cuda::Candidate), kBuffers);
    maxima_ = Memory(Place::Card, outputs * 4, kBuffers);
  }
  tables_.resize(static_cast<size_t>(shard_.rope_tables()));
  for (size_t i = 0; i < p.operations.size(); i++) {
    if (p.operations[i].kind != OperationKind::Rope) continue;
    Table& table = tables_[static_cast<size_t>(shard_.rope_table_number(static_cast<int>(i)))];
    const size_t table_bytes = static_cast<size_t>(p.context_tokens_max) * static_cast<size_t>(p.operations[i].dimensions / 2) * 4;
    if (table.cosine.size() == 0) table = {Memory(Place::Card, table_bytes, "the rope tables"), Memory(Place::Card, table_bytes, "the rope tables")};
  }
}

// Last, so that what is free is what it may have.
void CudaDevice::allocate_kv() {
  const size_t block = static_cast<size_t>(program().kv.layers) * shard_.kv_layout().block_bytes, asked = block * static_cast<size_t>(shard_.config().kv_blocks);
  const size_t free = free_bytes();
  try {
    kv_ = Memory(Place::Card, asked, "the KV cache");
  } catch (const std::runtime_error& error) {
    const size_t usable = free - free / 32;  // the runtime takes some for graphs
    const size_t fitting = usable / block * block >> 20;
    refuse(std::string(error.what()) + (fitting > 0 ? "; --kv-cache-bytes " + std::to_string(fitting) + "m fits" : kSmallerShard));
  }
}

size_t CudaDevice::bytes() const {
  size_t sum = 0;
  const auto add = [&](const auto&... memories) { ((sum += memories.size()), ...); };
  for (const CardMatrix& m : matrices_) add(m.data);
  for (const Memory& v : vectors_) add(v);
  for (const Table& t : tables_) add(t.cosine, t.sine);
  for (const CardBuffer& b : buffers_) add(b.values, b.groups, b.bf16);
  for (const Memory& m : mirrors_) add(m);
  add(arrivals_, candidates_, maxima_, kv_, sums_, received_sums_, partials_, step_host_, step_card_, staging_host_, received_host_, sums_host_);
  return sum + (peers_ ? peers_->bytes() : 0);
}

WeightReport CudaDevice::load_matrix(int weight, const MatrixSource& source) {
  CardMatrix& matrix = matrices_[static_cast<size_t>(weight)];
  std::vector<uint8_t> packed(matrix.data.size());
  PackedMatrix out{source.type, source.rows, source.columns, packed.size(), packed.data(), 0, 0};
  pack(source, &out, Part{0, 1});
  matrix.phase = out.layout;
  if (const Problem problem = copy_now(matrix.data.as<void>(), packed.data(), packed.size()))
    refuse("tensor '" + program().weights[static_cast<size_t>(weight)].tensor + "' cannot be copied to the card: " + problem);
  return {out.repack_error, packed.size()};
}

void CudaDevice::finish_loading() {
  const auto copy = [](const Memory& memory, const float* from) {
    if (const Problem problem = copy_now(memory.as<void>(), from, memory.size())) refuse(std::string("vectors and tables cannot be copied to the card: ") + problem);
  };
  for (size_t i = 0; i < vectors_.size(); i++)
    if (vectors_[i].size() > 0) copy(vectors_[i], shard_.vector(static_cast<int>(i)));
  for (size_t number = 0; number < tables_.size(); number++) {
    const RopeTable table = shard_.rope_table_of(static_cast<int>(number));
    copy(tables_[number].cosine, table.cosine);
    copy(tables_[number].sine, table.sine);
  }
  build_graphs();
}

// Nothing reads what an epoch has not written; still no epoch leaves its K and V to the next.
void CudaDevice::clear_kv() {
  synchronise(stream_);
  problem_ = {};
  reports_sent_ = *word_host_.as<uint32_t>();
  queue(fill(arrivals_.as<void>(), 0, arrivals_.size(), stream_));
  if (kv_.size() > 0) queue(fill(kv_.as<void>(), 0, kv_.size(), stream_));
}

std::vector<PeerMemory> CudaDevice::peer_memory() {
  return peers_ ? peers_->offers() : std::vector<PeerMemory>();
}

void CudaDevice::connect_peers(const std::vector<PeerMemory>& by_rank, uint32_t epoch) {
  synchronise(stream_);
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
  if (!were_peers && !reduces_with_peers_) return;
  close_graphs();
  build_graphs();
  if (reduces_with_peers_) peers_->follow({});
}

// ---------------------------------------------------------------- a step

void CudaDevice::begin_step(const StepRows& rows, int output_rows, int64_t wait_timeout_ms) {
  rows_ = &rows;
  // A wait inside a kernel begins later than the step, and ends by itself.
  deadline_ns_ = monotonic_now_ns() + wait_timeout_ms * 1'000'000 * (reduces_with_peers_ ? 2 : 1);
  step_graphs_ = nullptr;
  ahead_ = nullptr;
  sent_ = false;
  // Rows and output rows of a decode step pad to the same number.
  const auto fitting = [&](int count) { return std::find_if(graphs_.begin(), graphs_.end(), [&](const StepGraphs& g) { return g.rows >= count; }); };
  const auto found = fitting(rows.tokens);
  const bool has_tail = shard_.tail_begin() < shard_.tail_end();
  if (found != graphs_.end() && (!has_tail || (output_rows > 0 && fitting(output_rows) == found))) step_graphs_ = &*found;
  if (step_graphs_) found->steps++;
  sum_rows_ = step_graphs_ ? step_graphs_->rows : rows.tokens;
  if (!broken()) plan_step(rows, wait_timeout_ms);
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
void CudaDevice::plan_step(const StepRows& rows, int64_t wait_timeout_ms) {
  const size_t T = static_cast<size_t>(rows.tokens), padded = step_graphs_ ? kGraphRowsMax : T;
  size_t at = lay_out(padded, step_graphs_ ? padded : static_cast<size_t>(rows.sequences), step_graphs_ != nullptr);
  uint8_t* const host = step_host_.as<uint8_t>();
  const auto put = [&](const int32_t* there, const int32_t* values, int32_t padding) {
    int32_t* here = on_host(there);
    std::memcpy(here, values, T * 4);
    std::fill(here + T, here + padded, padding);
  };
  int32_t* const header = step_host_.as<int32_t>();
  header[kLeast] = static_cast<int32_t>(kNothingFound);
  header[kLiveRows] = rows.tokens;
  header[kLiveOutputs] = 0;
  if (reduces_with_peers_) {
    const PeerStep record = peers_->begin_step(wait_timeout_ms, stream_);
    std::memcpy(header + kPeerStep, &record, sizeof record);
    if (step_graphs_) peers_->follow(step_graphs_->reductions);
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
  for (AttentionShape& shape : shapes_) {
    plan_attention(rows, shape.host_runs, shape.like->window, {shape.tuning.split_rows_max, slots_, step_graphs_ && fuses(step_graphs_->rows)}, &shape.plan);
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
  if (!step_graphs_) queue(copy_to_card(step_card_.as<void>(), host, at, stream_));
}

// Completes what a graph's step needs to know, and sends it.
void CudaDevice::send_step(const int32_t* tokens) {
  sent_ = true;
  int32_t *const ids = on_host(tokens_), *const which = on_host(selected_);
  HeadRow* const settings = on_host(settings_);
  for (int r = 0; r < kGraphRowsMax; r++) {
    ids[r] = r < rows_->tokens ? tokens[r] : -1;
    const bool selected = r < tail_rows_;
    which[r] = selected ? outputs_[r].row : 0;
    settings[r] = selected ? HeadRow{candidate_rows_[r].temperature, candidate_rows_[r].key.low, candidate_rows_[r].key.high} : HeadRow{};
  }
  step_host_.as<int32_t>()[kLiveOutputs] = tail_rows_;
  queue(copy_to_card(step_card_.as<void>(), step_host_.as<void>(), step_bytes_, stream_));
}

size_t CudaDevice::run_ahead(size_t action, const int32_t* tokens) {
  if (!step_graphs_ || broken()) return action;
  const auto found = std::find_if(step_graphs_->pieces.begin(), step_graphs_->pieces.end(), [&](const Piece& p) { return p.begin == action; });
  if (found == step_graphs_->pieces.end()) return action;
  if (!sent_) send_step(tokens);
  if (!broken()) queue(launch_graph(found->graph, stream_));
  ahead_ = &*found;
  if (found->reports) {
    reports_sent_++;
    reported_ = true;
  }
  return found->end;
}

void CudaDevice::report() {
  queue(send_report({step_card_.as<uint32_t>() + kLeast, candidates_.as<cuda::Candidate>(), reported_candidates_, least_host_.as<uint32_t>(), candidates_host_.as<cuda::Candidate>(),
                     reports_.as<uint32_t>(), word_host_.as<uint32_t>()},
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

bool CudaDevice::wait() {
  if (!waited_) {
    if (!broken() && !reported_) {
      report();
      reports_sent_++;
    }
    if (!broken()) queue(wait_for(word_host_.as<uint32_t>(), reports_sent_, stream_, deadline_ns_, shard_.config().spin));
    if (broken()) give_up();
    waited_ = true;
    const uint32_t found = *least_host_.as<uint32_t>();
    if (reduces_with_peers_ && !problem_.lost) {
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

// ---------------------------------------------------------------- graphs

bool CudaDevice::is_device_only(ActionKind kind) const {
  switch (kind) {
    case ActionKind::ResolveTokens:
    case ActionKind::GatherRows:
    case ActionKind::ReceiveHidden:
    case ActionKind::SendHidden:
    case ActionKind::GatherLogits:
    case ActionKind::Sample:
    case ActionKind::SendTokens: return false;
    case ActionKind::LinearPartial:
    case ActionKind::AllReduce: return program().ranks == 1 || reduces_with_peers_;
    default: return true;
  }
}

void CudaDevice::build_graphs() {
  const int most = std::min(kGraphRowsMax, shard_.config().step_tokens_max);
  action_of_reduce_.resize(program().operations.size());
  for (size_t i = 0; i < shard_.actions().size(); i++)
    if (const Action* reduce = action_of(i, ActionKind::AllReduce)) action_of_reduce_[static_cast<size_t>(reduce->operation)] = i;
  building_ = true;
  lay_out(kGraphRowsMax, kGraphRowsMax, true);
  for (const int rows : kGraphRows) {
    StepGraphs graphs{std::min(rows, most), {}, 0};
    build(&graphs);
    graphs_.push_back(std::move(graphs));
    if (rows >= most) break;
  }
  building_ = false;
  to_ = stream_;
  waited_ = true;
}

// Output rows that take several passes stay outside: such a step's layers are graphs, its tail is not.
void CudaDevice::build(StepGraphs* graphs) {
  StepRows rows{};
  rows.tokens = device_rows_.tokens = graphs->rows;
  rows_ = &rows;
  sum_rows_ = tail_rows_ = graphs->rows;
  if (reduces_with_peers_) peers_->follow({});
  const std::vector<Action>& actions = shard_.actions();
  const bool whole_tail = graphs->rows <= shard_.output_rows();
  const auto ends = [&](size_t i, size_t begin) { return i == actions.size() || !is_device_only(actions[i].kind) || (!whole_tail && i == shard_.tail_begin() && i > begin); };
  for (size_t begin = 0; begin < actions.size(); begin++) {
    if (ends(begin, begin) || (!whole_tail && begin >= shard_.tail_begin() && begin < shard_.tail_end())) continue;
    Piece piece{begin, begin, nullptr, false};
    Problem problem = open_graph(&piece.graph);
    to_ = stream_of(piece.graph);
    if (begin > 0 && program().ranks > 1 && fuses(graphs->rows) && norms(begin - 1)) piece.end++;  // reduce() does it
    while (!ends(piece.end, begin) && !problem) {
      const size_t fused = fuse(piece.end);
      if (fused == 0) run_action(piece.end);
      piece.end += std::max<size_t>(fused, 1);
    }
    if (piece.end < actions.size()) piece.reports = run_ahead_of_host(actions[piece.end]);
    if (!problem && broken()) problem = problem_.fault.c_str();
    if (!problem) problem = finish_graph(piece.graph);
    graphs->pieces.push_back(piece);
    if (problem) refuse("the graph of a step of " + std::to_string(graphs->rows) + " rows cannot be made: " + problem);
    begin = piece.end;
  }
  if (reduces_with_peers_) graphs->reductions = peers_->reductions();
  rows_ = nullptr;
}

// An action as StepRun runs it.
void CudaDevice::run_action(size_t index) {
  const Action& action = shard_.actions()[index];
  const int number = static_cast<int>(index);
  const Operation& o = operation(action.operation);
  switch (action.kind) {
    case ActionKind::Embed: return look_up(o);
    case ActionKind::RmsNorm: return action.buffer >= 0 ? static_cast<void>(norm_quantized(number, o)) : norm(o);
    case ActionKind::Quantize: return static_cast<void>(quantize(number, action.buffer));
    case ActionKind::Linear: return products(action.products);
    case ActionKind::LinearPartial: return partial_product(action.operation, nullptr);
    case ActionKind::AllReduce: {
      const float* const own[1] = {nullptr};
      return reduce(action.operation, 0, rows_->tokens, own);
    }
    case ActionKind::StoreKv: return static_cast<void>(store_kv(number, o));
    case ActionKind::Attention: return attention(o);
    case ActionKind::GatedActivation: return action.buffer >= 0 ? static_cast<void>(activation_quantized(number, o)) : gated_activation(o);
    case ActionKind::SelectRows:
      check_rows(number, o.in);
      return select_rows(o);
    default: return;  // rope goes with store_kv
  }
}

// ---------------------------------------------------------------- several actions as one launch

// Action `index` when it is of that kind.
const Action* CudaDevice::action_of(size_t index, ActionKind kind) const {
  const std::vector<Action>& actions = shard_.actions();
  return index < actions.size() && actions[index].kind == kind ? &actions[index] : nullptr;
}

bool CudaDevice::are_quantized(const std::vector<int>& operations) const {
  return std::all_of(operations.begin(), operations.end(), [&](int index) { return shard_.is_quantized(operation(index).weight); });
}

// `operations` with what follows them; `action`: the one whose output is quantised.
FusedProducts CudaDevice::fused(Then then, const std::vector<int>& operations, size_t action) {
  FusedProducts f{};
  f.then = then;
  f.count = static_cast<int>(operations.size());
  for (size_t i = 0; i < operations.size(); i++) {
    const Operation& o = operation(operations[i]);
    fused_trees_[i] = {0, static_cast<int>(o.segments.size())};
    f.product[i] = product(o, 1, &fused_trees_[i], o.out < 0 ? nullptr : values(o.out), o.out < 0 ? 0 : shard_.buffer(o.out).stride, 0);
  }
  f.arrivals = arrivals_.as<uint32_t>();
  if (const int buffer = action < shard_.actions().size() ? shard_.actions()[action].buffer : -1; buffer >= 0) {
    f.quantized = card(buffer).groups.as<ActivationGroup>();
    f.check = check_of(action, buffer);
  }
  return f;
}

// Whether the action behind reduction `index` is the norm of its result, which nobody reads but in its quantised form.
bool CudaDevice::norms(size_t index) const {
  const Action *reduce = action_of(index, ActionKind::AllReduce), *norm = action_of(index + 1, ActionKind::RmsNorm);
  return reduce && norm && norm->buffer >= 0 && card(norm->buffer).only_groups && operation(norm->operation).in == operation(reduce->operation).out;
}

NormAfter CudaDevice::norm_after(size_t action, int first_row) const {
  const Operation& o = operation(shard_.actions()[action].operation);
  return {vector(o.weight), o.epsilon, card(o.out).groups.as<ActivationGroup>(), first_row, check_of(action, o.out)};
}

// Adds the launch that does the actions from `index` on in one; returns how many it does, 0 when there is none.
size_t CudaDevice::fuse(size_t index) {
  const Program& p = program();
  if (!fuses(rows_->tokens)) return 0;
  const std::vector<Action>& actions = shard_.actions();
  const Action& first = actions[index];
  // An output that nobody reads but in its quantised form.
  const auto only_quantized = [&](const Action* action) { return action && action->buffer >= 0 && card(action->buffer).only_groups; };

  if (first.kind == ActionKind::Linear && are_quantized(first.products)) {
    const Action* store = action_of(index + 3, ActionKind::StoreKv);
    if (first.products.size() == 3 && store && action_of(index + 1, ActionKind::Rope) && action_of(index + 2, ActionKind::Rope)) {
      const Operation &kv = operation(store->operation), &q = operation(store->operation - 2);
      if (operation(first.products[0]).out != q.out || operation(first.products[1]).out != kv.in || operation(first.products[2]).out != kv.in2) return 0;
      FusedProducts f = fused(Then::RopeStoreKv, first.products, actions.size());
      f.rope = rope_store(static_cast<int>(index + 3), kv);
      queue(linear_fused(f, to_));
      return 4;
    }
    const Action* activation = action_of(index + 1, ActionKind::GatedActivation);
    if (first.products.size() == 2 && only_quantized(activation)) {
      const Operation& o = operation(activation->operation);
      if (operation(first.products[0]).out != o.in || operation(first.products[1]).out != o.in2) return 0;
      FusedProducts f = fused(Then::Activation, first.products, index + 1);
      f.activation = o.activation;
      queue(linear_fused(f, to_));
      return 2;
    }
    return 0;
  }
  if (const Action* quantize = action_of(index + 1, ActionKind::Quantize); first.kind == ActionKind::Attention && only_quantized(quantize)) {
    const Operation& o = operation(first.operation);
    if (quantize->buffer != o.out) return 0;
    const AttentionShape& shape = shape_of(o);
    queue(attention_fused(attention_step(o), static_cast<int>(shape.host_runs.size()), card(o.out).groups.as<ActivationGroup>(), arrivals_.as<uint32_t>(),
                          card_facts_.multiprocessors * shape.tuning.warps, to_, check_of(index + 1, o.out)));
    return 2;
  }
  const Action* reduce = action_of(index + 1, ActionKind::AllReduce);
  if (first.kind == ActionKind::LinearPartial && p.ranks == 1 && reduce && are_quantized({first.operation})) {
    const Operation& sum = operation(reduce->operation);
    const bool normed = norms(index + 1);
    FusedProducts f = fused(normed ? Then::ResidualNorm : Then::Residual, {first.operation}, actions.size());
    f.product[0].out = values(sum.out);
    f.product[0].out_stride = shard_.buffer(sum.out).stride;
    f.product[0].bias = vector(sum.bias);
    if (normed) f.norm = norm_after(index + 2, 0);
    queue(linear_fused(f, to_));
    return normed ? 3 : 2;
  }
  return 0;
}

// What the card does for an action of the host. True: the graph ends with a report.
bool CudaDevice::run_ahead_of_host(const Action& action) {
  if (action.operation < 0) return false;
  const Operation& o = operation(action.operation);
  switch (action.kind) {
    case ActionKind::LinearPartial: partial_product(action.operation, nullptr); return false;  // the host asks for the sums where it wants them
    case ActionKind::GatherLogits:
    case ActionKind::Sample:
      find_candidates(o.in, action.kind == ActionKind::Sample ? 0 : static_cast<int32_t>(o.vocabulary[static_cast<size_t>(program().rank)].from));
      report();
      return true;
    default: return false;
  }
}

std::vector<GraphFacts> CudaDevice::graphs() const {
  std::vector<GraphFacts> facts;
  for (const StepGraphs& graphs : graphs_) {
    GraphFacts of_rows{graphs.rows, {}, graphs.steps};
    for (const Piece& piece : graphs.pieces) of_rows.nodes.push_back(node_count(piece.graph));
    facts.push_back(std::move(of_rows));
  }
  return facts;
}

// ---------------------------------------------------------------- operations

void CudaDevice::fetch_rows(int buffer, int first, int count) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(copy_to_host(row(buffer, first), values(buffer, first), (static_cast<size_t>(count - 1) * static_cast<size_t>(b.stride) + static_cast<size_t>(b.width)) * 4, stream_));
}

void CudaDevice::push_rows(int buffer, int first, int count) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(copy_to_card(values(buffer, first), row(buffer, first), (static_cast<size_t>(count - 1) * static_cast<size_t>(b.stride) + static_cast<size_t>(b.width)) * 4, stream_));
}

void CudaDevice::embed(const Operation& o, const int32_t* tokens) {
  if (broken()) return;
  const size_t count = static_cast<size_t>(rows_->tokens);
  std::memcpy(tokens_host_.as<void>(), tokens, count * 4);
  queue(copy_to_card(tokens_card_.as<void>(), tokens_host_.as<void>(), count * 4, to_));
  if (!broken()) look_up(o);
}

// The rows of the tokens that are on the card already.
void CudaDevice::look_up(const Operation& o) {
  const WeightSlice& slice = program().weights[static_cast<size_t>(o.weight)];
  const CardMatrix& matrix = matrices_[static_cast<size_t>(o.weight)];
  queue(cuda::embed(slice.type, slice.rows.size(), slice.columns.size(), matrix.phase, matrix.data.as<uint8_t>(), tokens_, rows_->tokens,
                    static_cast<int32_t>(o.vocabulary[static_cast<size_t>(program().rank)].from), values(o.out), shard_.buffer(o.out).stride, to_));
}

void CudaDevice::norm(const Operation& o) {
  if (broken()) return;
  const Buffer& in = shard_.buffer(o.in);
  queue(rms_norm(values(o.in), in.stride, vector(o.weight), o.epsilon, in.width, rows_of(o.in), values(o.out), shard_.buffer(o.out).stride, nullptr, to_));
}

bool CudaDevice::quantize(int action, int buffer) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(cuda::quantize(values(buffer), b.stride, rows_of(buffer), b.width, groups(buffer), to_, check_of(action, buffer)));
  return true;
}

bool CudaDevice::norm_quantized(int action, const Operation& o) {
  if (!card(o.out).only_groups) return Device::norm_quantized(action, o);
  const Buffer& in = shard_.buffer(o.in);
  if (!broken())
    queue(rms_norm(values(o.in), in.stride, vector(o.weight), o.epsilon, in.width, rows_of(o.in), nullptr, 0, groups(o.out), to_, check_of(action, o.out)));
  return true;
}

bool CudaDevice::activation_quantized(int action, const Operation& o) {
  if (!card(o.out).only_groups) return Device::activation_quantized(action, o);
  const Buffer& gate = shard_.buffer(o.in);
  if (!broken())
    queue(cuda::gated_activation(values(o.in), gate.stride, values(o.in2), shard_.buffer(o.in2).stride, gate.width, rows_of(o.in), o.activation, nullptr, 0,
                                 groups(o.out), to_, check_of(action, o.out)));
  return true;
}

bool CudaDevice::check_rows(int action, int buffer) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(cuda::check_rows(values(buffer), b.stride, rows_of(buffer), b.width, check_of(action, buffer), to_));
  return true;
}

Product CudaDevice::product(const Operation& o, int subtree_count, const Subtree* subtrees, float* out, int64_t out_stride, int64_t subtree_stride) const {
  const WeightSlice& slice = program().weights[static_cast<size_t>(o.weight)];
  const CardMatrix& matrix = matrices_[static_cast<size_t>(o.weight)];
  return {slice.type,        slice.rows.size(), slice.columns.size(), matrix.phase,
          matrix.data.as<uint8_t>(), card(o.in).groups.as<ActivationGroup>(), rows_of(o.in), static_cast<int>(o.segments.size()),
          o.segments.data(), subtree_count,     subtrees,             vector(o.bias),
          out,               out_stride,        subtree_stride,       matrix.tuning.decode_tiles,
          program().activations, values(o.in),  shard_.buffer(o.in).stride, card(o.in).bf16.as<Bf16Group>()};
}

void CudaDevice::round_input(const Operation& o) {
  const Buffer& in = shard_.buffer(o.in);
  queue(round_bf16(values(o.in), in.stride, rows_of(o.in), in.width, card(o.in).bf16.as<Bf16Group>(), to_));
}

void CudaDevice::run(const Operation& o, const Product& product) {
  if (broken()) return;
  const int decode_tokens_max = matrices_[static_cast<size_t>(o.weight)].tuning.decode_tokens_max;
  if (shard_.is_quantized(o.weight)) queue(product.tokens <= decode_tokens_max ? linear_decode(product, to_) : linear_prefill(product, to_));
  else if (is_bf16(o)) queue(product.tokens <= kBf16DecodeTokensMax ? linear_bf16_decode(product, to_) : linear_bf16_prefill(product, to_));
  else queue(product.tokens <= kFloatDecodeTokensMax ? linear_float_decode(product, to_) : linear_float_prefill(product, to_));
}

void CudaDevice::products(const std::vector<int>& operations) {
  bool rounded = false;  // they share their input
  for (const int index : operations) {
    if (broken()) return;
    const Operation& o = operation(index);
    if (is_bf16(o) && !rounded) round_input(o);
    rounded = rounded || is_bf16(o);
    const Subtree whole{0, static_cast<int>(o.segments.size())};
    run(o, product(o, 1, &whole, values(o.out), shard_.buffer(o.out).stride, 0));
  }
}

// With peers the sums leave at once: into the block of the exchange, which is ordinary memory to the card, or into memory that it writes directly.
void CudaDevice::partial_product(int index, uint8_t* block) {
  partial_ = block ? reinterpret_cast<float*>(block) : staging_;
  if (broken()) return;
  const Operation& o = operation(index);
  const std::vector<Subtree>& subtrees = shard_.own_subtrees(index);
  if (!is_ahead(index)) {
    if (is_bf16(o)) round_input(o);
    run(o, product(o, static_cast<int>(subtrees.size()), subtrees.data(), sums(), o.width, sum_rows_ * o.width));
  }
  if (program().ranks == 1 || building_ || reduces_with_peers_) return;
  const int64_t values = rows_->tokens * o.width;  // of a subtree, without the rows that pad
  for (size_t s = 0; s < subtrees.size() && !broken(); s++) {
    const int64_t i = static_cast<int64_t>(s);
    queue(copy_to_host(partial_ + i * values, sums() + i * sum_rows_ * o.width, static_cast<size_t>(values) * 4, to_));
  }
}

void CudaDevice::reduce(int index, int first_row, int rows, const float* const* sums) {
  if (broken()) return;
  if (reduces_with_peers_) return reduce_with_peers(index);
  const Operation& o = operation(index);
  const Buffer& residual = shard_.buffer(o.out);
  int lo[kSegmentsMax], hi[kSegmentsMax], count = 0;
  const float* nodes[kSegmentsMax];
  int64_t strides[kSegmentsMax];
  const int64_t piece = rows * residual.width;
  float *host = sums_host_.as<float>(), *there = received_sums_.as<float>();
  for (int r = 0; r < program().ranks; r++) {
    const std::vector<Subtree>& subtrees = shard_.subtrees(index)[static_cast<size_t>(r)];
    const size_t values_of_rank = subtrees.size() * static_cast<size_t>(piece);
    const float* from = sums[r] ? there : this->sums() + first_row * residual.width;
    const int64_t apart = sums[r] ? piece : sum_rows_ * residual.width;
    for (const Subtree& s : subtrees) {
      lo[count] = s.first;
      hi[count] = s.first + s.count;
      nodes[count] = from;
      strides[count] = residual.width;
      from += apart;
      count++;
    }
    if (!sums[r]) continue;
    const float* source = sums[r];  // of the wire: in received(), which the card reads directly
    if (host) {
      std::memcpy(host, sums[r], values_of_rank * 4);
      source = host;
      host += values_of_rank;
    }
    queue(copy_to_card(there, source, values_of_rank * 4, to_));
    there += values_of_rank;
  }
  if (broken()) return;
  float* out = values(o.out, first_row);
  // In front of a graph whose first node would be the norm.
  const size_t action = program().ranks > 1 && step_graphs_ && fuses(step_graphs_->rows) ? action_of_reduce_[static_cast<size_t>(index)] : 0;
  if (action > 0 && norms(action))
    queue(finish_tree_norm(o.cut.units, count, lo, hi, nodes, strides, vector(o.bias), out, residual.stride, residual.width, rows, norm_after(action + 1, first_row), arrivals_.as<uint32_t>(), to_));
  else queue(finish_tree(o.cut.units, count, lo, hi, nodes, strides, vector(o.bias), out, residual.stride, residual.width, rows, to_));
}

// Own sums lie where the peers read them.
void CudaDevice::reduce_with_peers(int index) {
  const Operation& o = operation(index);
  const Buffer& residual = shard_.buffer(o.out);
  int lo[kSegmentsMax], hi[kSegmentsMax], owner[kSegmentsMax], count = 0, fewest = kSegmentsMax;
  for (int r = 0; r < program().ranks; r++) {
    const std::vector<Subtree>& subtrees = shard_.subtrees(index)[static_cast<size_t>(r)];
    fewest = std::min(fewest, static_cast<int>(subtrees.size()));
    for (const Subtree& s : subtrees) {
      lo[count] = s.first;
      hi[count] = s.first + s.count;
      owner[count] = r;
      count++;
    }
  }
  queue(peers_->reduce({o.cut.units, count, lo, hi, owner, vector(o.bias), values(o.out), residual.stride, residual.width, rows_->tokens}, count - fewest, index, to_));
}

bool CudaDevice::store_kv(int action, const Operation& o) {
  if (!broken()) queue(rope_store_kv(rope_store(action, o), to_));
  return true;
}

RopeStore CudaDevice::rope_store(int action, const Operation& o) {
  const int index = static_cast<int>(&o - program().operations.data());
  const Operation& q = operation(index - 2);
  const int number = shard_.rope_table_number(index - 2);
  const Table& table = tables_[static_cast<size_t>(number)];
  const RopeTable host = shard_.rope_table_of(number);
  return {values(q.out), shard_.buffer(q.out).stride, q.heads, values(o.in), shard_.buffer(o.in).stride, values(o.in2), shard_.buffer(o.in2).stride,
          {host.dimensions, host.half_style, table.cosine.as<float>(), table.sine.as<float>()}, shard_.kv_layout(), kv_layer(o.layer), device_rows_, check_of(action, o.in)};
}

uint8_t* CudaDevice::kv_layer(int layer) const {
  return kv_.as<uint8_t>() + static_cast<size_t>(layer) * static_cast<size_t>(shard_.config().kv_blocks) * shard_.kv_layout().block_bytes;
}

AttentionStep CudaDevice::attention_step(const Operation& o) const {
  const AttentionShape& shape = shape_of(o);
  return {values(o.in),      shard_.buffer(o.in).stride, values(o.out), shard_.buffer(o.out).stride, o.heads,          static_cast<float>(o.scale), o.window, shard_.kv_layout(),
          kv_layer(o.layer), device_rows_,               shape.runs.as<HeadRun>(), shape.work,       shape.work_count, partials_.as<float>(),       shape.first_slot};
}

void CudaDevice::attention(const Operation& o) {
  if (broken()) return;
  const AttentionStep step = attention_step(o);
  const bool integer = program().kv.key == KeyType::Int8 && program().kv.value == ValueType::Int8;
  if (integer) queue(cuda::attention(step, card_facts_.multiprocessors * shape_of(o).tuning.warps, to_));
  else queue(attention_f16(step, card_facts_.multiprocessors * kHalfAttentionBlocks, to_));
  if (!broken() && (building_ || shape_of(o).plan.first_slot.back() > 0)) queue(attention_join(step, to_));
}

void CudaDevice::gated_activation(const Operation& o) {
  if (broken()) return;
  const Buffer& gate = shard_.buffer(o.in);
  queue(cuda::gated_activation(values(o.in), gate.stride, values(o.in2), shard_.buffer(o.in2).stride, gate.width, rows_of(o.in), o.activation, values(o.out), shard_.buffer(o.out).stride, nullptr,
                               to_));
}

void CudaDevice::select_rows(const Operation& o) {
  if (broken()) return;
  if (!building_) {
    int32_t* which = select_host_.as<int32_t>();
    for (int r = 0; r < tail_rows_; r++) which[r] = outputs_[r].row;
    queue(copy_to_card(select_card_.as<void>(), which, static_cast<size_t>(tail_rows_) * 4, to_));
  }
  const Buffer& in = shard_.buffer(o.in);
  const int32_t* from = building_ ? selected_ : select_card_.as<int32_t>();
  if (!broken()) queue(cuda::select_rows(values(o.in), in.stride, from, tail_rows_, in.width, values(o.out), shard_.buffer(o.out).stride, to_));
}

void CudaDevice::find_candidates(int buffer, int32_t first_token) {
  if (broken() || (!building_ && ahead_ && ahead_->reports)) return;
  if (!building_) {
    HeadRow* settings = settings_host_.as<HeadRow>();
    for (int r = 0; r < tail_rows_; r++) settings[r] = {candidate_rows_[r].temperature, candidate_rows_[r].key.low, candidate_rows_[r].key.high};
    queue(copy_to_card(settings_card_.as<void>(), settings, static_cast<size_t>(tail_rows_) * sizeof(HeadRow), to_));
  }
  const Buffer& logits = shard_.buffer(buffer);
  const HeadRow* settings = building_ ? settings_ : settings_card_.as<HeadRow>();
  if (!broken())
    queue(head_candidates(values(buffer), logits.stride, tail_rows_, logits.width, first_token, settings, candidates_.as<cuda::Candidate>(), maxima_.as<float>(), to_));
  reported_candidates_ = tail_rows_;
}

shardmesh::Candidate CudaDevice::candidate(int r) const {
  const cuda::Candidate& found = candidates_host_.as<cuda::Candidate>()[r];
  return {found.token, found.value};
}

}  // namespace

CudaFacts cuda_facts() {
  CudaFacts facts;
  Card card{};
  facts.absent = find_card(&card);
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

std::unique_ptr<Device> make_cuda_device(const Shard& shard) { return std::make_unique<CudaDevice>(shard); }

}  // namespace shardmesh
