// Speed of the CUDA kernels and of whole decode steps on a card, beside what the card does at most, measured in the same run. Without Node.
//
//   gpu_bench [--json FILE] [--tries N] [--only PARTS] [--quick] [--tiny] [FILE...]      FILE: exported models (step-*.jsonl) whose decode steps are measured
//     --only PARTS  of products, attention, others, steps, with commas
//     --quick     one format, fewer batches
//     --tiny      shapes for the emulated machine: shows that it runs, measures nothing
//     --floors    prints the floors' names and limits, needs no card
//     --memory FILE...   what each model takes on a card, a JSON object a line; needs no card
//     --tuning FILE  with what --tune wrote
//     --tune FILE    measures what kernels are launched with, and writes it as tuning_table.h has it; nothing else
//
// Weights and caches are taken in turns, together more than four times the L2 cache, so that each repetition finds it cold; values are random. Norms, activations, trees and
// candidates find there what the kernel before them left, as in a step, and are beside no ceiling.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "../../kernels/cuda/attention_plan.h"
#include "../../kernels/cuda/tuning.h"
#include "../../kernels/cuda/weight_layout.h"
#include "../kernels/test_matrix.h"
#include "bench_report.h"
#include "workload.h"

using namespace shardmesh;
using namespace shardmesh::bench;
using cuda::Memory;
using cuda::Place;
using cuda::Problem;
using cuda::Stream;

namespace {

struct Options {
  std::string json, tune, tuning, only = "products,attention,others,steps";  // tuning: the file's text
  int tries = 9;
  bool quick = false, tiny = false, floors = false, memory = false;
  std::vector<std::string> models;
};

void check(Problem problem) {
  if (problem) throw std::runtime_error(problem);
}

template <typename T>
Memory on_card(const std::vector<T>& values) {
  Memory memory(Place::Card, values.size() * sizeof(T), "the benchmark");
  check(cuda::copy_now(memory.as<void>(), values.data(), values.size() * sizeof(T)));
  return memory;
}

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char out[200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(out, sizeof out, format, arguments);
  va_end(arguments);
  return out;
}

class Bench {
 public:
  Bench(const Options& options, Report* report) : options_(options), report_(*report), tuning_(report->card.sm, report->card.name, options.tuning), SM_(report->card.multiprocessors) {}

  void ceilings();
  void products();
  void attention();
  void others();
  void steps();
  // Throws std::runtime_error when the card cannot be measured or the file not be written.
  void tune(const std::string& path);

 private:
  // Copies of `bytes` bytes that together do not fit four L2 caches.
  int copies(size_t bytes) const { return static_cast<int>(std::clamp<size_t>(4 * report_.card.l2_bytes / std::max<size_t>(bytes, 1) + 2, 2, options_.tiny ? 3 : 1024)); }
  // Repetitions of one run: about as many as take some milliseconds.
  int repetitions(size_t bytes) const { return options_.tiny ? 2 : static_cast<int>(std::clamp<size_t>((size_t{4} << 30) / std::max<size_t>(bytes, 1 << 20), 8, 400)); }
  template <typename Measure>
  void row(Row row, const Measure& measure) {
    try {
      row.us = measure();
    } catch (const std::exception& error) {
      row.skipped = error.what();
    }
    report_.add(std::move(row));
  }

  void products_of(const std::string& matrix_name, TensorType type, int64_t rows, int64_t columns, const std::vector<int>& decode, const std::vector<int>& prefill);
  std::string tune_product(TensorType type, cuda::Products arithmetic, int64_t columns, int64_t rows, int64_t bytes_max);
  std::pair<int, cuda::Fusion> tune_fused();
  std::string tune_attention(int head_size);
  cuda::Edges tune_edges();
  void paged_decode(int head_size, int heads, int kv_heads, int sequences, int context);
  void prefill_attention(int head_size, int heads, int kv_heads, int tokens);
  void steps_of(const ExportedModel& model);

  const Options& options_;
  Report& report_;
  const cuda::Tuning tuning_;
  const int SM_;
};

// ---------------------------------------------------------------- ceilings

void Bench::ceilings() {
  const size_t bytes = options_.tiny ? 4096 : size_t{1} << 30;
  Memory from(Place::Card, bytes, "the benchmark"), to(Place::Card, bytes, "the benchmark"), sink(Place::Card, 4, "the benchmark");
  check(cuda::copy_now(to.as<void>(), std::vector<uint8_t>(bytes, 0x5a).data(), bytes));
  check(cuda::copy_now(from.as<void>(), std::vector<uint8_t>(bytes, 0xa5).data(), bytes));
  const int count = options_.tiny ? 1 : 4, iterations = options_.tiny ? 2 : 4096;
  Ceilings& c = report_.ceilings;
  const double copied = time_us(count, options_.tries, [&](int, Stream s) { return copy_bytes(to.as<void>(), from.as<void>(), bytes, SM_, s); });
  const double read = time_us(count, options_.tries, [&](int, Stream s) { return read_bytes(from.as<void>(), bytes, sink.as<uint32_t>(), SM_, s); });
  c.copy = 2.0 * static_cast<double>(bytes) / (copied * 1e-6);
  c.read = static_cast<double>(bytes) / (read * 1e-6);
  for (const Multiply kind : {Multiply::Int8, Multiply::Bf16}) {
    const double us = time_us(count, options_.tries, [&](int, Stream s) { return multiply_fragments(kind, iterations, sink.as<uint32_t>(), SM_, s); });
    (kind == Multiply::Int8 ? c.int8 : c.bf16) = fragment_operations(kind, SM_) * iterations / (us * 1e-6);
  }
  std::printf("ceilings: copy %.1f GB/s, read %.1f GB/s, int8 %.1f TOPS, bf16 %.1f TFLOP/s (mma.sync)\n", c.copy / 1e9, c.read / 1e9, c.int8 / 1e12, c.bf16 / 1e12);
}

// ---------------------------------------------------------------- products

// A matrix as packed bytes, and copies of it on the card.
struct CardMatrix {
  int phase;
  size_t bytes;
  std::vector<Memory> copies;
};

CardMatrix card_matrix(TensorType type, int64_t rows, int64_t columns, int copies) {
  Random random(7);
  const Source source(type, rows, columns, 0, Values::Random, random);
  CardMatrix matrix{0, cuda::packed_bytes(source.view), {}};
  if (matrix.bytes == 0) throw std::runtime_error(std::string(name_of(type)) + " has no CUDA product");
  std::vector<uint8_t> packed(matrix.bytes);
  PackedMatrix out{type, rows, columns, packed.size(), packed.data(), 0, 0};
  const int parts = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (int i = 0; i < parts; i++)
    threads.emplace_back([&, i] {
      PackedMatrix own = out;
      cuda::pack(source.view, &own, Part{i, parts});
      if (i == 0) matrix.phase = own.layout;
    });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < copies; i++) matrix.copies.push_back(on_card(packed));
  return matrix;
}

