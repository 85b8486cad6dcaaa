// The other CUDA operations of a step on the emulated machine against the reference, bit for bit: norm, activation, trees, rope and K/V, attention, head.
//
//   cuda_step_test    runs all; prints "ok NAME" or "FAIL NAME: what", a line each
//
// Slots of the KV pool that nothing has written hold NaN scales and random bytes, and block tables end with ids that do not exist.
#if !defined(__CUDACC__)
#include "cuda_source.h"
#endif

#include "../../../kernels/cuda/attention_plan.h"
#include "../../../kernels/cuda/device.cuh"
#include "../../../kernels/cuda/operations.h"
#include "../../../kernels/cuda/weight_layout.h"
#include "../../../kernels/runner/sampler_loops.h"
#include "../../../kernels/runner/sampler_math.h"
#include "../test_matrix.h"
#include "kernel_cases.h"

using namespace shardmesh;
using simt::Guarded;

// Not in the unnamed namespace: nvcc's stub of a kernel cannot tell that one from the one of arithmetic.h.
__global__ void exp_kernel(const float* x, float* y, int count) {
  cuda::grid_dependency_wait();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = cuda::exp_fixed(x[i]);
}

namespace {

const KernelSet& reference() { return *reference_kernel_set(); }

std::string in_every_order(const std::function<std::string()>& run) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    simt::set_schedule(schedule);
    const std::string what = run();
    if (!what.empty()) return what + simt::name_of(schedule) + " order";
  }
  return "";
}

std::string failed(const char* problem) { return std::string(problem) + "; "; }

constexpr Values kValues[] = {Values::Random, Values::Extreme, Values::Zero, Values::Tiny};

// ---------------------------------------------------------------- arithmetic of device.cuh

std::string check_exp() {
  std::vector<float> values = {0.0f, -0.0f, -INFINITY, -87.0f, 88.0f};
  for (uint32_t bits = 0; bits < 0x43000000u; bits += 20011)  // both signs, to beyond both ends
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const uint32_t both = bits | sign;
      float x;
      std::memcpy(&x, &both, 4);
      values.push_back(x);
    }
  std::vector<float> expected;
  for (const float x : values) expected.push_back(shardmesh::exp_fixed(x));
  const Guarded<float> in("x", values), out("y", values.size());
  const int count = static_cast<int>(values.size());
  if (const char* problem = cuda::launch(exp_kernel, static_cast<unsigned>((count + 127) / 128), 128, 0, nullptr, in.data(), out.data(), count)) return failed(problem);
  return simt::difference(expected, out);
}

// ---------------------------------------------------------------- along a token

// The activations that a fused kernel wrote, as the quantise kernel makes them of the reference's fp32 result.
std::string same_groups(const std::vector<float>& y, int64_t stride, int64_t width, int tokens, ActivationType type, const Guarded<uint8_t>& found) {
  const Guarded<float> in("y", y);
  const Guarded<uint8_t> expected("expected", found.size());
  if (const char* problem = cuda::quantize(in.data(), stride, tokens, width, {reinterpret_cast<cuda::ActivationGroup*>(expected.data()), type}, nullptr)) return failed(problem);
  if (const std::string problem = simt::finish(); !problem.empty()) return problem;
  return simt::difference(expected.values(), found);
}

std::string compare_rms_norm(int64_t width, int tokens, Values values) {
  Random random(static_cast<uint64_t>(width) * 31 + static_cast<uint64_t>(tokens));
  const int64_t x_stride = width + 5, out_stride = width + 3;
  const std::vector<float> x = make_activations(static_cast<size_t>(x_stride * tokens), values, random), w = make_activations(static_cast<size_t>(width), Values::Random, random);
  std::vector<float> expected = simt::poisoned<float>(static_cast<size_t>(out_stride * tokens));
  reference().rms_norm(x.data(), x_stride, w.data(), 1e-5f, width, tokens, expected.data(), out_stride, {0, 1});
  const Guarded<float> dx("x", x), dw("w", w), out("out", expected.size());
  if (const char* problem = cuda::rms_norm(dx.data(), x_stride, dw.data(), 1e-5f, width, tokens, out.data(), out_stride, nullptr, nullptr)) return failed(problem);
  const std::string what = simt::difference(expected, out);
  if (!what.empty() || width % 32 != 0) return what;
  for (const ActivationType type : {ActivationType::Int8, ActivationType::Int16}) {
    const Guarded<uint8_t> groups("groups", cuda::activation_bytes(tokens, width, type));
    if (const char* problem = cuda::rms_norm(dx.data(), x_stride, dw.data(), 1e-5f, width, tokens, nullptr, 0, {reinterpret_cast<cuda::ActivationGroup*>(groups.data()), type}, nullptr))
      return failed(problem);
    if (const std::string other = same_groups(expected, out_stride, width, tokens, type, groups); !other.empty()) return other;
  }
  return "";
}

