// What the parts of kernel_bench share: a clock, memory in huge pages, and a body run by pinned threads.
#pragma once
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "../../kernels/include/kernel_set.h"

namespace shardmesh {

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

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

struct Options {
  std::string set = "auto", type = "all";
  int threads = 1;
  bool quick = false, json = false, products = true, operations = true;
};

// Per second, on the threads of a run: bytes from memory, bytes from a second-level cache, int8 operations (2 per multiply-add).
struct Ceilings {
  double bytes, cached_bytes, operations;
};

// kernel_bench.cpp: takes about a tenth of a second.
Ceilings measure_ceilings(const KernelSet& set, const Options& options);
// operation_bench.cpp: everything of a step but the products.
void measure_operations(const KernelSet& set, const Options& options);

}  // namespace shardmesh
