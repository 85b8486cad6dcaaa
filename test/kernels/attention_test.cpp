// Attention and the elementwise operations of every CPU kernel set against the reference, bit for bit.
//
//   attention_test --list           names of all tests this machine can run, one a line
//   attention_test TEST [SET]       one test for every set of this machine, or one of them; prints `ok NAME` or `FAIL NAME: what` for each; exit status 0: passed
//   attention_test                  runs all
//   attention_test --bench [SET]    microseconds and GB/s of KV for the shapes of real models, one thread
//
// Slots that nothing has written hold NaN scales and random bytes, and block tables are followed by ids that do not exist: whoever reads them crashes or shows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernel_set.h"

using namespace shardmesh;

namespace {

using Sets = std::vector<const KernelSet*>;
const KernelSet* under_test = nullptr;  // null: the reference itself is wrong, and so nothing is shown of any set
std::map<const KernelSet*, std::string> first_failures;  // of the running test
int failures = 0;

#define FAIL(...)                                                              \
  do {                                                                         \
    char text[300];                                                            \
    std::snprintf(text, sizeof text, __VA_ARGS__);                             \
    if (failures++ < 10) std::fprintf(stderr, "  %s: %s\n", under_test ? under_test->name : "reference", text); \
    first_failures.emplace(under_test, text);                                  \
  } while (0)

// Does for one set after the other what `run` does for one.
std::function<void(const Sets&)> each(void (*run)(const KernelSet&)) {
  return [run](const Sets& sets) {
    for (const KernelSet* set : sets) {
      under_test = set;
      run(*set);
    }
  };
}

struct Random {
  uint64_t state;
  uint64_t next() {
    state += 0x9e3779b97f4a7c15u;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f; }  // [-1, 1)
  float normal() {
    float sum = 0;
    for (int i = 0; i < 6; i++) sum += uniform();
    return sum * 0.7071f;
  }
};

std::vector<float> normals(Random& random, size_t n, float scale = 1.0f) {
  std::vector<float> x(n);
  for (float& v : x) v = random.normal() * scale;
  return x;
}

bool same(const void* a, const void* b, size_t bytes) { return std::memcmp(a, b, bytes) == 0; }

// First float whose bits differ.
size_t first_difference(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (!same(&a[i], &b[i], 4)) return i;
  return a.size();
}

void expect_same(const std::vector<float>& expected, const std::vector<float>& actual, const std::string& what) {
  const size_t i = first_difference(expected, actual);
  if (i < expected.size())
    FAIL("%s: value %zu is %.9g, the reference has %.9g", what.c_str(), i, static_cast<double>(actual[i]), static_cast<double>(expected[i]));
}

void in_parts(int parts, const std::function<void(Part)>& run) {
  for (int i = 0; i < parts; i++) run(Part{i, parts});
}

// ---------------------------------------------------------------- a KV pool with sequences in it

struct SequenceShape {
  int context;  // tokens whose K and V exist when the step's rows are there
  int rows;     // the last of them are rows of the step
};

struct KvTypes {
  KeyType key;
  ValueType value;
  const char* name;
};
const KvTypes kInt8 = {KeyType::Int8, ValueType::Int8, "int8 K and V"}, kHalfKey = {KeyType::F16, ValueType::Int8, "f16 K, int8 V"},
              kHalf = {KeyType::F16, ValueType::F16, "f16 K and V"};
const KvTypes kKvTypes[] = {kInt8, kHalfKey, kHalf, {KeyType::Int8, ValueType::F16, "int8 K, f16 V"}};

struct Shape {
  KvTypes types = kInt8;
  int head_size = 64;
  std::vector<int> kv_head = {0, 0, 0};
  int kv_heads = 1;
  int block_tokens = 16;
  int window = 0;
  float scale = 0.125f;
  std::vector<SequenceShape> sequences = {{100, 1}};
};

enum class Fill { Normal, Extreme, Equal, Steep, Zero };

struct Scene {
  Shape shape;
  KvLayout layout;
  std::vector<uint8_t> pool;
  std::vector<int32_t> positions, row_sequence, first_row, block_offsets, block_tables;
  StepRows rows;
  std::vector<float> q;
  int64_t q_stride;
};

void garbage(Random& random, std::vector<uint8_t>& bytes, const KvLayout& layout) {
  for (size_t i = 0; i + 8 <= bytes.size(); i += 8) {
    const uint64_t x = random.next();
    std::memcpy(&bytes[i], &x, 8);
  }
  for (size_t at = 0; at + layout.subblock_bytes <= bytes.size(); at += layout.subblock_bytes) {
    float* scales = reinterpret_cast<float*>(&bytes[at + layout.key_bytes + layout.value_bytes]);
    for (size_t i = 0; i < layout.scale_bytes / 4; i++) scales[i] = i % 3 == 0 ? INFINITY : NAN;
    if (layout.key == KeyType::F16)
      for (size_t i = 0; i < layout.key_bytes / 2; i += 5) reinterpret_cast<uint16_t*>(&bytes[at])[i] = 0x7e00;
    if (layout.value == ValueType::F16)
      for (size_t i = 0; i < layout.value_bytes / 2; i += 5) reinterpret_cast<uint16_t*>(&bytes[at + layout.key_bytes])[i] = 0x7e00;
  }
}

float filled(Fill fill, Random& random, int position, int d, bool key) {
  switch (fill) {
    case Fill::Normal: return random.normal() * (position % 7 == 3 ? 9.0f : 1.0f);
    case Fill::Extreme: return (position + (key ? 0 : d)) % 2 ? 2.0f : -2.0f;  // quantises to 127 and -127
    case Fill::Equal: return key ? 1.0f : random.uniform();
    case Fill::Steep: return key ? 0.01f * static_cast<float>(position) + 0.001f * random.uniform() : random.normal();
    case Fill::Zero: return 0.0f;
  }
  return 0.0f;
}

// Rows of the step; `all`: every position of every sequence as a row (to write K and V).
void set_rows(Scene& scene, bool all) {
  scene.positions.clear();
  scene.row_sequence.clear();
  scene.first_row.assign(1, 0);
  for (size_t s = 0; s < scene.shape.sequences.size(); s++) {
    const SequenceShape& sequence = scene.shape.sequences[s];
    for (int p = all ? 0 : sequence.context - sequence.rows; p < sequence.context; p++) {
      scene.positions.push_back(p);
      scene.row_sequence.push_back(static_cast<int32_t>(s));
    }
    scene.first_row.push_back(static_cast<int32_t>(scene.positions.size()));
  }
  scene.rows = {static_cast<int>(scene.positions.size()), scene.positions.data(), scene.row_sequence.data(), static_cast<int>(scene.shape.sequences.size()),
                scene.first_row.data(), scene.block_offsets.data(), scene.block_tables.data()};
}

void fill_queries(Scene& scene, Random& random, Fill fill) {
  const Shape& shape = scene.shape;
  scene.q_stride = static_cast<int64_t>(shape.kv_head.size()) * shape.head_size + 16;
  scene.q = normals(random, static_cast<size_t>(scene.q_stride) * scene.positions.size());
  if (fill == Fill::Normal) return;
  for (size_t i = 0; i < scene.q.size(); i++) scene.q[i] = fill == Fill::Extreme ? (i % 5 == 0 ? -3.0f : 3.0f) : fill == Fill::Zero ? 0.0f : 1.0f;
}

Scene make_scene(const Shape& shape, uint64_t seed, Fill fill = Fill::Normal) {
  Random random{seed};
  Scene scene;
  scene.shape = shape;
  scene.layout = make_kv_layout(shape.types.key, shape.types.value, shape.kv_heads, shape.head_size, shape.block_tokens);
  int blocks = 0;
  for (const SequenceShape& s : shape.sequences) blocks += (s.context + shape.block_tokens - 1) / shape.block_tokens;
  std::vector<int32_t> ids;
  for (int i = 0; i < blocks + 2; i++) ids.push_back(i);
  for (size_t i = ids.size() - 1; i > 0; i--) std::swap(ids[i], ids[static_cast<size_t>(random.below(static_cast<int>(i) + 1))]);
  int next = 0;
  for (const SequenceShape& s : shape.sequences) {
    scene.block_offsets.push_back(static_cast<int32_t>(scene.block_tables.size()));
    for (int i = 0; i < (s.context + shape.block_tokens - 1) / shape.block_tokens; i++) scene.block_tables.push_back(ids[static_cast<size_t>(next++)]);
    for (int i = 0; i < 4; i++) scene.block_tables.push_back(0x40000000);  // no such block
  }
  scene.block_offsets.push_back(static_cast<int32_t>(scene.block_tables.size()));
  scene.pool.resize(ids.size() * scene.layout.block_bytes);
  garbage(random, scene.pool, scene.layout);

  set_rows(scene, true);
  const int width = shape.kv_heads * shape.head_size;
  std::vector<float> k(static_cast<size_t>(width) * scene.positions.size()), v(k.size());
  for (size_t t = 0; t < scene.positions.size(); t++)
    for (int i = 0; i < width; i++) {
      k[t * static_cast<size_t>(width) + static_cast<size_t>(i)] = filled(fill, random, scene.positions[t], i, true);
      v[t * static_cast<size_t>(width) + static_cast<size_t>(i)] = filled(fill, random, scene.positions[t], i, false);
    }
  reference_kernel_set()->store_kv(k.data(), width, v.data(), width, scene.layout, scene.pool.data(), scene.rows, Part{0, 1});
  set_rows(scene, false);
  fill_queries(scene, random, fill);
  return scene;
}

constexpr float kUntouched = 12345.0f;

std::vector<float> attend(const KernelSet& set, const Scene& scene, int parts) {
  const Shape& shape = scene.shape;
  const int heads = static_cast<int>(shape.kv_head.size());
  const int64_t stride = static_cast<int64_t>(heads) * shape.head_size + 8;
  std::vector<float> out(static_cast<size_t>(stride) * scene.positions.size(), kUntouched);
  const size_t scratch_bytes = set.attention_scratch_bytes(heads, shape.head_size, scene.rows.tokens);
  std::vector<uint8_t> scratch(scratch_bytes + 64);
  uint8_t* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  in_parts(parts, [&](Part part) {
    std::memset(aligned, 0xff, scratch_bytes);  // NaN
    const AttentionArguments arguments{scene.q.data(), scene.q_stride, out.data(), stride, heads, shape.kv_head.data(), shape.scale, shape.window,
                                       &scene.layout,  scene.pool.data(), &scene.rows, aligned};
    set.attention(arguments, part);
  });
  return out;
}

std::string describe(const Shape& s, int parts) {
  char text[256];
  std::snprintf(text, sizeof text, "%s, D %d, %zu heads over %d, context %d, rows %d, block %d, window %d, parts %d", s.types.name, s.head_size,
                s.kv_head.size(), s.kv_heads, s.sequences[0].context, s.sequences[0].rows, s.block_tokens, s.window, parts);
  return text;
}

// The reference's result is made once for all sets: it takes longer than theirs.
void compare_scene(const Sets& sets, const Scene& scene, std::vector<int> parts_list = {1, 2, 3}) {
  under_test = nullptr;
  const std::vector<float> expected = attend(*reference_kernel_set(), scene, 1);
  for (float x : expected)
    if (!std::isfinite(x)) {
      FAIL("%s: the reference's own result is not finite", describe(scene.shape, 1).c_str());
      return;
    }
  for (const KernelSet* set : sets) {
    under_test = set;
    for (int parts : parts_list) expect_same(expected, attend(*set, scene, parts), describe(scene.shape, parts));
  }
}

std::vector<int> grouped(int kv_heads, int group) {
  std::vector<int> map;
  for (int h = 0; h < kv_heads * group; h++) map.push_back(h / group);
  return map;
}

// ---------------------------------------------------------------- attention

const int kHeadSizes[] = {32, 64, 96, 128, 256};
const int kContexts[] = {1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600, 1030};
const int kBlockSizes[] = {16, 32, 64};
const int kWindows[] = {0, 1, 40, 64, 300};

// Every head size x group size x context; block size, window, rows, KV heads and parts go round with them.
void attention_shapes(const Sets& sets, const KvTypes& types) {
  int n = 0;
  for (int head_size : kHeadSizes)
    for (int group = 1; group <= 8; group++)
      for (int context : kContexts) {
        n++;
        Shape shape;
        shape.types = types;
        shape.head_size = head_size;
        shape.kv_heads = 1 + n % 2;
        shape.kv_head = grouped(shape.kv_heads, group);
        shape.block_tokens = kBlockSizes[n / 2 % 3];
        shape.window = kWindows[n % 5];
        shape.scale = 1.0f / std::sqrt(static_cast<float>(head_size));
        const int rows = context > 500 ? 1 + n % 3 : n % 3 == 0 ? 1 : 1 + n % 23;
        shape.sequences = {{context, std::min(rows, context)}};
        compare_scene(sets, make_scene(shape, static_cast<uint64_t>(n)), {1 + n % 3});
      }
}

void attention_block_sizes(const Sets& sets) {
  for (int block_tokens : {16, 32, 48, 64, 128})
    for (int window : kWindows) {
      Shape shape;
      shape.block_tokens = block_tokens;
      shape.window = window;
      shape.kv_heads = 2;
      shape.kv_head = grouped(2, 3);
      shape.sequences = {{333, 30}, {1, 1}, {70, 70}, {290, 1}};
      compare_scene(sets, make_scene(shape, static_cast<uint64_t>(block_tokens * 1000 + window)), {1, 2, 3});
    }
}

void attention_head_maps(const Sets& sets) {
  const std::vector<std::vector<int>> maps = {{0, 0, 0, 1, 1, 2}, {1, 1, 2, 2, 2, 2, 2}, {2}, {0, 1, 2}, grouped(1, 40), {0, 2, 2}};
  for (const std::vector<int>& map : maps)
    for (const KvTypes& types : kKvTypes) {
      Shape shape;
      shape.types = types;
      shape.kv_heads = 3;
      shape.kv_head = map;
      shape.sequences = {{130, 9}, {300, 2}};
      compare_scene(sets, make_scene(shape, map.size()), {1, 2, 3, 5, 64});
    }
}

// Parts go round, each of them with every fill, scale and size of head: that rows fall to their parts is shown above.
void attention_extremes(const Sets& sets) {
  int n = 0;
  for (const KvTypes& types : kKvTypes)
    for (Fill fill : {Fill::Extreme, Fill::Equal, Fill::Steep, Fill::Zero})
      for (float scale : {0.125f, 30.0f, 1e-6f})
        for (int head_size : {32, 128, 256}) {
          Shape shape;
          shape.types = types;
          shape.head_size = head_size;
          shape.scale = scale;
          shape.kv_head = grouped(1, 5);
          shape.sequences = {{700, 4}, {64, 64}, {513, 1}};
          compare_scene(sets, make_scene(shape, 7, fill), {1 + (n + n / 3 + n / 9) % 3});
          n++;
        }
}

// Scores so far apart that a later step's weights fall below what can be quantised (such a step leaves o as it is, a negative zero included), or that a
// rescale flushes o to zero.
void attention_vanishing_weights(const Sets& sets) {
  struct Case {
    float slope;      // of the scores, per position
    float odd_scale;  // value scales in every other step; 1e-29 in the rest
  };
  for (const Case& c : {Case{-0.1f, 1e-29f}, Case{0.1f, 1e-29f}, Case{1.5f, 1e-31f}, Case{-1.5f, 1e-31f}}) {
    Shape shape;
    shape.kv_head = grouped(1, 3);
    shape.sequences = {{600, 20}};
    Scene scene = make_scene(shape, 11, Fill::Equal);
    // All K are 127 and q is 1, so a score is key scale * 127 * 127 * 64 * (0.125 / 127).
    for (int position = 0; position < 600; position++) {
      const size_t block = static_cast<size_t>(scene.block_tables[static_cast<size_t>(position / 16)]), column = static_cast<size_t>(position % 16);
      float* scales = reinterpret_cast<float*>(&scene.pool[block * scene.layout.block_bytes + scene.layout.key_bytes + scene.layout.value_bytes]);
      scales[column] = c.slope * static_cast<float>(position) / (127 * 64 * 0.125f);
      scales[16 + column] = position / 64 % 2 ? c.odd_scale : 1e-29f;
    }
    compare_scene(sets, scene);
  }
}

// The same row alone, in chunks, in one piece, and beside other sequences.
void attention_chunks(const KernelSet& set) {
  for (const KvTypes& types : kKvTypes)
    for (int window : {0, 50}) {
      Shape shape;
      shape.types = types;
      shape.window = window;
      shape.kv_heads = 2;
      shape.kv_head = grouped(2, 3);
      shape.sequences = {{300, 300}, {77, 5}};
      const Scene whole = make_scene(shape, 21);
      const std::vector<float> expected = attend(set, whole, 1);
      const size_t stride = expected.size() / whole.positions.size();
      for (int chunk : {1, 7, 64, 129})
        for (int from = 0; from < 300; from += chunk) {
          Scene part = whole;
          const int rows = std::min(chunk, 300 - from);
          part.shape.sequences = {{from + rows, rows}};
          set_rows(part, false);
          part.q.assign(whole.q.begin() + from * whole.q_stride, whole.q.begin() + (from + rows) * whole.q_stride);
          const std::vector<float> actual = attend(set, part, 1 + chunk % 3);
          if (!same(actual.data(), expected.data() + static_cast<size_t>(from) * stride, static_cast<size_t>(rows) * stride * 4))
            FAIL("rows %d..%d in chunks of %d, window %d: bits differ from those of the whole prompt", from, from + rows - 1, chunk, window);
        }
    }
}

// What lies in slots that a row may not see must not matter, NaN included.
void attention_masked(const KernelSet& set) {
  for (const KvTypes& types : kKvTypes)
    for (int window : {0, 20}) {
      Shape shape;
      shape.types = types;
      shape.block_tokens = 32;
      shape.window = window;
      shape.sequences = {{85, 6}, {3, 1}};
      const Scene clean = make_scene(shape, 31);
      Scene dirty = clean;
      Random random{99};
      // Everything but the written slots gets other garbage: take the written bytes back from a second pool with the same K and V.
      const std::vector<uint8_t> before = dirty.pool;
      garbage(random, dirty.pool, dirty.layout);
      for (size_t s = 0; s < shape.sequences.size(); s++)
        for (int p = 0; p < shape.sequences[s].context; p++) {
          const KvLayout& l = dirty.layout;
          const size_t block = static_cast<size_t>(dirty.block_tables[static_cast<size_t>(dirty.block_offsets[s] + p / 32)]);
          const size_t base = block * l.block_bytes + static_cast<size_t>(p % 32 / 16) * l.subblock_bytes, column = static_cast<size_t>(p % 16), D = static_cast<size_t>(l.head_size);
          const auto keep = [&](size_t at, size_t bytes) { std::memcpy(&dirty.pool[base + at], &before[base + at], bytes); };
          if (types.key == KeyType::Int8)
            for (size_t d = 0; d < D; d += 4) keep(d * 16 + column * 4, 4);
          else
            for (size_t d = 0; d < D; d++) keep(d * 32 + column * 2, 2);
          if (types.value == ValueType::Int8)
            for (size_t d = 0; d < D; d++) keep(l.key_bytes + column / 4 * D * 4 + d * 4 + column % 4, 1);
          else
            keep(l.key_bytes + column * D * 2, D * 2);
          for (size_t at = l.key_bytes + l.value_bytes; at < l.subblock_bytes; at += 64) keep(at + column * 4, 4);
        }
      if (before == dirty.pool) FAIL("the second pool is no different from the first");
      const std::vector<float> expected = attend(*reference_kernel_set(), clean, 1);
      expect_same(expected, attend(set, dirty, 2), describe(shape, 2) + ", other garbage");
    }
}

// ---------------------------------------------------------------- store_kv

void store_kv_matches(const Sets& sets) {
  for (const KvTypes& types : kKvTypes)
    for (int head_size : kHeadSizes)
      for (int block_tokens : kBlockSizes) {
        Shape shape;
        shape.types = types;
        shape.head_size = head_size;
        shape.block_tokens = block_tokens;
        shape.kv_heads = 3;
        shape.sequences = {{50, 33}, {1, 1}, {130, 2}};
        Scene scene = make_scene(shape, static_cast<uint64_t>(head_size + block_tokens));
        Random random{5};
        const int64_t stride = 3 * head_size + 4;
        std::vector<float> k = normals(random, static_cast<size_t>(stride) * scene.positions.size()), v = normals(random, k.size(), 20.0f);
        for (int d = 0; d < head_size; d++) {
          k[static_cast<size_t>(d)] = 0.0f;                                          // a head of zeros
          v[static_cast<size_t>(d)] = 0x1p-101f;                                     // counts as zero
          k[static_cast<size_t>(stride + d)] = d % 2 ? 1e30f : -1e30f;               // overflows a half
          v[static_cast<size_t>(stride + d)] = 0x1p-100f * static_cast<float>(d % 3 - 1);  // just quantisable
          k[static_cast<size_t>(2 * stride + d)] = 6e-8f * static_cast<float>(d);    // subnormal halves
          v[static_cast<size_t>(2 * stride + d)] = d == 5 ? -127.0f : static_cast<float>(d % 4) + 0.5f;  // ties
        }
        std::vector<uint8_t> expected = scene.pool;
        under_test = nullptr;
        reference_kernel_set()->store_kv(k.data(), stride, v.data(), stride, scene.layout, expected.data(), scene.rows, Part{0, 1});
        if (expected == scene.pool) FAIL("store_kv wrote nothing");
        for (const KernelSet* set : sets)
          for (int parts : {1, 2, 3}) {
            under_test = set;
            std::vector<uint8_t> actual = scene.pool;
            in_parts(parts, [&](Part part) { set->store_kv(k.data(), stride, v.data(), stride, scene.layout, actual.data(), scene.rows, part); });
            if (actual == expected) continue;
            const auto at = std::mismatch(actual.begin(), actual.end(), expected.begin()).first - actual.begin();
            FAIL("store_kv %s, D %d, block %d, parts %d: byte %td (%td of its subblock) is %d, the reference has %d", types.name, head_size,
                 block_tokens, parts, at, at % static_cast<ptrdiff_t>(scene.layout.subblock_bytes), actual[static_cast<size_t>(at)], expected[static_cast<size_t>(at)]);
          }
      }
}

// ---------------------------------------------------------------- elementwise

void rms_norm_matches(const KernelSet& set) {
  Random random{41};
  for (int64_t width : {1, 2, 15, 16, 17, 32, 100, 127, 128, 129, 144, 255, 576, 960, 1000, 4096})
    for (int tokens : {1, 2, 5})
      for (float scale : {1.0f, 1e-18f, 1e12f}) {
        const int64_t stride = width + 3;
        const std::vector<float> x = normals(random, static_cast<size_t>(stride * tokens), scale), w = normals(random, static_cast<size_t>(width));
        std::vector<float> expected(x.size(), kUntouched);
        reference_kernel_set()->rms_norm(x.data(), stride, w.data(), 1e-5f, width, tokens, expected.data(), stride, Part{0, 1});
        for (int parts : {1, 2, 3}) {
          std::vector<float> actual(x.size(), kUntouched);
          in_parts(parts, [&](Part part) { set.rms_norm(x.data(), stride, w.data(), 1e-5f, width, tokens, actual.data(), stride, part); });
          expect_same(expected, actual, "rms_norm, width " + std::to_string(width) + ", tokens " + std::to_string(tokens));
        }
        std::vector<float> in_place = x, expected_in_place = x;
        reference_kernel_set()->rms_norm(x.data(), stride, w.data(), 1e-5f, width, tokens, expected_in_place.data(), stride, Part{0, 1});
        set.rms_norm(in_place.data(), stride, w.data(), 1e-5f, width, tokens, in_place.data(), stride, Part{0, 1});
        expect_same(expected_in_place, in_place, "rms_norm in place, width " + std::to_string(width));
      }
}

void rope_matches(const KernelSet& set) {
  Random random{43};
  for (int style : {0, 1})
    for (int dimensions : {2, 20, 32, 40, 64, 96, 128, 256})
      for (int head_size : {dimensions, dimensions + 32}) {
        const int heads = 3, tokens = 7;
        const std::vector<int32_t> positions = {4, 5, 6, 0, 90, 91, 99}, sequence = {0, 0, 0, 1, 2, 2, 3}, first = {0, 3, 4, 6, 7}, offsets = {0, 0, 0, 0, 0};
        const StepRows rows{tokens, positions.data(), sequence.data(), 4, first.data(), offsets.data(), nullptr};
        const std::vector<float> cosine = normals(random, static_cast<size_t>(dimensions / 2) * 100), sine = normals(random, cosine.size());
        const RopeTable table{dimensions, style, cosine.data(), sine.data()};
        const int64_t stride = heads * head_size + 5;
        const std::vector<float> x = normals(random, static_cast<size_t>(stride) * tokens);
        std::vector<float> expected = x;
        reference_kernel_set()->rope(expected.data(), stride, heads, head_size, table, rows, Part{0, 1});
        if (expected == x) FAIL("rope changed nothing");
        for (int parts : {1, 2, 3}) {
          std::vector<float> actual = x;
          in_parts(parts, [&](Part part) { set.rope(actual.data(), stride, heads, head_size, table, rows, part); });
          expect_same(expected, actual, "rope, style " + std::to_string(style) + ", dimensions " + std::to_string(dimensions) + ", head size " + std::to_string(head_size));
        }
      }
}

void gated_activation_matches(const KernelSet& set) {
  Random random{47};
  const float special[] = {0.0f,  -0.0f, 1e-30f, -1e-30f, 86.99999f, 87.0f,  87.00001f, 88.0f,   88.00001f, 89.0f,   -86.99999f, -87.0f, -88.0f, -100.0f,
                           200.f, -200.f, 1e19f,  -1e19f,  1e38f,     -1e38f, 0.5f,      -0.693f, 1.0f,      -10.0f, 10.0f,      -4.5f,  5.4f,   0x1p-126f};
  for (int activation : {0, 1})
    for (int64_t width : {1, 16, 28, 63, 64, 65, 129, 1536, 4000})
      for (int tokens : {1, 3}) {
        const int64_t gate_stride = width + 2, up_stride = width + 7, out_stride = width + 1;
        std::vector<float> gate = normals(random, static_cast<size_t>(gate_stride * tokens), 20.0f);
        for (size_t i = 0; i < gate.size(); i += 3) gate[i] = random.normal();
        for (size_t i = 0; i < std::size(special) && i < gate.size(); i++) gate[i] = special[i];
        const std::vector<float> up = normals(random, static_cast<size_t>(up_stride * tokens));
        std::vector<float> expected(static_cast<size_t>(out_stride * tokens), kUntouched);
        reference_kernel_set()->gated_activation(gate.data(), gate_stride, up.data(), up_stride, width, tokens, activation, expected.data(), out_stride, Part{0, 1});
        for (int parts : {1, 2, 3, 9}) {
          std::vector<float> actual(expected.size(), kUntouched);
          in_parts(parts, [&](Part part) {
            set.gated_activation(gate.data(), gate_stride, up.data(), up_stride, width, tokens, activation, actual.data(), out_stride, part);
          });
          expect_same(expected, actual, std::string(activation ? "gelu" : "silu") + ", width " + std::to_string(width));
        }
      }
}

// Maximal subtrees of tree(units) inside [from, to).
void maximal_subtrees(int lo, int hi, int from, int to, std::vector<Subtree>& out) {
  if (lo >= to || hi <= from) return;
  if (from <= lo && hi <= to) {
    out.push_back({lo, hi - lo});
    return;
  }
  const int middle = lo + (hi - lo + 1) / 2;
  maximal_subtrees(lo, middle, from, to, out);
  maximal_subtrees(middle, hi, from, to, out);
}

void finish_tree_matches(const KernelSet& set) {
  Random random{53};
  for (int units = 1; units <= kSegmentsMax; units++)
    for (int ranks = 1; ranks <= std::min(units, 5); ranks++)
      for (int64_t width : {1, 31, 64, 130, 576}) {
        std::vector<int> border = {0, units};
        while (static_cast<int>(border.size()) <= ranks) {
          const int cut = 1 + random.below(std::max(units - 1, 1));
          if (std::find(border.begin(), border.end(), cut) == border.end()) border.push_back(cut);
        }
        std::sort(border.begin(), border.end());
        std::vector<Subtree> trees;
        for (int r = 0; r < ranks; r++) maximal_subtrees(0, units, border[static_cast<size_t>(r)], border[static_cast<size_t>(r) + 1], trees);
        const int tokens = 1 + random.below(3);
        std::vector<int> lo, hi;
        std::vector<std::vector<float>> data;
        std::vector<const float*> nodes;
        std::vector<int64_t> strides;
        for (const Subtree& tree : trees) {
          lo.push_back(tree.first);
          hi.push_back(tree.first + tree.count);
          strides.push_back(width + random.below(9));
          data.push_back(normals(random, static_cast<size_t>(strides.back() * tokens), tree.first % 2 ? 1e4f : 1.0f));
        }
        for (const auto& d : data) nodes.push_back(d.data());
        const std::vector<float> bias = normals(random, static_cast<size_t>(width)), residual = normals(random, static_cast<size_t>((width + 5) * tokens));
        for (const float* b : {bias.data(), static_cast<const float*>(nullptr)}) {
          std::vector<float> expected = residual;
          const int count = static_cast<int>(nodes.size());
          reference_kernel_set()->finish_tree(units, count, lo.data(), hi.data(), nodes.data(), strides.data(), b, expected.data(), width + 5, width, tokens, Part{0, 1});
          for (int parts : {1, 2, 3}) {
            std::vector<float> actual = residual;
            in_parts(parts, [&](Part part) {
              set.finish_tree(units, count, lo.data(), hi.data(), nodes.data(), strides.data(), b, actual.data(), width + 5, width, tokens, part);
            });
            expect_same(expected, actual, "finish_tree, units " + std::to_string(units) + ", nodes " + std::to_string(count) + ", width " + std::to_string(width));
          }
        }
      }
}

void all_finite_matches(const KernelSet& set) {
  Random random{59};
  for (int64_t count : {0, 1, 15, 16, 17, 31, 32, 33, 100}) {
    std::vector<float> x = normals(random, static_cast<size_t>(count) + 1);
    x[static_cast<size_t>(count)] = NAN;  // behind the end
    for (int64_t i = 0; i < count; i++) x[static_cast<size_t>(i)] = i % 3 == 0 ? 3.4e38f : i % 3 == 1 ? -3.4e38f : 0x1p-140f;
    if (!set.all_finite(x.data(), count)) FAIL("all_finite: %d finite values are said not to be", static_cast<int>(count));
    for (int64_t i = 0; i < count; i++)
      for (float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
        const float kept = x[static_cast<size_t>(i)];
        x[static_cast<size_t>(i)] = bad;
        if (set.all_finite(x.data(), count)) FAIL("all_finite: missed value %d of %d", static_cast<int>(i), static_cast<int>(count));
        x[static_cast<size_t>(i)] = kept;
      }
  }
}

// ---------------------------------------------------------------- benchmark

// Of this thread alone, so that other programs on the machine count less.
double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double best_seconds(const std::function<void()>& run) {
  double best = 1e9;
  for (int i = 0; i < 9; i++) {
    const double start = cpu_seconds();
    run();
    best = std::min(best, cpu_seconds() - start);
  }
  return best;
}

void bench(const KernelSet& set) {
  struct BenchShape {
    int head_size, group, kv_heads;
  };
  const BenchShape shapes[] = {{64, 3, 3}, {128, 6, 2}, {128, 4, 8}, {64, 7, 2}, {64, 3, 1}, {128, 4, 1}};
  std::printf("%s, one thread, best of 9, block 16, random block order\n", set.name);
  for (const KvTypes& types : kKvTypes)
    for (const BenchShape& b : shapes)
      for (int batch : {1, 4})
        for (int context : {128, 512, 2048, 8192}) {
          if (batch > 1 && context > 512) continue;
          Shape shape;
          shape.types = types;
          shape.head_size = b.head_size;
          shape.kv_heads = b.kv_heads;
          shape.kv_head = grouped(b.kv_heads, b.group);
          shape.sequences.assign(static_cast<size_t>(batch), {context, 1});
          const Scene scene = make_scene(shape, 1);
          const double seconds = best_seconds([&] { attend(set, scene, 1); });
          const double bytes = static_cast<double>(scene.layout.subblock_bytes) / 16 * b.kv_heads * context * batch;
          std::printf("decode  %-13s D %3d G %d HK %d B %d ctx %5d  %9.1f us  %6.2f GB/s\n", types.name, b.head_size, b.group, b.kv_heads, batch,
                      context, seconds * 1e6, bytes / seconds / 1e9);
        }
  for (const BenchShape& b : shapes)
    for (int tokens : {128, 512, 2048}) {
      Shape shape;
      shape.head_size = b.head_size;
      shape.kv_heads = b.kv_heads;
      shape.kv_head = grouped(b.kv_heads, b.group);
      shape.sequences = {{tokens, tokens}};
      const Scene scene = make_scene(shape, 1);
      const double seconds = best_seconds([&] { attend(set, scene, 1); });
      const double operations = 2.0 * tokens * tokens * b.head_size * b.group * b.kv_heads;
      std::printf("prefill int8 K  D %3d G %d HK %d T %5d  %10.1f us  %6.1f Gop/s\n", b.head_size, b.group, b.kv_heads, tokens, seconds * 1e6, operations / seconds / 1e9);
    }
}

// ---------------------------------------------------------------- names

struct Test {
  const char* name;  // after "operation set - "
  const char* operation;
  std::function<void(const Sets&)> run;
};

const std::vector<Test>& tests() {
  static const std::vector<Test> all = {
      {"matches the reference for every head size, group size and context with int8 K", "attention", [](const Sets& s) { attention_shapes(s, kInt8); }},
      {"matches the reference for every head size, group size and context with f16 K", "attention", [](const Sets& s) { attention_shapes(s, kHalfKey); }},
      {"matches the reference for every head size, group size and context with f16 K and V", "attention", [](const Sets& s) { attention_shapes(s, kHalf); }},
      {"matches the reference for several sequences, block sizes, windows and parts", "attention", attention_block_sizes},
      {"matches the reference when query heads lie unevenly over KV heads", "attention", attention_head_maps},
      {"matches the reference on extreme, equal, steep and zero K and V", "attention", attention_extremes},
      {"matches the reference when weights vanish", "attention", attention_vanishing_weights},
      {"gives a row the same bits in any chunk", "attention", each(attention_chunks)},
      {"never lets a masked or unwritten slot matter", "attention", each(attention_masked)},
      {"writes the same bytes as the reference and no others", "store_kv", store_kv_matches},
      {"matches the reference", "rms_norm", each(rms_norm_matches)},
      {"matches the reference in both styles", "rope", each(rope_matches)},
      {"matches the reference at the ends of exp too", "gated_activation", each(gated_activation_matches)},
      {"matches the reference for any cut of 1 to 16 units", "finish_tree", each(finish_tree_matches)},
      {"finds a bad value at any place", "all_finite", each(all_finite_matches)},
  };
  return all;
}

std::string full_name(const Test& test, const KernelSet& set) { return std::string(test.operation) + " " + set.name + " - " + test.name; }

}  // namespace