std::string check_rms_norm() {
  for (const int64_t width : {1, 31, 64, 129, 576, 896})
    for (const Values values : kValues) {
      const std::string what = compare_rms_norm(width, 1 + static_cast<int>(width % 4), values);
      if (!what.empty()) return what + "width " + std::to_string(width) + ", ";
    }
  return compare_rms_norm(96, 11, Values::Random);
}

std::string check_gated_activation() {
  for (const int activation : {0, 1})
    for (const int64_t width : {1, 96, 300}) {
      Random random(static_cast<uint64_t>(width + activation));
      const int tokens = 9;
      const int64_t stride = width + 2;
      std::vector<float> gate = make_activations(static_cast<size_t>(stride * tokens), Values::Random, random);
      const std::vector<float> up = make_activations(static_cast<size_t>(stride * tokens), Values::Random, random);
      for (size_t i = 0; i < gate.size(); i += 7) gate[i] *= 8.0f;  // to both ends of exp
      std::vector<float> expected = simt::poisoned<float>(static_cast<size_t>(stride * tokens));
      reference().gated_activation(gate.data(), stride, up.data(), stride, width, tokens, activation, expected.data(), stride, {0, 1});
      const Guarded<float> dg("gate", gate), du("up", up), out("out", expected.size());
      if (const char* problem = cuda::gated_activation(dg.data(), stride, du.data(), stride, width, tokens, activation, out.data(), stride, nullptr, nullptr)) return failed(problem);
      std::string what = simt::difference(expected, out);
      for (const ActivationType type : {ActivationType::Int8, ActivationType::Int16}) {
        if (!what.empty() || width % 32 != 0) break;
        const Guarded<uint8_t> groups("groups", cuda::activation_bytes(tokens, width, type));
        if (const char* problem =
                cuda::gated_activation(dg.data(), stride, du.data(), stride, width, tokens, activation, nullptr, 0, {reinterpret_cast<cuda::ActivationGroup*>(groups.data()), type},
                                       nullptr))
          return failed(problem);
        what = same_groups(expected, stride, width, tokens, type, groups);
      }
      if (!what.empty()) return what + "width " + std::to_string(width) + ", ";
    }
  return "";
}

// The maximal subtrees of [from, to) inside the tree over [lo, hi).
void subtrees(int lo, int hi, int from, int to, std::vector<int>* node_lo, std::vector<int>* node_hi) {
  if (from <= lo && hi <= to) {
    node_lo->push_back(lo);
    node_hi->push_back(hi);
  } else if (lo < to && from < hi) {
    const int middle = lo + tree_left(hi - lo);
    subtrees(lo, middle, from, to, node_lo, node_hi);
    subtrees(middle, hi, from, to, node_lo, node_hi);
  }
}

std::string check_finish_tree() {
  constexpr int64_t kWidth = 70, kTokens = 3, kStride = 75;
  for (int units = 1; units <= 16; units++)
    for (const int cut : {0, 1, units / 2, units}) {
      Random random(static_cast<uint64_t>(units * 17 + cut));
      std::vector<int> lo, hi;
      subtrees(0, units, 0, cut, &lo, &hi);
      subtrees(0, units, cut, units, &lo, &hi);
      const size_t n = lo.size();
      std::vector<std::unique_ptr<Guarded<float>>> device;
      std::vector<std::vector<float>> host;
      std::vector<const float*> pointers, device_pointers;
      for (size_t i = 0; i < n; i++) {
        host.push_back(make_activations(kStride * kTokens, Values::Random, random));
        device.push_back(std::make_unique<Guarded<float>>("node", host.back()));
        device_pointers.push_back(device.back()->data());
      }
      for (const auto& h : host) pointers.push_back(h.data());
      const std::vector<int64_t> strides(n, kStride);
      const std::vector<float> bias = make_activations(kWidth, Values::Random, random), before = make_activations(kStride * kTokens, Values::Random, random);
      std::vector<float> expected = before;
      const bool biased = units % 2;
      reference().finish_tree(units, static_cast<int>(n), lo.data(), hi.data(), pointers.data(), strides.data(), biased ? bias.data() : nullptr, expected.data(), kStride, kWidth, kTokens, {0, 1});
      const Guarded<float> residual("residual", before), device_bias("bias", bias);
      if (const char* problem = cuda::finish_tree(units, static_cast<int>(n), lo.data(), hi.data(), device_pointers.data(), strides.data(), biased ? device_bias.data() : nullptr, residual.data(),
                                                  kStride, kWidth, kTokens, nullptr))
        return failed(problem);
      const std::string what = simt::difference(expected, residual);
      if (!what.empty()) return what + std::to_string(units) + " units cut at " + std::to_string(cut) + ", ";
    }
  const int lo[] = {0, 2}, hi[] = {1, 3};
  const float* nodes[] = {nullptr, nullptr};
  const int64_t strides[] = {1, 1};
  return cuda::finish_tree(3, 2, lo, hi, nodes, strides, nullptr, nullptr, 1, 1, 1, nullptr) ? "" : "nodes with a hole are taken; ";
}

