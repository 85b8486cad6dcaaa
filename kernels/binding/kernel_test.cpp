// Hooks for tests: single operations of a named kernel set, the elementary functions, and the sampler, on typed arrays. They run on the event loop with
// denormals flushed, as on a compute thread; each takes `parts` and runs the parts one after the other.
#include <napi.h>

#include <algorithm>
#include <stdexcept>

#include "../include/arithmetic.h"
#include "../include/kernel_set.h"
#include "../include/program.h"
#include "../include/wire.h"
#include "../links/tcp_connection.h"
#include "../runner/rope_table.h"
#include "../runner/sampler.h"
#include "../runner/sampler_math.h"
#include "values.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace shardmesh::binding {
namespace {

// Flushes denormals for its lifetime on a thread that is only borrowed.
class FlushedDenormals {
 public:
  FlushedDenormals() { flush_denormals(); }
#if defined(__x86_64__)
  ~FlushedDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

struct Arguments {
  explicit Arguments(const Napi::CallbackInfo& info) : env(info.Env()), object(object_of(info[0], "arguments")) {}
  Napi::Env env;
  Napi::Object object;

  Napi::Value at(const char* name) const { return object.Get(name); }
  int64_t integer(const char* name, int64_t min, int64_t max) const { return integer_of(at(name), name, min, max); }
  std::vector<float> floats(const char* name, int64_t count) const {
    std::vector<float> values = float32_array_of(at(name), name);
    if (static_cast<int64_t>(values.size()) != count)
      throw std::runtime_error(std::string(name) + " has " + std::to_string(values.size()) + " values, needed are " + std::to_string(count));
    return values;
  }
  int parts() const { return static_cast<int>(integer("parts", 1, 64)); }
  const KernelSet& set() const {
    const char* why = nullptr;
    const std::string name = text_of(at("set"), "set");
    const KernelSet* found = find_kernel_set(name.c_str(), &why);
    if (!found) throw std::runtime_error(why ? why : "no kernel set '" + name + "'");
    return *found;
  }
};

template <typename Work>
void each_part(int parts, const Work& work) {
  for (int i = 0; i < parts; i++) work(Part{i, parts});
}

Napi::Value float_result(Napi::Env env, const std::vector<float>& values) {
  Napi::Float32Array array = Napi::Float32Array::New(env, values.size());
  std::copy(values.begin(), values.end(), array.Data());
  return array;
}

// 64-byte aligned bytes.
class Aligned {
 public:
  explicit Aligned(size_t bytes) : storage_(bytes + 64) {}
  uint8_t* data() { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64); }

