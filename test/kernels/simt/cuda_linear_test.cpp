// The CUDA products on the emulated machine against the reference, bit for bit: quantise, decode product, prefill product, for every quantised format.
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
};

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

std::string describe(const Case& c, Values values, const simt::Schedule& schedule, uint64_t seed) {
  char text[200];
  std::snprintf(text, sizeof text, "K %lld, rows %lld, skip %lld, tokens %d, %zu segments, %zu subtrees, %s values, %s order, seed %llu", static_cast<long long>(c.columns),
                static_cast<long long>(c.rows), static_cast<long long>(c.skip), c.tokens, c.segment_ends.size(), c.subtrees.size(), shardmesh::name_of(values), simt::name_of(schedule),
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

  AlignedBytes activations(reference.activation_bytes(ActivationType::Int8, c.tokens, c.columns), 0);
  const Activations in{x.data(), x_stride, c.tokens, c.columns, activations.data(), ActivationType::Int8};
  std::vector<float> expected = simt::poisoned<float>(out_count);
  reference.quantize_activations(in, {0, 1});
  reference.linear({&packed.matrix, in, static_cast<int>(c.segment_ends.size()), c.segment_ends.data(), static_cast<int>(c.subtrees.size()), c.subtrees.data(),
                    c.bias ? bias.data() : nullptr, expected.data(), out_stride, subtree_stride},
                   {0, 1});

  PackedMatrix matrix{type, c.rows, c.columns, cuda::packed_bytes(source.view), nullptr, 0, 0};
  const Guarded<uint8_t> weight("weight", matrix.bytes), quantized("activations", cuda::activation_bytes(c.tokens, c.columns));
  matrix.data = weight.data();
  for (int part = 0; part < 2; part++) cuda::pack(source.view, &matrix, {part, 2});
  const Guarded<float> device_x("x", x), device_bias("bias", bias), out("out", out_count);
  auto* groups = reinterpret_cast<cuda::ActivationGroup*>(quantized.data());
  const std::string at = describe(c, values, schedule, seed);
  if (const char* problem = cuda::quantize(device_x.data(), x_stride, c.tokens, c.columns, groups, nullptr)) return std::string("quantize: ") + problem + "; " + at;
  const cuda::Product product{type, c.rows, c.columns, matrix.layout, weight.data(), groups, c.tokens, static_cast<int>(c.segment_ends.size()), c.segment_ends.data(),
                              static_cast<int>(c.subtrees.size()), c.subtrees.data(), c.bias ? device_bias.data() : nullptr, out.data(), out_stride, subtree_stride};
  if (const char* problem = launcher(product, nullptr)) return std::string(problem) + "; " + at;
  const std::string what = simt::difference(expected, out);
  return what.empty() ? "" : what + at;
}

constexpr Values kValues[] = {Values::Random, Values::Extreme, Values::Zero, Values::Tiny};

// Each shape with three of the batches, which ones hangs on the type.
std::string compare_shapes(Launcher launcher, TensorType type, const std::vector<int>& tokens) {
  const int64_t shapes[][3] = {{32, 1, 0}, {64, 17, 224}, {96, 33, 96}, {288, 50, 160}, {576, 64, 0}, {1536, 20, 0}};  // K, rows, skip
  uint64_t seed = 100 * static_cast<uint64_t>(type);
  size_t next = static_cast<size_t>(type);
  for (const auto& shape : shapes)
    for (int i = 0; i < 3; i++) {
      const int t = tokens[next++ % tokens.size()];
      Random random(++seed);
      Case c{shape[0], shape[1], shape[2], t, {}, {}, seed % 3 == 0};
      cut(random, c.columns / 32, &c);
      const std::string what = compare(launcher, type, kValues[seed % 4], c, seed);
      if (!what.empty()) return what;
    }
  return "";
}

// One shape in every order of threads and blocks.
std::string compare_orders(Launcher launcher, TensorType type, int tokens) {
  for (uint64_t seed = 0; seed < simt::kScheduleCount; seed++) {
    const Case c{416, 36, 0, tokens, {1, 2, 5, 6, 10, 11, 13}, {{0, 5}, {5, 2}}, true};
    const std::string what = compare(launcher, type, Values::Random, c, 5 * 1000 + seed);
    if (!what.empty()) return what;
  }
  return "";
}

// Each tree of 1 to 16 segments.
std::string compare_trees(Launcher launcher, int tokens) {
  for (int n = 1; n <= kSegmentsMax; n++) {
    Case c{512, 24, 0, tokens, {}, {{0, n}}, false};
    for (int i = 1; i <= n; i++) c.segment_ends.push_back(i == n ? 16 : i);
    const std::string what = compare(launcher, TensorType::Q4_1, Values::Random, c, 300 + static_cast<uint64_t>(n));
    if (!what.empty()) return what;
  }
  return "";
}

std::string check_refusals() {
  const int ends[] = {1, 3}, down[] = {2, 2}, far[] = {1, 2};
  const Subtree all[] = {{0, 2}}, hole[] = {{1, 1}};
  const auto refused = [](const cuda::Product& p, const char* word) {
    for (const Launcher launcher : {cuda::linear_decode, cuda::linear_prefill}) {
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
  return cuda::quantize(nullptr, 0, 1, 33, nullptr, nullptr) ? "" : "quantize takes 33 columns";
}

}  // namespace

int main() {
  if (!simt::can_run()) return 0;
  flush_denormals();
  for (const TensorType type : kTypes) {
    if (type == TensorType::F32 || type == TensorType::F16 || type == TensorType::BF16) continue;
    const std::string name = std::string("cuda linear ") + shardmesh::name_of(type);
    simt::test_case(name + " - the decode product has the reference's bits for any shape, batch and segments", [&] { return compare_shapes(cuda::linear_decode, type, {1, 2, 7, 8, 9, 17, 33, 70}); });
    simt::test_case(name + " - the decode product does not depend on the order of threads and blocks", [&] { return compare_orders(cuda::linear_decode, type, 11); });
    simt::test_case(name + " - the prefill product has the reference's bits for any shape, batch and segments", [&] { return compare_shapes(cuda::linear_prefill, type, {1, 31, 64, 90}); });
    simt::test_case(name + " - the prefill product does not depend on the order of threads and blocks", [&] { return compare_orders(cuda::linear_prefill, type, 66); });
  }
  simt::test_case("cuda linear - the decode product makes every tree of 1 to 16 segments", [] { return compare_trees(cuda::linear_decode, 3); });
  simt::test_case("cuda linear - the prefill product makes every tree of 1 to 16 segments", [] { return compare_trees(cuda::linear_prefill, 20); });
  simt::test_case("cuda linear - refuses shapes by name before any launch", check_refusals);
  return simt::end_of_tests();
}
