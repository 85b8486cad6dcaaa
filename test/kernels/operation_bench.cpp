// Speed of what a step does besides its products, each beside its floor: elementwise operations read and write a second-level cache, decode attention reads K and V
// from memory, prefill attention multiplies integers.
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "bench_machine.h"
#include "test_matrix.h"

namespace shardmesh {
namespace {

constexpr int kBlockTokens = 32;

struct Model {
  const char* name;
  int heads, kv_heads, head_size, hidden, feed_forward;
};
// SmolLM2-135M, Qwen2.5-1.5B, Llama-3.1-8B.
constexpr Model kModels[] = {{"135M", 9, 3, 64, 576, 1536}, {"1.5B", 12, 2, 128, 1536, 8960}, {"8B", 32, 8, 128, 4096, 14336}};

class Report {
 public:
  Report(const KernelSet& set, const Options& options) : set_(set), options_(options) {}

  // What the machine can do now: it differs from minute to minute.
  void look() { ceilings_ = measure_ceilings(set_, options_); }

  // `amount`: bytes moved, or operations; `ceiling` what the machine does of them in a second.
  void line(const std::string& what, double seconds, double amount, double ceiling, const char* unit) {
    if (options_.json) {
      std::printf("%s\n    {\"operation\": \"%s\", \"microseconds\": %.2f, \"%s\": %.2f, \"shareOfFloor\": %.4f}", first_ ? "" : ",", what.c_str(), seconds * 1e6,
                  std::strcmp(unit, "GB/s") == 0 ? "gigabytesPerSecond" : "gigaopsPerSecond", amount / seconds / 1e9, amount / seconds / ceiling);
      first_ = false;
    } else {
      std::printf("%-8s %-62s threads %d: %9.1f us %7.1f %-6s %3.0f %% of the ceiling\n", set_.name, what.c_str(), options_.threads, seconds * 1e6, amount / seconds / 1e9, unit,
                  100 * amount / seconds / ceiling);
    }
    std::fflush(stdout);
  }

  // Seconds of one body, the best of several rounds; `repeat` of them a round, `index` counts them.
  double time(int repeat, const std::function<void(int index, Part part)>& body) const {
    return best_round(options_.threads, options_.quick ? 5 : 11, [&](Part part) {
             for (int i = 0; i < repeat; i++) body(i, part);
           }) /
           repeat;
  }
  const Ceilings& ceilings() const { return ceilings_; }

 private:
  const KernelSet& set_;
  const Options& options_;
  Ceilings ceilings_{};
  bool first_ = true;
};

std::vector<float> values(size_t count, Random& random) {
  std::vector<float> x(count);
  for (float& v : x) v = random.uniform();
  return x;
}

// Rows of `sequences` sequences whose last `tokens` positions are computed; blocks in an order that is not theirs.
struct Rows {
  std::vector<int32_t> positions, row_sequence, first_row, block_offsets, block_tables;
  StepRows view{};
  int blocks = 0;