int main(int count, char** arguments) {
  flush_denormals();
  std::vector<const KernelSet*> sets;
  for (const char* name : {"portable", "avx2", "avx512"})
    if (const KernelSet* set = find_kernel_set(name, nullptr)) sets.push_back(set);
  const std::string wanted = count > 1 ? arguments[1] : "";
  if (wanted == "--bench") {
    for (const KernelSet* set : sets)
      if (count < 3 || std::string(arguments[2]) == set->name) bench(*set);
    return 0;
  }
  if (count > 2) sets.erase(std::remove_if(sets.begin(), sets.end(), [&](const KernelSet* set) { return std::string(set->name) != arguments[2]; }), sets.end());
  if (wanted == "--list") {
    for (const KernelSet* set : sets)
      for (const Test& test : tests()) std::printf("%s\n", full_name(test, *set).c_str());
    return 0;
  }
  bool found = false;
  for (const Test& test : tests()) {
    if (!wanted.empty() && wanted != std::string(test.operation) + " - " + test.name) continue;
    first_failures.clear();
    test.run(sets);
    for (const KernelSet* set : sets) {
      found = true;
      const auto failure = first_failures.count(set) ? first_failures.find(set) : first_failures.find(nullptr);
      if (failure == first_failures.end()) std::printf("ok %s\n", full_name(test, *set).c_str());
      else std::printf("FAIL %s: %s\n", full_name(test, *set).c_str(), failure->second.c_str());
      std::fflush(stdout);
    }
  }
  if (!found) std::fprintf(stderr, "attention_test: there is no test \"%s\" that can run here; --list prints the names\n", wanted.c_str());
  return found && failures == 0 ? 0 : 1;
}