// ---------------------------------------------------------------- K/V and attention

struct Shape {
  KeyType key;
  int head_size, block_tokens, window;
  std::vector<int> kv_head;
  std::vector<std::pair<int, int>> sequences;  // tokens in the context; the last of them that are rows of the step
  ValueType value = ValueType::Int8;
};

struct Scene {
  Shape shape;
  KvLayout layout;
  std::vector<int32_t> positions, row_sequence, first_row{0}, block_offsets{0}, block_tables;
  StepRows rows;

  // `all`: every position is a row.
  Scene(const Shape& s, bool all, Random& random) : shape(s), layout(make_kv_layout(s.key, s.value, s.kv_head.back() + 1, s.head_size, s.block_tokens)) {
    std::vector<int32_t> ids;
    for (const auto& [context, count] : s.sequences) {
      for (int b = 0; b < (context + s.block_tokens - 1) / s.block_tokens; b++) ids.push_back(static_cast<int32_t>(ids.size()));
      for (int p = all ? 0 : context - count; p < context; p++) {
        positions.push_back(p);
        row_sequence.push_back(static_cast<int32_t>(first_row.size()) - 1);
      }
      first_row.push_back(static_cast<int32_t>(positions.size()));
    }
    block_count = ids.size();
    for (size_t i = ids.size(); i > 1; i--) std::swap(ids[i - 1], ids[random.below(static_cast<uint32_t>(i))]);
    size_t next = 0;
    for (const auto& [context, count] : s.sequences) {
      for (int b = 0; b < (context + s.block_tokens - 1) / s.block_tokens; b++) block_tables.push_back(ids[next++]);
      block_tables.push_back(0x7fffffff);
      block_offsets.push_back(static_cast<int32_t>(block_tables.size()));
    }
    rows = {static_cast<int>(positions.size()), positions.data(), row_sequence.data(), static_cast<int>(s.sequences.size()), first_row.data(), block_offsets.data(), block_tables.data()};
  }
  Scene(const Scene&) = delete;
  size_t block_count;

  std::vector<uint8_t> fresh_pool(Random& random) const {
    std::vector<uint8_t> pool(block_count * layout.block_bytes);
    for (uint8_t& b : pool) b = static_cast<uint8_t>(random.next() >> 56);
    for (size_t at = 0; at < pool.size(); at += layout.subblock_bytes)
      for (size_t i = 0; i < layout.scale_bytes; i += 4) {
        const float bad = i % 3 ? NAN : INFINITY;
        std::memcpy(&pool[at + layout.key_bytes + layout.value_bytes + i], &bad, 4);
      }
    return pool;
  }
};

struct DeviceScene {
  Guarded<int32_t> positions, row_sequence, block_offsets, block_tables;
  explicit DeviceScene(const Scene& s)
      : positions("positions", s.positions), row_sequence("row_sequence", s.row_sequence), block_offsets("block_offsets", s.block_offsets), block_tables("block_tables", s.block_tables) {}
  cuda::DeviceRows rows() const { return {static_cast<int>(positions.size()), positions.data(), row_sequence.data(), block_offsets.data(), block_tables.data()}; }
};

std::vector<float> angles(size_t count, Random& random) {
  std::vector<float> x(count);
  for (float& v : x) v = random.uniform();
  return x;
}

std::string compare_rope_store(const Shape& shape, int dimensions, bool half_style) {
  Random random(static_cast<uint64_t>(shape.head_size + dimensions));
  const Scene scene(shape, false, random);
  const DeviceScene device(scene);
  const int D = shape.head_size, q_heads = static_cast<int>(shape.kv_head.size()), context = 700;
  const int64_t q_stride = q_heads * D + 4, kv_stride = scene.layout.heads * D + 1;
  const auto count = [&](int64_t stride) { return static_cast<size_t>(stride * scene.rows.tokens); };
  const std::vector<float> cosine = angles(static_cast<size_t>(context * dimensions / 2), random), sine = angles(cosine.size(), random);
  const std::vector<float> q = make_activations(count(q_stride), Values::Random, random), k = make_activations(count(kv_stride), Values::Random, random);
  std::vector<float> v = make_activations(count(kv_stride), Values::Random, random);
  for (int d = 0; d < D; d++) v[static_cast<size_t>(d)] = 0.0f;  // a head of zeros
  const std::vector<uint8_t> pool = scene.fresh_pool(random);

  std::vector<float> expected_q = q, rotated_k = k;
  std::vector<uint8_t> expected_pool = pool;
  const RopeTable table{dimensions, half_style, cosine.data(), sine.data()};
  reference().rope(expected_q.data(), q_stride, q_heads, D, table, scene.rows, {0, 1});
  reference().rope(rotated_k.data(), kv_stride, scene.layout.heads, D, table, scene.rows, {0, 1});
  reference().store_kv(rotated_k.data(), kv_stride, v.data(), kv_stride, scene.layout, expected_pool.data(), scene.rows, {0, 1});

  const Guarded<float> dq("q", q), dk("k", k), dv("v", v), dc("cosine", cosine), ds("sine", sine);
  const Guarded<uint8_t> cache("cache", pool);
  if (const char* problem = cuda::rope_store_kv({dq.data(), q_stride, q_heads, dk.data(), kv_stride, dv.data(), kv_stride, {dimensions, half_style, dc.data(), ds.data()}, scene.layout, cache.data(),
                                                 device.rows(), {}},
                                                nullptr))
    return failed(problem);
  const std::string what = simt::difference(expected_q, dq);
  return what.empty() ? simt::difference(expected_pool, cache) : "q: " + what;
}