// A product of up to `tokens_max` tokens: the matrix in turns, segments as a column-parallel product has them.
struct ProductScene {
  TensorType type;
  int64_t rows, columns;
  CardMatrix matrix;
  std::vector<int> segments;
  Memory x, in, bf16, out;  // bf16: of BF16 weights, which go through the tensor cores but where tuning asks for the reference's arithmetic

  ProductScene(TensorType of, int64_t rows_, int64_t columns_, int copies, int tokens_max) : type(of), rows(rows_), columns(columns_), matrix(card_matrix(of, rows_, columns_, copies)) {
    const int groups = static_cast<int>(columns / 32), count = std::min(8, (groups + 7) / 8);
    for (int i = 0, end = 0; i < count; i++) segments.push_back(end += groups / count + (i < groups % count ? 1 : 0));
    Random random(3);
    x = on_card(make_activations(static_cast<size_t>(tokens_max * columns), Values::Random, random));
    in = Memory(Place::Card, cuda::activation_bytes(tokens_max, columns), "the benchmark");
    out = Memory(Place::Card, static_cast<size_t>(tokens_max * rows) * 4, "the benchmark");
    time_us(1, 1, [&](int, Stream s) { return cuda::quantize(x.as<float>(), columns, tokens_max, columns, in.as<cuda::ActivationGroup>(), s); });
    if (type != TensorType::BF16) return;
    bf16 = Memory(Place::Card, cuda::bf16_bytes(tokens_max, columns), "the benchmark");
    time_us(1, 1, [&](int, Stream s) { return cuda::round_bf16(x.as<float>(), columns, tokens_max, columns, bf16.as<cuda::Bf16Group>(), s); });
  }

  // `whole`: the tree of the segments.
  cuda::Product product(int tokens, int tiles, int i, const Subtree* whole) const {
    const uint8_t* weight = matrix.copies[static_cast<size_t>(i) % matrix.copies.size()].as<uint8_t>();
    cuda::Product product{type, rows, columns, matrix.phase, weight, in.as<cuda::ActivationGroup>(), tokens, whole->count, segments.data(), 1, whole, nullptr, out.as<float>(), rows, 0, tiles};
    product.x = x.as<float>();
    product.x_stride = columns;
    product.bf16 = bf16.as<cuda::Bf16Group>();
    return product;
  }
  Subtree whole() const { return {0, static_cast<int>(segments.size())}; }

  template <typename Launcher>
  Problem queue(const Launcher& launcher, int tokens, int tiles, int i, Stream stream) const {
    const Subtree tree = whole();
    return launcher(product(tokens, tiles, i, &tree), stream);
  }
};

// "1 token", "16 tokens"
std::string tokens_text(int tokens) { return text("%d token%s", tokens, tokens == 1 ? "" : "s"); }

void Bench::products_of(const std::string& matrix_name, TensorType type, int64_t rows, int64_t columns, const std::vector<int>& decode, const std::vector<int>& prefill) {
  const size_t bytes = cuda::packed_bytes({type, rows, columns, 0, 0, nullptr});
  const cuda::Products arithmetic = type == TensorType::BF16 ? cuda::Products::Bf16 : is_float(type) ? cuda::Products::Float : cuda::Products::Quantised;
  const int tiles = tuning_.product(type, arithmetic, static_cast<int64_t>(bytes)).decode_tiles;
  std::unique_ptr<ProductScene> scene;
  std::string problem;
  try {
    scene = std::make_unique<ProductScene>(type, rows, columns, copies(bytes), std::max(decode.empty() ? 1 : decode.back(), prefill.empty() ? 1 : prefill.back()));
  } catch (const std::exception& error) {
    problem = error.what();
  }
  const auto measure = [&](const char* part, int tokens, auto launcher, Limit limit) {
    Row r{part, matrix_name + ", " + tokens_text(tokens), 0, static_cast<double>(bytes + cuda::activation_bytes(tokens, columns)) + 4.0 * tokens * static_cast<double>(rows),
          2.0 * tokens * static_cast<double>(rows) * static_cast<double>(columns), limit, problem};
    if (!scene) return report_.add(std::move(r));
    row(std::move(r), [&] { return time_us(repetitions(bytes), options_.tries, [&](int i, Stream s) { return scene->queue(launcher, tokens, tiles, i, s); }); });
  };
  const bool bf16 = type == TensorType::BF16;
  for (const int tokens : decode) measure("decode product", tokens, bf16 ? cuda::linear_bf16_decode : cuda::linear_decode, Limit::Copy);
  for (const int tokens : prefill) measure("prefill product", tokens, bf16 ? cuda::linear_bf16_prefill : cuda::linear_prefill, bf16 ? Limit::None : Limit::Int8);
}

