#include "shard.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../reference/blocks.h"

namespace shardmesh {
namespace {

constexpr size_t kLine = 64;
constexpr uint64_t kFnvOffset = 14695981039346656037ull;

size_t align(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

std::string number(int64_t value) { return std::to_string(value); }

void expect(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

}  // namespace

Shard::Shard(ExecutorConfig config) : config_(std::move(config)) {
  check_config();
  choose_kernels();
  plan_actions();
  plan_exchanges();
  plan_memory();
  plan_rope();
  if (weights_.empty()) finish_loading();
}

void Shard::check_config() const {
  const ExecutorConfig& c = config_;
  expect(c.block_tokens >= 16 && c.block_tokens % 16 == 0 && c.block_tokens <= 4096, "blockTokens " + number(c.block_tokens) + " is not a multiple of 16 in 16..4096");
  expect(c.kv_blocks >= 1 && c.kv_blocks <= (1 << 24), "kvBlocks " + number(c.kv_blocks) + " is not in 1.." + number(1 << 24));
  expect(c.step_tokens_max >= 1 && c.step_tokens_max <= 65536, "stepTokensMax " + number(c.step_tokens_max) + " is not in 1..65536");
  expect(c.sequences_max >= 1 && c.sequences_max <= 65536, "sequencesMax " + number(c.sequences_max) + " is not in 1..65536");
  expect(c.threads >= 1 && c.threads <= 256, "threads " + number(c.threads) + " is not in 1..256");
  if (c.ranks_per_stage.empty()) return;
  expect(static_cast<int>(c.ranks_per_stage.size()) == c.program.stages,
         "ranksPerStage has " + number(static_cast<int64_t>(c.ranks_per_stage.size())) + " entries for " + number(c.program.stages) + " stages");
  for (const int ranks : c.ranks_per_stage) expect(ranks >= 1 && ranks <= kRanksMax, "ranksPerStage: " + number(ranks) + " ranks are not in 1.." + number(kRanksMax));
  expect(c.ranks_per_stage[static_cast<size_t>(c.program.stage)] == c.program.ranks, "ranksPerStage and program disagree on the ranks of stage " + number(c.program.stage));
}

void Shard::choose_kernels() {
  const char* why = nullptr;
  if (config_.kind == "cpu") {
    kernels_ = find_kernel_set(config_.isa.empty() ? "auto" : config_.isa.c_str(), &why);
    expect(kernels_ != nullptr, why ? why : "no kernel set for isa '" + config_.isa + "'");
    return;
  }
  expect(config_.isa.empty(), "executor kind '" + config_.kind + "' has no isa; '" + config_.isa + "' was asked for");
  if (config_.kind == "reference") kernels_ = reference_kernel_set();
  else if (config_.kind == "reference-f32") kernels_ = reference_f32_kernel_set();
  else throw std::runtime_error("executor kind '" + config_.kind + "' is not 'cpu', 'reference' or 'reference-f32'");
}

bool Shard::is_quantized(int weight) const { return !is_float(program().weights[static_cast<size_t>(weight)].type); }

void Shard::plan_actions() {
  const Program& p = program();
  std::vector<bool> quantized(p.buffers.size(), false);
  const auto written = [&](int buffer) { if (buffer >= 0) quantized[static_cast<size_t>(buffer)] = false; };
  const auto quantize = [&](int operation, int buffer, int weight) {
    if (!is_quantized(weight) || quantized[static_cast<size_t>(buffer)]) return;
    actions_.push_back({ActionKind::Quantize, operation, {}, buffer});
    quantized[static_cast<size_t>(buffer)] = true;
  };
  const bool last = p.stage + 1 == p.stages;
  bool tail = false;
  if (p.stage == 0) actions_.push_back({ActionKind::ResolveTokens});
  for (size_t i = 0; i < p.operations.size(); i++) {
    const Operation& o = p.operations[i];
    const int index = static_cast<int>(i);
    if (o.kind == OperationKind::SelectRows) {
      tail = true;
      tail_begin_ = actions_.size();
    }
    switch (o.kind) {
      case OperationKind::Linear: {
        Action* before = actions_.empty() ? nullptr : &actions_.back();
        const bool joins = before && before->kind == ActionKind::Linear && p.operations[static_cast<size_t>(before->products[0])].in == o.in &&
                           (!is_quantized(o.weight) || quantized[static_cast<size_t>(o.in)]);
        if (joins) {
          before->products.push_back(index);
        } else {
          quantize(index, o.in, o.weight);
          actions_.push_back({ActionKind::Linear, index, {index}});
        }
        written(o.out);
        break;
      }
      case OperationKind::LinearPartial:
        quantize(index, o.in, o.weight);
        actions_.push_back({ActionKind::LinearPartial, index});
        break;
      case OperationKind::Embed: actions_.push_back({ActionKind::Embed, index}); written(o.out); break;
      case OperationKind::GatherRows: if (p.ranks > 1) actions_.push_back({ActionKind::GatherRows, index}); written(o.out); break;
      case OperationKind::ReceiveHidden: actions_.push_back({ActionKind::ReceiveHidden, index}); written(o.out); break;
      case OperationKind::SendHidden: actions_.push_back({ActionKind::SendHidden, index}); break;
      case OperationKind::RmsNorm: actions_.push_back({ActionKind::RmsNorm, index}); written(o.out); break;
      case OperationKind::AllReduce: actions_.push_back({ActionKind::AllReduce, index}); written(o.out); break;
      case OperationKind::Rope: actions_.push_back({ActionKind::Rope, index}); written(o.out); break;
      case OperationKind::StoreKv: actions_.push_back({ActionKind::StoreKv, index}); break;
      case OperationKind::Attention: actions_.push_back({ActionKind::Attention, index}); written(o.out); break;
      case OperationKind::GatedActivation: actions_.push_back({ActionKind::GatedActivation, index}); written(o.out); break;
      case OperationKind::SelectRows: actions_.push_back({ActionKind::SelectRows, index}); written(o.out); break;
      case OperationKind::GatherLogits: actions_.push_back({ActionKind::GatherLogits, index}); written(o.out); break;
      case OperationKind::Sample: if (p.rank == 0) actions_.push_back({ActionKind::Sample, index}); break;
    }
  }
  tail_end_ = actions_.size();
  if (!tail) tail_begin_ = tail_end_;
  if (last && p.rank == 0) actions_.push_back({ActionKind::SendTokens});
}

MatrixSource Shard::source_of(int index, const uint8_t* data) const {
  const WeightSlice& slice = program().weights[static_cast<size_t>(index)];
  const SliceShape shape = slice_shape(slice);
  return {slice.type, shape.rows, shape.columns, shape.skip, shape.row_bytes, data};
}

void Shard::plan_exchanges() {
  const Program& p = program();
  for (const Operation& o : p.operations) {
    std::vector<std::vector<Subtree>> subtrees;
    for (const Range& own : o.cut.ranks) subtrees.push_back(maximal_subtrees(o.cut.units, static_cast<int>(own.from), static_cast<int>(own.to)));
    size_t row_bytes = 4;
    if (o.kind == OperationKind::AllReduce) {
      for (const auto& of_rank : subtrees) row_bytes = std::max(row_bytes, of_rank.size() * static_cast<size_t>(p.buffers[static_cast<size_t>(o.out)].width) * 4);
    } else if (o.kind == OperationKind::GatherRows) {
      row_bytes = static_cast<size_t>(p.buffers[static_cast<size_t>(o.out)].width) * 4;
    } else {
      for (const Range& range : o.vocabulary) row_bytes = std::max(row_bytes, static_cast<size_t>(range.size()) * 4);
    }
    piece_rows_.push_back(static_cast<int>(std::max<size_t>(1, kExchangePieceBytes / row_bytes)));
    subtrees_.push_back(std::move(subtrees));
  }
}

void Shard::plan_memory() {
  const Program& p = program();
  const size_t T = static_cast<size_t>(config_.step_tokens_max);

  output_rows_ = static_cast<int>(std::clamp<size_t>(kOutputBytes / (static_cast<size_t>(p.vocabulary_size) * 4), 8, kOutputRowsMax));

  // Weights: one arena in program order.
  weights_.resize(p.weights.size());
  std::vector<size_t> offsets;
  size_t at = 0;
  for (size_t i = 0; i < p.weights.size(); i++) {
    offsets.push_back(at);
    if (p.weights[i].use == WeightUse::Vector) continue;
    PackedMatrix& m = weights_[i].matrix;
    const MatrixSource source = source_of(static_cast<int>(i), nullptr);
    m.type = source.type;
    m.rows = source.rows;
    m.columns = source.columns;
    m.bytes = kernels_->packed_bytes(source);
    at += align(m.bytes);
  }
  weight_memory_ = Memory(at, "the weights of this shard");
  for (size_t i = 0; i < p.weights.size(); i++) weights_[i].matrix.data = weight_memory_.data() + offsets[i];

  // KV pool.
  kv_layout_ = config_.kind == "reference-f32" ? make_kv_layout(KeyType::F32, ValueType::F32, p.kv.heads, p.kv.head_size, config_.block_tokens)
                                                : make_kv_layout(p.kv.key, p.kv.value, p.kv.heads, p.kv.head_size, config_.block_tokens);
  kv_memory_ = Memory(static_cast<size_t>(p.kv.layers) * static_cast<size_t>(config_.kv_blocks) * kv_layout_.block_bytes, "the KV cache (kvBlocks)");

  // Buffers, with the quantised form of those that a quantised product reads, and the sums of partial products.
  struct Room { size_t values, quantized; };
  std::vector<Room> rooms;
  size_t bytes = 0;
  buffers_.resize(p.buffers.size());
  for (size_t i = 0; i < p.buffers.size(); i++) {
    Buffer& b = buffers_[i];
    b.width = p.buffers[i].width;
    b.stride = static_cast<int64_t>(align(static_cast<size_t>(b.width) * 4) / 4);
    const size_t rows = p.buffers[i].per_output ? static_cast<size_t>(output_rows_) : T;
    rooms.push_back({bytes, 0});
    bytes += align(rows * static_cast<size_t>(b.stride) * 4);
    const bool read_quantized = std::any_of(actions_.begin(), actions_.end(), [&](const Action& a) { return a.kind == ActionKind::Quantize && a.buffer == static_cast<int>(i); });
    if (!read_quantized) continue;
    rooms.back().quantized = bytes + 1;  // + 1: zero means none
    bytes += align(kernels_->activation_bytes(p.activations, static_cast<int>(rows), b.width));
  }
  // Also where hidden states are laid close together for a frame.
  size_t partial_bytes = std::min(T * static_cast<size_t>(p.hidden_size) * 4, std::max(kExchangePieceBytes, static_cast<size_t>(p.hidden_size) * 4));
  size_t received_bytes = 0;
  for (size_t i = 0; i < p.operations.size(); i++) {
    const Operation& o = p.operations[i];
    const auto piece = [&](size_t row_bytes) { return std::min<size_t>(static_cast<size_t>(piece_rows(static_cast<int>(i))), T) * row_bytes; };
    if (o.kind == OperationKind::AllReduce) {
      const size_t row_bytes = subtrees(static_cast<int>(i))[static_cast<size_t>(p.rank)].size() * static_cast<size_t>(buffer(o.out).width) * 4;
      partial_bytes = std::max(partial_bytes, T * row_bytes);
      exchange_bytes_ = std::max(exchange_bytes_, piece(row_bytes));
      size_t sums = 0;
      for (const auto& of_rank : subtrees(static_cast<int>(i))) sums += of_rank.size();
      if (config_.wire != WireType::F32) received_bytes = std::max(received_bytes, piece(sums * static_cast<size_t>(buffer(o.out).width) * 4));
    } else if (o.kind == OperationKind::GatherRows) {
      exchange_bytes_ = std::max(exchange_bytes_, piece(static_cast<size_t>(buffer(o.out).width) * 4));
    } else if (o.kind == OperationKind::GatherLogits) {
      const size_t rows = static_cast<size_t>(std::min(piece_rows(static_cast<int>(i)), output_rows_));
      exchange_bytes_ = std::max(exchange_bytes_, rows * static_cast<size_t>(o.vocabulary[static_cast<size_t>(p.rank)].size()) * 4);
    }
  }
  const size_t partial_at = bytes;
  bytes += align(partial_bytes);
  const size_t received_at = bytes;
  bytes += align(received_bytes);
  buffer_memory_ = Memory(bytes + kLine, "the buffers of a step (stepTokensMax)");
  for (size_t i = 0; i < buffers_.size(); i++) {
    buffers_[i].data = reinterpret_cast<float*>(buffer_memory_.data() + rooms[i].values);
    if (rooms[i].quantized) buffers_[i].quantized = buffer_memory_.data() + rooms[i].quantized - 1;
  }
  partial_ = reinterpret_cast<float*>(buffer_memory_.data() + partial_at);
  if (received_bytes > 0) received_ = reinterpret_cast<float*>(buffer_memory_.data() + received_at);

  // Scratch of the attention, for each thread.
  for (const Operation& o : p.operations)
    if (o.kind == OperationKind::Attention)
      scratch_stride_ = std::max(scratch_stride_, align(kernels_->attention_scratch_bytes(o.heads, o.head_size, config_.step_tokens_max)));
  scratch_bytes_ = scratch_stride_ * static_cast<size_t>(config_.threads) + kLine;
  scratch_storage_ = std::make_unique<uint8_t[]>(scratch_bytes_);
  scratch_.reset(reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch_storage_.get()) + kLine - 1) / kLine * kLine));
}