std::string check_rope_store() {
  const Shape shapes[] = {{KeyType::Int8, 64, 16, 0, {0, 0, 0}, {{20, 3}, {1, 1}, {33, 2}}},
                          {KeyType::F16, 64, 32, 0, {0, 0, 1}, {{40, 5}}},
                          {KeyType::F16, 96, 16, 0, {0, 1}, {{19, 3}, {7, 1}}, ValueType::F16},
                          {KeyType::Int8, 32, 32, 0, {0}, {{35, 4}}, ValueType::F16},
                          {KeyType::Int8, 128, 16, 0, {0, 1}, {{17, 4}}},
                          {KeyType::Int8, 256, 16, 0, {0}, {{16, 2}}}};
  for (const Shape& shape : shapes)
    for (const bool half_style : {false, true}) {
      const std::string what = compare_rope_store(shape, half_style ? shape.head_size : shape.head_size / 2, half_style);
      if (!what.empty()) return what + "head size " + std::to_string(shape.head_size) + ", ";
    }
  return "";
}

// limits and blocks as in plan_attention and attention; neither may change a bit.
std::string compare_attention(const Shape& shape, Values values, const cuda::SplitLimits& limits, int blocks) {
  Random random(static_cast<uint64_t>(shape.head_size * 7 + shape.window));
  Random same = random;
  const Scene whole(shape, true, random), scene(shape, false, same);  // one seed: the same block tables
  const int D = shape.head_size, heads = static_cast<int>(shape.kv_head.size());
  const int64_t kv_stride = scene.layout.heads * D, q_stride = heads * D + 4, out_stride = heads * D + 8;
  std::vector<uint8_t> pool = scene.fresh_pool(random);
  {
    const std::vector<float> k = make_activations(static_cast<size_t>(kv_stride * whole.rows.tokens), values, random);
    const std::vector<float> v = make_activations(k.size(), values, random);
    reference().store_kv(k.data(), kv_stride, v.data(), kv_stride, whole.layout, pool.data(), whole.rows, {0, 1});
  }
  const std::vector<float> q = make_activations(static_cast<size_t>(q_stride * scene.rows.tokens), Values::Random, random);
  std::vector<float> expected = simt::poisoned<float>(static_cast<size_t>(out_stride * scene.rows.tokens));
  std::vector<int32_t> kv_head(shape.kv_head.begin(), shape.kv_head.end());
  const float scale = 0.11f;
  reference().attention({q.data(), q_stride, expected.data(), out_stride, heads, kv_head.data(), scale, shape.window, &scene.layout, pool.data(), &scene.rows, nullptr}, {0, 1});

  const std::vector<cuda::HeadRun> head_runs = cuda::head_runs(heads, kv_head.data());
  cuda::AttentionPlan plan;
  const bool integer = shape.key == KeyType::Int8 && shape.value == ValueType::Int8;
  cuda::plan_attention(scene.rows, head_runs, shape.window, {limits.rows_max, limits.slots_max, limits.all, integer ? cuda::kWholePairsMax : cuda::kHalfPairsMax}, &plan);
  if (plan.work.size() > cuda::AttentionPlan::most_work(static_cast<size_t>(scene.rows.tokens), static_cast<size_t>(plan.first_slot.back()), head_runs.size()))
    return "the plan has more work than most_work() says; ";
  if (plan.first_slot.back() > limits.slots_max) return "the plan has more slots than there is room for; ";
  const DeviceScene device(scene);
  const Guarded<float> dq("q", q), out("out", expected.size()), partials("partials", static_cast<size_t>(plan.first_slot.back()) * static_cast<size_t>(heads * (D + 2)));
  const Guarded<uint8_t> cache("cache", pool);
  const Guarded<cuda::HeadRun> runs("runs", head_runs);
  const Guarded<cuda::AttentionWork> work("work", plan.work);
  const Guarded<int32_t> work_count("work_count", std::vector<int32_t>{static_cast<int32_t>(plan.work.size()), 0}), first_slot("first_slot", plan.first_slot);
  const cuda::AttentionStep step{dq.data(),      q_stride,    out.data(),  out_stride,        heads,           scale,            shape.window, scene.layout,
                                 cache.data(),   device.rows(), runs.data(), work.data(), work_count.data(), partials.data(), first_slot.data()};
  if (const char* problem = (integer ? cuda::attention : cuda::attention_f16)(step, blocks, nullptr)) return failed(problem);
  if (const char* problem = cuda::attention_join(step, nullptr)) return failed(problem);
  const std::string what = simt::difference(expected, out);
  return what.empty() ? simt::difference(pool, cache) : what;
}