void Bench::products() {
  if (options_.tiny) return products_of("Q4_1 128 x 48", TensorType::Q4_1, 48, 128, {1, 16}, {70});
  const std::vector<TensorType> types = options_.quick ? std::vector<TensorType>{TensorType::Q4_1}
                                                       : std::vector<TensorType>{TensorType::Q4_0, TensorType::Q4_1, TensorType::Q4_K, TensorType::Q8_0, TensorType::Q6_K, TensorType::BF16};
  const std::vector<int> batches = options_.quick ? std::vector<int>{1, 16, 64} : std::vector<int>{1, 2, 4, 8, 16, 32, 64};
  constexpr int64_t K = 4096;
  for (const TensorType type : types) {
    const double row_bytes = static_cast<double>(cuda::packed_bytes({type, 64, K, 0, 0, nullptr})) / 64;
    if (row_bytes == 0) {
      report_.add({"decode product", name_of(type), 0, 0, 0, Limit::None, "there is no CUDA product of this format"});
      continue;
    }
    for (const int mb : {1, 8, 32, 128})
      products_of(text("%s, %d MB", name_of(type), mb), type, static_cast<int64_t>(mb * 1e6 / row_bytes / 64 + 1) * 64, K, batches, {});
    for (const int64_t rows : {int64_t{4096}, int64_t{14336}})
      products_of(text("%s %lld x %lld", name_of(type), static_cast<long long>(K), static_cast<long long>(rows)), type, rows, K, {},
                  options_.quick ? std::vector<int>{512} : std::vector<int>{128, 512, 2048});
  }
}

// ---------------------------------------------------------------- attention

// Rows of a step over a paged cache on the card, several caches in turns. Sequences have `context` positions each, their last `rows` are the step's.
struct AttentionScene {
  KvLayout layout;
  std::vector<int32_t> positions, row_sequence, first_row{0}, block_offsets{0}, block_tables, kv_head;
  std::vector<cuda::HeadRun> host_runs;
  cuda::AttentionPlan plan;
  std::vector<Memory> caches;
  Memory card_positions, card_row_sequence, card_offsets, card_tables, runs, work, work_count, first_slot, q, out, partials;
  size_t kv_bytes = 0;

  AttentionScene(int head_size, int heads, int kv_heads, int sequences, int context, int rows, int block_tokens)
      : layout(make_kv_layout(KeyType::Int8, ValueType::Int8, kv_heads, head_size, block_tokens)) {
    const int blocks_of_sequence = (context + block_tokens - 1) / block_tokens, blocks = blocks_of_sequence * sequences;
    std::vector<int32_t> ids(static_cast<size_t>(blocks));
    for (int i = 0; i < blocks; i++) ids[static_cast<size_t>(i)] = i;
    Random random(9);
    for (size_t i = ids.size(); i > 1; i--) std::swap(ids[i - 1], ids[random.below(static_cast<uint32_t>(i))]);
    for (int s = 0; s < sequences; s++) {
      for (int p = context - rows; p < context; p++) {
        positions.push_back(p);
        row_sequence.push_back(s);
      }
      first_row.push_back(static_cast<int32_t>(positions.size()));
      block_tables.insert(block_tables.end(), ids.begin() + s * blocks_of_sequence, ids.begin() + (s + 1) * blocks_of_sequence);
      block_offsets.push_back(static_cast<int32_t>(block_tables.size()));
    }
    for (int h = 0; h < heads; h++) kv_head.push_back(h / (heads / kv_heads));
    host_runs = cuda::head_runs(heads, kv_head.data());
    kv_bytes = static_cast<size_t>(blocks) * layout.block_bytes;
  }

  void to_card(int cache_count, const cuda::SplitLimits& limits) {
    const StepRows rows{static_cast<int>(positions.size()), positions.data(), row_sequence.data(), static_cast<int>(first_row.size()) - 1, first_row.data(), block_offsets.data(), block_tables.data()};
    cuda::plan_attention(rows, host_runs, 0, limits, &plan);
    Random random(13);
    std::vector<uint8_t> pool(kv_bytes);
    for (size_t i = 0; i + 8 <= pool.size(); i += 8) {
      const uint64_t bits = random.next();
      std::memcpy(&pool[i], &bits, 8);
    }
    for (size_t at = 0; at < pool.size(); at += layout.subblock_bytes)
      for (size_t i = 0; i < layout.scale_bytes; i += 4) {
        const float scale = 0.005f + 0.002f * random.uniform();
        std::memcpy(&pool[at + layout.key_bytes + layout.value_bytes + i], &scale, 4);
      }
    for (int i = 0; i < cache_count; i++) caches.push_back(on_card(pool));
    const size_t width = kv_head.size() * static_cast<size_t>(layout.head_size);
    q = on_card(make_activations(positions.size() * width, Values::Random, random));
    out = Memory(Place::Card, positions.size() * width * 4, "the benchmark");
    partials = Memory(Place::Card, std::max<size_t>(1, static_cast<size_t>(plan.first_slot.back())) * kv_head.size() * static_cast<size_t>(layout.head_size + 2) * 4, "the benchmark");
    card_positions = on_card(positions);
    card_row_sequence = on_card(row_sequence);
    card_offsets = on_card(block_offsets);
    card_tables = on_card(block_tables);
    runs = on_card(host_runs);
    work = on_card(plan.work);
    work_count = on_card(std::vector<int32_t>{static_cast<int32_t>(plan.work.size()), 0});
    first_slot = on_card(plan.first_slot);
  }

  Problem queue(int i, int blocks, Stream stream) const {
    const int64_t width = static_cast<int64_t>(kv_head.size()) * layout.head_size;
    const cuda::AttentionStep step{q.as<float>(), width, out.as<float>(), width, static_cast<int>(kv_head.size()), 1.0f / std::sqrt(static_cast<float>(layout.head_size)), 0, layout,
                                   caches[static_cast<size_t>(i) % caches.size()].as<uint8_t>(),
                                   {static_cast<int>(positions.size()), card_positions.as<int32_t>(), card_row_sequence.as<int32_t>(), card_offsets.as<int32_t>(), card_tables.as<int32_t>()},
                                   runs.as<cuda::HeadRun>(), work.as<cuda::AttentionWork>(), work_count.as<int32_t>(), partials.as<float>(), first_slot.as<int32_t>()};
    if (const Problem problem = cuda::attention(step, blocks, stream)) return problem;
    return plan.first_slot.back() > 0 ? cuda::attention_join(step, stream) : nullptr;
  }
};

constexpr int kSlotsMax = 4096;