void Shard::plan_rope() {
  const Program& p = program();
  table_of_.assign(p.operations.size(), -1);
  for (size_t i = 0; i < p.operations.size(); i++) {
    const Operation& o = p.operations[i];
    if (o.kind != OperationKind::Rope) continue;
    const RopeParameters parameters{o.dimensions, o.half_style, o.base, o.scale, {}};
    size_t t = 0;
    while (t < table_parameters_.size() && !(table_parameters_[t] == parameters && table_factors_[t] == o.factors)) t++;
    if (t == table_parameters_.size()) {
      table_parameters_.push_back(parameters);
      table_factors_.push_back(o.factors);
    }
    table_of_[i] = static_cast<int>(t);
  }
}

WeightReport Shard::load_weight(int index, const uint8_t* data, size_t length) {
  const Program& p = program();
  expect(index >= 0 && static_cast<size_t>(index) < p.weights.size(), "weight " + number(index) + " is not in 0.." + number(static_cast<int64_t>(p.weights.size()) - 1));
  const WeightSlice& slice = p.weights[static_cast<size_t>(index)];
  const MatrixSource source = source_of(index, data);
  const size_t expected = static_cast<size_t>(source.rows) * static_cast<size_t>(source.row_bytes);
  expect(length == expected, "weight " + number(index) + " ('" + slice.tensor + "', " + tensor_type_name(slice.type) + ") has " + number(static_cast<int64_t>(length)) +
                                 " bytes, its slice " + number(static_cast<int64_t>(expected)));
  Weight& weight = weights_[static_cast<size_t>(index)];
  {
    std::lock_guard lock(loading_);
    expect(!weight.loading, "weight " + number(index) + " ('" + slice.tensor + "') is loaded already");
    weight.loading = true;
  }
  WeightReport report{0, 0};
  if (slice.use == WeightUse::Vector) {
    weight.vector.resize(static_cast<size_t>(source.columns));
    if (is_float(slice.type)) {
      read_floats(slice.type, data, source.skip, source.columns, weight.vector.data());
    } else {
      for (int64_t i = 0; i < source.columns; i++) {
        Group group;
        unpack_group(slice.type, data, (source.skip + i) / 32, &group);
        weight.vector[static_cast<size_t>(i)] = group_value(group, static_cast<int>((source.skip + i) % 32));
      }
    }
    expect(kernels_->all_finite(weight.vector.data(), source.columns), "weight " + number(index) + " '" + slice.tensor + "' holds a value that is not finite");
    report.bytes = weight.vector.size() * 4;
  } else {
    kernels_->pack(source, &weight.matrix, Part{0, 1});
    report = {weight.matrix.repack_error, weight.matrix.bytes};
  }
  std::lock_guard lock(loading_);
  weight.loaded = true;
  if (++loaded_ == weights_.size()) finish_loading();
  return report;
}

// Rope tables may need a weight (factors), so they are made when the last one is here. They cost time: this runs on a loading thread.
void Shard::finish_loading() {
  for (size_t t = 0; t < table_parameters_.size(); t++) {
    RopeParameters parameters = table_parameters_[t];
    if (table_factors_[t] >= 0) parameters.factors = weights_[static_cast<size_t>(table_factors_[t])].vector;
    tables_.push_back(std::make_unique<RopeTables>(parameters, program().context_tokens_max));
  }
}

const std::string* Shard::missing_weight() const {
  std::lock_guard lock(loading_);
  for (size_t i = 0; i < weights_.size(); i++)
    if (!weights_[i].loaded) return &program().weights[i].tensor;
  return nullptr;
}

uint64_t Shard::tables_checksum() const {
  uint64_t hash = kFnvOffset;
  for (const auto& table : tables_) hash = table->checksum(hash);
  return hash;
}

}  // namespace shardmesh
