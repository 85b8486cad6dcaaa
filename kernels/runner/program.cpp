#include "../include/program.h"

#include <cmath>
#include <stdexcept>

#include "json.h"

namespace shardmesh {
namespace {

constexpr int64_t kWidthMax = 1 << 24;
constexpr int kHeadSizeMax = 1024;

struct TypeInfo {
  TensorType type;
  const char* name;
  int block_values, block_bytes;
};
constexpr TypeInfo kTypes[] = {
    {TensorType::F32, "F32", 1, 4},      {TensorType::F16, "F16", 1, 2},      {TensorType::BF16, "BF16", 1, 2},    {TensorType::Q4_0, "Q4_0", 32, 18},
    {TensorType::Q4_1, "Q4_1", 32, 20},  {TensorType::Q5_0, "Q5_0", 32, 22},  {TensorType::Q5_1, "Q5_1", 32, 24},  {TensorType::Q8_0, "Q8_0", 32, 34},
    {TensorType::Q4_K, "Q4_K", 256, 144}, {TensorType::Q5_K, "Q5_K", 256, 176}, {TensorType::Q6_K, "Q6_K", 256, 210},
};

const TypeInfo& info_of(TensorType type) { return kTypes[static_cast<int>(type)]; }

constexpr struct {
  OperationKind kind;
  const char* name;
} kOperations[] = {
    {OperationKind::Embed, "embed"},
    {OperationKind::GatherRows, "gather_rows"},
    {OperationKind::ReceiveHidden, "receive_hidden"},
    {OperationKind::SendHidden, "send_hidden"},
    {OperationKind::RmsNorm, "rms_norm"},
    {OperationKind::Linear, "linear"},
    {OperationKind::LinearPartial, "linear_partial"},
    {OperationKind::AllReduce, "all_reduce"},
    {OperationKind::Rope, "rope"},
    {OperationKind::StoreKv, "store_kv"},
    {OperationKind::Attention, "attention"},
    {OperationKind::GatedActivation, "gated_activation"},
    {OperationKind::SelectRows, "select_rows"},
    {OperationKind::GatherLogits, "gather_logits"},
    {OperationKind::Sample, "sample"},
};

Range parse_range(const Json& json, int64_t max) {
  const Range range{json.at("from").integer(0, max), json.at("to").integer(0, max)};
  if (range.to < range.from) json.fail("ends at " + std::to_string(range.to) + ", before it begins at " + std::to_string(range.from));
  return range;
}

// Ranges of all ranks: contiguous from 0 to `total`.
std::vector<Range> parse_ranks(const Json& json, int ranks, int64_t total) {
  if (json.size() != static_cast<size_t>(ranks)) json.fail("has " + std::to_string(json.size()) + " ranges for " + std::to_string(ranks) + " ranks");
  std::vector<Range> result;
  int64_t at = 0;
  for (size_t i = 0; i < json.size(); i++) {
    const Range range = parse_range(json[i], total);
    if (range.from != at) json[i].fail("begins at " + std::to_string(range.from) + ", the range before ends at " + std::to_string(at));
    at = range.to;
    result.push_back(range);
  }
  if (at != total) json.fail("covers " + std::to_string(at) + " of " + std::to_string(total));
  return result;
}

class ProgramParser {
 public:
  explicit ProgramParser(const Json& json) : json_(json) {}

  Program parse() {
    p_.architecture = json_.at("architecture").text();
    p_.stages = static_cast<int>(json_.at("stages").integer(1, 1024));
    p_.stage = static_cast<int>(json_.at("stage").integer(0, p_.stages - 1));
    p_.ranks = static_cast<int>(json_.at("ranks").integer(1, kRanksMax));
    p_.rank = static_cast<int>(json_.at("rank").integer(0, p_.ranks - 1));
    p_.hidden_size = json_.at("hiddenSize").integer(1, kWidthMax);
    p_.vocabulary_size = json_.at("vocabularySize").integer(1, 1 << 24);
    p_.context_tokens_max = json_.at("contextTokensMax").integer(1, 1 << 24);
    parse_buffers(json_.at("buffers"));
    parse_weights(json_.at("weights"));
    const std::string& bits = json_.at("bits").text();
    if (bits != "exact" && bits != "per-kind" && bits != "free") json_.at("bits").fail("'" + bits + "' is not 'exact', 'per-kind' or 'free'");
    p_.bits = bits == "exact" ? Bits::Exact : bits == "per-kind" ? Bits::PerKind : Bits::Free;
    const std::string& activations = json_.at("activations").text();
    if (activations != "int8" && activations != "int16") json_.at("activations").fail("'" + activations + "' is neither 'int8' nor 'int16'");
    p_.activations = activations == "int8" ? ActivationType::Int8 : ActivationType::Int16;
    parse_kv(json_.at("kv"));
    const Json& operations = json_.at("operations");
    if (operations.size() == 0 || operations.size() > 65535) operations.fail(std::to_string(operations.size()) + " operations; 1..65535 are possible");
    for (size_t i = 0; i < operations.size(); i++) p_.operations.push_back(parse_operation(operations[i]));
    check_order(operations);
    return std::move(p_);
  }

