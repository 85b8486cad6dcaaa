// Matrix products, packing and activation quantisation of every CPU kernel set against the reference, with memcmp.
//
// linear_test [FILTER...]: runs the cases whose name contains one of them; prints `ok NAME` or `FAIL NAME: what` for each and ends with 1 when one failed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../../kernels/cpu/cpu_features.h"
#include "../../kernels/cpu/linear_tuning.h"
#include "../../kernels/include/kernel_set.h"
#include "test_matrix.h"

using namespace shardmesh;

namespace {

int failures = 0;
std::vector<std::string> filters;

template <class Body>
void test_case(const std::string& name, Body body) {
  const auto has = [&](const std::string& filter) { return name.find(filter) != std::string::npos; };
  if (!filters.empty() && std::none_of(filters.begin(), filters.end(), has)) return;
  const std::string what = body();
  if (what.empty()) {
    std::printf("ok %s\n", name.c_str());
  } else {
    std::printf("FAIL %s: %s\n", name.c_str(), what.c_str());
    failures++;
  }
  std::fflush(stdout);
}

struct Shape {
  int64_t columns, rows, skip;
};

struct Product {
  Shape shape;
  int tokens, parts;
  std::vector<int> ends;
  std::vector<Subtree> subtrees;
  bool bias;
  ActivationType activations = ActivationType::Int8;
  int64_t range = 0;  // rows, and columns, of a call; 0: all at once
};

std::string describe(const Product& p, Values values, uint64_t seed) {
  char text[260];
  std::snprintf(text, sizeof text, "%s activations, K %lld N %lld skip %lld T %d parts %d segments %zu subtrees %zu bias %d values %s seed %llu", p.activations == ActivationType::Int8 ? "int8" : "int16", static_cast<long long>(p.shape.columns),
                static_cast<long long>(p.shape.rows), static_cast<long long>(p.shape.skip), p.tokens, p.parts, p.ends.size(), p.subtrees.size(), p.bias ? 1 : 0, name_of(values),
                static_cast<unsigned long long>(seed));
  return text;
}

// `count` segments of random lengths (>= 1 group) that end at `groups`, cut into `trees` subtrees.
void cut(Random& random, int64_t groups, int count, int trees, Product* p) {
  if (count > groups) count = static_cast<int>(groups);
  if (trees > count) trees = count;
  p->ends.clear();
  int64_t at = 0;
  for (int i = 0; i < count; i++) {
    const int64_t rest = count - i - 1, room = groups - at - rest;
    at += rest ? 1 + static_cast<int64_t>(random.below(static_cast<uint32_t>(room < 3 * groups / count ? room : 3 * groups / count))) : room;
    if (at > groups - rest) at = groups - rest;
    p->ends.push_back(static_cast<int>(at));
  }
  p->subtrees.clear();
  for (int i = 0, first = 0; i < trees; i++) {
    const int size = i + 1 == trees ? count - first : 1 + static_cast<int>(random.below(static_cast<uint32_t>(count - first - (trees - i - 1))));
    p->subtrees.push_back({first, size});
    first += size;
  }
}

// visit(first, count) for ranges of `range` up to `total`; once with (0, 0), which stands for all, where `range` is 0.
template <class Visit>
void each_range(int64_t total, int64_t range, Visit visit) {
  if (range == 0) return visit(0, 0);
  for (int64_t first = 0; first < total; first += range) visit(first, first + range < total ? range : total - first);
}

// Runs one product with `set` and returns everything it wrote, with the poison around it.
std::vector<float> run(const KernelSet& set, const PackedMatrix& weight, const Product& p, const std::vector<float>& x, int64_t x_stride, const std::vector<float>& bias) {
  const size_t activation_bytes = set.activation_bytes(p.activations, p.tokens, p.shape.columns);
  AlignedBytes activations(activation_bytes + 64, 0xcd);
  Activations in{x.data(), x_stride, p.tokens, p.shape.columns, activations.data(), p.activations};
  in.meets_bytes = weight.type == TensorType::Q8_0;
  const int64_t out_stride = p.shape.rows + 5, subtree_stride = out_stride * p.tokens + 7;
  std::vector<float> out(static_cast<size_t>(subtree_stride) * p.subtrees.size() + 9, -12345.0f);
  const LinearArguments arguments{&weight, in, static_cast<int>(p.ends.size()), p.ends.data(), static_cast<int>(p.subtrees.size()), p.subtrees.data(),
                                  p.bias ? bias.data() : nullptr, out.data(), out_stride, subtree_stride};
  if (weight.type != TensorType::F32 && weight.type != TensorType::F16 && weight.type != TensorType::BF16)
    each_range(p.shape.columns, p.range, [&](int64_t first, int64_t count) {
      Activations range = in;
      range.x += first;
      range.first_column = first;
      range.column_count = count;
      for (int i = 0; i < p.parts; i++) set.quantize_activations(range, {i, p.parts});
    });
  each_range(p.shape.rows, p.range, [&](int64_t first, int64_t count) {
    LinearArguments range = arguments;
    range.out += first;
    range.first_row = first;
    range.row_count = count;
    for (int i = p.parts - 1; i >= 0; i--) set.linear(range, {i, p.parts});
  });
  for (int i = 0; i < 64; i++)
    if (activations.data()[activation_bytes + static_cast<size_t>(i)] != 0xcd) out[0] = 77777.0f;  // wrote past its activations
  return out;
}

std::string first_difference(const std::vector<float>& expected, const std::vector<float>& found) {
  for (size_t i = 0; i < expected.size(); i++)
    if (std::memcmp(&expected[i], &found[i], 4) != 0) {
      char text[120];
      std::snprintf(text, sizeof text, "value %zu is %a, the reference has %a; ", i, static_cast<double>(found[i]), static_cast<double>(expected[i]));
      return text;
    }
  return "";
}

// A product with all its numbers, and what the reference gives: kept, since every set is compared with it, and making it takes longer than most sets do.
struct Case {
  Source source;
  std::vector<float> x, bias, want;
};
std::map<std::tuple<TensorType, uint64_t, ActivationType>, std::unique_ptr<Case>> cases;  // by type, seed and activations

std::string compare(const KernelSet& set, TensorType type, Values values, const Product& p, uint64_t seed) {
  const int64_t x_stride = p.shape.columns + 3;
  std::unique_ptr<Case>& made = cases[{type, seed, p.activations}];
  if (!made) {
    Random random(seed);
    made.reset(new Case{Source(type, p.shape.rows, p.shape.columns, p.shape.skip, values, random), {}, std::vector<float>(static_cast<size_t>(p.shape.rows)), {}});
    made->x = make_activations(static_cast<size_t>(x_stride) * static_cast<size_t>(p.tokens), values, random);
    for (float& b : made->bias) b = random.uniform();
    const Packed packed(*reference_kernel_set(), made->source.view, 1);
    Product one = p;
    one.parts = 1;
    one.range = 0;
    made->want = run(*reference_kernel_set(), packed.matrix, one, made->x, x_stride, made->bias);
  }
  const Packed found(set, made->source.view, p.parts);
  const std::string difference = first_difference(made->want, run(set, found.matrix, p, made->x, x_stride, made->bias));
  return difference.empty() ? "" : difference + describe(p, values, seed);
}

constexpr Values kValues[] = {Values::Random, Values::Extreme, Values::Zero, Values::Tiny};

std::string compare_shapes(const KernelSet& set, TensorType type, ActivationType activations) {
  const Shape shapes[] = {{32, 1, 0}, {32, 16, 32}, {64, 17, 224}, {96, 33, 96}, {256, 40, 0}, {288, 19, 160}, {576, 50, 0}, {1536, 20, 0}};
  const int tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 20, 24, 31, 40};
  uint64_t seed = 1000;
  for (const Shape& shape : shapes)
    for (const int t : tokens) {
      Random random(++seed);
      const Values values = kValues[seed % 4];
      Product p{shape, t, 1 + static_cast<int>(seed % 3), {}, {}, seed % 5 == 0, activations};
      cut(random, shape.columns / 32, 1 + static_cast<int>(random.below(16)), 1 + static_cast<int>(random.below(4)), &p);
      const std::string what = compare(set, type, values, p, seed);
      if (!what.empty()) return what;
    }
  return "";
}