 private:
  std::vector<uint8_t> storage_;
};

struct Packed {
  PackedMatrix matrix;
  Aligned storage;
};

Packed pack_matrix(const Arguments& a, const KernelSet& set) {
  WeightSlice slice{"test", TensorType::F32, {0, a.integer("rows", 1, 1 << 20)}, {0, 0}, WeightUse::Matrix};
  const std::string type = text_of(a.at("type"), "type");
  if (!tensor_type_of(type, &slice.type)) throw std::runtime_error("unknown type '" + type + "'");
  slice.columns.from = a.integer("from", 0, 1 << 20);
  slice.columns.to = slice.columns.from + a.integer("columns", 32, 1 << 20);
  if (slice.columns.from % 32 || slice.columns.to % 32) throw std::runtime_error("from and columns must be multiples of 32");
  const SliceShape shape = slice_shape(slice);
  const Napi::Uint8Array data = bytes_of(a.at("data"), "data");
  if (static_cast<int64_t>(data.ByteLength()) != shape.rows * shape.row_bytes)
    throw std::runtime_error("data has " + std::to_string(data.ByteLength()) + " bytes, needed are " + std::to_string(shape.rows * shape.row_bytes));
  const MatrixSource source{slice.type, shape.rows, shape.columns, shape.skip, shape.row_bytes, data.Data()};
  const size_t bytes = set.packed_bytes(source);
  Packed packed{{slice.type, shape.rows, shape.columns, bytes, nullptr, 0, 0}, Aligned(bytes)};
  packed.matrix.data = packed.storage.data();
  const int parts = a.parts();
  each_part(parts, [&](Part part) { set.pack(source, &packed.matrix, part); });
  return packed;
}

// {set, parts, type, rows, from, columns, data} -> fp32 [rows][columns]
Napi::Value read_rows(const Arguments& a) {
  const KernelSet& set = a.set();
  Packed packed = pack_matrix(a, set);
  packed.matrix.data = packed.storage.data();
  std::vector<float> out(static_cast<size_t>(packed.matrix.rows * packed.matrix.columns));
  for (int64_t r = 0; r < packed.matrix.rows; r++) set.read_row(packed.matrix, r, out.data() + r * packed.matrix.columns);
  return float_result(a.env, out);
}

// {.., activations, x [tokens][columns], tokens, segments, subtrees: [first, count][], bias | null} -> [subtrees][tokens][rows]
Napi::Value linear(const Arguments& a) {
  const KernelSet& set = a.set();
  Packed packed = pack_matrix(a, set);
  packed.matrix.data = packed.storage.data();
  const int64_t rows = packed.matrix.rows, columns = packed.matrix.columns;
  const int tokens = static_cast<int>(a.integer("tokens", 1, 4096)), parts = a.parts();
  const std::vector<float> x = a.floats("x", tokens * columns);
  const std::vector<int32_t> segments = integers_of(a.at("segments"), "segments", 1, columns / 32);
  if (segments.empty() || segments.size() > kSegmentsMax || segments.back() != columns / 32) throw std::runtime_error("segments must be 1..16 and end at columns / 32");
  const Napi::Array list = array_of(a.at("subtrees"), "subtrees");
  std::vector<Subtree> subtrees;
  for (uint32_t i = 0; i < list.Length(); i++) {
    const std::vector<int32_t> pair = integers_of(list.Get(i), "subtrees[]", 0, static_cast<int64_t>(segments.size()));
    if (pair.size() != 2 || pair[1] < 1 || pair[0] + pair[1] > static_cast<int32_t>(segments.size())) throw std::runtime_error("a subtree is [first, count] within the segments");
    subtrees.push_back({pair[0], pair[1]});
  }
  std::vector<float> bias;
  if (!a.at("bias").IsNull()) bias = a.floats("bias", rows);
  const ActivationType type = text_of(a.at("activations"), "activations") == "int16" ? ActivationType::Int16 : ActivationType::Int8;
  Aligned quantized(set.activation_bytes(type, tokens, columns));
  const Activations in{x.data(), columns, tokens, columns, quantized.data(), type};
  std::vector<float> out(subtrees.size() * static_cast<size_t>(tokens * rows));
  if (!(packed.matrix.type == TensorType::F32 || packed.matrix.type == TensorType::F16 || packed.matrix.type == TensorType::BF16))
    each_part(parts, [&](Part part) { set.quantize_activations(in, part); });
  const LinearArguments arguments{&packed.matrix, in, static_cast<int>(segments.size()), segments.data(), static_cast<int>(subtrees.size()), subtrees.data(),
                                  bias.empty() ? nullptr : bias.data(), out.data(), rows, tokens * rows};
  each_part(parts, [&](Part part) { set.linear(arguments, part); });
  return float_result(a.env, out);
}

// {set, parts, x, w, epsilon, width, tokens}
Napi::Value rms_norm(const Arguments& a) {
  const int tokens = static_cast<int>(a.integer("tokens", 1, 4096));
  const int64_t width = a.integer("width", 32, 1 << 20);
  const std::vector<float> x = a.floats("x", tokens * width), w = a.floats("w", width);
  std::vector<float> out(x.size());
  const float epsilon = static_cast<float>(number_of(a.at("epsilon"), "epsilon"));
  each_part(a.parts(), [&](Part part) { a.set().rms_norm(x.data(), width, w.data(), epsilon, width, tokens, out.data(), width, part); });
  return float_result(a.env, out);
}

// {set, parts, x, heads, headSize, dimensions, style, base, scale, positions}
Napi::Value rope(const Arguments& a) {
  const std::vector<int32_t> positions = integers_of(a.at("positions"), "positions", 0, 1 << 20);
  const int heads = static_cast<int>(a.integer("heads", 1, 1024)), head_size = static_cast<int>(a.integer("headSize", 2, 1024));
  const int dimensions = static_cast<int>(a.integer("dimensions", 2, head_size)), tokens = static_cast<int>(positions.size());
  if (positions.empty()) throw std::runtime_error("positions is empty");
  std::vector<float> x = a.floats("x", static_cast<int64_t>(tokens) * heads * head_size);
  const RopeTables tables({dimensions, text_of(a.at("style"), "style") == "half", number_of(a.at("base"), "base"), number_of(a.at("scale"), "scale"), {}},
                          *std::max_element(positions.begin(), positions.end()) + 1);
  StepRows rows{};
  rows.tokens = tokens;
  rows.positions = positions.data();
  each_part(a.parts(), [&](Part part) { a.set().rope(x.data(), static_cast<int64_t>(heads) * head_size, heads, head_size, tables.view(), rows, part); });
  return float_result(a.env, x);
}

// {set, parts, gate, up, width, tokens, activation}
Napi::Value gated_activation(const Arguments& a) {
  const int tokens = static_cast<int>(a.integer("tokens", 1, 4096));
  const int64_t width = a.integer("width", 1, 1 << 20);
  const std::vector<float> gate = a.floats("gate", tokens * width), up = a.floats("up", tokens * width);
  std::vector<float> out(gate.size());
  const int activation = text_of(a.at("activation"), "activation") == "silu" ? 0 : 1;
  each_part(a.parts(), [&](Part part) { a.set().gated_activation(gate.data(), width, up.data(), width, width, tokens, activation, out.data(), width, part); });
  return float_result(a.env, out);
}

// {set, parts, units, nodes: [lo, hi][], values [nodes][tokens][width], bias | null, residual [tokens][width], width, tokens} -> residual
Napi::Value finish_tree(const Arguments& a) {
  const int tokens = static_cast<int>(a.integer("tokens", 1, 4096)), units = static_cast<int>(a.integer("units", 1, kSegmentsMax));
  const int64_t width = a.integer("width", 1, 1 << 20);
  const Napi::Array list = array_of(a.at("nodes"), "nodes");
  const std::vector<float> values = a.floats("values", list.Length() * tokens * width);
  std::vector<int> lo, hi;
  std::vector<const float*> nodes;
  for (uint32_t i = 0; i < list.Length(); i++) {
    const std::vector<int32_t> pair = integers_of(list.Get(i), "nodes[]", 0, units);
    if (pair.size() != 2) throw std::runtime_error("a node is [lo, hi]");
    lo.push_back(pair[0]);
    hi.push_back(pair[1]);
    nodes.push_back(values.data() + static_cast<int64_t>(i) * tokens * width);
  }
  const std::vector<int64_t> strides(nodes.size(), width);
  std::vector<float> bias, residual = a.floats("residual", tokens * width);
  if (!a.at("bias").IsNull()) bias = a.floats("bias", width);
  each_part(a.parts(), [&](Part part) {
    a.set().finish_tree(units, static_cast<int>(nodes.size()), lo.data(), hi.data(), nodes.data(), strides.data(), bias.empty() ? nullptr : bias.data(), residual.data(), width, width,
                        tokens, part);
  });
  return float_result(a.env, residual);
}

// One sequence: k and v of positions 0.. are stored in one go, then attention of the rows whose q is given, which are the last ones.
// {set, parts, key, value, heads, headSize, kvHead, scale, window | null, blockTokens, blockTable, k [n][kvHeads][headSize], v, q [rows][heads][headSize], rows, kvHeads, fill}
// `fill` is the byte that the cache is filled with before.
Napi::Value attention(const Arguments& a) {
  const KernelSet& set = a.set();
  const std::string key = text_of(a.at("key"), "key");
  const KeyType type = key == "int8" ? KeyType::Int8 : key == "f16" ? KeyType::F16 : KeyType::F32;
  const std::string value = text_of(a.at("value"), "value");
  const ValueType value_type = value == "int8" ? ValueType::Int8 : value == "f16" ? ValueType::F16 : ValueType::F32;
  const int heads = static_cast<int>(a.integer("heads", 1, 1024)), head_size = static_cast<int>(a.integer("headSize", 32, 1024));
  const int kv_heads = static_cast<int>(a.integer("kvHeads", 1, 1024)), rows = static_cast<int>(a.integer("rows", 1, 4096)), parts = a.parts();
  const int block_tokens = static_cast<int>(a.integer("blockTokens", 16, 4096));
  const std::vector<int32_t> kv_head = integers_of(a.at("kvHead"), "kvHead", 0, kv_heads - 1), table = integers_of(a.at("blockTable"), "blockTable", 0, 65535);
  const std::vector<float> k = float32_array_of(a.at("k"), "k");
  const int64_t kv_width = static_cast<int64_t>(kv_heads) * head_size, q_width = static_cast<int64_t>(heads) * head_size;
  const int tokens = static_cast<int>(static_cast<int64_t>(k.size()) / kv_width);
  const std::vector<float> v = a.floats("v", tokens * kv_width), q = a.floats("q", rows * q_width);
  if (static_cast<int>(kv_head.size()) != heads || block_tokens % 16 || rows > tokens || table.size() * static_cast<size_t>(block_tokens) < static_cast<size_t>(tokens))
    throw std::runtime_error("kvHead, blockTokens, rows or blockTable do not fit");
  const KvLayout layout = make_kv_layout(type, value_type, kv_heads, head_size, block_tokens);
  const size_t blocks = static_cast<size_t>(*std::max_element(table.begin(), table.end())) + 1;
  Aligned cache(blocks * layout.block_bytes);
  std::fill(cache.data(), cache.data() + blocks * layout.block_bytes, static_cast<uint8_t>(a.integer("fill", 0, 255)));
  std::vector<int32_t> positions(static_cast<size_t>(tokens)), sequence(static_cast<size_t>(tokens), 0);
  for (int t = 0; t < tokens; t++) positions[static_cast<size_t>(t)] = t;
  const int32_t offsets[2] = {0, static_cast<int32_t>(table.size())}, all_rows[2] = {0, tokens}, own_rows[2] = {0, rows};
  const StepRows stored{tokens, positions.data(), sequence.data(), 1, all_rows, offsets, table.data()};
  each_part(parts, [&](Part part) { set.store_kv(k.data(), kv_width, v.data(), kv_width, layout, cache.data(), stored, part); });
  const StepRows asked{rows, positions.data() + (tokens - rows), sequence.data(), 1, own_rows, offsets, table.data()};
  Aligned scratch(set.attention_scratch_bytes(heads, head_size, rows) + 64);
  std::vector<float> out(q.size());
  const AttentionArguments arguments{q.data(), q_width, out.data(), q_width, heads, kv_head.data(), static_cast<float>(number_of(a.at("scale"), "scale")),
                                     a.at("window").IsNull() ? 0 : static_cast<int>(a.integer("window", 1, 1 << 24)), &layout, cache.data(), &asked, scratch.data()};
  each_part(parts, [&](Part part) { set.attention(arguments, part); });
  return float_result(a.env, out);
}

// {name: exp | log | gumbel | sin | cos, x} -> f(x); gumbel takes x as the index of a token under a fixed key; sin and cos round to fp32.
Napi::Value function(const Arguments& a) {
  std::vector<float> x = float32_array_of(a.at("x"), "x");
  const std::string name = text_of(a.at("name"), "name");
  for (float& value : x) {
    double s, c;
    sine_cosine(static_cast<double>(value), &s, &c);
    if (name == "exp") value = exp_fixed(value);
    else if (name == "log") value = log_fixed(value);
    else if (name == "gumbel") value = gumbel_noise(noise_bits(noise_key(1, 0, 0), static_cast<uint32_t>(value)));
    else if (name == "sin") value = static_cast<float>(s);
    else if (name == "cos") value = static_cast<float>(c);
    else throw std::runtime_error("unknown function '" + name + "'");
  }
  return float_result(a.env, x);
}

// {logits, positions: [from, to], temperature, topP, topK, minP, seed, choice, repetition, presence, frequency, bias: [token, bias][], prompt, output, banned}
// -> Int32Array of the token sampled at each position, the state unchanged.
Napi::Value sample(const Arguments& a) {
  const std::vector<float> logits = float32_array_of(a.at("logits"), "logits");
  const int64_t vocabulary = static_cast<int64_t>(logits.size());
  if (vocabulary < 1) throw std::runtime_error("logits is empty");
  SamplingParameters p;
  p.temperature = static_cast<float>(number_of(a.at("temperature"), "temperature"));
  const double top_p = number_of(a.at("topP"), "topP");
  p.top_p = top_p >= 1 ? 1ull << 32 : static_cast<uint64_t>(std::max(0.0, top_p) * 4294967296.0);
  p.top_k = static_cast<int32_t>(a.integer("topK", 0, 1 << 24));
  p.min_p = static_cast<float>(number_of(a.at("minP"), "minP"));
  p.seed = unsigned64_of(a.at("seed"), "seed");
  p.choice = static_cast<uint32_t>(a.integer("choice", 0, 65535));
  p.repetition_penalty = static_cast<float>(number_of(a.at("repetition"), "repetition"));
  p.presence_penalty = static_cast<float>(number_of(a.at("presence"), "presence"));
  p.frequency_penalty = static_cast<float>(number_of(a.at("frequency"), "frequency"));
  std::vector<std::pair<int32_t, float>> bias;
  const Napi::Array list = array_of(a.at("bias"), "bias");
  for (uint32_t i = 0; i < list.Length(); i++) {
    const Napi::Array pair = array_of(list.Get(i), "bias[]");
    bias.emplace_back(static_cast<int32_t>(integer_of(pair.Get(0u), "bias[][0]", 0, vocabulary - 1)), static_cast<float>(number_of(pair.Get(1u), "bias[][1]")));
  }
  const SlotState state(p, bias, integers_of(a.at("prompt"), "prompt", 0, vocabulary - 1), integers_of(a.at("output"), "output", 0, vocabulary - 1));
  const std::vector<int32_t> banned = integers_of(a.at("banned"), "banned", 0, vocabulary - 1);
  const std::vector<int32_t> range = integers_of(a.at("positions"), "positions", 0, 1 << 24);
  if (range.size() != 2 || range[1] < range[0]) throw std::runtime_error("positions is [from, to]");
  Sampler sampler(vocabulary);
  Napi::Int32Array tokens = Napi::Int32Array::New(a.env, static_cast<size_t>(range[1] - range[0]));
  for (int32_t position = range[0]; position < range[1]; position++)
    tokens[static_cast<size_t>(position - range[0])] = sampler.sample(logits.data(), state, static_cast<uint32_t>(position), banned.data(), banned.size()).token;
  return tokens;
}

// {logits, token, top} -> Float32Array: log-probability of the token, then pairs (id, log-probability) of the best
Napi::Value score(const Arguments& a) {
  const std::vector<float> logits = float32_array_of(a.at("logits"), "logits");
  if (logits.empty()) throw std::runtime_error("logits is empty");
  Sampler sampler(static_cast<int64_t>(logits.size()));
  const SampledToken result = sampler.score(logits.data(), static_cast<int32_t>(a.integer("token", 0, static_cast<int64_t>(logits.size()) - 1)), static_cast<int>(a.integer("top", 0, kLogprobsMax)));
  std::vector<float> out{result.logprob};
  for (const TokenLogprob& t : result.top) {
    out.push_back(static_cast<float>(t.token));
    out.push_back(t.logprob);
  }
  return float_result(a.env, out);
}

// {type, x} -> {bytes: the row on the wire, values: what the receiver takes from it, tcpBytes: of a tcp frame that holds it}
Napi::Value wire(const Arguments& a) {
  const std::vector<float> x = float32_array_of(a.at("x"), "x");
  const WireType type = wire_type_of(a.at("type"), "type");
  const int64_t width = static_cast<int64_t>(x.size());
  Napi::Uint8Array bytes = Napi::Uint8Array::New(a.env, wire_bytes(type, width));
  to_wire(type, x.data(), width, bytes.Data());
  std::vector<float> values(x.size());
  from_wire(type, bytes.Data(), width, values.data());
  Napi::Object result = Napi::Object::New(a.env);
  result.Set("bytes", bytes);
  result.Set("values", float_result(a.env, values));
  result.Set("tcpBytes", static_cast<double>(bytes.ByteLength() + kTcpFrameOverhead));
  return result;
}

template <Napi::Value (*body)(const Arguments&)>
Napi::Value hook(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const FlushedDenormals flushed;
    return body(Arguments(info));
  });
}

}  // namespace

Napi::Object kernel_test_object(Napi::Env env) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("readRows", Napi::Function::New(env, hook<read_rows>, "readRows"));
  object.Set("linear", Napi::Function::New(env, hook<linear>, "linear"));
  object.Set("rmsNorm", Napi::Function::New(env, hook<rms_norm>, "rmsNorm"));
  object.Set("rope", Napi::Function::New(env, hook<rope>, "rope"));
  object.Set("gatedActivation", Napi::Function::New(env, hook<gated_activation>, "gatedActivation"));
  object.Set("finishTree", Napi::Function::New(env, hook<finish_tree>, "finishTree"));
  object.Set("attention", Napi::Function::New(env, hook<attention>, "attention"));
  object.Set("elementary", Napi::Function::New(env, hook<function>, "elementary"));
  object.Set("sample", Napi::Function::New(env, hook<sample>, "sample"));
  object.Set("wire", Napi::Function::New(env, hook<wire>, "wire"));
  object.Set("score", Napi::Function::New(env, hook<score>, "score"));
  return object;
}

}  // namespace shardmesh::binding