 private:
  void parse_buffers(const Json& list) {
    for (size_t i = 0; i < list.size(); i++) {
      const Json& b = list[i];
      BufferSpec spec{b.at("name").text(), b.at("width").integer(1, kWidthMax), false};
      const std::string& per = b.at("per").text();
      if (per != "token" && per != "output") b.at("per").fail("'" + per + "' is neither 'token' nor 'output'");
      spec.per_output = per == "output";
      for (const BufferSpec& other : p_.buffers)
        if (other.name == spec.name) b.fail("a second buffer named '" + spec.name + "'");
      p_.buffers.push_back(std::move(spec));
    }
  }

  void parse_weights(const Json& list) {
    for (size_t i = 0; i < list.size(); i++) {
      const Json& w = list[i];
      WeightSlice slice{w.at("tensor").text(), TensorType::F32, parse_range(w.at("rows"), int64_t{1} << 32), parse_range(w.at("columns"), kWidthMax), WeightUse::Matrix};
      if (!tensor_type_of(w.at("type").text(), &slice.type)) w.at("type").fail("unknown type '" + w.at("type").text() + "'");
      const std::string& use = w.at("use").text();
      if (use == "matrix") slice.use = WeightUse::Matrix;
      else if (use == "vector") slice.use = WeightUse::Vector;
      else if (use == "embedding") slice.use = WeightUse::Embedding;
      else w.at("use").fail("'" + use + "' is not 'matrix', 'vector' or 'embedding'");
      if (slice.rows.size() < 1 || slice.columns.size() < 1) w.fail("an empty slice of '" + slice.tensor + "'");
      if (slice.use == WeightUse::Vector && slice.rows.size() != 1) w.fail("a vector has one row, this slice has " + std::to_string(slice.rows.size()));
      if (slice.use != WeightUse::Vector && slice.columns.size() % 32) w.fail(std::to_string(slice.columns.size()) + " columns are not a multiple of 32");
      if (info_of(slice.type).block_values > 1 && slice.columns.from % 32) w.fail("column " + std::to_string(slice.columns.from) + " is not a multiple of 32");
      p_.weights.push_back(std::move(slice));
    }
  }

  void parse_kv(const Json& kv) {
    p_.kv.layers = static_cast<int>(kv.at("layers").integer(0, 65536));
    p_.kv.heads = static_cast<int>(kv.at("heads").integer(1, 65536));
    p_.kv.head_size = static_cast<int>(kv.at("headSize").integer(32, kHeadSizeMax));
    if (p_.kv.head_size % 32) kv.at("headSize").fail(std::to_string(p_.kv.head_size) + " is not a multiple of 32");
    const std::string& key = kv.at("key").text();
    if (key != "int8" && key != "f16") kv.at("key").fail("'" + key + "' is neither 'int8' nor 'f16'");
    p_.kv.key = key == "int8" ? KeyType::Int8 : KeyType::F16;
    const std::string& value = kv.at("value").text();
    if (value != "int8" && value != "f16") kv.at("value").fail("'" + value + "' is neither 'int8' nor 'f16'");
    p_.kv.value = value == "int8" ? ValueType::Int8 : ValueType::F16;
  }

  int buffer(const Json& operation, const char* field) {
    const Json& name = operation.at(field);
    for (size_t i = 0; i < p_.buffers.size(); i++)
      if (p_.buffers[i].name == name.text()) return static_cast<int>(i);
    name.fail("no buffer named '" + name.text() + "'");
  }