const char* name_of(KeyType key) { return key == KeyType::F16 ? "f16" : "int8"; }

std::string check_attention(const cuda::SplitLimits& limits) {
  const std::vector<int> three = {0, 0, 0}, uneven = {0, 0, 1, 1, 1}, seven = {0, 0, 0, 0, 0, 0, 0}, two = {0, 1}, twenty(20, 0);
  const Shape shapes[] = {{KeyType::Int8, 64, 16, 0, three, {{100, 1}, {1, 1}, {257, 1}, {600, 2}}},
                          {KeyType::Int8, 64, 32, 0, three, {{90, 37}, {64, 64}}},
                          {KeyType::Int8, 32, 16, 70, uneven, {{300, 3}, {20, 1}, {70, 1}}},
                          {KeyType::Int8, 32, 64, 300, uneven, {{580, 30}}},
                          {KeyType::Int8, 128, 16, 0, seven, {{300, 5}}},
                          {KeyType::Int8, 256, 16, 0, two, {{290, 2}, {17, 1}}},
                          {KeyType::Int8, 96, 32, 100, two, {{270, 3}, {20, 2}}},
                          {KeyType::Int8, 32, 16, 0, twenty, {{40, 2}}},
                          {KeyType::F16, 64, 16, 0, three, {{100, 1}, {1, 1}, {257, 1}, {600, 2}}, ValueType::F16},
                          {KeyType::F16, 64, 32, 0, three, {{90, 37}, {64, 64}}, ValueType::Int8},
                          {KeyType::F16, 32, 16, 70, uneven, {{300, 3}, {20, 1}, {70, 1}}, ValueType::F16},
                          {KeyType::Int8, 64, 64, 300, uneven, {{580, 30}}, ValueType::F16},
                          {KeyType::F16, 128, 16, 0, seven, {{300, 5}}, ValueType::Int8},
                          {KeyType::F16, 128, 16, 0, two, {{330, 6}}, ValueType::F16},
                          {KeyType::Int8, 96, 16, 50, two, {{290, 2}, {17, 1}}, ValueType::F16},
                          {KeyType::F16, 96, 32, 0, two, {{100, 9}}, ValueType::Int8},
                          {KeyType::F16, 256, 16, 0, two, {{290, 2}, {17, 1}}, ValueType::F16},
                          {KeyType::Int8, 256, 16, 0, two, {{80, 2}}, ValueType::F16},
                          {KeyType::F16, 256, 16, 0, two, {{80, 2}}, ValueType::Int8},
                          {KeyType::F16, 32, 16, 0, twenty, {{40, 2}}, ValueType::Int8}};
  int blocks = 1;
  for (const Shape& shape : shapes)
    for (const Values values : {Values::Random, shape.head_size == 64 ? Values::Extreme : Values::Tiny}) {
      simt::set_schedule(simt::kSchedules[static_cast<size_t>(blocks) % simt::kScheduleCount]);
      const std::string what = compare_attention(shape, values, limits, blocks++);
      if (!what.empty())
        return what + "head size " + std::to_string(shape.head_size) + ", window " + std::to_string(shape.window) + ", " + shardmesh::name_of(values) + " values, K " + name_of(shape.key) + ", V " +
               (shape.value == ValueType::F16 ? "f16" : "int8");
    }
  return "";
}

// ---------------------------------------------------------------- rows