void Bench::paged_decode(int head_size, int heads, int kv_heads, int sequences, int context) {
  AttentionScene scene(head_size, heads, kv_heads, sequences, context, 1, 16);
  Row r{"paged decode", text("D %d, %d/%d heads, %d x %d tokens, %.0f MB", head_size, heads, kv_heads, sequences, context, static_cast<double>(scene.kv_bytes) / 1e6), 0,
        static_cast<double>(scene.kv_bytes), 4.0 * head_size * heads * sequences * context, Limit::Copy, ""};
  row(std::move(r), [&] {
    const cuda::AttentionTuning tuning = tuning_.attention(head_size);
    scene.to_card(copies(scene.kv_bytes), {tuning.split_rows_max, kSlotsMax});
    return time_us(repetitions(scene.kv_bytes), options_.tries, [&](int i, Stream s) { return scene.queue(i, SM_ * tuning.warps, s); });
  });
}

void Bench::prefill_attention(int head_size, int heads, int kv_heads, int tokens) {
  AttentionScene scene(head_size, heads, kv_heads, 1, tokens, tokens, 16);
  Row r{"prefill attention", text("D %d, %d/%d heads, %d tokens", head_size, heads, kv_heads, tokens), 0, 0, 2.0 * head_size * heads * tokens * (tokens + 1.0), Limit::Int8, ""};
  row(std::move(r), [&] {
    const cuda::AttentionTuning tuning = tuning_.attention(head_size);
    scene.to_card(2, {tuning.split_rows_max, kSlotsMax});
    return time_us(options_.tiny ? 1 : 8, options_.tries, [&](int i, Stream s) { return scene.queue(i, SM_ * tuning.warps, s); });
  });
}

void Bench::attention() {
  if (options_.tiny) {
    paged_decode(64, 4, 2, 2, 40);
    return prefill_attention(64, 4, 2, 20);
  }
  // 135M, 1.5B and 8B: few and many sequences, short contexts and long ones.
  for (const auto& [d, heads, kv_heads] : {std::array{64, 9, 3}, std::array{128, 12, 2}, std::array{128, 32, 8}}) {
    for (const auto& [sequences, context] : {std::pair{1, 1024}, std::pair{1, 32768}, std::pair{32, 1024}, std::pair{32, 4096}, std::pair{128, 1024}, std::pair{128, 4096}}) {
      if (options_.quick && sequences * context != 32768) continue;
      paged_decode(d, heads, kv_heads, sequences, context);
    }
    for (const int tokens : {512, 2048, 8192})
      if (!options_.quick || tokens == 2048) prefill_attention(d, heads, kv_heads, tokens);
  }
}

// ---------------------------------------------------------------- norms, activations, trees, head

void Bench::others() {
  const int64_t H = options_.tiny ? 64 : 4096, F = options_.tiny ? 96 : 14336, V = options_.tiny ? 1100 : 128256;
  const std::vector<int> batches = options_.tiny ? std::vector<int>{2} : std::vector<int>{1, 32, 512};
  const int most = batches.back();
  Random random(1);
  const auto floats = [&](int64_t rows, int64_t width) { return on_card(make_activations(static_cast<size_t>(rows * width), Values::Random, random)); };
  const Memory x = floats(most, F), gate = floats(most, F), w = floats(1, H), residual = floats(most, H), nodes = floats(2 * most, H);
  Memory groups(Place::Card, cuda::activation_bytes(most, F), "the benchmark");
  auto* quantized = groups.as<cuda::ActivationGroup>();
  const int count = options_.tiny ? 1 : 200;
  for (const int T : batches) {
    const double rows = T;
    const auto h = static_cast<double>(H), f = static_cast<double>(F);
    const auto what = [&](const char* of, int64_t width) { return text("%s, %d x %lld", of, T, static_cast<long long>(width)); };
    row({"other", what("norm, quantised", H), 0, rows * h * (4 + 320.0 / 256), 0, Limit::None, ""}, [&] {
      return time_us(count, options_.tries, [&](int, Stream s) { return cuda::rms_norm(x.as<float>(), H, w.as<float>(), 1e-5f, H, T, nullptr, 0, quantized, s); });
    });
    row({"other", what("gated activation, quantised", F), 0, rows * f * (8 + 320.0 / 256), 0, Limit::None, ""}, [&] {
      return time_us(count, options_.tries, [&](int, Stream s) { return cuda::gated_activation(gate.as<float>(), F, x.as<float>(), F, F, T, 0, nullptr, 0, quantized, s); });
    });
    row({"other", what("end of a reduction, 2 nodes", H), 0, rows * h * 16, 0, Limit::None, ""}, [&] {
      const int lo[] = {0, 1}, hi[] = {1, 2};
      const float* const both[] = {nodes.as<float>(), nodes.as<float>() + T * H};
      const int64_t strides[] = {H, H};
      return time_us(count, options_.tries, [&](int, Stream s) { return cuda::finish_tree(2, 2, lo, hi, both, strides, nullptr, residual.as<float>(), H, H, T, s); });
    });
  }
  const Memory logits = floats(batches.size() > 1 ? 32 : 2, V);
  for (const int T : batches) {
    if (T > 32) continue;
    const Memory settings = on_card(std::vector<cuda::HeadRow>(static_cast<size_t>(T), {0.8f, 1, 2}));
    Memory best(Place::Card, static_cast<size_t>(T) * sizeof(cuda::Candidate), "the benchmark"), maximum(Place::Card, static_cast<size_t>(T) * 4, "the benchmark");
    const size_t part_count = static_cast<size_t>(T) * cuda::head_part_count(V);
    Memory candidates(Place::Card, part_count * sizeof(cuda::Candidate), "the benchmark"), maxima(Place::Card, part_count * 4, "the benchmark");
    const Memory arrivals = on_card(std::vector<uint32_t>(static_cast<size_t>(T), 0));
    const cuda::HeadParts parts{candidates.as<cuda::Candidate>(), maxima.as<float>(), arrivals.as<uint32_t>()};
    row({"other", text("best candidates, %d x %lld", T, static_cast<long long>(V)), 0, 4.0 * T * static_cast<double>(V), 0, Limit::None, ""}, [&] {
      return time_us(count, options_.tries,
                     [&](int, Stream s) { return cuda::head_candidates(logits.as<float>(), V, T, V, 0, settings.as<cuda::HeadRow>(), best.as<cuda::Candidate>(), maximum.as<float>(), parts, s); });
    });
  }
}