  int64_t width(int b) const { return p_.buffers[static_cast<size_t>(b)].width; }

  void expect_width(const Json& operation, int b, int64_t expected, const char* why) {
    if (width(b) != expected)
      operation.fail("buffer '" + p_.buffers[static_cast<size_t>(b)].name + "' is " + std::to_string(width(b)) + " wide, " + why + " " + std::to_string(expected));
  }

  void expect_same_rows(const Json& operation, int a, int b) {
    if (p_.buffers[static_cast<size_t>(a)].per_output != p_.buffers[static_cast<size_t>(b)].per_output)
      operation.fail("buffers '" + p_.buffers[static_cast<size_t>(a)].name + "' and '" + p_.buffers[static_cast<size_t>(b)].name + "' have different rows");
  }

  void expect_token_rows(const Json& operation, int b) {
    if (p_.buffers[static_cast<size_t>(b)].per_output) operation.fail("buffer '" + p_.buffers[static_cast<size_t>(b)].name + "' holds output rows, needed are token rows");
  }

  int weight(const Json& index, bool vector) {
    if (index.is_null()) return -1;
    const int w = static_cast<int>(index.integer(0, static_cast<int64_t>(p_.weights.size()) - 1));
    if ((p_.weights[static_cast<size_t>(w)].use == WeightUse::Vector) != vector)
      index.fail("'" + p_.weights[static_cast<size_t>(w)].tensor + (vector ? "' is not a vector" : "' is a vector, needed is a matrix"));
    return w;
  }

  int vector_of(const Json& operation, const char* field, int64_t length) {
    const int w = weight(operation.at(field), true);
    if (w >= 0 && p_.weights[static_cast<size_t>(w)].columns.size() != length)
      operation.at(field).fail("'" + p_.weights[static_cast<size_t>(w)].tensor + "' has " + std::to_string(p_.weights[static_cast<size_t>(w)].columns.size()) +
                               " values, needed are " + std::to_string(length));
    return w;
  }

  int matrix_of(const Json& operation, bool product) {
    const Json& index = operation.at("weight");
    const int w = weight(index, false);
    if (w < 0) index.fail("is null");
    if (product && p_.weights[static_cast<size_t>(w)].use != WeightUse::Matrix) index.fail("'" + p_.weights[static_cast<size_t>(w)].tensor + "' is only looked up by row");
    return w;
  }

  int required_vector(const Json& operation, const char* field, int64_t length) {
    const int w = vector_of(operation, field, length);
    if (w < 0) operation.at(field).fail("is null");
    return w;
  }

  std::vector<int> parse_segments(const Json& list, int64_t columns) {
    if (list.size() < 1 || list.size() > kSegmentsMax) list.fail(std::to_string(list.size()) + " segments; 1.." + std::to_string(kSegmentsMax) + " are possible");
    std::vector<int> ends;
    for (size_t i = 0; i < list.size(); i++) ends.push_back(static_cast<int>(list[i].integer(ends.empty() ? 1 : ends.back() + 1, columns / 32)));
    if (ends.back() != columns / 32) list.fail("ends at group " + std::to_string(ends.back()) + " of " + std::to_string(columns / 32));
    return ends;
  }

  UnitCut parse_cut(const Json& cut) {
    UnitCut result;
    result.units = static_cast<int>(cut.at("units").integer(1, kSegmentsMax));
    result.ranks = parse_ranks(cut.at("ranks"), p_.ranks, result.units);
    return result;
  }

  void expect_rank(const Json& operation) {
    if (operation.at("rank").integer(0, p_.ranks - 1) != p_.rank) operation.at("rank").fail("is not this program's rank " + std::to_string(p_.rank));
  }

  void parse_heads(const Json& json, Operation* o, int b) {
    o->heads = static_cast<int>(json.at("heads").integer(1, 65536));
    o->head_size = static_cast<int>(json.at("headSize").integer(2, kHeadSizeMax));
    expect_width(json, b, static_cast<int64_t>(o->heads) * o->head_size, "its heads need");
    expect_token_rows(json, b);
  }

