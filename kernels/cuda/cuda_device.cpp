// The device that is a card: operations become launches on one stream, and the host waits where it needs what they made: in front of an exchange, a hand-over to the next
// stage, sampling, and the end of a step. All memory is planned when the executor is made; a step allocates none on the card, and on the host only what vectors keep.
//
// Weights lie packed on the card (weight_layout.h), the embedding too: tokens travel, rows do not. A step's rows, block tables and attention work go over as one copy.
// Rope of q and k and the store into the cache are one launch, at the place of store_kv; so are a norm or activation and the quantising of what it makes. Products that share an input are launches of their own.
#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "../runner/cuda_part.h"
#include "../runner/device.h"
#include "attention_plan.h"
#include "operations.h"
#include "runtime.h"
#include "tuning.h"
#include "weight_layout.h"

namespace shardmesh {
namespace {

using namespace cuda;

// Above these the prefill products of float weights take over from the decode products; either gives the same bits.
constexpr int kFloatDecodeTokensMax = 16, kBrainDecodeTokensMax = 64;
constexpr int kSlotsMax = 4096;
constexpr int kHalfAttentionBlocks = 3;  // of a multiprocessor, where K or V is f16
constexpr uint32_t kNothingFound = 0xffffffffu;

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
  void fetch_rows(int buffer, int first, int count) override;
  void push_rows(int buffer, int first, int count) override;
  void begin_step(const StepRows& rows) override;
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
  void select_rows(const Operation& o, const OutputRow* outputs) override;
  void find_candidates(int buffer, int32_t first_token, const std::vector<CandidateRow>& rows) override;
  shardmesh::Candidate candidate(int r) const override;

 private:
  struct CardMatrix {
    Memory data;
    int phase = 0;
    ProductTuning tuning{};
  };
  struct CardBuffer {
    Memory values, groups, brain;  // groups: its quantised form; brain: rounded to bf16, of what a bf16 product reads
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

  const Program& program() const { return shard_.program(); }
  const Operation& operation(int index) const { return program().operations[static_cast<size_t>(index)]; }
  const CardBuffer& card(int buffer) const { return buffers_[static_cast<size_t>(buffer)]; }
  float* values(int buffer, int r = 0) const { return card(buffer).row(shard_.buffer(buffer).stride, r); }
  const float* vector(int weight) const { return weight < 0 ? nullptr : vectors_[static_cast<size_t>(weight)].as<float>(); }
  ActivationTiles groups(int buffer) const { return {card(buffer).groups.as<ActivationGroup>(), program().activations}; }
  FiniteCheck check_of(int action) const { return {least_.as<uint32_t>(), static_cast<uint32_t>(action) << 16}; }

  void check_program() const;
  void check_matrix(int weight) const;
  void check_rope(int index) const;
  void plan_memory();
  void plan_attention_shapes();
  const AttentionShape& shape_of(const Operation& o) const;
  void plan_step(const StepRows& rows);

  // Takes note of what a launch or copy answered. After the first fault nothing is queued.
  void queue(Problem problem) {
    waited_ = false;
    if (problem && problem_.fault.empty()) problem_.fault = problem;
  }
  bool broken() const { return !problem_.fault.empty(); }
  Product product(const Operation& o, int subtree_count, const Subtree* subtrees, float* out, int64_t out_stride, int64_t subtree_stride) const;
  // Whether a product goes through the tensor cores as bf16: where the program lets executor kinds differ in their bits.
  bool is_brain(const Operation& o) const { return program().per_kind && program().weights[static_cast<size_t>(o.weight)].type == TensorType::BF16; }
  void round_input(const Operation& o);
  void run(const Operation& o, const Product& product);

