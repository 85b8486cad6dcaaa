// The CUDA products on the emulated machine against the reference, bit for bit: quantise (int8 and int16), decode product, prefill product, for every format. The bf16
// products of tensor cores have an order of their own inside 16 columns: against the reference where every sum is exact, else by tolerance.
//
//   cuda_linear_test    runs all; prints "ok NAME" or "FAIL NAME: what", a line each
#include "../../../kernels/cuda/operations.h"
#include "../../../kernels/cuda/weight_layout.h"
#include "../test_matrix.h"
#include "kernel_cases.h"

using namespace shardmesh;
using simt::Guarded;

namespace {

struct Case {
  int64_t columns, rows, skip;
  int tokens;
  std::vector<int> segment_ends;
  std::vector<Subtree> subtrees;
  bool bias;
  ActivationType activations = ActivationType::Int8;
};

bool is_float_type(TensorType type) { return type == TensorType::F32 || type == TensorType::F16 || type == TensorType::BF16; }

// Segments and subtrees at random: ends ascend, subtrees cover the segments in order.
void cut(Random& random, int64_t groups, Case* c) {
  const int segments = 1 + static_cast<int>(random.below(static_cast<uint32_t>(std::min<int64_t>(groups, kSegmentsMax))));
  std::vector<bool> ends(static_cast<size_t>(groups), false);
  ends.back() = true;
  for (int placed = 1; placed < segments;) {
    const size_t at = random.below(static_cast<uint32_t>(groups));
    if (!ends[at]) {
      ends[at] = true;
      placed++;
    }
  }
  for (int g = 0; g < groups; g++)
    if (ends[static_cast<size_t>(g)]) c->segment_ends.push_back(g + 1);
  for (int first = 0; first < segments;) {
    const int count = 1 + static_cast<int>(random.below(static_cast<uint32_t>(segments - first)));
    c->subtrees.push_back({first, count});
    first += count;
  }
}

float rounded_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

std::string describe(const Case& c, Values values, const simt::Schedule& schedule, uint64_t seed) {
  char text[240];
  std::snprintf(text, sizeof text, "K %lld, rows %lld, skip %lld, tokens %d, %s, %zu segments, %zu subtrees, %s values, %s order, seed %llu", static_cast<long long>(c.columns),
                static_cast<long long>(c.rows), static_cast<long long>(c.skip), c.tokens, c.activations == ActivationType::Int8 ? "int8" : "int16", c.segment_ends.size(),
                c.subtrees.size(), shardmesh::name_of(values), simt::name_of(schedule),
                static_cast<unsigned long long>(seed));
  return text;
}

using Launcher = cuda::Problem (*)(const cuda::Product&, cuda::Stream);

std::string compare(Launcher launcher, TensorType type, Values values, const Case& c, uint64_t seed) {
  const KernelSet& reference = *reference_kernel_set();
  const simt::Schedule& schedule = simt::kSchedules[seed % simt::kScheduleCount];
  simt::set_schedule(schedule);
  Random random(seed);
  const Source source(type, c.rows, c.columns, c.skip, values, random);
  const Packed packed(reference, source.view, 1);
  const int64_t x_stride = c.columns + 4, out_stride = c.rows + 3, subtree_stride = out_stride * c.tokens + 1;
  const std::vector<float> x = make_activations(static_cast<size_t>(x_stride * c.tokens), values, random);
  std::vector<float> bias(static_cast<size_t>(c.rows));
  for (float& b : bias) b = random.uniform();
  const size_t out_count = static_cast<size_t>(subtree_stride) * c.subtrees.size();

  AlignedBytes activations(reference.activation_bytes(c.activations, c.tokens, c.columns), 0);
  const Activations in{x.data(), x_stride, c.tokens, c.columns, activations.data(), c.activations};
  std::vector<float> expected = simt::poisoned<float>(out_count);
  if (!is_float_type(type)) reference.quantize_activations(in, {0, 1});
  reference.linear({&packed.matrix, in, static_cast<int>(c.segment_ends.size()), c.segment_ends.data(), static_cast<int>(c.subtrees.size()), c.subtrees.data(),
                    c.bias ? bias.data() : nullptr, expected.data(), out_stride, subtree_stride},
                   {0, 1});

  PackedMatrix matrix{type, c.rows, c.columns, cuda::packed_bytes(source.view), nullptr, 0, 0};
  const Guarded<uint8_t> weight("weight", matrix.bytes), quantized("activations", is_float_type(type) ? 0 : cuda::activation_bytes(c.tokens, c.columns, c.activations));
  matrix.data = weight.data();
  for (int part = 0; part < 2; part++) cuda::pack(source.view, &matrix, {part, 2});
  const Guarded<float> device_x("x", x), device_bias("bias", bias), out("out", out_count);
  auto* groups = reinterpret_cast<cuda::ActivationGroup*>(quantized.data());
  const std::string at = describe(c, values, schedule, seed);
  if (!is_float_type(type))
    if (const char* problem = cuda::quantize(device_x.data(), x_stride, c.tokens, c.columns, {groups, c.activations}, nullptr)) return std::string("quantize: ") + problem + "; " + at;
  cuda::Product product{type, c.rows, c.columns, matrix.layout, weight.data(), groups, c.tokens, static_cast<int>(c.segment_ends.size()), c.segment_ends.data(),
                              static_cast<int>(c.subtrees.size()), c.subtrees.data(), c.bias ? device_bias.data() : nullptr, out.data(), out_stride, subtree_stride};
  product.activations = c.activations;
  product.x = device_x.data();
  product.x_stride = x_stride;
  if (const char* problem = launcher(product, nullptr)) return std::string(problem) + "; " + at;
  const std::string what = simt::difference(expected, out);
  return what.empty() ? "" : what + at;
}

// ---------------------------------------------------------------- bf16 by tensor cores

struct Bf16Case {
  int64_t columns, rows;
  int tokens;
  bool exact;  // small integers: no sum rounds, whatever its order
};

// Both products of one case, decode with weights in strips and row after row: the reference's bytes where no sum rounds; else the same bytes as each other, close to the sums in
// double precision.
std::string compare_bf16(const Bf16Case& b, uint64_t seed) {
  simt::set_schedule(simt::kSchedules[seed % simt::kScheduleCount]);
  Random random(seed);
  Case c{b.columns, b.rows, 0, b.tokens, {}, {}, seed % 2 == 0};
  cut(random, c.columns / 32, &c);
  Source source(TensorType::BF16, c.rows, c.columns, 0, Values::Random, random);
  const int64_t x_stride = c.columns + 4, out_stride = c.rows + 3, subtree_stride = out_stride * c.tokens + 1;
  std::vector<float> x = make_activations(static_cast<size_t>(x_stride * c.tokens), Values::Random, random), bias(static_cast<size_t>(c.rows));
  for (float& value : bias) value = random.uniform();
  const auto small = [&] { return static_cast<float>(static_cast<int>(random.below(17)) - 8); };
  if (b.exact) {
    for (float& value : x) value = small();
    for (size_t i = 0; i < source.bytes.size(); i += 2) {
      const float value = small();
      std::memcpy(&source.bytes[i], reinterpret_cast<const uint8_t*>(&value) + 2, 2);
    }
  }
  PackedMatrix matrix{TensorType::BF16, c.rows, c.columns, cuda::packed_bytes(source.view), nullptr, 0, 0};
  const Guarded<uint8_t> weight("weight", matrix.bytes), rounded("rounded", cuda::bf16_bytes(c.tokens, c.columns));
  matrix.data = weight.data();
  cuda::pack(source.view, &matrix, {0, 1});
  const Guarded<uint8_t> by_rows("weight by rows", matrix.bytes);
  matrix.data = by_rows.data();
  for (int part = 0; part < 2; part++) cuda::pack_rows(source.view, &matrix, {part, 2});
  const size_t out_count = static_cast<size_t>(subtree_stride) * c.subtrees.size();
  const Guarded<float> device_x("x", x), device_bias("bias", bias), decoded("decoded", out_count), decoded_by_rows("decoded by rows", out_count), prefilled("prefilled", out_count);
  auto* bf16 = reinterpret_cast<cuda::Bf16Group*>(rounded.data());
  cuda::Product product{TensorType::BF16, c.rows, c.columns, 0, weight.data(), nullptr, c.tokens, static_cast<int>(c.segment_ends.size()), c.segment_ends.data(),
                        static_cast<int>(c.subtrees.size()), c.subtrees.data(), c.bias ? device_bias.data() : nullptr, decoded.data(), out_stride, subtree_stride};
  product.bf16 = bf16;
  if (const char* problem = cuda::round_bf16(device_x.data(), x_stride, c.tokens, c.columns, bf16, nullptr)) return problem;
  if (const char* problem = cuda::linear_bf16_decode(product, nullptr)) return problem;
  product.out = decoded_by_rows.data();
  product.weight = by_rows.data();
  product.by_rows = true;
  if (const char* problem = cuda::linear_bf16_decode(product, nullptr)) return problem;
  product.out = prefilled.data();
  product.weight = weight.data();
  product.by_rows = false;
  if (const char* problem = cuda::linear_bf16_prefill(product, nullptr)) return problem;
  const Guarded<uint16_t> rounded_rows("rounded rows", static_cast<size_t>(c.tokens * c.columns));
  if (const char* problem = cuda::round_bf16_rows(device_x.data(), x_stride, c.tokens, c.columns, rounded_rows.data(), nullptr)) return problem;
  const std::string at = describe(c, Values::Random, simt::kSchedules[seed % simt::kScheduleCount], seed);
  if (const std::string problem = simt::finish(); !problem.empty()) return problem + "; " + at;
  if (std::memcmp(decoded.data(), decoded_by_rows.data(), out_count * 4) != 0) return "decode differs by the layout of weights; " + at;
  if (!decoded.intact() || !decoded_by_rows.intact() || !prefilled.intact()) return "bytes beside a buffer have changed; " + at;
  if (decoded.values() != prefilled.values() && std::memcmp(decoded.data(), prefilled.data(), out_count * 4) != 0) return "decode and prefill differ; " + at;

  for (int t = 0; t < c.tokens; t++)
    for (int64_t k = 0; k < c.columns; k++) {
      const float want = rounded_to_bf16(x[static_cast<size_t>(t * x_stride + k)]);
      if (bfloat_to_float(rounded_rows.data()[t * c.columns + k]) != want) return "round_bf16_rows rounds otherwise; " + at;
    }
  if (!rounded_rows.intact()) return "bytes beside rounded rows have changed; " + at;

  if (b.exact) {
    const KernelSet& reference = *reference_kernel_set();
    const Packed packed(reference, source.view, 1);
    std::vector<float> expected = simt::poisoned<float>(out_count);
    reference.linear({&packed.matrix, {x.data(), x_stride, c.tokens, c.columns, nullptr, ActivationType::Int8}, static_cast<int>(c.segment_ends.size()), c.segment_ends.data(),
                      static_cast<int>(c.subtrees.size()), c.subtrees.data(), c.bias ? bias.data() : nullptr, expected.data(), out_stride, subtree_stride},
                     {0, 1});
    const std::string what = simt::difference(expected, decoded);
    return what.empty() ? "" : what + at;
  }
  for (size_t s = 0; s < c.subtrees.size(); s++) {
    const int first = c.subtrees[s].first, last = first + c.subtrees[s].count - 1;
    const int from = first ? c.segment_ends[static_cast<size_t>(first) - 1] * 32 : 0, to = c.segment_ends[static_cast<size_t>(last)] * 32;
    for (int t = 0; t < c.tokens; t++)
      for (int64_t r = 0; r < c.rows; r++) {
        double sum = c.bias ? bias[static_cast<size_t>(r)] : 0.0, magnitude = 0.0;
        for (int k = from; k < to; k++) {
          uint16_t w;
          std::memcpy(&w, &source.bytes[static_cast<size_t>(r * c.columns + k) * 2], 2);
          const double term = static_cast<double>(bfloat_to_float(w)) * static_cast<double>(rounded_to_bf16(x[static_cast<size_t>(t * x_stride + k)]));
          sum += term;
          magnitude += std::fabs(term);
        }
        const double found = decoded.data()[static_cast<size_t>(s) * static_cast<size_t>(subtree_stride) + static_cast<size_t>(t * out_stride + r)];
        if (!(std::fabs(found - sum) <= 0x1p-18 * (magnitude + 1.0))) return "a sum is " + std::to_string(found) + ", in double precision " + std::to_string(sum) + "; " + at;
      }
  }
  return "";
}

std::string check_bf16(bool exact) {
  const Bf16Case cases[] = {{32, 1, 1, exact}, {96, 17, 7, exact}, {288, 50, 9, exact}, {576, 140, 33, exact}, {160, 130, 130, exact}, {1536, 20, 70, exact}};
  for (uint64_t seed = 0; seed < sizeof cases / sizeof cases[0]; seed++)
    if (const std::string what = compare_bf16(cases[seed], 700 + seed); !what.empty()) return what;
  return "";
}

constexpr Values kValues[] = {Values::Random, Values::Extreme, Values::Zero, Values::Tiny};

// Each shape with three of the batches, which ones hangs on the type.
std::string compare_shapes(Launcher launcher, TensorType type, const std::vector<int>& tokens, ActivationType activations = ActivationType::Int8) {
  const int64_t shapes[][3] = {{32, 1, 0}, {64, 17, 224}, {96, 33, 96}, {288, 50, 160}, {576, 64, 0}, {1536, 20, 0}};  // K, rows, skip
  uint64_t seed = 100 * static_cast<uint64_t>(type);
  size_t next = static_cast<size_t>(type);
  for (const auto& shape : shapes)
    for (int i = 0; i < 3; i++) {
      const int t = tokens[next++ % tokens.size()];
      Random random(++seed);
      Case c{shape[0], shape[1], shape[2], t, {}, {}, seed % 3 == 0};
      cut(random, c.columns / 32, &c);
      c.activations = activations;
      const std::string what = compare(launcher, type, kValues[seed % 4], c, seed);
      if (!what.empty()) return what;
    }
  return "";
}

// One shape in every order of threads and blocks.
std::string compare_orders(Launcher launcher, TensorType type, int tokens, ActivationType activations = ActivationType::Int8) {
  for (uint64_t seed = 0; seed < simt::kScheduleCount; seed++) {
    const Case c{416, 36, 0, tokens, {1, 2, 5, 6, 10, 11, 13}, {{0, 5}, {5, 2}}, true, activations};
    const std::string what = compare(launcher, type, Values::Random, c, 5 * 1000 + seed);
    if (!what.empty()) return what;
  }
  return "";
}

// So many strips that blocks have two of them for one token; their number is odd.
std::string compare_many_strips(TensorType type) {
  const Case c{64, 24581, 0, 1, {1, 2}, {{0, 1}, {1, 1}}, true};
  return compare(cuda::linear_decode, type, Values::Random, c, 900 + static_cast<uint64_t>(type));
}

// Each tree of 1 to 16 segments.
std::string compare_trees(Launcher launcher, TensorType type, int tokens) {
  for (int n = 1; n <= kSegmentsMax; n++) {
    Case c{512, 24, 0, tokens, {}, {{0, n}}, false};
    for (int i = 1; i <= n; i++) c.segment_ends.push_back(i == n ? 16 : i);
    const std::string what = compare(launcher, type, Values::Random, c, 300 + static_cast<uint64_t>(n));
    if (!what.empty()) return what;
  }
  return "";
}

std::string check_refusals() {
  const int ends[] = {1, 3}, down[] = {2, 2}, far[] = {1, 2};
  const Subtree all[] = {{0, 2}}, hole[] = {{1, 1}};
  const auto refused = [](const cuda::Product& p, const char* word, std::initializer_list<Launcher> launchers = {cuda::linear_decode, cuda::linear_prefill}) {
    for (const Launcher launcher : launchers) {
      const char* problem = launcher(p, nullptr);
      if (!problem || !std::strstr(problem, word)) return false;
    }
    return true;
  };
  const cuda::Product good{TensorType::Q4_0, 16, 96, 0, nullptr, nullptr, 1, 2, ends, 1, all, nullptr, nullptr, 16, 16};
  cuda::Product p = good;
  p.columns = 95;
  if (!refused(p, "columns")) return "columns";
  p = good;
  p.tokens = 0;
  if (!refused(p, "tokens")) return "tokens";
  p = good;
  p.segment_count = 17;
  if (!refused(p, "segments")) return "segments";
  p = good;
  p.segment_ends = down;
  if (!refused(p, "ascend")) return "descending segments";
  p = good;
  p.segment_ends = far;
  if (!refused(p, "end with the columns")) return "short segments";
  p = good;
  p.subtrees = hole;
  if (!refused(p, "cover")) return "a hole between subtrees";
  p = good;
  p.type = TensorType::BF16;
  if (!refused(p, "float weights")) return "float weights";
  p.x_stride = 6;
  if (!refused(p, "stride", {cuda::linear_float_decode, cuda::linear_float_prefill})) return "a stride of x that splits 16 bytes";
  p.x_stride = 96;
  p.x = reinterpret_cast<const float*>(8);
  if (!refused(p, "aligned", {cuda::linear_float_decode, cuda::linear_float_prefill})) return "x that is not aligned";
  if (!refused(good, "quantised weights", {cuda::linear_float_decode, cuda::linear_float_prefill})) return "quantised weights of a float product";
  p.type = TensorType::F16;
  if (!refused(p, "BF16", {cuda::linear_bf16_decode, cuda::linear_bf16_prefill})) return "F16 weights of a bf16 product";
  p.type = TensorType::BF16;
  p.by_rows = true;
  if (!refused(p, "strips", {cuda::linear_bf16_prefill})) return "weights by rows of the prefill product";
  if (!cuda::round_bf16_rows(nullptr, 0, 1, 48, nullptr, nullptr)) return "round_bf16_rows takes 48 columns";
  if (!cuda::round_bf16(nullptr, 0, 1, 48, nullptr, nullptr)) return "round_bf16 takes 48 columns";
  return cuda::quantize(nullptr, 0, 1, 33, nullptr, nullptr) ? "" : "quantize takes 33 columns";
}

}  // namespace