  Operation parse_operation(const Json& json) {
    const std::string& name = json.at("op").text();
    for (const auto& known : kOperations) {
      if (name != known.name) continue;
      Operation o;
      o.kind = known.kind;
      fill(json, &o);
      return o;
    }
    json.at("op").fail("unknown operation '" + name + "'");
  }

  void fill(const Json& json, Operation* o) {
    switch (o->kind) {
      case OperationKind::Embed: {
        o->weight = matrix_of(json, false);
        o->out = buffer(json, "out");
        o->vocabulary = parse_ranks(json.at("vocabulary"), p_.ranks, p_.vocabulary_size);
        expect_rank(json);
        const WeightSlice& w = p_.weights[static_cast<size_t>(o->weight)];
        expect_width(json, o->out, w.columns.size(), "an embedding row has");
        expect_token_rows(json, o->out);
        if (w.rows.size() != o->vocabulary[static_cast<size_t>(p_.rank)].size())
          json.fail("'" + w.tensor + "' has " + std::to_string(w.rows.size()) + " rows, this rank's vocabulary " + std::to_string(o->vocabulary[static_cast<size_t>(p_.rank)].size()));
        return;
      }
      case OperationKind::GatherRows:
        o->out = buffer(json, "buffer");
        o->vocabulary = parse_ranks(json.at("vocabulary"), p_.ranks, p_.vocabulary_size);
        expect_token_rows(json, o->out);
        return;
      case OperationKind::ReceiveHidden:
        o->out = buffer(json, "buffer");
        expect_width(json, o->out, p_.hidden_size, "hidden states have");
        expect_token_rows(json, o->out);
        if (p_.stage == 0) json.fail("the first stage has no stage before it");
        return;
      case OperationKind::SendHidden:
        o->in = buffer(json, "buffer");
        expect_width(json, o->in, p_.hidden_size, "hidden states have");
        expect_token_rows(json, o->in);
        if (p_.stage == p_.stages - 1) json.fail("the last stage has no stage after it");
        return;
      case OperationKind::RmsNorm:
        o->in = buffer(json, "in");
        o->out = buffer(json, "out");
        o->epsilon = static_cast<float>(json.at("epsilon").number());
        o->weight = required_vector(json, "weight", width(o->in));
        expect_width(json, o->out, width(o->in), "its input has");
        expect_same_rows(json, o->in, o->out);
        if (!(o->epsilon > 0)) json.at("epsilon").fail("is not above 0");
        return;
      case OperationKind::Linear: {
        o->in = buffer(json, "in");
        o->out = buffer(json, "out");
        o->weight = matrix_of(json, true);
        const WeightSlice& w = p_.weights[static_cast<size_t>(o->weight)];
        expect_width(json, o->in, w.columns.size(), "its weight has columns");
        expect_width(json, o->out, w.rows.size(), "its weight has rows");
        expect_same_rows(json, o->in, o->out);
        if (o->in == o->out) json.fail("a product cannot be written over its input");
        o->bias = vector_of(json, "bias", w.rows.size());
        o->segments = parse_segments(json.at("segments"), w.columns.size());
        return;
      }
      case OperationKind::LinearPartial: {
        o->in = buffer(json, "in");
        o->weight = matrix_of(json, true);
        const WeightSlice& w = p_.weights[static_cast<size_t>(o->weight)];
        expect_rank(json);
        expect_width(json, o->in, w.columns.size(), "its weight has columns");
        expect_token_rows(json, o->in);
        o->cut = parse_cut(json.at("cut"));
        o->segments = parse_segments(json.at("segments"), w.columns.size());
        o->width = json.at("width").integer(1, kWidthMax);
        if (o->width != w.rows.size()) json.at("width").fail(std::to_string(o->width) + " is not the weight's " + std::to_string(w.rows.size()) + " rows");
        const int64_t own = o->cut.ranks[static_cast<size_t>(p_.rank)].size();
        if (static_cast<int64_t>(o->segments.size()) != own) json.at("segments").fail(std::to_string(o->segments.size()) + " segments for " + std::to_string(own) + " own units");
        return;
      }
      case OperationKind::AllReduce:
        o->out = buffer(json, "residual");
        expect_rank(json);
        expect_token_rows(json, o->out);
        o->cut = parse_cut(json.at("cut"));
        o->bias = vector_of(json, "bias", width(o->out));
        return;
      case OperationKind::Rope: {
        o->out = buffer(json, "buffer");
        parse_heads(json, o, o->out);
        o->dimensions = static_cast<int>(json.at("dimensions").integer(2, o->head_size));
        if (o->dimensions % 2) json.at("dimensions").fail(std::to_string(o->dimensions) + " is odd");
        const std::string& style = json.at("style").text();
        if (style != "adjacent" && style != "half") json.at("style").fail("'" + style + "' is neither 'adjacent' nor 'half'");
        o->half_style = style == "half";
        o->base = json.at("base").number();
        o->scale = json.at("scale").number();
        if (!(o->base > 1 && std::isfinite(o->base))) json.at("base").fail("is not above 1");
        if (!(o->scale > 0 && o->scale <= 1024)) json.at("scale").fail("is not in (0, 1024]");
        o->factors = vector_of(json, "factors", o->dimensions / 2);
        return;
      }
      case OperationKind::StoreKv:
        o->in = buffer(json, "k");
        o->in2 = buffer(json, "v");
        o->layer = static_cast<int>(json.at("layer").integer(0, p_.kv.layers - 1));
        for (const int b : {o->in, o->in2}) {
          expect_width(json, b, static_cast<int64_t>(p_.kv.heads) * p_.kv.head_size, "the KV cache holds");
          expect_token_rows(json, b);
        }
        return;
      case OperationKind::Attention: {
        o->in = buffer(json, "q");
        o->out = buffer(json, "out");
        parse_heads(json, o, o->in);
        expect_width(json, o->out, width(o->in), "q has");
        expect_token_rows(json, o->out);
        if (o->head_size != p_.kv.head_size) json.at("headSize").fail(std::to_string(o->head_size) + " is not the KV cache's " + std::to_string(p_.kv.head_size));
        o->layer = static_cast<int>(json.at("layer").integer(0, p_.kv.layers - 1));
        const Json& kv_head = json.at("kvHead");
        if (kv_head.size() != static_cast<size_t>(o->heads)) kv_head.fail("has " + std::to_string(kv_head.size()) + " entries for " + std::to_string(o->heads) + " heads");
        for (size_t i = 0; i < kv_head.size(); i++)
          o->kv_head.push_back(static_cast<int32_t>(kv_head[i].integer(o->kv_head.empty() ? 0 : o->kv_head.back(), p_.kv.heads - 1)));
        o->scale = json.at("scale").number();
        if (!(o->scale > 0 && std::isfinite(o->scale))) json.at("scale").fail("is not above 0");
        const Json& window = json.at("window");
        o->window = window.is_null() ? 0 : static_cast<int>(window.integer(1, 1 << 24));
        return;
      }
      case OperationKind::GatedActivation: {
        o->in = buffer(json, "gate");
        o->in2 = buffer(json, "up");
        o->out = buffer(json, "out");
        expect_width(json, o->in2, width(o->in), "the gate has");
        expect_width(json, o->out, width(o->in), "the gate has");
        expect_same_rows(json, o->in, o->in2);
        expect_same_rows(json, o->in, o->out);
        const std::string& activation = json.at("activation").text();
        if (activation != "silu" && activation != "gelu_tanh") json.at("activation").fail("'" + activation + "' is neither 'silu' nor 'gelu_tanh'");
        o->activation = activation == "silu" ? 0 : 1;
        return;
      }
      case OperationKind::SelectRows:
        o->in = buffer(json, "in");
        o->out = buffer(json, "out");
        expect_width(json, o->out, width(o->in), "its input has");
        expect_token_rows(json, o->in);
        if (!p_.buffers[static_cast<size_t>(o->out)].per_output) json.fail("the selected rows need a buffer of output rows");
        return;
      case OperationKind::GatherLogits: {
        o->in = buffer(json, "in");
        o->out = buffer(json, "out");
        expect_rank(json);
        o->vocabulary = parse_ranks(json.at("vocabulary"), p_.ranks, p_.vocabulary_size);
        expect_width(json, o->in, o->vocabulary[static_cast<size_t>(p_.rank)].size(), "this rank's vocabulary has");
        expect_width(json, o->out, p_.vocabulary_size, "the vocabulary has");
        return;
      }
      case OperationKind::Sample:
        o->in = buffer(json, "logits");
        expect_width(json, o->in, p_.vocabulary_size, "the vocabulary has");
        return;
    }
  }

