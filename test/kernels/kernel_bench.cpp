// Speed of the kernels on this machine, beside its own ceilings, measured before each of them: matrix products here, the other operations in operation_bench.cpp.
//
// kernel_bench [--only products|operations] [--set NAME] [--type NAME] [--threads 1|2] [--quick] [--strips-one 1|4] [--strips-few 1|2] [--prefetch BYTES] [--panel TOKENS] [--json]
//
// For each shape and batch: microseconds (best of several rounds), GB/s of packed weights, Gop/s (2 per multiply-add), share of the memory ceiling and of the
// compute ceiling, whichever is larger is what limits. Weights are walked over many copies (96 MiB and more) so that they come from memory, not from a cache.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../kernels/cpu/cpu_features.h"
#include "../../kernels/cpu/linear_tuning.h"
#include "../../kernels/include/kernel_set.h"
#include "bench_machine.h"
#include "test_matrix.h"

using namespace shardmesh;

namespace {

// Bytes per second read in order by `threads` threads, the better of with and without a software prefetch. As many bytes as the products walk over, since a part
// of them stays in the last cache.
double read_ceiling(int threads, size_t bytes) {
  typedef uint64_t Quarter __attribute__((vector_size(16)));
  HugePages pages(bytes);
  std::memset(pages.data(), 1, bytes);
  static std::atomic<uint64_t> sink;
  double best = 1e9;
  for (const size_t ahead : {size_t{0}, size_t{4096}}) {
    const double seconds = best_round(threads, 12, [&](Part part) {
      const size_t lines = bytes / 64, from = lines * static_cast<size_t>(part.index) / static_cast<size_t>(part.count);
      const size_t to = lines * (static_cast<size_t>(part.index) + 1) / static_cast<size_t>(part.count);
      const Quarter* quarter = reinterpret_cast<const Quarter*>(pages.data());
      Quarter a = {}, b = {}, c = {}, d = {};
      for (size_t i = 4 * from; i < 4 * to; i += 4) {
        if (ahead) __builtin_prefetch(reinterpret_cast<const uint8_t*>(quarter + i) + ahead, 0, 3);
        a ^= quarter[i];
        b ^= quarter[i + 1];
        c ^= quarter[i + 2];
        d ^= quarter[i + 3];
      }
      const Quarter all = a ^ b ^ c ^ d;
      sink += all[0] ^ all[1];
    });
    if (seconds < best) best = seconds;
  }
  return static_cast<double>(bytes) / best;
}

// Bytes per second from a second-level cache: 512 KiB a thread, over and over, 32 bytes at a time.
constexpr size_t kCachedBytes = 512 * 1024;
#if defined(__x86_64__)
__attribute__((target("avx2"))) void read_cached(const uint8_t* data, int turns) {
  for (int turn = 0; turn < turns; turn++) {
    __m256i sums[4];
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    for (size_t i = 0; i < kCachedBytes; i += 128) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) sums[k] = _mm256_xor_si256(sums[k], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + i + 32 * static_cast<size_t>(k))));
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) __asm__ volatile("" : "+x"(sums[k]));
  }
}
double cached_ceiling(int threads) {
  if (!__builtin_cpu_supports("avx2")) return 0;
  constexpr int kTurns = 100;
  HugePages pages(kCachedBytes * static_cast<size_t>(threads));
  std::memset(pages.data(), 1, kCachedBytes * static_cast<size_t>(threads));
  const double seconds = best_round(threads, 12, [&](Part part) { read_cached(pages.data() + kCachedBytes * static_cast<size_t>(part.index), kTurns); });
  return static_cast<double>(kCachedBytes) * threads * kTurns / seconds;
}
#else
double cached_ceiling(int) { return 0; }
#endif

// int8 multiply-adds with nothing read and independent accumulators, by the instructions of each set: vpdpbusd for avx512; for avx2 vpmaddubsw, of which eight
// fit into 16 bits where weights have 4 bits, then vpmaddwd; for portable the baseline's pmaddwd. No product of the set can be faster.
#if defined(__x86_64__)
constexpr int kChains = 12, kTurns = 200000;
__attribute__((target("avx512f,avx512vnni"))) double int8_operations_avx512() {
  __m512i sums[kChains], a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x04030201);
