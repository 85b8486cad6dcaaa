// The launches that do several operations of a step in one (linear_fused, attention_fused, finish_tree_norm) on the emulated machine against the kernels that do them one by one, bit for
// bit; those are held against the reference by cuda_linear_test and cuda_step_test.
//
//   cuda_fused_test    runs all; prints "ok NAME" or "FAIL NAME: what", a line each
#include <deque>

#include "../../../kernels/cuda/attention_plan.h"
#include "../../../kernels/cuda/operations.h"
#include "../../../kernels/cuda/weight_layout.h"
#include "../test_matrix.h"
#include "kernel_cases.h"

using namespace shardmesh;
using simt::Guarded;

namespace {

using Floats = Guarded<float>;

const TensorType kQuantized[] = {TensorType::Q4_0, TensorType::Q4_1, TensorType::Q5_0, TensorType::Q5_1, TensorType::Q8_0, TensorType::Q4_K, TensorType::Q5_K, TensorType::Q6_K};
constexpr size_t kQuantizedCount = sizeof kQuantized / sizeof kQuantized[0];

// A random matrix as the card has it.
struct Matrix {
  TensorType type;
  int64_t rows, columns;
  int phase;
  std::unique_ptr<Guarded<uint8_t>> weight;
  Matrix(TensorType type_, int64_t rows_, int64_t columns_, Random& random) : type(type_), rows(rows_), columns(columns_) {
    const Source source(type, rows, columns, 0, Values::Random, random);
    PackedMatrix packed{type, rows, columns, cuda::packed_bytes(source.view), nullptr, 0, 0};
    weight = std::make_unique<Guarded<uint8_t>>("weight", packed.bytes);
    packed.data = weight->data();
    cuda::pack(source.view, &packed, {0, 1});
    phase = packed.layout;
  }
};

// Activations of `tokens` rows, `segments` segments of whole groups, as long as can be equal.
struct Input {
  int tokens;
  int64_t columns;
  Guarded<uint8_t> groups;
  std::vector<int> ends;
  Subtree whole;
  Input(int tokens_, int64_t columns_, int segments, Random& random)
      : tokens(tokens_), columns(columns_), groups("activations", cuda::activation_bytes(tokens_, columns_)), whole{0, segments} {
    const Floats x("x", make_activations(static_cast<size_t>(columns * tokens), Values::Random, random));
    problem = cuda::quantize(x.data(), columns, tokens, columns, reinterpret_cast<cuda::ActivationGroup*>(groups.data()), nullptr);
    finished = simt::finish();
    for (int i = 1; i <= segments; i++) ends.push_back(static_cast<int>(columns / 32 * i / segments));
  }
  cuda::Product product(const Matrix& m, const float* bias, float* out, int64_t stride) const {
    return {m.type, m.rows, m.columns, m.phase, m.weight->data(), reinterpret_cast<const cuda::ActivationGroup*>(groups.data()), tokens, whole.count, ends.data(), 1, &whole, bias, out, stride, 0};
  }
  cuda::Problem problem;
  std::string finished;
};

std::string first_of(std::initializer_list<std::string> all) {
  for (const std::string& what : all)
    if (!what.empty()) return what;
  return "";
}

// The first problem of launches that follow each other.
std::string run(std::initializer_list<cuda::Problem> problems) {
  for (const cuda::Problem problem : problems)
    if (problem) return std::string(problem) + "; ";
  return simt::finish();
}

Floats values(const char* name, size_t count, Random& random) { return Floats(name, make_activations(count, Values::Random, random)); }

// Products side by side, of which nothing follows; `many`: of so many strips that a block has two.
std::string side_by_side(int tokens, int segments, size_t type, bool many, uint64_t seed) {
  Random random(seed);
  const int64_t columns = many ? 64 : 512;
  const Input in(tokens, columns, segments, random);
  const int64_t rows[] = {many ? 24'581 : 48, many ? 33 : 83, 16};
  const int count = 2 + static_cast<int>(seed % 2);
  std::vector<Matrix> matrices;
  std::deque<Floats> want, found;
  cuda::FusedProducts f{};
  f.count = count;
  f.then = cuda::Then::Nothing;
  std::string problem = run({in.problem});
  for (int i = 0; i < count; i++) {
    matrices.emplace_back(kQuantized[(type + static_cast<size_t>(i)) % kQuantizedCount], rows[i], columns, random);
    for (std::deque<Floats>* all : {&want, &found}) all->emplace_back("product", static_cast<size_t>(rows[i] * tokens));
  }
  for (size_t i = 0; i < matrices.size() && problem.empty(); i++) {
    f.product[i] = in.product(matrices[i], nullptr, found[i].data(), rows[i]);
    problem = run({cuda::linear_decode(in.product(matrices[i], nullptr, want[i].data(), rows[i]), nullptr)});
  }
  if (problem.empty()) problem = run({cuda::linear_fused(f, nullptr)});
  for (size_t i = 0; i < matrices.size() && problem.empty(); i++) problem = simt::difference(want[i].values(), found[i]);
  return problem;
}

std::string gate_and_up(int tokens, int segments, size_t type, int activation, uint64_t seed) {
  Random random(seed);
  const int64_t columns = 512, rows = 96, stride = rows + 5;
  const Input in(tokens, columns, segments, random);
  const Matrix gate(kQuantized[type], rows, columns, random), up(kQuantized[(type + 3) % kQuantizedCount], rows, columns, random);
  const size_t count = static_cast<size_t>(stride * tokens);
  const Floats want_gate("gate", count), want_up("up", count), found_gate("gate", count), found_up("up", count);
  const size_t bytes = cuda::activation_bytes(tokens, rows);
  const Guarded<uint8_t> want("want", bytes), found("found", bytes);
  const Guarded<uint32_t> arrivals("arrivals", std::vector<uint32_t>(3, 0));
  const auto groups = [](const Guarded<uint8_t>& g) { return reinterpret_cast<cuda::ActivationGroup*>(g.data()); };
  cuda::FusedProducts f{};
  f.count = 2;
  f.product[0] = in.product(gate, nullptr, found_gate.data(), stride);
  f.product[1] = in.product(up, nullptr, found_up.data(), stride);
  f.then = cuda::Then::Activation;
  f.activation = activation;
  f.quantized = groups(found);
  f.arrivals = arrivals.data();
  if (cuda::fused_arrivals(f) != arrivals.size()) return "arrivals; ";
  const std::string problem = run({in.problem, cuda::linear_decode(in.product(gate, nullptr, want_gate.data(), stride), nullptr), cuda::linear_decode(in.product(up, nullptr, want_up.data(), stride), nullptr),
                                   cuda::gated_activation(want_gate.data(), stride, want_up.data(), stride, rows, tokens, activation, nullptr, 0, groups(want), nullptr), cuda::linear_fused(f, nullptr)});
  return first_of({problem, simt::difference(want.values(), found), simt::difference(want_gate.values(), found_gate), simt::difference(std::vector<uint32_t>(3, 0), arrivals)});
}

std::string into_residual(int tokens, int segments, size_t type, bool normed, uint64_t seed) {
  Random random(seed);
  const int64_t columns = 544, rows = normed ? 160 : 84, stride = rows + 4;
  const Input in(tokens, columns, segments, random);
  const Matrix matrix(kQuantized[type], rows, columns, random);
  const Floats bias = values("bias", static_cast<size_t>(rows), random), weight = values("weight", static_cast<size_t>(rows), random);
  const Floats want_residual = values("residual", static_cast<size_t>(stride * tokens), random), found_residual("residual", want_residual.values());
  const Floats sums("sums", static_cast<size_t>(stride * tokens));
  const size_t bytes = cuda::activation_bytes(tokens, (rows + 31) / 32 * 32);
  const Guarded<uint8_t> want("want", bytes), found("found", bytes);
  const Guarded<uint32_t> arrivals("arrivals", std::vector<uint32_t>(1, 0));
  const float* added = seed % 2 ? bias.data() : nullptr;
  cuda::FusedProducts f{};
  f.count = 1;
  f.product[0] = in.product(matrix, added, found_residual.data(), stride);
  f.then = normed ? cuda::Then::ResidualNorm : cuda::Then::Residual;
  f.norm = {weight.data(), 1e-5f, reinterpret_cast<cuda::ActivationGroup*>(found.data()), 0, {}};
  f.arrivals = arrivals.data();
  const int lo[] = {0}, hi[] = {1};
  const float* node[] = {sums.data()};
  const int64_t strides[] = {stride};
  std::string problem = run({in.problem, cuda::linear_decode(in.product(matrix, nullptr, sums.data(), stride), nullptr),
                             cuda::finish_tree(1, 1, lo, hi, node, strides, added, want_residual.data(), stride, rows, tokens, nullptr), cuda::linear_fused(f, nullptr)});
  if (problem.empty() && normed)
    problem = run({cuda::rms_norm(want_residual.data(), stride, weight.data(), 1e-5f, rows, tokens, nullptr, 0, reinterpret_cast<cuda::ActivationGroup*>(want.data()), nullptr)});
  return first_of({problem, simt::difference(want_residual.values(), found_residual), simt::difference(want.values(), found), simt::difference(std::vector<uint32_t>(1, 0), arrivals)});
}

// Rows [first, first + tokens) of a step: the end of a reduction of two ranks, and the norm.
std::string tree_and_norm(int tokens, size_t type, uint64_t seed) {
  Random random(seed);
  const int64_t width = 32 * (1 + static_cast<int64_t>(type)) + 192, stride = width + 2;
  const int first = static_cast<int>(seed % 3), units = 3;
  const size_t count = static_cast<size_t>(stride * tokens);
  const Floats a = values("a", count, random), b = values("b", count, random), bias = values("bias", static_cast<size_t>(width), random), weight = values("weight", static_cast<size_t>(width), random);
  const Floats want_residual = values("residual", count, random), found_residual("residual", want_residual.values());
  const size_t bytes = cuda::activation_bytes(tokens + first, width);
  const Guarded<uint8_t> whole("whole", bytes), found("found", bytes);
  const Guarded<uint32_t> arrivals("arrivals", std::vector<uint32_t>(1, 0));
  const int lo[] = {0, 2}, hi[] = {2, 3};
  const float* nodes[] = {a.data(), b.data()};
  const int64_t strides[] = {stride, stride};
  const float* added = seed % 2 ? bias.data() : nullptr;
  const cuda::NormAfter norm{weight.data(), 1e-6f, reinterpret_cast<cuda::ActivationGroup*>(found.data()), first, {}};
  const Floats all("all", static_cast<size_t>(stride * (tokens + first)));  // the norm of all rows of the step, those in front zeros
  std::memset(all.data(), 0, static_cast<size_t>(stride * first) * 4);
  std::string problem = run({cuda::finish_tree(units, 2, lo, hi, nodes, strides, added, want_residual.data(), stride, width, tokens, nullptr),
                             cuda::finish_tree_norm(units, 2, lo, hi, nodes, strides, added, found_residual.data(), stride, width, tokens, norm, arrivals.data(), nullptr)});
  std::memcpy(all.data() + stride * first, want_residual.data(), count * 4);
  if (problem.empty())
    problem = run({cuda::rms_norm(all.data(), stride, weight.data(), 1e-6f, width, tokens + first, nullptr, 0, reinterpret_cast<cuda::ActivationGroup*>(whole.data()), nullptr)});
  // Of rows in front nothing was written: take theirs from the whole.
  std::vector<uint8_t> want = found.values();
  const auto* from = reinterpret_cast<const cuda::ActivationGroup*>(whole.data());
  auto* to = reinterpret_cast<cuda::ActivationGroup*>(want.data());
  for (int64_t g = 0; g < static_cast<int64_t>(bytes / sizeof *to); g++)
    for (int t = 0; t < cuda::kTileTokens; t++) {
      const int row = static_cast<int>(g / (width / 32)) * cuda::kTileTokens + t;
      if (row < first || row >= first + tokens) continue;
      for (int lane = 4 * t; lane < 4 * t + 4; lane++) to[g].q[lane] = from[g].q[lane];
      to[g].scale[t] = from[g].scale[t];
    }
  return first_of({problem, simt::difference(want_residual.values(), found_residual), simt::difference(want, found), simt::difference(std::vector<uint32_t>(1, 0), arrivals)});
}

// Two sequences, and a row that only pads.
struct Rows {
  Guarded<int32_t> positions, row_sequence, block_offsets, block_tables;
  Rows(int tokens, int context)
      : positions("positions", static_cast<size_t>(tokens)), row_sequence("row_sequence", static_cast<size_t>(tokens)), block_offsets("block_offsets", std::vector<int32_t>{0, 40}),
        block_tables("block_tables", 80) {
    for (int i = 0; i < 80; i++) block_tables.data()[i] = (i * 37 + 11) % 80;
    const int live = tokens > 1 ? tokens - 1 : tokens, second = (live + 1) / 2;
    for (int t = 0; t < tokens; t++) {
      row_sequence.data()[t] = t >= live ? -1 : t >= second;
      positions.data()[t] = t >= live ? 0 : t >= second ? t - second : context + t;
    }
  }
  cuda::DeviceRows view() const { return {static_cast<int>(positions.size()), positions.data(), row_sequence.data(), block_offsets.data(), block_tables.data()}; }
};

std::string rope_and_store(int tokens, int segments, size_t type, int D, uint64_t seed) {
  Random random(seed);
  const int64_t columns = 256;
  const int q_heads = 3, kv_heads = 2, context = 300;
  const Input in(tokens, columns, segments, random);
  const int64_t widths[] = {q_heads * D, kv_heads * D, kv_heads * D};
  std::vector<Matrix> matrices;
  std::vector<std::unique_ptr<Floats>> bias, want, found;
  for (size_t i = 0; i < 3; i++) {
    matrices.emplace_back(kQuantized[(type + i) % kQuantizedCount], widths[i], columns, random);
    bias.push_back(std::make_unique<Floats>("bias", make_activations(static_cast<size_t>(widths[i]), Values::Random, random)));
    for (auto* into : {&want, &found}) into->push_back(std::make_unique<Floats>("qkv", static_cast<size_t>((widths[i] + 3) * tokens)));
  }
  const Floats cosine = values("cosine", static_cast<size_t>((context + 8) * D / 2), random), sine = values("sine", cosine.size(), random);
  const KvLayout layout = make_kv_layout(KeyType::Int8, ValueType::Int8, kv_heads, D, 16);
  const Guarded<uint8_t> want_cache("cache", 80 * layout.block_bytes), found_cache("cache", 80 * layout.block_bytes);
  const Rows rows(tokens, context);
  const Guarded<uint32_t> arrivals("arrivals", std::vector<uint32_t>(7, 0));
  const auto step = [&](const std::vector<std::unique_ptr<Floats>>& qkv, uint8_t* cache) {
    return cuda::RopeStore{qkv[0]->data(), widths[0] + 3, q_heads, qkv[1]->data(), widths[1] + 3, qkv[2]->data(), widths[2] + 3, {D, seed % 2 ? 1 : 0, cosine.data(), sine.data()}, layout, cache, rows.view(), {}};
  };
  cuda::FusedProducts f{};
  f.count = 3;
  f.then = cuda::Then::RopeStoreKv;
  for (size_t i = 0; i < 3; i++) {
    const float* added = seed % 3 ? bias[i]->data() : nullptr;
    f.product[i] = in.product(matrices[i], added, found[i]->data(), widths[i] + 3);
    if (const std::string problem = run({in.problem, cuda::linear_decode(in.product(matrices[i], added, want[i]->data(), widths[i] + 3), nullptr)}); !problem.empty()) return problem;
  }
  f.rope = step(found, found_cache.data());
  f.arrivals = arrivals.data();
  const std::string problem = run({cuda::rope_store_kv(step(want, want_cache.data()), nullptr), cuda::linear_fused(f, nullptr)});
  return first_of({problem, simt::difference(want[0]->values(), *found[0]), simt::difference(want_cache.values(), found_cache), simt::difference(std::vector<uint32_t>(7, 0), arrivals)});
}

std::string attend(int D, int window, const std::vector<int32_t>& kv_head, uint64_t seed) {
  Random random(seed);
  const int tokens = 5, heads = static_cast<int>(kv_head.size()), kv_heads = kv_head.back() + 1, context = 520;
  const int64_t q_stride = heads * D + 4;
  const KvLayout layout = make_kv_layout(KeyType::Int8, ValueType::Int8, kv_heads, D, 16);
  // Every slot of the pool holds some token's K and V: a row for each position of 80 blocks.
  const int all = 80 * 16;
  const Guarded<uint8_t> cache("cache", 80 * layout.block_bytes);
  {
    std::vector<int32_t> positions(static_cast<size_t>(all)), sequence(positions.size(), 0), table(80);
    for (size_t i = 0; i < positions.size(); i++) positions[i] = static_cast<int32_t>(i);
    for (size_t i = 0; i < table.size(); i++) table[i] = static_cast<int32_t>(i);
    const int32_t first_row[] = {0, all}, offsets[] = {0, 80};
    const std::vector<float> kv = make_activations(static_cast<size_t>(all * kv_heads * D), Values::Random, random);
    const StepRows rows{all, positions.data(), sequence.data(), 1, first_row, offsets, table.data()};
    reference_kernel_set()->store_kv(kv.data(), kv_heads * D, kv.data(), kv_heads * D, layout, cache.data(), rows, {0, 1});
  }
  const Rows rows(tokens, context);
  const int32_t first_row[] = {0, 2, 4}, offsets[] = {0, 40, 80};
  const StepRows host{4, rows.positions.data(), rows.row_sequence.data(), 2, first_row, offsets, rows.block_tables.data()};
  const std::vector<cuda::HeadRun> head_runs = cuda::head_runs(heads, kv_head.data());
  cuda::AttentionPlan plan;
  cuda::plan_attention(host, head_runs, window, {8, 1000, true}, &plan);
  plan.first_slot.push_back(plan.first_slot.back());  // of the row that pads
  const Floats q = values("q", static_cast<size_t>(q_stride * tokens), random), out("out", static_cast<size_t>(heads * D * tokens));
  const Floats partials("partials", static_cast<size_t>(plan.first_slot.back()) * static_cast<size_t>(heads * (D + 2)));
  const Guarded<cuda::HeadRun> runs("runs", head_runs);
  std::vector<cuda::AttentionWork> list(3, cuda::AttentionWork{1000, 1, 0, 0});  // work may lie behind other things
  list.insert(list.end(), plan.work.begin(), plan.work.end());
  const Guarded<cuda::AttentionWork> work("work", list);
  const Guarded<int32_t> work_count("work_count", std::vector<int32_t>{static_cast<int32_t>(plan.work.size()), 3}), first_slot("first_slot", plan.first_slot);
  const size_t bytes = cuda::activation_bytes(tokens, heads * D), counters = static_cast<size_t>(tokens) * head_runs.size();
  const Guarded<uint8_t> want("want", bytes), found("found", bytes);
  const Guarded<uint32_t> arrivals("arrivals", std::vector<uint32_t>(counters, 0));
  const cuda::AttentionStep step{q.data(), q_stride, out.data(), heads * D, heads, 0.1f, window, layout, cache.data(), rows.view(), runs.data(), work.data(), work_count.data(), partials.data(), first_slot.data()};
  const auto groups = [](const Guarded<uint8_t>& g) { return reinterpret_cast<cuda::ActivationGroup*>(g.data()); };
  const std::string problem =
      run({cuda::attention_fused(step, static_cast<int>(head_runs.size()), groups(found), arrivals.data(), 1 + static_cast<int>(seed % 5), nullptr, {}), cuda::attention(step, 3, nullptr),
           cuda::attention_join(step, nullptr), cuda::quantize(out.data(), heads * D, 4, heads * D, groups(want), nullptr)});
  return first_of({problem, simt::difference(want.values(), found), simt::difference(std::vector<uint32_t>(counters, 0), arrivals)});
}

// `one` for each format and number of tokens and segments, in turning orders.
std::string each(const std::function<std::string(int tokens, int segments, size_t type, uint64_t seed)>& one) {
  const int segments[] = {1, 8, 3, 16, 5, 2, 7, 4};
  for (size_t type = 0; type < kQuantizedCount; type++)
    for (const int tokens : {1 + static_cast<int>(type), 8 - static_cast<int>(type)}) {
      const uint64_t seed = 40 * type + static_cast<uint64_t>(tokens);
      const simt::Schedule& schedule = simt::kSchedules[seed % simt::kScheduleCount];
      simt::set_schedule(schedule);
      const std::string what = one(tokens, segments[type], type, seed);
      if (!what.empty()) return what + shardmesh::name_of(kQuantized[type]) + ", " + std::to_string(tokens) + " tokens, " + std::to_string(segments[type]) + " segments, " + simt::name_of(schedule) + " order";
    }
  return "";
}

std::string check_refusals() {
  Random random(1);
  const Input in(2, 64, 2, random);
  const Matrix a(TensorType::Q4_0, 64, 64, random), b(TensorType::Q8_0, 32, 64, random);
  const auto refused = [&](cuda::FusedProducts f, const char* word) {
    const char* problem = cuda::linear_fused(f, nullptr);
    return problem && std::strstr(problem, word) ? std::string() : std::string(word) + (problem ? ": " + std::string(problem) : ": taken") + "; ";
  };
  cuda::FusedProducts pair{};
  pair.count = 2;
  pair.then = cuda::Then::Activation;
  pair.product[0] = in.product(a, nullptr, nullptr, 64);
  pair.product[1] = in.product(b, nullptr, nullptr, 64);
  cuda::FusedProducts many = pair, norm = pair, rope = pair, none = pair;
  many.product[0].tokens = many.product[1].tokens = 9;
  norm.then = cuda::Then::ResidualNorm;
  rope.then = cuda::Then::RopeStoreKv;
  none.count = 0;
  return first_of({refused(pair, "as many rows"), refused(many, "1 to 8 tokens"), refused(norm, "one product"), refused(rope, "not q, k and v"), refused(none, "1 to 3 products")});
}

}  // namespace

int main() {
  if (!simt::can_run()) return 0;
  simt::check_early_starts(true);
  flush_denormals();
  simt::test_case("cuda fused - products of a gate and their activation have the bits of single launches", [] {
    return each([](int tokens, int segments, size_t type, uint64_t seed) { return gate_and_up(tokens, segments, type, static_cast<int>(seed % 2), seed); });
  });
  simt::test_case("cuda fused - products side by side have the bits of single launches", [] {
    const std::string what = each([](int tokens, int segments, size_t type, uint64_t seed) { return side_by_side(tokens, segments, type, false, seed); });
    return what.empty() ? side_by_side(1, 2, 1, true, 1) : what;
  });
  simt::test_case("cuda fused - a product into the residual has the bits of single launches", [] {
    return each([](int tokens, int segments, size_t type, uint64_t seed) { return into_residual(tokens, segments, type, false, seed); });
  });
  simt::test_case("cuda fused - a product into the residual and the norm behind it have the bits of single launches", [] {
    return each([](int tokens, int segments, size_t type, uint64_t seed) { return into_residual(tokens, segments, type, true, seed); });
  });
  simt::test_case("cuda fused - the end of a reduction and the norm behind it have the bits of single launches", [] {
    return each([](int tokens, int, size_t type, uint64_t seed) { return tree_and_norm(tokens, type, seed); });
  });
  simt::test_case("cuda fused - q, k and v, rotated and stored, have the bits of single launches, and rows that pad are left alone", [] {
    return each([](int tokens, int segments, size_t type, uint64_t seed) { return rope_and_store(tokens, std::min(segments, 8), type, type % 2 ? 32 : 64, seed); });
  });
  simt::test_case("cuda fused - attention with its join has the bits of single launches", [] {
    uint64_t seed = 0;
    for (const int D : {32, 64, 128, 256})
      for (const int window : {0, 300}) {
        simt::set_schedule(simt::kSchedules[++seed % simt::kScheduleCount]);
        const std::string what = attend(D, window, D == 64 ? std::vector<int32_t>{0, 0, 0, 1, 1, 1} : std::vector<int32_t>{0, 1, 1}, seed);
        if (!what.empty()) return what + "head size " + std::to_string(D) + ", window " + std::to_string(window);
      }
    return std::string();
  });
  simt::test_case("cuda fused - refuses by name what does not belong together", check_refusals);
  return simt::end_of_tests();
}