  // What may follow what: a partial product is finished by the reduction right after it; the output tail (select_rows and what follows) comes last and is the
  // only place of output rows; stages begin and end with their hand-over.
  void check_order(const Json& list) {
    const std::vector<Operation>& ops = p_.operations;
    bool tail = false;
    for (size_t i = 0; i < ops.size(); i++) {
      const Operation& o = ops[i];
      if (o.kind == OperationKind::LinearPartial) {
        if (i + 1 == ops.size() || ops[i + 1].kind != OperationKind::AllReduce) list[i].fail("a partial product must be followed by its all_reduce");
        const UnitCut& a = o.cut;
        const UnitCut& b = ops[i + 1].cut;
        bool same = a.units == b.units;
        for (size_t r = 0; same && r < a.ranks.size(); r++) same = a.ranks[r].from == b.ranks[r].from && a.ranks[r].to == b.ranks[r].to;
        if (!same) list[i + 1].fail("the cut is not that of the product before it");
        if (width(ops[i + 1].out) != o.width) list[i + 1].fail("the residual is " + std::to_string(width(ops[i + 1].out)) + " wide, the product " + std::to_string(o.width));
      }
      if (o.kind == OperationKind::AllReduce && (i == 0 || ops[i - 1].kind != OperationKind::LinearPartial)) list[i].fail("an all_reduce must follow its linear_partial");
      if ((o.kind == OperationKind::ReceiveHidden) != (i == 0 && p_.stage > 0)) list[i].fail("receive_hidden is the first operation of every stage but the first, and of no other place");
      if ((o.kind == OperationKind::SendHidden) != (i + 1 == ops.size() && p_.stage + 1 < p_.stages))
        list[i].fail("send_hidden is the last operation of every stage but the last, and of no other place");
      if (o.kind == OperationKind::SelectRows) {
        if (tail) list[i].fail("a second select_rows");
        if (p_.stage + 1 < p_.stages) list[i].fail("only the last stage has output rows");
        tail = true;
      } else {
        for (const int b : {o.in, o.in2, o.out})
          if (b >= 0 && p_.buffers[static_cast<size_t>(b)].per_output != tail)
            list[i].fail(tail ? "token rows after select_rows" : "output rows before select_rows");
      }
      if (o.kind == OperationKind::Sample && i + 1 != ops.size()) list[i].fail("sample is the last operation");
    }
    if (p_.stage + 1 == p_.stages && p_.rank == 0 && ops.back().kind != OperationKind::Sample) list.fail("rank 0 of the last stage must end with sample");
  }