#pragma GCC unroll 12
  for (int c = 0; c < kChains; c++) sums[c] = _mm512_setzero_si512();  // unrolled, or the sums live on the stack
  for (int i = 0; i < kTurns; i++) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) {
      sums[c] = _mm512_dpbusd_epi32(sums[c], a, b);
      __asm__ volatile("" : "+v"(sums[c]));
    }
  }
  return 2.0 * 64 * kChains * kTurns;
}
__attribute__((target("avx2"))) double int8_operations_avx2() {
  __m256i sums[kChains / 4], a = _mm256_set1_epi32(0x01020304);
  const __m256i b = _mm256_set1_epi32(0x04030201), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 3
  for (int c = 0; c < kChains / 4; c++) sums[c] = _mm256_setzero_si256();
  for (int i = 0; i < kTurns; i++) {
#pragma GCC unroll 3
    for (int c = 0; c < kChains / 4; c++) {
      __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) {
        __asm__ volatile("" : "+x"(a));  // the product is not the same one as before
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(a, b));
      }
      sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(pairs, ones));
      __asm__ volatile("" : "+x"(sums[c]));
    }
  }
  return 2.0 * 32 * 8 * (kChains / 4) * kTurns;
}
double int8_operations_portable() {
  __m128i sums[kChains], a = _mm_set1_epi32(0x00020001), b = _mm_set1_epi32(0x00040003);
#pragma GCC unroll 12
  for (int c = 0; c < kChains; c++) sums[c] = _mm_setzero_si128();
  for (int i = 0; i < kTurns; i++) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) {
      __asm__ volatile("" : "+x"(a));
      sums[c] = _mm_add_epi32(sums[c], _mm_madd_epi16(a, b));
      __asm__ volatile("" : "+x"(sums[c]));
    }
  }
  return 2.0 * 8 * kChains * kTurns;
}
#endif

// int8 operations (2 per multiply-add) per second on `threads` threads; 0 where there is no such measurement.
double int8_ceiling(const KernelSet& set, int threads) {
#if defined(__x86_64__)
  double (*operations)() = std::strcmp(set.name, "avx512") == 0 || std::strcmp(set.name, "amx") == 0 ? int8_operations_avx512 : std::strcmp(set.name, "avx2") == 0 ? int8_operations_avx2 : int8_operations_portable;
  std::atomic<double> count{0};
  const double seconds = best_round(threads, 20, [&](Part) { count = operations(); });
  return count * threads / seconds;
#else
  (void)set;
  (void)threads;
  return 0;
#endif
}

size_t walked_bytes(const Options& options) { return size_t{options.quick ? 64u : 96u} << 20; }

struct BenchShape {
  int64_t columns, rows;
};

void measure(const KernelSet& set, TensorType type, BenchShape shape, int tokens, const Options& options, Ceilings ceilings, bool first) {
  Random random(7);
  const Source source(type, shape.rows, shape.columns, 0, Values::Random, random);
  const size_t bytes = (set.packed_bytes(source.view) + 63) / 64 * 64;
  const size_t budget = walked_bytes(options);
  const int copies = tokens > 16 ? 1 : static_cast<int>(budget / bytes + 1);
  HugePages pages(bytes * static_cast<size_t>(copies));
  PackedMatrix matrix{type, shape.rows, shape.columns, bytes, pages.data(), 0, 0};
  set.pack(source.view, &matrix, {0, 1});
  for (int i = 1; i < copies; i++) std::memcpy(pages.data() + bytes * static_cast<size_t>(i), pages.data(), bytes);

  const std::vector<float> x = make_activations(static_cast<size_t>(shape.columns * tokens), Values::Random, random);
  AlignedBytes activations(set.activation_bytes(ActivationType::Int8, tokens, shape.columns) + 64, 0);
  std::vector<float> out(static_cast<size_t>(shape.rows * tokens));
  const Activations in{x.data(), shape.columns, tokens, shape.columns, activations.data(), ActivationType::Int8};
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
  const double memory = gigabytes * 1e9 / ceilings.bytes;
  // Float weights are no int8 product.
  const bool integer = type != TensorType::F32 && type != TensorType::F16 && type != TensorType::BF16 && ceilings.operations > 0;
  const double compute = integer ? gigaops * 1e9 / ceilings.operations : 0;
  if (options.json) {
    std::printf("%s\n    {\"type\": \"%s\", \"columns\": %lld, \"rows\": %lld, \"tokens\": %d, \"microseconds\": %.2f, \"gigabytesPerSecond\": %.3f, \"gigaopsPerSecond\": %.2f, ", first ? "" : ",",
                name_of(type), static_cast<long long>(shape.columns), static_cast<long long>(shape.rows), tokens, seconds * 1e6, gigabytes, gigaops);
    std::printf("\"shareOfMemory\": %.4f, \"shareOfCompute\": ", memory);
    if (integer) std::printf("%.4f}", compute);
    else std::printf("null}");
  } else {
    std::printf("%-8s %-5s K %5lld N %6lld T %4d threads %d: %9.1f us %6.2f GB/s %7.1f Gop/s  memory %3.0f %%  compute ", set.name, name_of(type), static_cast<long long>(shape.columns),
                static_cast<long long>(shape.rows), tokens, options.threads, seconds * 1e6, gigabytes, gigaops, 100 * memory);
    if (integer) std::printf("%3.0f %%\n", 100 * compute);
    else std::printf("  -\n");
  }
  std::fflush(stdout);
}

}  // namespace

