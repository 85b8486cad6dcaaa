// Speed of matrix products on this machine, beside its own ceilings measured in the same run.
//
// kernel_bench [--set NAME] [--type NAME] [--threads 1|2] [--quick] [--strips-one 1|4] [--strips-few 1|2] [--prefetch BYTES] [--panel TOKENS]
//
// For each shape and batch: microseconds (best of several rounds), GB/s of packed weights, Gop/s (2 per multiply-add), share of the memory ceiling and of the
// compute ceiling, whichever is larger is what limits. Weights are walked over many copies (96 MiB and more) so that they come from memory, not from a cache.
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../kernels/cpu/cpu_features.h"
#include "../../kernels/cpu/linear_tuning.h"
#include "../../kernels/include/kernel_set.h"
#include "test_matrix.h"

using namespace shardmesh;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class HugePages {
 public:
  explicit HugePages(size_t bytes) : bytes_((bytes + (size_t{2} << 20) - 1) & ~((size_t{2} << 20) - 1)) {
    data_ = static_cast<uint8_t*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (data_ == MAP_FAILED) {
      std::fprintf(stderr, "kernel_bench: cannot map %zu bytes; free memory or take --quick\n", bytes_);
      std::exit(1);
    }
    madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  ~HugePages() { munmap(data_, bytes_); }
  uint8_t* data() const { return data_; }

 private:
  size_t bytes_;
  uint8_t* data_;
};

// Runs body(part) on `threads` pinned threads at once, `rounds` times; seconds of the best round.
template <class Body>
double best_round(int threads, int rounds, Body body) {
  std::atomic<int> ready{0}, done{0}, round{0};
  double best = 1e9;
  std::vector<std::thread> others;
  const auto pin = [](int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
    flush_denormals();
  };
  for (int i = 1; i < threads; i++)
    others.emplace_back([&, i] {
      pin(i);
      for (int r = 1; r <= rounds; r++) {
        ready++;
        while (round.load() < r) __builtin_ia32_pause();
        body(Part{i, threads});
        done++;
      }
    });
  pin(0);
  for (int r = 1; r <= rounds; r++) {
    while (ready.load() < (threads - 1) * r) __builtin_ia32_pause();
    const double start = now();
    round = r;
    body(Part{0, threads});
    while (done.load() < (threads - 1) * r) __builtin_ia32_pause();
    const double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  for (std::thread& t : others) t.join();
  return best;
}

double read_ceiling(int threads) {
  constexpr size_t kBytes = size_t{256} << 20;
  HugePages pages(kBytes);
  std::memset(pages.data(), 1, kBytes);
  static std::atomic<uint64_t> sink;
  const double seconds = best_round(threads, 8, [&](Part part) {
    const uint64_t* from = reinterpret_cast<const uint64_t*>(pages.data() + kBytes / static_cast<size_t>(part.count) * static_cast<size_t>(part.index));
    uint64_t sum[8] = {};
    for (size_t i = 0; i < kBytes / 8 / static_cast<size_t>(part.count); i += 8)
      for (int j = 0; j < 8; j++) sum[j] += from[i + static_cast<size_t>(j)];
    sink += sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
  });
  return static_cast<double>(kBytes) / seconds;
}

struct Options {
  std::string set = "auto", type = "all";
  int threads = 1;
  bool quick = false;
};

struct BenchShape {
  int64_t columns, rows;
};

void measure(const KernelSet& set, TensorType type, BenchShape shape, int tokens, const Options& options, double bandwidth) {
  Random random(7);
  const Source source(type, shape.rows, shape.columns, 0, Values::Random, random);
  const size_t bytes = (set.packed_bytes(source.view) + 63) / 64 * 64;
  const size_t budget = size_t{options.quick ? 24u : 96u} << 20;
  const int copies = tokens > 16 ? 1 : static_cast<int>(budget / bytes + 1);
  HugePages pages(bytes * static_cast<size_t>(copies));
  PackedMatrix matrix{type, shape.rows, shape.columns, bytes, pages.data(), 0, 0};
  set.pack(source.view, &matrix, {0, 1});
  for (int i = 1; i < copies; i++) std::memcpy(pages.data() + bytes * static_cast<size_t>(i), pages.data(), bytes);

  const std::vector<float> x = make_activations(static_cast<size_t>(shape.columns * tokens), Values::Random, random);
  AlignedBytes activations(set.activation_bytes(tokens, shape.columns) + 64, 0);
  std::vector<float> out(static_cast<size_t>(shape.rows * tokens));
  const Activations in{x.data(), shape.columns, tokens, shape.columns, activations.data()};
  set.quantize_activations(in, {0, 1});
  // Segments of a column-parallel product.
  const int groups = static_cast<int>(shape.columns / 32), wanted = (groups + 7) / 8 < 8 ? (groups + 7) / 8 : 8;
  std::vector<int> ends;
  for (int i = 0, at = 0; i < wanted; i++) ends.push_back(at += groups / wanted + (i < groups % wanted ? 1 : 0));
  const Subtree all{0, wanted};

  const double seconds = best_round(options.threads, options.quick ? 5 : 11, [&](Part part) {
                           for (int i = 0; i < copies; i++) {
                             PackedMatrix copy = matrix;
                             copy.data = pages.data() + bytes * static_cast<size_t>(i);
                             const LinearArguments arguments{&copy, in, wanted, ends.data(), 1, &all, nullptr, out.data(), shape.rows, 0};
                             set.linear(arguments, part);
                           }
                         }) /
                         copies;
  const double gigabytes = static_cast<double>(bytes) / seconds / 1e9;
  const double gigaops = 2.0 * static_cast<double>(shape.columns) * static_cast<double>(shape.rows) * tokens / seconds / 1e9;
  std::printf("%-8s %-5s K %5lld N %6lld T %4d threads %d: %9.1f us %6.2f GB/s (%3.0f %% of memory) %7.1f Gop/s\n", set.name, name_of(type), static_cast<long long>(shape.columns),
              static_cast<long long>(shape.rows), tokens, options.threads, seconds * 1e6, gigabytes, 100 * gigabytes * 1e9 / bandwidth, gigaops);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  LinearTuning& tuning = linear_tuning();
  for (int i = 1; i < argc; i++) {
    const std::string key = argv[i];
    if (key == "--quick") {
      options.quick = true;
      continue;
    }
    if (i + 1 >= argc) {
      std::fprintf(stderr, "kernel_bench: %s needs a value\n", key.c_str());
      return 2;
    }
    const char* value = argv[++i];
    if (key == "--set") options.set = value;
    else if (key == "--type") options.type = value;
    else if (key == "--threads") options.threads = std::atoi(value);
    else if (key == "--strips-one") tuning.strips_one = std::atoi(value);
    else if (key == "--strips-few") tuning.strips_few = std::atoi(value);
    else if (key == "--prefetch") tuning.prefetch_bytes = std::atoi(value);
    else if (key == "--panel") tuning.panel_tokens = std::atoi(value);
    else {
      std::fprintf(stderr, "kernel_bench: unknown option %s\n", key.c_str());
      return 2;
    }
  }
  const char* why = nullptr;
  const KernelSet* set = find_kernel_set(options.set.c_str(), &why);
  if (!set) {
    std::fprintf(stderr, "kernel_bench: %s\n", why);
    return 2;
  }
  flush_denormals();
  const double bandwidth = read_ceiling(options.threads);
  std::printf("%s, %d threads: memory ceiling %.1f GB/s; strips %d and %d, prefetch %d bytes, panel from %d tokens\n", cpu_features().model, options.threads, bandwidth / 1e9,
              tuning.strips_one, tuning.strips_few, tuning.prefetch_bytes, tuning.panel_tokens);
  const BenchShape shapes[] = {{576, 960}, {576, 3072}, {1536, 576}, {4096, 4096}};
  const int batches[] = {1, 2, 4, 6, 8, 16, 32, 128, 512};
  for (const TensorType type : kTypes) {
    if (options.type != "all" && options.type != name_of(type)) continue;
    if (options.type == "all" && type != TensorType::Q4_1 && type != TensorType::Q8_0 && type != TensorType::Q4_K && type != TensorType::Q6_K) continue;
    for (const BenchShape& shape : shapes)
      for (const int tokens : batches) measure(*set, type, shape, tokens, options, bandwidth);
  }
  return 0;
}