  Rows(int sequences, int context, int tokens) {
    const int each = (context + kBlockTokens - 1) / kBlockTokens;
    blocks = sequences * each;
    block_offsets.push_back(0);
    for (int s = 0; s < sequences; s++) {
      first_row.push_back(static_cast<int32_t>(positions.size()));
      for (int t = context - tokens; t < context; t++) {
        positions.push_back(t);
        row_sequence.push_back(s);
      }
      for (int b = 0; b < each; b++) block_tables.push_back((s * each + b) * 7 % blocks);
      block_offsets.push_back(static_cast<int32_t>(block_tables.size()));
    }
    first_row.push_back(static_cast<int32_t>(positions.size()));
    view = {static_cast<int>(positions.size()), positions.data(), row_sequence.data(), sequences, first_row.data(), block_offsets.data(), block_tables.data()};
  }
};

void measure_elementwise(const KernelSet& set, Report& report, const Model& model, int tokens, Random& random) {
  const size_t T = static_cast<size_t>(tokens), H = static_cast<size_t>(model.hidden), F = static_cast<size_t>(model.feed_forward);
  std::vector<float> x = values(T * F, random), y = values(T * F, random), out(T * F), w = values(H, random);
  AlignedBytes quantized(set.activation_bytes(ActivationType::Int8, tokens, model.feed_forward) + 64, 0);
  report.look();
  const double cached = report.ceilings().cached_bytes;
  const int repeat = 1 + 200000 / (tokens * model.feed_forward);
  const auto name = [&](const char* what, int width) { return std::string(what) + ", " + model.name + ": " + std::to_string(tokens) + " x " + std::to_string(width); };
  const auto quantize = [&](const float* from, int64_t width, Part part) { set.quantize_activations({from, width, tokens, width, quantized.data(), ActivationType::Int8}, part); };
  report.line(name("norm", model.hidden), report.time(repeat, [&](int, Part part) { set.rms_norm(x.data(), model.hidden, w.data(), 1e-5f, model.hidden, tokens, out.data(), model.hidden, part); }),
              8.0 * static_cast<double>(T * H), cached, "GB/s");
  report.line(name("quantise", model.hidden), report.time(repeat, [&](int, Part part) { quantize(x.data(), model.hidden, part); }), 5.5 * static_cast<double>(T * H), cached, "GB/s");
  report.line(name("activation and quantise", model.feed_forward), report.time(repeat, [&](int, Part part) {
                set.gated_activation(x.data(), model.feed_forward, y.data(), model.feed_forward, model.feed_forward, tokens, 0, out.data(), model.feed_forward, part);
                quantize(out.data(), model.feed_forward, part);
              }),
              13.5 * static_cast<double>(T * F), cached, "GB/s");
  const int lo[] = {0, 5}, hi[] = {5, 9};
  const float* nodes[] = {x.data(), y.data()};
  const int64_t strides[] = {model.hidden, model.hidden};
  report.line(name("end of a reduction", model.hidden), report.time(repeat, [&](int, Part part) {
                set.finish_tree(9, 2, lo, hi, nodes, strides, nullptr, out.data(), model.hidden, model.hidden, tokens, part);
              }),
              16.0 * static_cast<double>(T * H), cached, "GB/s");
}

void measure_attention(const KernelSet& set, Report& report, const Model& model, int sequences, int context, int tokens, bool prefill, size_t walked, Random& random) {
  const Rows rows(sequences, context, tokens);
  const KvLayout layout = make_kv_layout(KeyType::Int8, ValueType::Int8, model.kv_heads, model.head_size, kBlockTokens);
  const size_t pool = static_cast<size_t>(rows.blocks) * layout.block_bytes;
  const int copies = prefill ? 1 : static_cast<int>(walked / pool + 1);
  HugePages pages(pool * static_cast<size_t>(copies));
  const int64_t q_width = int64_t{model.heads} * model.head_size, kv_width = int64_t{model.kv_heads} * model.head_size;
  {
    const Rows whole(sequences, context, context);
    const size_t count = static_cast<size_t>(whole.view.tokens) * static_cast<size_t>(kv_width);
    const std::vector<float> k = values(count, random), v = values(count, random);
    set.store_kv(k.data(), kv_width, v.data(), kv_width, layout, pages.data(), whole.view, {0, 1});
    for (int i = 1; i < copies; i++) std::memcpy(pages.data() + pool * static_cast<size_t>(i), pages.data(), pool);
  }
  const std::vector<float> q = values(static_cast<size_t>(rows.view.tokens * q_width), random);
  std::vector<float> out(q.size());
  std::vector<int32_t> kv_head;
  for (int h = 0; h < model.heads; h++) kv_head.push_back(h / (model.heads / model.kv_heads));
  constexpr int kThreadsMax = 64;
  const size_t scratch_bytes = (set.attention_scratch_bytes(model.heads, model.head_size, rows.view.tokens) + 4095) / 4096 * 4096;
  HugePages scratch(scratch_bytes * kThreadsMax);
  report.look();
  const double seconds = report.time(copies, [&](int index, Part part) {
    const AttentionArguments arguments{q.data(), q_width, out.data(), q_width, model.heads, kv_head.data(), 0.125f, 0, &layout, pages.data() + pool * static_cast<size_t>(index), &rows.view,
                                       scratch.data() + scratch_bytes * static_cast<size_t>(part.index)};
    set.attention(arguments, part);
  });
  const std::string name = std::string(prefill ? "attention of a prompt, " : "attention, ") + model.name + ": " + std::to_string(sequences) + " x " + std::to_string(context) + " tokens";
  if (prefill) {
    // Two products of head_size for each pair of positions that see each other.
    const double pairs = static_cast<double>(context) * (context + 1) / 2 * sequences;
    report.line(name, seconds, pairs * model.heads * model.head_size * 4, report.ceilings().operations, "Gop/s");
  } else {
    const double bytes = static_cast<double>(sequences) * context * model.kv_heads * (2 * model.head_size + 8);
    report.line(name, seconds, bytes, report.ceilings().bytes, "GB/s");
  }
}

}  // namespace

void measure_operations(const KernelSet& set, const Options& options) {
  Report report(set, options);
  Random random(11);
  for (const Model& model : kModels)
    for (const int tokens : {1, 16}) measure_elementwise(set, report, model, tokens, random);
  const size_t walked = size_t{options.quick ? 64u : 96u} << 20;
  for (const Model& model : kModels)
    for (const int context : {128, 512, 2048, 8192})
      for (const int sequences : {1, 4}) measure_attention(set, report, model, sequences, context, 1, false, walked, random);
  for (const Model& model : kModels)
    for (const int context : {128, 512, 2048}) measure_attention(set, report, model, 1, context, context, true, walked, random);
}

}  // namespace shardmesh