// All weights at an end of their range and all activations at +-127: what an instruction that saturates would get wrong.
std::string compare_extremes(const KernelSet& set, TensorType type, ActivationType activations) {
  uint64_t seed = 5000;
  for (const int t : {1, 3, 6, 18})
    for (int i = 0; i < 6; i++) {
      Product p{{256, 32, 0}, t, 1, {8}, {{0, 1}}, false, activations};
      const std::string what = compare(set, type, Values::Extreme, p, ++seed);
      if (!what.empty()) return what;
    }
  return "";
}

std::string compare_tuning(const KernelSet& set, TensorType type) {
  LinearTuning& tuning = linear_tuning();
  const LinearTuning before = tuning;
  uint64_t seed = 7000;
  std::string what;
  for (const LinearTuning& t : {LinearTuning{1, 1, 0, 16}, LinearTuning{4, 2, 2048, 1000}, LinearTuning{4, 1, 512, 16}})
    for (const int tokens : {1, 2, 3, 4, 16, 19, 30})
      for (const ActivationType activations : {ActivationType::Int8, ActivationType::Int16}) {
        tuning = t;
        Product p{{352, 149, 0}, tokens, 2, {4, 8, 11}, {{0, 3}}, true, activations};
        if (what.empty()) what = compare(set, type, Values::Random, p, ++seed);
      }
  tuning = before;
  return what;
}