  Card card_facts_{};
  std::optional<Tuning> tuning_;  // while memory is planned
  Stream stream_ = nullptr;
  std::vector<CardMatrix> matrices_;  // by weight
  std::vector<Memory> vectors_;       // by weight
  std::vector<Table> tables_;         // by number
  std::vector<CardBuffer> buffers_;
  std::vector<Memory> mirrors_;       // by buffer: its rows on the host
  std::vector<AttentionShape> shapes_;
  Memory kv_, sums_, received_sums_, partials_, least_, candidates_, maxima_;
  // On the host, each with its counterpart on the card: what a step needs to know, in one piece; tokens; rows to select; rows to look for candidates in.
  Memory step_host_, step_card_, tokens_host_, tokens_card_, select_host_, select_card_, settings_host_, settings_card_;
  Memory least_host_, candidates_host_, staging_host_, received_host_, sums_host_;
  DeviceRows device_rows_{};
  bool waited_ = true;
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
  plan_memory();
  if (const Problem problem = open_stream(&stream_)) refuse(std::string("no stream: ") + problem);
}

CudaDevice::~CudaDevice() {
  synchronise(stream_);
  close_stream(stream_);
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
  kv_ = Memory(Place::Card, static_cast<size_t>(p.kv.layers) * static_cast<size_t>(c.kv_blocks) * shard_.kv_layout().block_bytes, "the KV cache (kvBlocks, --kv-cache-bytes)");

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
          return (o.kind == OperationKind::Linear || o.kind == OperationKind::LinearPartial) && o.in == static_cast<int>(i) && is_brain(o);
        }))
      buffers_[i].brain = Memory(Place::Card, brain_bytes(b.rows, b.width), kBuffers);
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
  sums_ = Memory(Place::Card, own_sums, kBuffers);
  received_sums_ = Memory(Place::Card, other_sums, kBuffers);
  if (c.wire == WireType::F32) sums_host_ = Memory(Place::Host, other_sums, kBuffers);
  staging_host_ = Memory(Place::Host, shard_.staging_bytes(), kBuffers);
  received_host_ = Memory(Place::Host, shard_.received_bytes(), kBuffers);
  staging_ = staging_host_.as<float>();
  received_ = received_host_.as<float>();

  // What a step needs to know: positions, sequences, block tables, and a work list for each kind of attention; every list begins at a multiple of 16 bytes.
  const size_t sequences = std::min<size_t>(T, static_cast<size_t>(c.sequences_max));
  const size_t blocks = (static_cast<size_t>(p.context_tokens_max) + static_cast<size_t>(c.block_tokens) - 1) / static_cast<size_t>(c.block_tokens);
  size_t words = 3 * (T + 4) + sequences * blocks + 8;
  size_t heads = 0;
  for (AttentionShape& shape : shapes_) {
    const size_t most = AttentionPlan::most_work(T, kSlotsMax, shape.host_runs.size());
    shape.plan.work.reserve(most);
    shape.plan.first_slot.reserve(T + 1);
    words += (T + 5) + 4 * most + 8;
    heads = std::max(heads, static_cast<size_t>(shape.like->heads));
    shape.runs = Memory(Place::Card, shape.host_runs.size() * sizeof(HeadRun), kBuffers);
    if (const Problem problem = copy_now(shape.runs.as<void>(), shape.host_runs.data(), shape.runs.size())) refuse(problem);
  }
  step_host_ = Memory(Place::Host, words * 4, kBuffers);
  step_card_ = Memory(Place::Card, words * 4, kBuffers);
  partials_ = Memory(Place::Card, shapes_.empty() ? 0 : kSlotsMax * heads * static_cast<size_t>(p.kv.head_size + 2) * 4, kBuffers);
  least_ = Memory(Place::Card, 4, kBuffers);
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
}

size_t CudaDevice::bytes() const {
  size_t sum = 0;
  const auto add = [&](const auto&... memories) { ((sum += memories.size()), ...); };
  for (const CardMatrix& m : matrices_) add(m.data);
  for (const Memory& v : vectors_) add(v);
  for (const Table& t : tables_) add(t.cosine, t.sine);
  for (const CardBuffer& b : buffers_) add(b.values, b.groups, b.brain);
  for (const Memory& m : mirrors_) add(m);
  add(kv_, sums_, received_sums_, partials_, step_host_, step_card_, staging_host_, received_host_, sums_host_);
  return sum;
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
  for (int number = 0; number < shard_.rope_tables(); number++) {
    const RopeTable table = shard_.rope_table_of(number);
    const size_t bytes = static_cast<size_t>(program().context_tokens_max) * static_cast<size_t>(table.dimensions / 2) * 4;
    tables_.push_back({Memory(Place::Card, bytes, "the rope tables"), Memory(Place::Card, bytes, "the rope tables")});
    copy(tables_.back().cosine, table.cosine);
    copy(tables_.back().sine, table.sine);
  }
}

