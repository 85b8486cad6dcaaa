// The device's memory, planned when the executor is made, and its weights.
#include <algorithm>
#include <memory>
#include <stdexcept>

#include "cuda_device.h"
#include "weight_layout.h"

namespace shardmesh::cuda {

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

  fused_tokens_max_ = tuning_->fused_tokens_max();
  fuses_followers_ = tuning_->fusion() == Fusion::Whole;
  matrices_.resize(p.weights.size());
  vectors_.resize(p.weights.size());
  for (size_t i = 0; i < p.weights.size(); i++) {
    const MatrixSource source = shard_.source_of(static_cast<int>(i), nullptr);
    if (p.weights[i].use == WeightUse::Vector) vectors_[i] = Memory(Place::Card, static_cast<size_t>(source.columns) * 4, kWeights);
    else {
      matrices_[i].data = Memory(Place::Card, packed_bytes(source), kWeights);
      const Products arithmetic = shard_.is_quantized(static_cast<int>(i)) ? Products::Quantised : is_bf16(static_cast<int>(i)) ? Products::Bf16 : Products::Float;
      matrices_[i].tuning = tuning_->product(source.type, arithmetic, static_cast<int64_t>(matrices_[i].data.size()));
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

  plan_blas();

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
  for (Memory& place : step_host_) place = Memory(Place::Host, words * 4, kBuffers);
  step_card_ = Memory(Place::Card, words * 4, kBuffers);
  partials_ = Memory(Place::Card, shapes_.empty() ? 0 : static_cast<size_t>(slots_) * heads * static_cast<size_t>(p.kv.head_size + 2) * 4, kBuffers);
  size_t arrivals = 1;
  for (const Operation& o : p.operations) {  // of fuse(): groups of an activation, heads of q, k and v
    if (o.kind == OperationKind::GatedActivation) arrivals = std::max(arrivals, static_cast<size_t>(shard_.buffer(o.out).width) / 32);
    if (o.kind == OperationKind::Attention) arrivals = std::max(arrivals, static_cast<size_t>(o.heads + 2 * p.kv.heads));
  }
  size_t head_parts = 0;
  for (const Operation& o : p.operations)
    if (o.kind == OperationKind::GatherLogits || o.kind == OperationKind::Sample) {
      arrivals = std::max(arrivals, outputs);
      head_parts = std::max(head_parts, head_part_count(shard_.buffer(o.in).width));
    }
  for (const AttentionShape& shape : shapes_) arrivals = std::max(arrivals, static_cast<size_t>(kFusedTokensMax) * shape.host_runs.size());
  arrivals_ = Memory(Place::Card, arrivals * 4, kBuffers);
  began_ = Memory(Place::Card, 8, kBuffers);
  if (const Problem problem = copy_now(began_.as<void>(), &card_ended_ns_, 8)) refuse(problem);
  reports_ = Memory(Place::Card, 4, kBuffers);
  if (const Problem problem = copy_now(reports_.as<void>(), &reports_sent_, 4)) refuse(problem);
  word_host_ = Memory(Place::Host, 4, kBuffers);
  *word_host_.as<uint32_t>() = 0;
  times_host_ = Memory(Place::Host, kReportPlaces * sizeof(StepTimes), kBuffers);
  least_host_ = Memory(Place::Host, kReportPlaces * 4, kBuffers);
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
    candidates_host_ = Memory(Place::Host, kReportPlaces * outputs * sizeof(cuda::Candidate), kBuffers);
    maxima_ = Memory(Place::Card, outputs * 4, kBuffers);
    head_parts_ = Memory(Place::Card, outputs * head_parts * sizeof(cuda::Candidate), kBuffers);
    head_maxima_ = Memory(Place::Card, outputs * head_parts * 4, kBuffers);
  }
  tables_.resize(static_cast<size_t>(shard_.rope_tables()));
  for (size_t i = 0; i < p.operations.size(); i++) {
    if (p.operations[i].kind != OperationKind::Rope) continue;
    Table& table = tables_[static_cast<size_t>(shard_.rope_table_number(static_cast<int>(i)))];
    const size_t table_bytes = static_cast<size_t>(p.context_tokens_max) * static_cast<size_t>(p.operations[i].dimensions / 2) * 4;
    if (table.cosine.size() == 0) table = {Memory(Place::Card, table_bytes, "the rope tables"), Memory(Place::Card, table_bytes, "the rope tables")};
  }
}

// Steps that are no graph, which have more than kGraphRowsMax tokens, leave products of BF16 weights to the library where bits are free: all of them or none, so that a model has
// one layout. A matrix that it reads lies row after row, in as many bytes; own kernels read that too. The head sees too few rows at a time, and an embedding is read as it is packed.
void CudaDevice::plan_blas() {
  const Program& p = program();
  blas_parts_.resize(p.operations.size());
  if (p.bits != Bits::Free) return;
  note_ = "BF16 products by own kernels: ";
  if (shard_.config().step_tokens_max <= kGraphRowsMax) {
    note_ += "no step has more than " + std::to_string(kGraphRowsMax) + " tokens";
    return;
  }
  const auto is_embedding = [&](int weight) { return std::any_of(p.operations.begin(), p.operations.end(), [&](const Operation& o) { return o.kind == OperationKind::Embed && o.weight == weight; }); };
  try {
    blas_ = std::make_unique<BlasProducts>(blas_libraries(), kGraphRowsMax, shard_.config().step_tokens_max);
    for (size_t i = 0; i < p.operations.size(); i++) {
      const Operation& o = p.operations[i];
      const bool partial = o.kind == OperationKind::LinearPartial;
      if ((!partial && o.kind != OperationKind::Linear) || !is_bf16(o) || shard_.buffer(o.in).per_output || is_embedding(o.weight)) continue;
      const WeightSlice& slice = p.weights[static_cast<size_t>(o.weight)];
      const std::vector<Subtree> whole{{0, static_cast<int>(o.segments.size())}};
      for (const Subtree& tree : partial ? shard_.own_subtrees(static_cast<int>(i)) : whole) {
        const int64_t from = tree.first ? int64_t{o.segments[static_cast<size_t>(tree.first) - 1]} * 32 : 0, to = int64_t{o.segments[static_cast<size_t>(tree.first + tree.count) - 1]} * 32;
        const BlasShape shape{slice.rows.size(), to - from, slice.columns.size(), slice.columns.size(), partial ? o.width : shard_.buffer(o.out).stride, vector(o.bias)};
        blas_parts_[i].push_back({shape, from, blas_->plan(shape)});
      }
      matrices_[static_cast<size_t>(o.weight)].by_rows = true;
    }
    note_ = "BF16 products of more than " + std::to_string(kGraphRowsMax) + " tokens by " + blas_->name();
  } catch (const std::runtime_error& error) {
    note_ += error.what();
    blas_.reset();
    for (auto& parts : blas_parts_) parts.clear();
    for (CardMatrix& matrix : matrices_) matrix.by_rows = false;
  }
  if (blas_) blas_->allocate_workspace();
}

BlasOperands CudaDevice::operands(const BlasPart& part, const Operation& o, float* out) const {
  return {matrices_[static_cast<size_t>(o.weight)].data.as<uint8_t>() + 2 * part.from, card(o.in).bf16.as<uint8_t>() + 2 * part.from, out};
}

// Before a kernel waits for another card, every kernel must be loaded, those of the library too.
void CudaDevice::warm_blas() {
  std::vector<int> warm;
  for (const Operation& o : program().operations)
    for (const BlasPart& part : blas_parts(o)) {
      if (std::find(warm.begin(), warm.end(), part.plan) != warm.end()) continue;
      warm.push_back(part.plan);
      float* out = o.kind == OperationKind::LinearPartial ? sums() : values(o.out);
      Problem problem = blas_->warm(part.plan, part.shape, operands(part, o, out), stream_);
      if (!problem) problem = synchronise(stream_);
      if (problem) refuse(std::string("a product of BF16 weights fails: ") + problem);
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
  add(arrivals_, candidates_, maxima_, head_parts_, head_maxima_, kv_, sums_, received_sums_, partials_, step_host_[0], step_host_[1], step_card_, staging_host_, received_host_, sums_host_);
  if (blas_) sum += blas_->workspace_bytes();
  return sum + (peers_ ? peers_->bytes() : 0);
}

WeightReport CudaDevice::load_matrix(int weight, const MatrixSource& source) {
  CardMatrix& matrix = matrices_[static_cast<size_t>(weight)];
  std::vector<uint8_t> packed(matrix.data.size());
  PackedMatrix out{source.type, source.rows, source.columns, packed.size(), packed.data(), 0, 0};
  (matrix.by_rows ? pack_rows : pack)(source, &out, Part{0, 1});
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
  if (blas_) warm_blas();
  build_graphs({this});
}

}  // namespace shardmesh::cuda