// ---------------------------------------------------------------- decode steps

// Packed, with or without embeddings that are only looked up by row.
double matrix_bytes(const Program& program, bool embeddings) {
  double bytes = 0;
  for (const WeightSlice& slice : program.weights) {
    if (slice.use == WeightUse::Vector || (slice.use == WeightUse::Embedding && !embeddings)) continue;
    const SliceShape shape = slice_shape(slice);
    bytes += static_cast<double>(cuda::packed_bytes({slice.type, shape.rows, shape.columns, shape.skip, shape.row_bytes, nullptr}));
  }
  return bytes;
}

double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(share * static_cast<double>(values.size())))];
}

// Sequences with prompts of the model's length that decode side by side, every step queued beforehand.
void Bench::steps_of(const ExportedModel& model) {
  const Program& program = model.cuts.front().programs.front();
  const int prompt = options_.tiny ? 5 : model.prompt_tokens, decode = options_.tiny ? 2 : 64;
  const std::vector<int> batches = options_.tiny ? std::vector<int>{1, 2} : std::vector<int>{1, 8, 32, 128};
  MeshOptions mesh_options;
  mesh_options.cuda_tuning = options_.tuning;
  mesh_options.sequences_max = batches.back();
  mesh_options.step_tokens_max = options_.tiny ? 32 : 2048;
  mesh_options.kv_blocks = batches.back() * ((prompt + decode) / mesh_options.block_tokens + 1);
  const auto named = [&](int batch) { return text("%s, batch %d", model.name.c_str(), batch); };
  std::unique_ptr<LocalMesh> mesh;
  std::string problem;
  try {
    mesh = std::make_unique<LocalMesh>(model, model.cuts.front(), [](PeerAddress) { return "cuda"; }, mesh_options);
  } catch (const std::exception& error) {
    problem = error.what();
  }
  std::vector<double> totals, idles;
  std::mutex mutex;
  if (mesh)
    mesh->on_done = [&](PeerAddress, const StepDone& done) {
      std::lock_guard lock(mutex);
      totals.push_back(done.timings.total_us + done.timings.idle_us);
      idles.push_back(done.timings.idle_us);
    };
  for (const int batch : batches) {
    const double kv = static_cast<double>(batch) * (prompt + decode / 2.0) * static_cast<double>(kv_bytes_per_block(program, mesh_options.block_tokens)) / mesh_options.block_tokens;
    Row r{"decode step", named(batch), 0, matrix_bytes(program, false) + kv, 0, Limit::Copy, problem};
    if (!mesh) {
      report_.add(std::move(r));
      continue;
    }
    row(std::move(r), [&] {
      Workload workload{{}, decode, 0};
      Random random(static_cast<uint64_t>(batch));
      for (int i = 0; i < batch; i++) {
        std::vector<int32_t> tokens;
        for (int t = 0; t < prompt; t++) tokens.push_back(static_cast<int32_t>(random.below(static_cast<uint32_t>(program.vocabulary_size))));
        workload.sequences.push_back({std::move(tokens), greedy_sampling(-1), false});
      }
      mesh->open_segments();
      mesh->connect({});
      {
        std::lock_guard lock(mutex);
        totals.clear();
        idles.clear();
      }
      run_workload(*mesh, workload, std::max(1, mesh_options.step_tokens_max / batch), mesh_options, 60'000);
      std::lock_guard lock(mutex);
      const auto decoding = [&](std::vector<double>& all) { return std::vector<double>(all.end() - decode, all.end()); };
      totals = decoding(totals);
      idles = decoding(idles);
      return percentile(totals, 0.5);
    });
    const Row& last = report_.rows.back();
    if (!last.skipped.empty()) continue;
    std::printf("%-18s %-52s %9.0f tokens/s; between steps %.1f us p50, %.1f us p99\n", "", "", batch / (last.us * 1e-6), percentile(idles, 0.5), percentile(idles, 0.99));
    report_.add({"between steps", named(batch) + ", p50", percentile(idles, 0.5), 0, 0, Limit::None, ""});
    report_.add({"between steps", named(batch) + ", p99", percentile(idles, 0.99), 0, 0, Limit::None, ""});
  }
}

void Bench::steps() {
  for (const std::string& file : options_.models) steps_of(read_exported_model(file));
}

// ---------------------------------------------------------------- tuning

// Index of the choice whose times, each beside the best of its column, are smallest together. times[choice][column].
size_t best_choice(const std::vector<std::vector<double>>& times) {
  size_t best = 0;
  double least = 1e300;
  for (size_t choice = 0; choice < times.size(); choice++) {
    double sum = 0;
    for (size_t column = 0; column < times[choice].size(); column++) {
      double fastest = times[0][column];
      for (const std::vector<double>& other : times) fastest = std::min(fastest, other[column]);
      sum += times[choice][column] / fastest;
    }
    if (sum < least) {
      least = sum;
      best = choice;
    }
  }
  return best;
}

// A row of "products": tiles of a decode block by batches of 16, 32 and 64 tokens, where there is a choice, then how many tokens the decode product stays ahead for.
std::string Bench::tune_product(TensorType type, cuda::Products arithmetic, int64_t columns, int64_t rows, int64_t bytes_max) {
  using Launcher = Problem (*)(const cuda::Product&, Stream);
  const bool quantised = arithmetic == cuda::Products::Quantised, floats = arithmetic == cuda::Products::Float;
  const Launcher decode = quantised ? cuda::linear_decode : floats ? cuda::linear_float_decode : cuda::linear_bf16_decode;
  const Launcher prefill = quantised ? cuda::linear_prefill : floats ? cuda::linear_float_prefill : cuda::linear_bf16_prefill;
  const size_t bytes = cuda::packed_bytes({type, rows, columns, 0, 0, nullptr});
  const ProductScene scene(type, rows, columns, copies(bytes), cuda::kDecodeTokensMaxChoices[std::size(cuda::kDecodeTokensMaxChoices) - 1]);
  const auto time = [&](auto launcher, int tokens, int tiles) {
    return time_us(repetitions(bytes), options_.tries, [&](int i, Stream s) { return scene.queue(launcher, tokens, tiles, i, s); });
  };
  int tiles = cuda::kDecodeTilesChoices[std::size(cuda::kDecodeTilesChoices) - 1];
  if (quantised) {
    std::vector<std::vector<double>> times;
    for (const int choice : cuda::kDecodeTilesChoices) {
      times.emplace_back();
      for (const int tokens : {16, 32, 64}) times.back().push_back(time(decode, tokens, choice));
    }
    tiles = cuda::kDecodeTilesChoices[best_choice(times)];
  }
  int tokens_max = cuda::kDecodeTokensMaxChoices[0];
  for (const int tokens : cuda::kDecodeTokensMaxChoices) {
    if (time(decode, tokens, tiles) > time(prefill, tokens, tiles)) break;
    tokens_max = tokens;
  }
  return text("{\"type\": \"%s\", \"arithmetic\": \"%s\", \"bytesMax\": %s, \"decodeTokensMax\": %d, \"decodeTiles\": %d}", name_of(type), cuda::name_of(arithmetic), bytes_max ? std::to_string(bytes_max).c_str() : "null", tokens_max, tiles);
}

// For how many rows gate and up in one launch stay ahead of two launches, and whether the activation behind them, quantised, had better be done by the block that comes last.
std::pair<int, cuda::Fusion> Bench::tune_fused() {
  const int64_t columns = options_.tiny ? 128 : 4096, rows = options_.tiny ? 64 : 4096;
  constexpr TensorType type = TensorType::Q4_1;
  const size_t bytes = cuda::packed_bytes({type, rows, columns, 0, 0, nullptr});
  const ProductScene gate(type, rows, columns, copies(bytes), cuda::kFusedTokensMax), up(type, rows, columns, copies(bytes), cuda::kFusedTokensMax);
  const Memory quantized(Place::Card, cuda::activation_bytes(cuda::kFusedTokensMax, rows), "the benchmark"), arrivals = on_card(std::vector<uint32_t>(static_cast<size_t>(rows / 32), 0));
  const Subtree tree = gate.whole();
  const int tiles = tuning_.product(type, cuda::Products::Quantised, static_cast<int64_t>(bytes)).decode_tiles;
  const auto activation = [&](int tokens, Stream s) {
    return cuda::gated_activation(gate.out.as<float>(), rows, up.out.as<float>(), rows, rows, tokens, 0, nullptr, 0, quantized.as<cuda::ActivationGroup>(), s);
  };
  const auto time = [&](int tokens, const auto& queue) {
    return time_us(repetitions(2 * bytes), options_.tries, [&](int i, Stream s) { return queue(std::array{gate.product(tokens, tiles, i, &tree), up.product(tokens, tiles, i, &tree)}, tokens, s); });
  };
  const auto one_launch = [&](cuda::Then then) {
    return [&, then](const std::array<cuda::Product, 2>& products, int tokens, Stream s) -> Problem {
      cuda::FusedProducts f{};
      f.count = 2;
      f.product[0] = products[0];
      f.product[1] = products[1];
      f.product[1].in = f.product[0].in;
      f.then = then;
      f.quantized = quantized.as<cuda::ActivationGroup>();
      f.arrivals = arrivals.as<uint32_t>();
      if (const Problem problem = cuda::linear_fused(f, s)) return problem;
      return then == cuda::Then::Nothing ? activation(tokens, s) : nullptr;
    };
  };
  const auto launch_each = [&](const std::array<cuda::Product, 2>& products, int tokens, Stream s) -> Problem {
    for (const cuda::Product& product : products)
      if (const Problem problem = cuda::linear_decode(product, s)) return problem;
    return activation(tokens, s);
  };
  int most = 0;
  double by_products = 0, by_whole = 0;
  for (const int tokens : cuda::kFusedTokensChoices) {
    if (tokens == 0) continue;
    const double whole = time(tokens, one_launch(cuda::Then::Activation)), products = time(tokens, one_launch(cuda::Then::Nothing)), each = time(tokens, launch_each);
    std::printf("gate, up and activation of %s: %.2f us in one launch, %.2f us in two, %.2f us in three\n", tokens_text(tokens).c_str(), whole, products, each);
    if (std::min(whole, products) > each) break;
    most = tokens;
    by_whole += whole;
    by_products += products;
  }
  return {most, by_products < by_whole ? cuda::Fusion::Products : cuda::Fusion::Whole};
}

// A row of "attention": warps by one long and many short contexts, then how many rows of a sequence splitting pays for.
std::string Bench::tune_attention(int head_size) {
  const int heads = options_.tiny ? 2 : 32, kv_heads = options_.tiny ? 1 : 8, context = options_.tiny ? 270 : 4096, count = options_.tiny ? 1 : 20;
  std::vector<std::vector<double>> times(std::size(cuda::kAttentionWarpsChoices));
  for (const int sequences : options_.tiny ? std::vector<int>{1} : std::vector<int>{1, 32}) {
    AttentionScene scene(head_size, heads, kv_heads, sequences, context, 1, 16);
    scene.to_card(copies(scene.kv_bytes), {1, kSlotsMax});
    for (size_t i = 0; i < times.size(); i++)
      times[i].push_back(time_us(count, options_.tries, [&](int r, Stream s) { return scene.queue(r, SM_ * cuda::kAttentionWarpsChoices[i], s); }));
  }
  const int warps = cuda::kAttentionWarpsChoices[best_choice(times)];
  int split = cuda::kSplitRowsChoices[0];
  for (const int rows : cuda::kSplitRowsChoices) {
    double us[2];
    for (const int splits : {0, 1}) {
      AttentionScene scene(head_size, heads, kv_heads, options_.tiny ? 1 : 4, context, rows, 16);
      scene.to_card(copies(scene.kv_bytes), {splits * rows, kSlotsMax});
      us[splits] = time_us(count, options_.tries, [&](int r, Stream s) { return scene.queue(r, SM_ * warps, s); });
    }
    if (us[1] > us[0]) break;
    split = rows;
  }
  return text("{\"headSize\": %d, \"splitRowsMax\": %d, \"warps\": %d}", head_size, split, warps);
}

// Of a chain of products and norms, as layers of few rows are, built as a step's graph is; the host's clock over several launches of it.
cuda::Edges Bench::tune_edges() {
  if (report_.card.sm < cuda::kProgrammaticEdgesSm) return cuda::Edges::Plain;
  const int64_t width = options_.tiny ? 128 : 4096;
  const int pairs = options_.tiny ? 3 : 32, launches = options_.tiny ? 2 : 50;
  const size_t bytes = cuda::packed_bytes({TensorType::Q4_1, width, width, 0, 0, nullptr});
  const std::array batches = {1, 8};
  const ProductScene scene(TensorType::Q4_1, width, width, copies(bytes), batches.back());
  const Memory weight = on_card(std::vector<float>(static_cast<size_t>(width), 1.0f));
  Stream stream = nullptr;
  check(cuda::open_stream(&stream));
  const auto time = [&](int tokens, cuda::Edges edges) {
    cuda::Graph graph = nullptr;
    check(cuda::open_graph(&graph, edges));
    for (int i = 0; i < pairs; i++) {
      check(scene.queue(cuda::linear_decode, tokens, 1, i, cuda::stream_of(graph)));
      check(cuda::rms_norm(scene.out.as<float>(), width, weight.as<float>(), 1e-5f, width, tokens, nullptr, 0, scene.in.as<cuda::ActivationGroup>(), cuda::stream_of(graph)));
    }
    check(cuda::finish_graph(graph));
    std::vector<double> times;
    for (int t = 0; t <= options_.tries; t++) {  // the first one warms up
      const auto began = std::chrono::steady_clock::now();
      for (int i = 0; i < launches; i++) check(cuda::launch_graph(graph, stream));
      check(cuda::synchronise(stream));
      if (t > 0) times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - began).count() / (launches * 2 * pairs));
    }
    cuda::close_graph(graph);
    return percentile(times, 0.5);
  };
  std::vector<std::vector<double>> times;
  for (const cuda::Edges edges : cuda::kEdgesChoices) {
    times.emplace_back();
    for (const int tokens : batches) times.back().push_back(time(tokens, edges));
    std::printf("%s edges: %.2f and %.2f us a kernel, for %d and %d tokens\n", cuda::name_of(edges), times.back()[0], times.back()[1], batches[0], batches[1]);
  }
  cuda::close_stream(stream);
  return cuda::kEdgesChoices[best_choice(times)];
}