std::string compare_embed(TensorType type, int64_t columns, int64_t skip, Values values) {
  constexpr int64_t kRows = 37;
  constexpr int32_t kFirst = 1000;
  Random random(static_cast<uint64_t>(columns + skip) * 13 + static_cast<uint64_t>(type));
  const Source source(type, kRows, columns, skip, values, random);
  const Packed packed(reference(), source.view, 1);
  const std::vector<int32_t> tokens = {1000, 999, 1036, 1016, 1037, 1015, 0, 1036, 1001, -1};  // some of another rank
  std::vector<int32_t> given = tokens;
  given[2] = -2 - 4;  // what row 4 of the step before has found
  given[8] = -2;
  std::vector<cuda::Candidate> found(5, {1.0f, -1});
  found[4].token = tokens[2];
  found[0].token = tokens[8];
  const int64_t stride = columns + 5;
  std::vector<float> expected = simt::poisoned<float>(static_cast<size_t>(stride) * tokens.size());
  for (size_t t = 0; t < tokens.size(); t++)
    if (tokens[t] >= kFirst && tokens[t] < kFirst + kRows) reference().read_row(packed.matrix, tokens[t] - kFirst, &expected[t * static_cast<size_t>(stride)]);
  PackedMatrix matrix{type, kRows, columns, cuda::packed_bytes(source.view), nullptr, 0, 0};
  const Guarded<uint8_t> weight("weight", matrix.bytes);
  matrix.data = weight.data();
  cuda::pack(source.view, &matrix, {0, 1});
  const Guarded<int32_t> ids("tokens", given);
  const Guarded<cuda::Candidate> before("candidates", found);
  const Guarded<float> out("out", expected.size());
  if (const char* problem = cuda::embed(type, kRows, columns, matrix.layout, weight.data(), ids.data(), before.data(), nullptr, static_cast<int>(tokens.size()), kFirst, out.data(), stride, nullptr))
    return failed(problem);
  return simt::difference(expected, out);
}

std::string check_embed() {
  for (const TensorType type : kTypes) {
    for (const Values values : kValues)
      for (const auto& [columns, skip] : {std::pair<int64_t, int64_t>{288, 0}, {160, 224}}) {
        const std::string what = compare_embed(type, columns, skip, values);
        if (!what.empty()) return what + shardmesh::name_of(type) + ", " + shardmesh::name_of(values) + " values, ";
      }
  }
  return "";
}

std::string check_select_rows() {
  constexpr int kWidth = 300, kRows = 9;
  Random random(5);
  const std::vector<float> x = make_activations(kRows * (kWidth + 4), Values::Random, random);
  const std::vector<int32_t> from = {8, 0, 3, 3};
  std::vector<float> expected = simt::poisoned<float>(from.size() * (kWidth + 1));
  for (size_t r = 0; r < from.size(); r++) std::memcpy(&expected[r * (kWidth + 1)], &x[static_cast<size_t>(from[r]) * (kWidth + 4)], kWidth * 4);
  const Guarded<float> in("x", x), out("out", expected.size());
  const Guarded<int32_t> rows("from", from);
  if (const char* problem = cuda::select_rows(in.data(), kWidth + 4, rows.data(), static_cast<int>(from.size()), kWidth, out.data(), kWidth + 1, nullptr)) return failed(problem);
  return simt::difference(expected, out);
}

// Who looks at its input names the first bad row, whatever looked before found, and leaves no mark where all is finite.
std::string check_finite_checks() {
  constexpr int kWidth = 320, kRows = 20;
  constexpr uint32_t kMark = 7 << 16, kNothing = 0xffffffffu;
  for (const float bad : {0.0f, NAN, INFINITY, -INFINITY})
    for (const int at : {0, kWidth - 1}) {
      Random random(6);
      std::vector<float> x = make_activations(kRows * kWidth, Values::Random, random);
      for (const int row : {17, 6, 11})
        if (bad != 0.0f) x[static_cast<size_t>(row * kWidth + at)] = bad;
      const uint32_t expected = bad == 0.0f ? kNothing : kMark + 6;
      const Guarded<float> in("x", x);
      const Guarded<uint8_t> groups("groups", cuda::activation_bytes(kRows, kWidth));
      for (const bool quantize : {false, true}) {
        const Guarded<uint32_t> least("least", std::vector<uint32_t>{kNothing}), before("before", std::vector<uint32_t>{kMark - 1});
        for (uint32_t* found : {least.data(), before.data()}) {
          const char* problem = quantize ? cuda::quantize(in.data(), kWidth, kRows, kWidth, reinterpret_cast<cuda::ActivationGroup*>(groups.data()), nullptr, {found, kMark})
                                         : cuda::check_rows(in.data(), kWidth, kRows, kWidth, {found, kMark}, nullptr);
          if (problem) return failed(problem);
        }
        if (const std::string problem = simt::finish(); !problem.empty()) return problem;
        if (least.data()[0] != expected) return "the mark is " + std::to_string(least.data()[0]) + ", expected " + std::to_string(expected) + "; ";
        if (before.data()[0] != kMark - 1) return "an earlier mark is overwritten; ";
      }
    }
  return "";
}

