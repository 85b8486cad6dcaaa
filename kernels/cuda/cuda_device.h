// The device that is a card: operations become launches on one stream, and the host waits where it needs what they made: in front of an exchange, a hand-over to the next
// stage, sampling, and the end of a step. All memory is planned when the executor is made; a step allocates none on the card, and on the host only what vectors keep.
//
// A decode step of at most kGraphRowsMax rows is a graph, or several where the host must act in between: built once for each number of rows in kGraphRows from the same
// operations as every other step, since a graph that is being built takes launches like a stream. A step takes the next larger graph; the rows that it lacks are marked as
// such in what it sends ahead, which is also all that differs from step to step. The host then waits for one word (report.cu). Where a step is one graph, the next may be launched
// behind it meanwhile: it takes tokens from candidates on the card, and has places of its own in memory of the host, for what it reads there and what it writes there.
//
// Weights lie packed on the card (weight_layout.h), the embedding too: tokens travel, rows do not. A step's rows, block tables and attention work go over as one copy.
// Rope of q and k and the store into the cache are one launch, at the place of store_kv; so are a norm or activation and the quantising of what it makes. In graphs of few
// rows (tuning.h says how few, kFusedTokensMax at most) a layer is five launches: q, k, v with rope and store; attention with its join; o with the residual and the next norm; gate and up with the activation; down
// like o (fuse).
//
// Ranks of a stage that are devices of this process on this card do each step together (card_group.h): a step is then one graph with the nodes of all, from the embedding to the
// candidates, whose reductions come after the partial products of every rank and read their sums where those lie; a step that is no graph is queued by the rank that comes last, in
// the same order on one stream. Sums have two blocks, so that nothing waits for the others to have read: a rank's next reduction but one comes after all have read this one's.
//
// cuda_device.cpp: what it can run, and a step; cuda_device_memory.cpp: memory and weights; cuda_device_graphs.cpp: steps as graphs; cuda_device_operations.cpp: launches.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../runner/device.h"
#include "attention_plan.h"
#include "blas_products.h"
#include "card_group.h"
#include "operations.h"
#include "peer_driver.h"
#include "runtime.h"
#include "tuning.h"