// Columns quantised and rows computed a range at a time; 149 rows: the last range ends inside a strip.
std::string compare_ranges(const KernelSet& set, TensorType type) {
  uint64_t seed = 8000;
  std::string what;
  for (const int64_t range : {32, 96})
    for (const int tokens : {1, 5, 16, 40})
      if (what.empty()) what = compare(set, type, Values::Random, {{352, 149, 0}, tokens, 2, {4, 8, 11}, {{0, 2}, {2, 1}}, true, ActivationType::Int8, range}, ++seed);
  return what;
}

// More groups than a panel holds.
std::string compare_long(const KernelSet& set, TensorType type) {
  std::string what;
  for (const ActivationType activations : {ActivationType::Int8, ActivationType::Int16})
    if (what.empty()) what = compare(set, type, Values::Random, {{8224, 17, 0}, 24, 1, {100, 200, 257}, {{0, 3}}, false, activations}, 9000);
  return what;
}

std::string compare_rows(const KernelSet& set, TensorType type) {
  for (const Shape& shape : {Shape{64, 1, 0}, Shape{288, 37, 0}, Shape{256, 18, 96}}) {
    Random random(static_cast<uint64_t>(shape.rows));
    const Source source(type, shape.rows, shape.columns, shape.skip, Values::Random, random);
    const Packed expected(*reference_kernel_set(), source.view, 1), one(set, source.view, 1), three(set, source.view, 3);
    if (one.matrix.layout != three.matrix.layout || std::memcmp(one.matrix.data, three.matrix.data, one.matrix.bytes) != 0) return "packing in three parts differs from packing in one";
    if (one.matrix.repack_error != 0.0) return "repack_error is not 0";
    std::vector<float> a(static_cast<size_t>(shape.columns) + 1, 5.0f), b = a;
    for (int64_t row = 0; row < shape.rows; row++) {
      reference_kernel_set()->read_row(expected.matrix, row, a.data());
      set.read_row(one.matrix, row, b.data());
      const std::string what = first_difference(a, b);
      if (!what.empty()) return what + "row " + std::to_string(row) + " of K " + std::to_string(shape.columns);
    }
  }
  return "";
}