// Nothing reads what an epoch has not written; still no epoch leaves its K and V to the next.
void CudaDevice::clear_kv() {
  synchronise(stream_);
  problem_ = {};
  if (kv_.size() > 0) queue(fill(kv_.as<void>(), 0, kv_.size(), stream_));
}

// ---------------------------------------------------------------- a step

void CudaDevice::begin_step(const StepRows& rows) {
  rows_ = &rows;
  if (broken()) return;
  queue(fill(least_.as<void>(), 0xff, 4, stream_));
  plan_step(rows);
}

// Lays down everything that the step's kernels look up, and sends it in one piece. A sequence's block table goes as far as its rows.
void CudaDevice::plan_step(const StepRows& rows) {
  uint8_t* const host = step_host_.as<uint8_t>();
  const uint8_t* const card = step_card_.as<uint8_t>();
  size_t at = 0;
  const auto put = [&](const auto* values, size_t count) {
    const auto* there = reinterpret_cast<decltype(values)>(card + at);
    std::memcpy(host + at, values, count * sizeof *values);
    at = (at + count * sizeof *values + 15) / 16 * 16;
    return there;
  };
  const size_t T = static_cast<size_t>(rows.tokens);
  device_rows_.tokens = rows.tokens;
  device_rows_.positions = put(rows.positions, T);
  device_rows_.row_sequence = put(rows.row_sequence, T);
  int32_t* const offsets = reinterpret_cast<int32_t*>(host + at);
  device_rows_.block_offsets = reinterpret_cast<const int32_t*>(card + at);
  at = (at + static_cast<size_t>(rows.sequences) * 4 + 15) / 16 * 16;
  device_rows_.block_tables = reinterpret_cast<const int32_t*>(card + at);
  int32_t* const tables = reinterpret_cast<int32_t*>(host + at);
  int32_t blocks = 0;
  for (int s = 0; s < rows.sequences; s++) {
    const int32_t needed = rows.positions[rows.first_row[s + 1] - 1] / shard_.config().block_tokens + 1;
    offsets[s] = blocks;
    std::memcpy(tables + blocks, rows.block_tables + rows.block_offsets[s], static_cast<size_t>(needed) * 4);
    blocks += needed;
  }
  at = (at + static_cast<size_t>(blocks) * 4 + 15) / 16 * 16;
  for (AttentionShape& shape : shapes_) {
    plan_attention(rows, shape.host_runs, shape.like->window, {shape.tuning.split_rows_max, kSlotsMax}, &shape.plan);
    const int32_t count = static_cast<int32_t>(shape.plan.work.size());
    shape.first_slot = put(shape.plan.first_slot.data(), shape.plan.first_slot.size());
    shape.work = put(shape.plan.work.data(), shape.plan.work.size());
    shape.work_count = put(&count, 1);
  }
  queue(copy_to_card(step_card_.as<void>(), host, at, stream_));
}

bool CudaDevice::wait() {
  if (!waited_) {
    if (!broken()) queue(copy_to_host(least_host_.as<void>(), least_.as<void>(), 4, stream_));
    queue(synchronise(stream_));
    waited_ = true;
    const uint32_t found = *least_host_.as<uint32_t>();
    if (!broken() && found != kNothingFound) problem_ = {static_cast<int>(found >> 16), static_cast<int>(found & 0xffff), ""};
  }
  return !broken() && problem_.action < 0;
}

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
  queue(copy_to_card(tokens_card_.as<void>(), tokens_host_.as<void>(), count * 4, stream_));
  const WeightSlice& slice = program().weights[static_cast<size_t>(o.weight)];
  const CardMatrix& matrix = matrices_[static_cast<size_t>(o.weight)];
  queue(cuda::embed(slice.type, slice.rows.size(), slice.columns.size(), matrix.phase, matrix.data.as<uint8_t>(), tokens_card_.as<int32_t>(), rows_->tokens,
                    static_cast<int32_t>(o.vocabulary[static_cast<size_t>(program().rank)].from), values(o.out), shard_.buffer(o.out).stride, stream_));
}

void CudaDevice::norm(const Operation& o) {
  if (broken()) return;
  const Buffer& in = shard_.buffer(o.in);
  queue(rms_norm(values(o.in), in.stride, vector(o.weight), o.epsilon, in.width, rows_of(o.in), values(o.out), shard_.buffer(o.out).stride, nullptr, stream_));
}