void Bench::tune(const std::string& path) {
  std::vector<std::string> products, attentions;
  if (options_.tiny) {
    products.push_back(tune_product(TensorType::Q4_1, cuda::Products::Quantised, 128, 48, 0));
    products.push_back(tune_product(TensorType::F16, cuda::Products::Float, 128, 48, 0));
    products.push_back(tune_product(TensorType::BF16, cuda::Products::Bf16, 128, 48, 0));
  } else {
    for (const TensorType type : kTypes) {
      const double row_bytes = static_cast<double>(cuda::packed_bytes({type, 64, 4096, 0, 0, nullptr})) / 64;
      // Measured at half of the largest that a row is for, and at 64 MB for what is larger still.
      for (const int64_t bytes_max : {int64_t{4} << 20, int64_t{16} << 20, int64_t{0}}) {
        const double bytes = bytes_max ? static_cast<double>(bytes_max) / 2 : 64e6;
        for (const cuda::Products arithmetic : cuda::kProducts) {
          const bool fits = arithmetic == cuda::Products::Quantised ? !is_float(type) : arithmetic == cuda::Products::Float ? is_float(type) : type == TensorType::BF16;
          if (!fits) continue;
          products.push_back(tune_product(type, arithmetic, 4096, static_cast<int64_t>(bytes / row_bytes / 64 + 1) * 64, bytes_max));
          std::printf("%s\n", products.back().c_str());
          std::fflush(stdout);
        }
      }
    }
  }
  for (const int head_size : options_.tiny ? std::vector<int>{64} : std::vector<int>{64, 128, 256}) {
    attentions.push_back(tune_attention(head_size));
    std::printf("%s\n", attentions.back().c_str());
  }
  const auto [fused, fusion] = tune_fused();
  const cuda::Edges edges = tune_edges();
  const auto joined = [](const std::vector<std::string>& rows) {
    std::string all;
    for (const std::string& row : rows) all += (all.empty() ? "    " : ",\n    ") + row;
    return all;
  };
  FILE* file = std::fopen(path.c_str(), "w");
  if (!file) throw std::runtime_error(path + ": cannot be written");
  std::fprintf(file, "{\"version\": 1, \"cards\": [{\n  \"sm\": %d, \"card\": \"%s\", \"measured\": \"%s\",\n  \"products\": [\n%s\n  ],\n  \"attention\": [\n%s\n  ],\n  \"fusedTokensMax\": %d,\n  \"fusion\": \"%s\",\n  \"graphEdges\": \"%s\"\n}]}\n",
               report_.card.sm, report_.card.name.c_str(), today().c_str(), joined(products).c_str(), joined(attentions).c_str(), fused, cuda::name_of(fusion), cuda::name_of(edges));
  if (std::fclose(file) != 0) throw std::runtime_error(path + ": cannot be written");
}