// A norm or an activation that quantises what it makes names the row whose result is not finite, though what it read was.
std::string check_finite_results() {
  constexpr int kWidth = 160, kRows = 5;
  const std::vector<float> ones(kRows * kWidth, 1.0f);
  std::vector<float> large = ones, w(kWidth, 1.0f);
  for (int i = 0; i < kWidth; i++) large[3 * kWidth + static_cast<size_t>(i)] = i == 7 ? 1.0e18f : 0.0f;  // normed: 12.6
  w[7] = 3.0e38f;
  const Guarded<float> x("x", large), weight("w", w), gate("gate", std::vector<float>(kRows * kWidth, 2.0f));
  const Guarded<uint8_t> groups("groups", cuda::activation_bytes(kRows, kWidth));
  auto* out = reinterpret_cast<cuda::ActivationGroup*>(groups.data());
  std::vector<float> values = ones;
  values[2 * kWidth + 159] = 3.4e38f;  // times silu(2)
  const Guarded<float> up("up", values);
  for (const bool norm : {false, true}) {
    const Guarded<uint32_t> least("least", std::vector<uint32_t>{0xffffffffu});
    const cuda::FiniteCheck check{least.data(), 9 << 16};
    const char* problem = norm ? cuda::rms_norm(x.data(), kWidth, weight.data(), 1e-5f, kWidth, kRows, nullptr, 0, out, nullptr, check)
                               : cuda::gated_activation(gate.data(), kWidth, up.data(), kWidth, kWidth, kRows, 0, nullptr, 0, out, nullptr, check);
    if (problem) return failed(problem);
    if (const std::string wrong = simt::finish(); !wrong.empty()) return wrong;
    if (least.data()[0] != (9 << 16) + (norm ? 3u : 2u)) return std::string(norm ? "norm" : "activation") + ": the mark is " + std::to_string(least.data()[0]) + "; ";
  }
  return "";
}

// As above for k, which is looked at when it is rotated, and for v.
std::string check_finite_keys_and_values() {
  const Shape shape{KeyType::Int8, 64, 16, 0, {0, 0}, {{20, 4}}};
  for (const bool in_v : {false, true}) {
    Random random(8);
    const Scene scene(shape, false, random);
    const DeviceScene device(scene);
    std::vector<float> q(4 * 128, 1.0f), k(4 * 64, 2.0f), v(4 * 64, 3.0f);
    if (in_v) v[2 * 64 + 5] = INFINITY;
    else k[2 * 64 + 4] = k[2 * 64 + 5] = 3.0e38f;  // finite; the sum that their rotation makes of them is not
    const std::vector<float> ones(20 * 32, 1.0f);
    const Guarded<float> dq("q", q), dk("k", k), dv("v", v), cosine("cosine", ones), sine("sine", ones);
    const Guarded<uint8_t> cache("cache", scene.fresh_pool(random));
    const Guarded<uint32_t> least("least", std::vector<uint32_t>{0xffffffffu});
    if (const char* problem = cuda::rope_store_kv({dq.data(), 128, 2, dk.data(), 64, dv.data(), 64, {64, 0, cosine.data(), sine.data()}, scene.layout, cache.data(), device.rows(), {least.data(), 3 << 16}}, nullptr))
      return failed(problem);
    if (const std::string problem = simt::finish(); !problem.empty()) return problem;
    if (least.data()[0] != (3 << 16) + 2) return std::string(in_v ? "v" : "k") + ": the mark is " + std::to_string(least.data()[0]) + "; ";
  }
  return "";
}

// ---------------------------------------------------------------- head

std::string check_candidates() {
  constexpr int kRows = 3, kCount = 9500, kStride = 9501, kFirst = 2048;  // five parts, the last one not whole
  Random random(77);
  std::vector<float> logits(kRows * kStride);
  for (float& x : logits) x = static_cast<float>(static_cast<int>(random.below(64)) - 32) * 0.25f;  // many ties
  std::vector<cuda::HeadRow> settings;
  for (int r = 0; r < kRows; r++) {
    const NoiseKey key = noise_key(5, static_cast<uint32_t>(r), 1000);
    settings.push_back({r == 0 ? 0.0f : 0.6f * static_cast<float>(r), key.low, key.high});
  }
  const Guarded<float> x("logits", logits), maximum("maximum", kRows);
  const Guarded<cuda::HeadRow> rows("settings", settings);
  const Guarded<cuda::Candidate> best("best", kRows), part_candidates("candidates of parts", kRows * cuda::head_part_count(kCount));
  const Guarded<float> part_maxima("maxima of parts", kRows * cuda::head_part_count(kCount));
  const Guarded<uint32_t> arrivals("arrivals", std::vector<uint32_t>(kRows, 0));
  const cuda::HeadParts parts{part_candidates.data(), part_maxima.data(), arrivals.data()};
  if (const char* problem = cuda::head_candidates(x.data(), kStride, kRows, kCount, kFirst, rows.data(), best.data(), maximum.data(), parts, nullptr)) return failed(problem);
  if (const std::string problem = simt::finish(); !problem.empty()) return problem;
  for (int r = 0; r < kRows; r++) {
    const cuda::HeadRow& row = settings[static_cast<size_t>(r)];
    cuda::Candidate expected{-INFINITY, 0};
    float largest = -INFINITY;
    for (int i = 0; i < kCount; i++) {
      const float logit = logits[static_cast<size_t>(r * kStride + i)];
      const float value = row.temperature == 0.0f ? logit : logit / row.temperature + gumbel_noise(noise_bits({row.noise_low, row.noise_high}, static_cast<uint32_t>(kFirst + i)));
      if (value > expected.value) expected = {value, kFirst + i};
      largest = std::max(largest, logit);
    }
    if (best.data()[r].token != expected.token || best.data()[r].value != expected.value || maximum.data()[r] != largest)
      return "row " + std::to_string(r) + " picks token " + std::to_string(best.data()[r].token) + ", expected " + std::to_string(expected.token) + "; ";
  }
  // A value that is not finite, wherever it stands, leaves its row without a token, and no other row.
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    x.data()[kStride + 700] = bad;
    if (const char* problem = cuda::head_candidates(x.data(), kStride, kRows, kCount, kFirst, rows.data(), best.data(), maximum.data(), parts, nullptr)) return failed(problem);
    if (const std::string problem = simt::finish(); !problem.empty()) return problem;
    if (best.data()[1].token != -1 || best.data()[0].token < kFirst || best.data()[2].token < kFirst) return "a row that is not finite has a token, or another row has none; ";
  }
  return "";
}