int main() {
  if (!simt::can_run()) return 0;
  simt::check_early_starts(true);
  flush_denormals();
  for (const TensorType type : kTypes) {
    const std::string name = std::string("cuda linear ") + shardmesh::name_of(type);
    const bool floats = is_float_type(type);
    const Launcher decode = floats ? cuda::linear_float_decode : cuda::linear_decode, prefill = floats ? cuda::linear_float_prefill : cuda::linear_prefill;
    simt::test_case(name + " - the decode product has the reference's bits for any shape, batch and segments", [&] { return compare_shapes(decode, type, {1, 2, 7, 8, 9, 17, 33, 70}); });
    simt::test_case(name + " - the decode product does not depend on the order of threads and blocks", [&] { return compare_orders(decode, type, 11); });
    simt::test_case(name + " - the prefill product has the reference's bits for any shape, batch and segments", [&] { return compare_shapes(prefill, type, {1, 31, 64, 90}); });
    simt::test_case(name + " - the prefill product does not depend on the order of threads and blocks", [&] { return compare_orders(prefill, type, 66); });
    if (floats) continue;
    simt::test_case(name + " - the decode product of one token has the reference's bits where a block has two strips", [&] { return compare_many_strips(type); });
    constexpr ActivationType kInt16 = ActivationType::Int16;
    simt::test_case(name + " - both products have the reference's bits with int16 activations, in any order", [&] {
      std::string what = compare_shapes(decode, type, {1, 7, 9, 33}, kInt16);
      if (what.empty()) what = compare_orders(decode, type, 3, kInt16);
      if (what.empty()) what = compare_shapes(prefill, type, {1, 31, 70}, kInt16);
      return what.empty() ? compare_orders(prefill, type, 12, kInt16) : what;
    });
  }
  simt::test_case("cuda linear - the decode products make every tree of 1 to 16 segments", [] {
    const std::string what = compare_trees(cuda::linear_decode, TensorType::Q4_1, 3);
    return what.empty() ? compare_trees(cuda::linear_float_decode, TensorType::F16, 3) : what;
  });
  simt::test_case("cuda linear - the prefill products make every tree of 1 to 16 segments", [] {
    const std::string what = compare_trees(cuda::linear_prefill, TensorType::Q4_1, 20);
    return what.empty() ? compare_trees(cuda::linear_float_prefill, TensorType::BF16, 20) : what;
  });
  simt::test_case("cuda linear bf16 - both products of tensor cores have the reference's bits where no sum rounds", [] { return check_bf16(true); });
  simt::test_case("cuda linear bf16 - both products of tensor cores give the same, as close to the true sums as fp32 is", [] { return check_bf16(false); });
  simt::test_case("cuda linear - refuses shapes by name before any launch", check_refusals);
  return simt::end_of_tests();
}
