#include "shard.h"

#include <algorithm>
#include <stdexcept>

#include "../reference/blocks.h"
#include "device.h"

namespace shardmesh {
namespace {

constexpr uint64_t kFnvOffset = 14695981039346656037ull;

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
  plan_buffers();
  plan_rope();
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
  else if (config_.kind == "cuda") kernels_ = find_kernel_set("auto", &why);
  else throw std::runtime_error("executor kind '" + config_.kind + "' is not 'cpu', 'cuda', 'reference' or 'reference-f32'");
}

bool Shard::is_quantized(int weight) const { return !is_float(program().weights[static_cast<size_t>(weight)].type); }

void Shard::plan_actions() {
  const Program& p = program();
  std::vector<bool> quantized(p.buffers.size(), false);
  std::vector<size_t> quantizer(p.buffers.size(), 0);  // the action that did it
  const auto written = [&](int buffer) { if (buffer >= 0) quantized[static_cast<size_t>(buffer)] = false; };
  const auto quantize = [&](int operation, int buffer, int weight) {
    if (!is_quantized(weight) || quantized[static_cast<size_t>(buffer)]) return;
    quantized[static_cast<size_t>(buffer)] = true;
    Action* before = actions_.empty() ? nullptr : &actions_.back();
    const bool made_it = before && (before->kind == ActionKind::RmsNorm || before->kind == ActionKind::GatedActivation) && p.operations[static_cast<size_t>(before->operation)].out == buffer;
    if (made_it) {
      before->buffer = buffer;
      join_gated_products();
    } else {
      actions_.push_back({ActionKind::Quantize, operation, {}, buffer});
    }
    quantizer[static_cast<size_t>(buffer)] = actions_.size() - 1;
  };
  const auto meet = [&](int buffer, int weight) {
    if (p.weights[static_cast<size_t>(weight)].type == TensorType::Q8_0) actions_[quantizer[static_cast<size_t>(buffer)]].meets_bytes = true;
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
        meet(o.in, o.weight);
        written(o.out);
        break;
      }
      case OperationKind::LinearPartial:
        quantize(index, o.in, o.weight);
        actions_.push_back({ActionKind::LinearPartial, index});
        meet(o.in, o.weight);
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

// The last action, an activation whose output is quantised next, together with the products in front of it.
void Shard::join_gated_products() {
  if (config_.kind != "cpu" && config_.kind != "reference") return;
  const std::vector<Operation>& operations = program().operations;
  const Action activation = actions_.back();
  if (activation.kind != ActionKind::GatedActivation || actions_.size() < 2) return;
  const Action& products = actions_[actions_.size() - 2];
  if (products.kind != ActionKind::Linear || products.products.size() != 2) return;
  const Operation& o = operations[static_cast<size_t>(activation.operation)];
  const Operation& gate = operations[static_cast<size_t>(products.products[0])];
  const Operation& up = operations[static_cast<size_t>(products.products[1])];
  if (gate.out != o.in || up.out != o.in2 || gate.out == up.out) return;
  for (const Operation& reader : operations) {
    const auto reads = [&](int buffer) { return reader.in == buffer || reader.in2 == buffer; };
    const bool product = reader.kind == OperationKind::Linear || reader.kind == OperationKind::LinearPartial;
    if ((reads(gate.out) || reads(up.out)) && reader.kind != OperationKind::GatedActivation) return;
    if (reads(o.out) && !(product && is_quantized(reader.weight))) return;
  }
  const std::vector<int> joined = products.products;
  actions_.pop_back();
  actions_.back() = {ActionKind::GatedProducts, activation.operation, joined, activation.buffer};
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
    std::vector<Subtree> own;
    if (!subtrees.empty())
      for (const Subtree& s : subtrees[static_cast<size_t>(p.rank)]) own.push_back({s.first - static_cast<int>(o.cut.ranks[static_cast<size_t>(p.rank)].from), s.count});
    own_subtrees_.push_back(std::move(own));
    subtrees_.push_back(std::move(subtrees));
  }
}

void Shard::plan_buffers() {
  const Program& p = program();
  const size_t T = static_cast<size_t>(config_.step_tokens_max);
  weights_.resize(p.weights.size());
  output_rows_ = static_cast<int>(std::clamp<size_t>(kOutputBytes / (static_cast<size_t>(p.vocabulary_size) * 4), 8, kOutputRowsMax));
  kv_layout_ = config_.kind == "reference-f32" ? make_kv_layout(KeyType::F32, ValueType::F32, p.kv.heads, p.kv.head_size, config_.block_tokens)
                                                : make_kv_layout(p.kv.key, p.kv.value, p.kv.heads, p.kv.head_size, config_.block_tokens);
  for (size_t i = 0; i < p.buffers.size(); i++) {
    Buffer b;
    b.width = p.buffers[i].width;
    b.stride = static_cast<int64_t>(align_to_line(static_cast<size_t>(b.width) * 4) / 4);
    b.per_output = p.buffers[i].per_output;
    b.rows = b.per_output ? output_rows_ : config_.step_tokens_max;
    b.quantized = std::any_of(actions_.begin(), actions_.end(), [&](const Action& a) { return a.buffer == static_cast<int>(i); });
    buffers_.push_back(b);
  }
  // Hidden states need room for a piece.
  staging_bytes_ = std::min(T * static_cast<size_t>(p.hidden_size) * 4, std::max(kExchangePieceBytes, static_cast<size_t>(p.hidden_size) * 4));
  for (size_t i = 0; i < p.operations.size(); i++) {
    const Operation& o = p.operations[i];
    const auto piece = [&](size_t row_bytes) { return std::min<size_t>(static_cast<size_t>(piece_rows(static_cast<int>(i))), T) * row_bytes; };
    const auto host = [&](int b) { buffers_[static_cast<size_t>(b)].host = true; };
    if (o.kind == OperationKind::AllReduce) {
      const size_t row_bytes = subtrees(static_cast<int>(i))[static_cast<size_t>(p.rank)].size() * static_cast<size_t>(buffer(o.out).width) * 4;
      staging_bytes_ = std::max(staging_bytes_, T * row_bytes);
      exchange_bytes_ = std::max(exchange_bytes_, piece(row_bytes));
      size_t sums = 0;
      for (const auto& of_rank : subtrees(static_cast<int>(i))) sums += of_rank.size();
      if (config_.wire != WireType::F32) received_bytes_ = std::max(received_bytes_, piece(sums * static_cast<size_t>(buffer(o.out).width) * 4));
    } else if (o.kind == OperationKind::GatherRows) {
      exchange_bytes_ = std::max(exchange_bytes_, piece(static_cast<size_t>(buffer(o.out).width) * 4));
      host(o.out);
    } else if (o.kind == OperationKind::GatherLogits) {
      const size_t rows = static_cast<size_t>(std::min(piece_rows(static_cast<int>(i)), output_rows_));
      exchange_bytes_ = std::max(exchange_bytes_, rows * static_cast<size_t>(o.vocabulary[static_cast<size_t>(p.rank)].size()) * 4);
      host(o.in);
      host(o.out);
    } else if (o.kind == OperationKind::ReceiveHidden) {
      host(o.out);
    } else if (o.kind == OperationKind::SendHidden || o.kind == OperationKind::Sample) {
      host(o.in);
    }
  }
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

void Shard::load_into(Device& device) {
  device_ = &device;
  if (weights_.empty()) finish_loading();
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
    report = device_->load_matrix(index, source);
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
  device_->finish_loading();
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