// ---------------------------------------------------------------- floors

// The aims for an H100; what they need is found among the rows by name.
void hold_floors(Report* report) {
  const auto row = [&](const std::string& part, const std::string& what) { return report->find(part, what); };
  const auto share = [&](const std::string& part, const std::string& what) -> std::optional<double> {
    const Row* r = row(part, what);
    return r ? std::optional(100 * report->share(*r)) : std::nullopt;
  };
  const auto rate = [&](const std::string& part, const std::string& what) -> std::optional<double> {
    const Row* r = row(part, what);
    return r ? std::optional(r->operations / r->us / 1e6) : std::nullopt;
  };
  const auto ratio = [&](const std::string& above, const std::string& below) -> std::optional<double> {
    const Row *a = row("decode product", above), *b = row("decode product", below);
    return a && b ? std::optional(a->us / b->us) : std::nullopt;
  };
  const auto us = [&](const std::string& part, const std::string& what, double scale) -> std::optional<double> {
    const Row* r = row(part, what);
    return r ? std::optional(r->us * scale) : std::nullopt;
  };
  auto& floors = report->floors;
  for (const char* type : {"Q4_1", "Q8_0"}) {
    floors.push_back({std::string("decode product, ") + type + ", 32 MB of weights or more", "% of copy bandwidth", true, 75, {}, share("decode product", type + std::string(", 32 MB, 1 token"))});
    floors.push_back({std::string("decode product, ") + type + ", 8 MB", "% of copy bandwidth", true, 55, {}, share("decode product", type + std::string(", 8 MB, 1 token"))});
  }
  for (const auto& [tokens, most] : {std::pair{16, 1.3}, std::pair{32, 1.6}, std::pair{64, 3.0}})
    floors.push_back({text("decode product, %d tokens beside 1", tokens), "times", false, most, {}, ratio("Q4_1, 32 MB, " + tokens_text(tokens), "Q4_1, 32 MB, 1 token")});
  const Row* paged = nullptr;
  for (const Row& r : report->rows)
    if (r.part == "paged decode" && r.bytes >= 64e6 && r.skipped.empty() && (!paged || report->share(r) < report->share(*paged))) paged = &r;
  floors.push_back({"paged decode, 64 MB of K and V or more (the worst row)", "% of copy bandwidth", true, 70, {}, paged ? std::optional(100 * report->share(*paged)) : std::nullopt});
  floors.push_back({"prefill product, groups of 32", "TOPS", true, 200, 280, rate("prefill product", "Q4_1 4096 x 14336, 2048 tokens")});
  const std::optional<double> bf16 = rate("prefill product", "BF16 4096 x 14336, 2048 tokens");
  floors.push_back({"prefill product, bf16", "% of the mma.sync peak", true, 35, 50, bf16 && report->ceilings.bf16 > 0 ? std::optional(*bf16 * 1e14 / report->ceilings.bf16) : std::nullopt});
  floors.push_back({"prefill attention, D 128", "TFLOP/s", true, 150, 250, rate("prefill attention", "D 128, 32/8 heads, 8192 tokens")});
  floors.push_back({"prefill attention, D 64", "TFLOP/s", true, 100, {}, rate("prefill attention", "D 64, 9/3 heads, 8192 tokens")});
  floors.push_back({"8B step, 4-bit, batch 1", "% of copy bandwidth", true, 65, 75, share("decode step", "step-8b, batch 1")});
  const Row* eight = row("decode step", "step-8b, batch 128");
  floors.push_back({"8B step, 4-bit, batch 128", "tokens/s", true, 12000, {}, eight ? std::optional(128 / (eight->us * 1e-6)) : std::nullopt});
  floors.push_back({"135M step, batch 1", "ms", false, 0.6, 0.35, us("decode step", "step-135m, batch 1", 1e-3)});
  floors.push_back({"between steps, 99th percentile", "us", false, 30, {}, us("between steps", "step-135m, batch 1, p99", 1)});
  floors.push_back({"between steps, median", "us", false, 10, {}, us("between steps", "step-135m, batch 1, p50", 1)});
}