bool CudaDevice::quantize(int action, int buffer) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(cuda::quantize(values(buffer), b.stride, rows_of(buffer), b.width, groups(buffer), stream_, check_of(action)));
  return true;
}

bool CudaDevice::norm_quantized(int action, const Operation& o) {
  if (!card(o.out).only_groups) return Device::norm_quantized(action, o);
  const Buffer& in = shard_.buffer(o.in);
  if (!broken())
    queue(rms_norm(values(o.in), in.stride, vector(o.weight), o.epsilon, in.width, rows_of(o.in), nullptr, 0, groups(o.out), stream_, check_of(action)));
  return true;
}

bool CudaDevice::activation_quantized(int action, const Operation& o) {
  if (!card(o.out).only_groups) return Device::activation_quantized(action, o);
  const Buffer& gate = shard_.buffer(o.in);
  if (!broken())
    queue(cuda::gated_activation(values(o.in), gate.stride, values(o.in2), shard_.buffer(o.in2).stride, gate.width, rows_of(o.in), o.activation, nullptr, 0,
                                 groups(o.out), stream_, check_of(action)));
  return true;
}

bool CudaDevice::check_rows(int action, int buffer) {
  const Buffer& b = shard_.buffer(buffer);
  if (!broken()) queue(cuda::check_rows(values(buffer), b.stride, rows_of(buffer), b.width, check_of(action), stream_));
  return true;
}

Product CudaDevice::product(const Operation& o, int subtree_count, const Subtree* subtrees, float* out, int64_t out_stride, int64_t subtree_stride) const {
  const WeightSlice& slice = program().weights[static_cast<size_t>(o.weight)];
  const CardMatrix& matrix = matrices_[static_cast<size_t>(o.weight)];
  return {slice.type,        slice.rows.size(), slice.columns.size(), matrix.phase,
          matrix.data.as<uint8_t>(), card(o.in).groups.as<ActivationGroup>(), rows_of(o.in), static_cast<int>(o.segments.size()),
          o.segments.data(), subtree_count,     subtrees,             vector(o.bias),
          out,               out_stride,        subtree_stride,       matrix.tuning.decode_tiles,
          program().activations, values(o.in),  shard_.buffer(o.in).stride, card(o.in).brain.as<BrainGroup>()};
}

void CudaDevice::round_input(const Operation& o) {
  const Buffer& in = shard_.buffer(o.in);
  queue(round_bf16(values(o.in), in.stride, rows_of(o.in), in.width, card(o.in).brain.as<BrainGroup>(), stream_));
}

void CudaDevice::run(const Operation& o, const Product& product) {
  if (broken()) return;
  const int decode_tokens_max = matrices_[static_cast<size_t>(o.weight)].tuning.decode_tokens_max;
  if (shard_.is_quantized(o.weight)) queue(product.tokens <= decode_tokens_max ? linear_decode(product, stream_) : linear_prefill(product, stream_));
  else if (is_brain(o)) queue(product.tokens <= kBrainDecodeTokensMax ? linear_bf16_decode(product, stream_) : linear_bf16_prefill(product, stream_));
  else queue(product.tokens <= kFloatDecodeTokensMax ? linear_float_decode(product, stream_) : linear_float_prefill(product, stream_));
}

void CudaDevice::products(const std::vector<int>& operations) {
  bool rounded = false;  // they share their input
  for (const int index : operations) {
    if (broken()) return;
    const Operation& o = operation(index);
    if (is_brain(o) && !rounded) round_input(o);
    rounded = rounded || is_brain(o);
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
  if (is_brain(o)) round_input(o);
  run(o, product(o, static_cast<int>(subtrees.size()), subtrees.data(), sums_.as<float>(), o.width, rows_->tokens * o.width));
  if (program().ranks > 1 && !broken()) queue(copy_to_host(partial_, sums_.as<void>(), subtrees.size() * static_cast<size_t>(rows_->tokens) * static_cast<size_t>(o.width) * 4, stream_));
}

void CudaDevice::reduce(int index, int first_row, int rows, const float* const* sums) {
  if (broken()) return;
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
    const float* from = sums[r] ? there : sums_.as<float>() + first_row * residual.width;
    const int64_t apart = sums[r] ? piece : rows_->tokens * residual.width;
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
    queue(copy_to_card(there, source, values_of_rank * 4, stream_));
    there += values_of_rank;
  }
  if (!broken())
    queue(finish_tree(o.cut.units, count, lo, hi, nodes, strides, vector(o.bias), values(o.out, first_row), residual.stride, residual.width, rows, stream_));
}