namespace shardmesh::cuda {

// Rows of the graphs of decode steps.
constexpr int kGraphRows[] = {1, 2, 4, 8, 12, 16, 24, 32, 48, 64};
constexpr int kGraphRowsMax = 64;
constexpr int kSlotsMax = 4096;

constexpr const char* kSmallerShard = "; cut the model over more workers, or take a smaller one";

[[noreturn]] inline void refuse(const std::string& what) { throw std::runtime_error("executor kind 'cuda': " + what); }

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const Shard& shard);
  ~CudaDevice() override;

  const char* name() const override { return "cuda"; }
  size_t bytes() const override;
  std::string note() const override { return note_; }
  WeightReport load_matrix(int weight, const MatrixSource& source) override;
  void finish_loading() override;
  void clear_kv() override;
  std::vector<PeerMemory> peer_memory() override;
  void connect_peers(const std::vector<PeerMemory>& by_rank, uint32_t epoch) override;
  void join_card(const std::string& name) override;
  void abort() override {
    if (peers_) peers_->abort();
    if (group_) group_->abort(program().rank);
  }
  void fetch_rows(int buffer, int first, int count) override;
  void push_rows(int buffer, int first, int count) override;
  void begin_step(uint32_t step, const StepRows& rows, int output_rows, int64_t wait_timeout_ms) override;
  size_t run_ahead(size_t action, const int32_t* tokens) override;
  bool wait(const std::function<void()>& meanwhile) override;
  bool queue_behind(const StepBehind& step) override;
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
  double idle_us() const override { return idle_us_; }

 private:
  struct CardMatrix {
    Memory data;
    int phase = 0;
    ProductTuning tuning{};
    bool by_rows = false;  // BF16, row after row
  };
  // What the library does of an operation's product for many tokens: a subtree of it, from column `from` on.
  struct BlasPart {
    BlasShape shape;
    int64_t from;
    int plan;
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

  // Actions [begin, end) as a graph; what the card does of action `end`, which is the host's, is in it too. Ranks of this card share it.
  struct Piece {
    size_t begin, end;
    std::shared_ptr<void> graph;
    bool reports;
  };
  struct StepGraphs {
    int rows;
    std::vector<Piece> pieces;
    uint64_t steps = 0, steps_behind = 0;
    // A step is one launch, at whose end its results are there.
    bool is_whole() const { return pieces.size() == 1 && pieces[0].reports; }
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
  void plan_blas();
  BlasOperands operands(const BlasPart& part, const Operation& o, float* out) const;
  void warm_blas();
  void plan_attention_shapes();
  const AttentionShape& shape_of(const Operation& o) const;
  size_t lay_out(size_t rows, size_t sequences, bool graph);
  StepGraphs* graphs_of(int rows, int output_rows);
  void plan_step(const StepRows& rows, const StepGraphs* graphs, int64_t wait_timeout_ms);
  uint8_t* step_host() const { return step_host_[place_].as<uint8_t>(); }
  // What the host lays down for a place of the step's piece on the card.
  template <typename V>
  V* on_host(const V* there) const { return reinterpret_cast<V*>(step_host() + (reinterpret_cast<const uint8_t*>(there) - step_card_.as<uint8_t>())); }
  Problem send_step(const StepBehind& step);
  bool is_device_only(ActionKind kind) const;
  size_t piece_end(size_t begin, bool whole_tail) const;
  using Ranks = CardGroup::Ranks;  // of a stage on this card, by rank; or this device alone
  static void build_graphs(const Ranks& ranks);
  static void build(const Ranks& ranks, int rows);
  static void run_actions(const Ranks& ranks, size_t begin, size_t end, Graph graph, std::vector<int>* last);
  static void check_alike(const Ranks& ranks);
  static std::string fault_of(const Ranks& ranks);
  struct Building;
  void run_action(size_t action);
  void leave_card();
  void meet_ranks(size_t action, const int32_t* tokens, const CardGroup::Together& together);
  void note(const CardGroup::Outcome& outcome);
  RopeStore rope_store(int action, const Operation& o);
  uint8_t* kv_layer(int layer) const;
  AttentionStep attention_step(const Operation& o) const;
  size_t fuse(size_t action);
  FusedProducts fused(Then then, const std::vector<int>& operations, size_t action);
  bool are_quantized(const std::vector<int>& operations) const;
  bool norms(size_t index) const;
  NormAfter norm_after(size_t action, int first_row) const;
  bool has_integer_kv() const { return program().kv.key == KeyType::Int8 && program().kv.value == ValueType::Int8; }
  bool fuses(int rows) const { return rows <= fused_tokens_max_ && program().activations == ActivationType::Int8 && has_integer_kv(); }
  bool fuses_followers(int rows) const { return fuses_followers_ && fuses(rows); }
  const Action* action_of(size_t index, ActionKind kind) const;
  void send_tokens(const int32_t* tokens);
  void look_up(const Operation& o);
  void look_up(const Operation& o, const CudaDevice& owner, uint64_t* began);
  void gather_rows(const Operation& o);
  bool run_ahead_of_host(const Action& action);
  int report_rows() const { return shard_.output_rows(); }  // most candidates of a report
  void report();
  void give_up();
  void allocate_kv();
  float* sums() const { return group_ ? sums_of(reductions_) : peers_ ? peers_->block() : sums_.as<float>(); }
  float* sums_of(uint64_t reduction) const;
  // Whether kernels wait for those of other cards.
  bool spins_with_peers() const { return reduces_with_peers_ && !group_; }
  void reduce_with_peers(int index, const NormAfter* norm = nullptr);
  void reduce_with_ranks(int index, const NormAfter* norm);

  // Takes note of what a launch or copy answered. After the first fault nothing is queued.
  void queue(Problem problem) {
    waited_ = reported_ = false;
    if (problem && problem_.fault.empty()) problem_.fault = problem;
  }
  bool broken() const { return !problem_.fault.empty() || problem_.peer >= 0; }
  // Whether the graph that was launched last did operation `index`, whose host part comes now.
  bool is_ahead(int index) const { return !building_ && ahead_ && shard_.actions()[ahead_->end].operation == index; }
  Product product(const Operation& o, int subtree_count, const Subtree* subtrees, float* out, int64_t out_stride, int64_t subtree_stride) const;
  // Whether a product goes through the tensor cores as bf16: where the program lets executor kinds differ in their bits.
  bool is_bf16(int weight) const { return program().bits != Bits::Exact && program().weights[static_cast<size_t>(weight)].type == TensorType::BF16; }
  bool is_bf16(const Operation& o) const { return is_bf16(o.weight); }
  const std::vector<BlasPart>& blas_parts(const Operation& o) const { return blas_parts_[static_cast<size_t>(&o - program().operations.data())]; }
  bool is_for_blas(const Operation& o) const { return blas_ && blas_->serves(rows_of(o.in)) && !blas_parts(o).empty(); }
  void round_input(const Operation& o);
  void run(const Operation& o, const Product& product);
  void run_blas(const Operation& o, const Product& product);

  // Words at the beginning of what a step sends ahead.
  enum { kLeast, kLiveRows, kLiveOutputs, kPeerStep = 4, kHeaderWords = 8 };
  static_assert(sizeof(PeerStep) <= 4 * (kHeaderWords - kPeerStep));

  Card card_facts_{};
  std::optional<Tuning> tuning_;  // while memory is planned
  Edges edges_ = Edges::Plain;    // of graphs
  Stream own_stream_ = nullptr;
  Stream stream_ = nullptr;  // the own one, or that of all ranks of this card
  Stream to_ = nullptr;      // where operations queue: the stream, or a graph that is being built
  std::unique_ptr<BlasProducts> blas_;              // null: bits are not free, or the library cannot be had
  std::vector<std::vector<BlasPart>> blas_parts_;   // by operation; none: own kernels do it whatever the step
  std::string note_;
  std::vector<CardMatrix> matrices_;  // by weight
  std::vector<Memory> vectors_;       // by weight
  std::vector<Table> tables_;         // by number
  std::vector<CardBuffer> buffers_;
  std::vector<Memory> mirrors_;       // by buffer: its rows on the host
  std::vector<AttentionShape> shapes_;
  std::unique_ptr<PeerDriver> peers_;  // null: one rank, or sums are rounded on their way
  std::shared_ptr<CardGroup> group_;   // null: no other rank of the stage does its steps with this one
  Memory kv_, sums_, received_sums_, partials_, candidates_, maxima_, head_parts_, head_maxima_, reports_, began_, arrivals_;
  // On the host, each with its counterpart on the card: what a step needs to know, in one piece; and, of steps that are no graph, tokens, rows to select, and rows to
  // look for candidates in, which lie in the first one else. The first has two places on the host, so that the next step can be laid down while the copy of one is queued;
  // on the card the stream keeps them apart.
  Memory step_host_[2], step_card_, tokens_host_, tokens_card_, select_host_, select_card_, settings_host_, settings_card_;
  Memory least_host_, times_host_, candidates_host_, word_host_, staging_host_, received_host_, sums_host_;
  DeviceRows device_rows_{};
  // Where these lie on the card for the step, or for the graphs: in the step's piece or not.
  const int32_t *tokens_ = nullptr, *selected_ = nullptr;
  const HeadRow* settings_ = nullptr;
  int fused_tokens_max_ = kFusedTokensMax;  // of the tuning
  bool fuses_followers_ = true;             // Fusion::Whole
  int slots_ = kSlotsMax;  // of partials_
  size_t step_bytes_ = 0;  // of what the step sends ahead
  int place_ = 0;          // of step_host_, laid down last
  uint32_t reports_sent_ = 0, report_ = 0, report_of_candidates_ = 0;  // report_: the one that the step waits for
  uint64_t card_ended_ns_ = 0;  // the last step that was waited for, by the card's clock
  double idle_us_ = 0;
  int reported_candidates_ = 0;  // that the next report takes along
  bool waited_ = true, reported_ = false, building_ = false, sent_ = false;
  int64_t deadline_ns_ = 0, meeting_deadline_ns_ = 0;
  uint32_t step_ = 0;
  int step_outputs_ = 0;   // output rows of the step
  uint64_t reductions_ = 0;  // of the step so far, where ranks do it together: their sums lie in two blocks by turns
  std::vector<size_t> action_of_reduce_;  // by operation
  Subtree fused_trees_[kFusedProductsMax]{};
  int64_t sum_rows_ = 0;     // own sums are [subtree][so many rows][width]
  std::vector<StepGraphs> graphs_;
  const StepGraphs* step_graphs_ = nullptr;  // of this step
  const Piece* ahead_ = nullptr;             // the piece that was launched last
  // The step that was queued behind this one, and, once that has begun, what it found of itself.
  struct Queued {
    StepGraphs* graphs = nullptr;
    uint32_t report = 0;
    Problem problem = nullptr;
  } behind_, begun_;
};

}  // namespace shardmesh::cuda