std::string check_selection() {
  const char* why = nullptr;
  if (find_kernel_set("sse9", &why) != nullptr || !why || !std::strstr(why, "known are")) return "an unknown name is not refused with the known ones";
  if (find_kernel_set("portable", &why) != portable_kernel_set()) return "portable is not found";
  if (find_kernel_set("reference", &why) != reference_kernel_set()) return "reference is not found";
  why = nullptr;
  const KernelSet* avx512 = find_kernel_set("avx512", &why);
  if (cpu_features().avx512 ? avx512 == nullptr : avx512 != nullptr || !why || !std::strstr(why, "VNNI")) return "avx512 does not follow the processor, or its refusal names no feature";
  const KernelSet* best = find_kernel_set("auto", &why);
  why = nullptr;
  const KernelSet* amx = find_kernel_set("amx", &why);
  if (amx_kernel_set() && cpu_features().amx ? amx == nullptr : amx != nullptr || !why || !std::strstr(why, "AMX")) return "amx does not follow the processor, or its refusal names no feature";
  const KernelSet* expected = cpu_features().avx512 ? avx512_kernel_set() : cpu_features().avx2 ? avx2_kernel_set() : portable_kernel_set();
  return best == expected ? "" : "auto is not the best set of this machine";
}

std::string check_kv_layout() {
  const KvLayout int8 = make_kv_layout(KeyType::Int8, ValueType::Int8, 3, 64, 32), f16 = make_kv_layout(KeyType::F16, ValueType::Int8, 2, 64, 16);
  if (int8.key_bytes != 1024 || int8.value_bytes != 1024 || int8.scale_bytes != 128 || int8.subblock_bytes != 2176 || int8.head_bytes != 4352 || int8.block_bytes != 13056)
    return "int8 keys: a size is wrong";
  if (f16.key_bytes != 2048 || f16.value_bytes != 1024 || f16.scale_bytes != 64 || f16.subblock_bytes != 3136 || f16.head_bytes != 3136 || f16.block_bytes != 6272)
    return "f16 keys: a size is wrong";
  const KvLayout half = make_kv_layout(KeyType::F16, ValueType::F16, 2, 64, 16);
  if (half.key_bytes != 2048 || half.value_bytes != 2048 || half.scale_bytes != 0 || half.subblock_bytes != 4096) return "f16 keys and values: a size is wrong";
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  filters.assign(argv + 1, argv + argc);
  flush_denormals();
  test_case("kernel sets - are found by name and by what the machine runs", check_selection);
  test_case("kv layout - has the sizes that kernel_set.h draws", check_kv_layout);
  test_case("linear reference - gives a range of rows and of columns what it gives the whole", [] {
    std::string what;
    for (const TensorType type : kTypes) what += compare_ranges(*reference_kernel_set(), type);
    return what;
  });
  for (const char* name : {"portable", "avx2", "avx512", "amx"}) {
    const char* why = nullptr;
    const KernelSet* set = find_kernel_set(name, &why);
    if (!set) {
      std::printf("skip linear %s: %s\n", name, why);
      continue;
    }
    for (const TensorType type : kTypes) {
      const std::string head = std::string("linear ") + name + " " + name_of(type) + " - ";
      test_case(head + "packs without loss and reads rows back", [&] { return compare_rows(*set, type); });
      for (const ActivationType activations : {ActivationType::Int8, ActivationType::Int16}) {
        const std::string of = activations == ActivationType::Int8 ? "" : ", int16 activations";
        test_case(head + "has the reference's bits for any shape, batch, segments and parts" + of, [&] { return compare_shapes(*set, type, activations); });
        test_case(head + "has the reference's bits where every product is extreme" + of, [&] { return compare_extremes(*set, type, activations); });
      }
      test_case(head + "has the reference's bits, a range of rows and of columns at a time", [&] { return compare_ranges(*set, type); });
      test_case(head + "does not depend on tuning", [&] { return compare_tuning(*set, type); });
      test_case(head + "has the reference's bits where a row is longer than a panel", [&] { return compare_long(*set, type); });
    }
  }
  return failures ? 1 : 0;
}