void print_memory(const std::string& path) {
  const ExportedModel model = read_exported_model(path);
  const Program& program = model.cuts.front().programs.front();
  constexpr int kBlockTokens = 16;
  std::printf("{\"name\": \"%s\", \"weightBytes\": %.0f, \"kvBytesPerToken\": %.0f}\n", model.name.c_str(), matrix_bytes(program, true),
              static_cast<double>(kv_bytes_per_block(program, kBlockTokens)) / kBlockTokens);
}

std::string text_of_file(const std::string& path) {
  std::ifstream in(path);
  const std::string all(std::istreambuf_iterator<char>(in), {});
  if (all.empty()) throw std::runtime_error(path + ": cannot be read, or is empty");
  return all;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i++) {
    const std::string given = argv[i];
    const auto value = [&] {
      if (i + 1 == argc) throw std::runtime_error(given + " needs a value");
      return std::string(argv[++i]);
    };
    if (given == "--json") options.json = value();
    else if (given == "--tries") options.tries = std::stoi(value());
    else if (given == "--tune") options.tune = value();
    else if (given == "--tuning") options.tuning = text_of_file(value());
    else if (given == "--only") options.only = value();
    else if (given == "--quick") options.quick = true;
    else if (given == "--tiny") options.tiny = true;
    else if (given == "--floors") options.floors = true;
    else if (given == "--memory") options.memory = true;
    else if (given[0] == '-') throw std::runtime_error("unknown option " + given + "; options: --json FILE --tries N --only PARTS --quick --tiny --floors --tune FILE --tuning FILE");
    else options.models.push_back(given);
  }
  if (options.tries < 1) throw std::runtime_error("--tries must be above 0");
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options = parse(argc, argv);
    if (options.memory) {
      for (const std::string& file : options.models) print_memory(file);
      return 0;
    }
    Report report;
    if (!options.floors) {
      if (const std::string absent = find_bench_card(&report.card); !absent.empty()) {
        std::printf("skip %s\n", absent.c_str());
        return 0;
      }
      const CardFacts& card = report.card;
      std::printf("card %s, sm_%d, %d multiprocessors, L2 %zu KB, driver %s%s\n", card.name.c_str(), card.sm, card.multiprocessors, card.l2_bytes >> 10, card.driver.c_str(),
                  card.emulated ? "; EMULATED, no figure means anything" : "");
      flush_denormals();
      if (card.emulated) {
        options.tiny = true;
        options.tries = 1;
      }
      Bench bench(options, &report);
      if (!options.tune.empty()) {
        bench.tune(options.tune);
        return 0;
      }
      bench.ceilings();
      const auto wanted = [&](const char* part) { return ("," + options.only + ",").find(std::string(",") + part + ",") != std::string::npos; };
      if (wanted("products")) bench.products();
      if (wanted("attention")) bench.attention();
      if (wanted("others")) bench.others();
      if (wanted("steps")) bench.steps();
    }
    hold_floors(&report);
    report.print_floors();
    if (!options.json.empty()) report.write_json(options.json);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_bench: %s\n", error.what());
    return 1;
  }
}