  const Json& json_;
  Program p_{};
};

void collect_subtrees(int lo, int hi, int from, int to, std::vector<Subtree>* out) {
  if (hi <= from || lo >= to) return;
  if (from <= lo && hi <= to) {
    out->push_back({lo, hi - lo});
    return;
  }
  const int middle = lo + (hi - lo + 1) / 2;
  collect_subtrees(lo, middle, from, to, out);
  collect_subtrees(middle, hi, from, to, out);
}

}  // namespace

Program parse_program(std::string_view json) { return ProgramParser(Json::parse(json, "program")).parse(); }

const char* operation_name(OperationKind kind) {
  for (const auto& known : kOperations)
    if (known.kind == kind) return known.name;
  return "unknown";
}

const char* tensor_type_name(TensorType type) { return info_of(type).name; }

bool tensor_type_of(std::string_view name, TensorType* type) {
  for (const TypeInfo& info : kTypes)
    if (name == info.name) {
      *type = info.type;
      return true;
    }
  return false;
}

SliceShape slice_shape(const WeightSlice& slice) {
  const TypeInfo& info = info_of(slice.type);
  const int64_t first = slice.columns.from / info.block_values, last = (slice.columns.to + info.block_values - 1) / info.block_values;
  return {slice.rows.size(), slice.columns.size(), slice.columns.from - first * info.block_values, (last - first) * info.block_bytes};
}

std::vector<Subtree> maximal_subtrees(int units, int from, int to) {
  std::vector<Subtree> result;
  collect_subtrees(0, units, from, to, &result);
  return result;
}

}  // namespace shardmesh