std::string check_sums() {
  constexpr int kRows = 2, kCount = 2200, kStride = 2200, kSlices = 3;
  Random random(78);
  const std::vector<float> logits = make_activations(kRows * kStride, Values::Random, random);
  std::vector<float> maxima(kRows), expected = simt::poisoned<float>(kRows * (kSlices + 1));
  for (size_t r = 0; r < kRows; r++) {
    maxima[r] = sampler_loops().maximum(&logits[r * kStride], kCount);
    sampler_loops().sum_exp(&logits[r * kStride], maxima[r], kCount, &expected[r * (kSlices + 1)]);
  }
  const Guarded<float> x("logits", logits), maximum("maximum", maxima), sums("sums", expected.size());
  if (const char* problem = cuda::head_sums(x.data(), kStride, kRows, kCount, maximum.data(), sums.data(), kSlices + 1, nullptr)) return failed(problem);
  return simt::difference(expected, sums);
}

}  // namespace

int main() {
  if (!simt::can_run()) return 0;
  simt::check_early_starts(true);
  flush_denormals();
  simt::test_case("cuda arithmetic - exp has the reference's bits", check_exp);
  simt::test_case("cuda rms_norm - has the reference's bits, fp32 and quantised", [] { return in_every_order(check_rms_norm); });
  simt::test_case("cuda gated_activation - has the reference's bits at the ends of exp too, fp32 and quantised", [] { return in_every_order(check_gated_activation); });
  simt::test_case("cuda finish_tree - has the reference's bits for any cut of 1 to 16 units", [] { return in_every_order(check_finish_tree); });
  simt::test_case("cuda rope_store_kv - writes the reference's bytes and no others, both styles, K and V int8 and f16", [] { return in_every_order(check_rope_store); });
  simt::test_case("cuda attention - has the reference's bits where pieces fold their spans", [] { return check_attention({0, 1000}); });
  simt::test_case("cuda attention - has the reference's bits where a context is split into spans", [] { return check_attention({1000, 1000}); });
  simt::test_case("cuda attention - has the reference's bits where decode is split and prefill is not", [] { return check_attention({1, 1000}); });
  simt::test_case("cuda attention - has the reference's bits where there is room to split some contexts only", [] { return check_attention({1000, 7}); });
  simt::test_case("cuda attention - does not depend on the order of threads and blocks", [] {
    return in_every_order([] {
      const std::string what = compare_attention({KeyType::Int8, 64, 16, 0, {0, 0, 1}, {{270, 3}, {30, 1}}}, Values::Random, {2, 1000}, 3);
      return what.empty() ? compare_attention({KeyType::F16, 64, 16, 0, {0, 0, 1}, {{270, 3}, {30, 1}}, ValueType::F16}, Values::Random, {2, 1000}, 3) : what;
    });
  });
  simt::test_case("cuda embed - reads the reference's rows of every format, and leaves rows of other tokens alone", [] { return in_every_order(check_embed); });
  simt::test_case("cuda select_rows - copies the rows it is told", [] { return in_every_order(check_select_rows); });
  simt::test_case("cuda check_rows and quantize - name the first row that is not finite", [] { return in_every_order(check_finite_checks); });
  simt::test_case("cuda rms_norm and gated_activation - name the first row whose quantised result is not finite", [] { return in_every_order(check_finite_results); });
  simt::test_case("cuda rope_store_kv - names the row whose k, once rotated, or v is not finite", [] { return in_every_order(check_finite_keys_and_values); });
  simt::test_case("cuda head - picks the candidate that the sampler's noise picks, ties to the lower id, none where a logit is not finite", [] { return in_every_order(check_candidates); });
  simt::test_case("cuda head - sums have the sampler's bits", [] { return in_every_order(check_sums); });
  return simt::end_of_tests();
}