Ceilings shardmesh::measure_ceilings(const KernelSet& set, const Options& options) {
  return {read_ceiling(options.threads, walked_bytes(options)), cached_ceiling(options.threads), int8_ceiling(set, options.threads)};
}

int main(int argc, char** argv) {
  Options options;
  LinearTuning& tuning = linear_tuning();
  for (int i = 1; i < argc; i++) {
    const std::string key = argv[i];
    if (key == "--quick" || key == "--json") {
      (key == "--quick" ? options.quick : options.json) = true;
      continue;
    }
    if (i + 1 >= argc) {
      std::fprintf(stderr, "kernel_bench: %s needs a value\n", key.c_str());
      return 2;
    }
    const char* value = argv[++i];
    if (key == "--set") options.set = value;
    else if (key == "--type") options.type = value;
    else if (key == "--only") {
      const std::string what = value;
      if (what != "products" && what != "operations") {
        std::fprintf(stderr, "kernel_bench: --only is %s, known are products and operations\n", value);
        return 2;
      }
      options.products = what == "products";
      options.operations = !options.products;
    }
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
  if (options.threads < 1 || options.threads > 64) {
    std::fprintf(stderr, "kernel_bench: --threads is %d, needed are 1..64\n", options.threads);
    return 2;
  }
  bool known = options.type == "all";
  for (const TensorType type : kTypes) known = known || options.type == name_of(type);
  if (!known) {
    std::fprintf(stderr, "kernel_bench: unknown type %s; known are F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K\n", options.type.c_str());
    return 2;
  }
  const Ceilings ceilings = measure_ceilings(*set, options);
  if (options.json)
    std::printf("{\n  \"cpu\": \"%s\",\n  \"set\": \"%s\",\n  \"threads\": %d,\n  \"ceilings\": {\"gigabytesPerSecond\": %.3f, \"cachedGigabytesPerSecond\": %.3f, \"gigaopsPerSecond\": %.2f},\n  \"products\": [",
                cpu_features().model, set->name, options.threads, ceilings.bytes / 1e9, ceilings.cached_bytes / 1e9, ceilings.operations / 1e9);
  else
    std::printf("%s, %d threads: ceilings %.1f GB/s read, %.0f from the second-level cache, %.0f Gop/s int8 (%s); strips %d and %d, prefetch %d bytes, panel from %d tokens\n", cpu_features().model, options.threads,
                ceilings.bytes / 1e9, ceilings.cached_bytes / 1e9, ceilings.operations / 1e9, set->name, tuning.strips_one, tuning.strips_few, tuning.prefetch_bytes, tuning.panel_tokens);
  const BenchShape shapes[] = {{576, 960}, {576, 3072}, {1536, 576}, {4096, 4096}};
  const int batches[] = {1, 2, 4, 6, 8, 16, 32, 128, 512};
  bool first = true;
  for (const TensorType type : kTypes) {
    if (!options.products) break;
    if (options.type != "all" && options.type != name_of(type)) continue;
    if (options.type == "all" && type != TensorType::Q4_1 && type != TensorType::Q8_0 && type != TensorType::Q4_K && type != TensorType::Q6_K) continue;
    for (const BenchShape& shape : shapes)
      for (const int tokens : batches) {
        measure(*set, type, shape, tokens, options, measure_ceilings(*set, options), first);
        first = false;
      }
  }
  if (options.json) std::printf("\n  ],\n  \"operations\": [");
  if (options.operations) measure_operations(*set, options);
  if (options.json) std::printf("\n  ]\n}\n");
  return 0;
}