bool CudaDevice::store_kv(int action, const Operation& o) {
  if (broken()) return true;
  const int index = static_cast<int>(&o - program().operations.data());
  const Operation& q = operation(index - 2);
  const RopeTable host = shard_.rope_table(index - 2);
  const Table& table = tables_[static_cast<size_t>(shard_.rope_table_number(index - 2))];
  uint8_t* layer = kv_.as<uint8_t>() + static_cast<size_t>(o.layer) * static_cast<size_t>(shard_.config().kv_blocks) * shard_.kv_layout().block_bytes;
  queue(rope_store_kv(values(q.out), shard_.buffer(q.out).stride, q.heads, values(o.in), shard_.buffer(o.in).stride, values(o.in2), shard_.buffer(o.in2).stride,
                      {host.dimensions, host.half_style, table.cosine.as<float>(), table.sine.as<float>()}, shard_.kv_layout(), layer, device_rows_, stream_, check_of(action)));
  return true;
}

void CudaDevice::attention(const Operation& o) {
  if (broken()) return;
  const AttentionShape& shape = shape_of(o);
  const uint8_t* layer = kv_.as<uint8_t>() + static_cast<size_t>(o.layer) * static_cast<size_t>(shard_.config().kv_blocks) * shard_.kv_layout().block_bytes;
  const AttentionStep step{values(o.in),          shard_.buffer(o.in).stride, values(o.out), shard_.buffer(o.out).stride, o.heads,          static_cast<float>(o.scale), o.window, shard_.kv_layout(),
                           layer,                 device_rows_,               shape.runs.as<HeadRun>(), shape.work,       shape.work_count, partials_.as<float>(),       shape.first_slot};
  const bool integer = program().kv.key == KeyType::Int8 && program().kv.value == ValueType::Int8;
  if (integer) queue(cuda::attention(step, card_facts_.multiprocessors * shape.tuning.warps, stream_));
  else queue(cuda::attention_f16(step, card_facts_.multiprocessors * kHalfAttentionBlocks, stream_));
  if (!broken() && shape.plan.first_slot.back() > 0) queue(attention_join(step, stream_));
}

void CudaDevice::gated_activation(const Operation& o) {
  if (broken()) return;
  const Buffer& gate = shard_.buffer(o.in);
  queue(cuda::gated_activation(values(o.in), gate.stride, values(o.in2), shard_.buffer(o.in2).stride, gate.width, rows_of(o.in), o.activation, values(o.out), shard_.buffer(o.out).stride, nullptr,
                               stream_));
}

void CudaDevice::select_rows(const Operation& o, const OutputRow* outputs) {
  if (broken()) return;
  int32_t* which = select_host_.as<int32_t>();
  for (int r = 0; r < tail_rows_; r++) which[r] = outputs[r].row;
  queue(copy_to_card(select_card_.as<void>(), which, static_cast<size_t>(tail_rows_) * 4, stream_));
  const Buffer& in = shard_.buffer(o.in);
  if (!broken()) queue(cuda::select_rows(values(o.in), in.stride, select_card_.as<int32_t>(), tail_rows_, in.width, values(o.out), shard_.buffer(o.out).stride, stream_));
}

void CudaDevice::find_candidates(int buffer, int32_t first_token, const std::vector<CandidateRow>& rows) {
  if (broken()) return;
  HeadRow* settings = settings_host_.as<HeadRow>();
  for (size_t r = 0; r < rows.size(); r++) settings[r] = {rows[r].temperature, rows[r].key.low, rows[r].key.high};
  queue(copy_to_card(settings_card_.as<void>(), settings, rows.size() * sizeof(HeadRow), stream_));
  const Buffer& logits = shard_.buffer(buffer);
  if (!broken())
    queue(head_candidates(values(buffer), logits.stride, static_cast<int>(rows.size()), logits.width, first_token, settings_card_.as<HeadRow>(), candidates_.as<cuda::Candidate>(),
                          maxima_.as<float>(), stream_));
  if (!broken()) queue(copy_to_host(candidates_host_.as<void>(), candidates_.as<void>(), rows.size() * sizeof(cuda::Candidate), stream_));
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
