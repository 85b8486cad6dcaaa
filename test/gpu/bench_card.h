// What the benchmark needs of a card beside kernels/cuda/runtime.h: facts, and a clock on the card. Two implementations: bench_card.cu, and bench_emulated.cpp for the
// emulated machine, where the benchmark runs to show that it does, and no time means anything.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "../../kernels/cuda/operations.h"
#include "../../kernels/cuda/runtime.h"

namespace shardmesh::bench {

struct CardFacts {
  std::string name, driver;
  int sm = 0, multiprocessors = 0;
  size_t l2_bytes = 0, memory_bytes = 0;
  double bandwidth_bytes = 0, power_watts = 0;  // as the card says; 0: unknown
  bool emulated = false;
};
// "" or why there is none.
std::string find_bench_card(CardFacts* facts);

// Repetition i of what is measured, queued on the stream.
using Repetition = std::function<cuda::Problem(int i, cuda::Stream stream)>;

// Microseconds of one repetition: the middle one of `tries` runs of `count` repetitions. The repetitions are one graph, as a step's kernels are, so a kernel shorter than
// a launch is not measured as one. Throws std::runtime_error with what the card says.
double time_us(int count, int tries, const Repetition& repetition);

// ceilings.cu: queued kernels that do one thing as fast as the card does it.
cuda::Problem copy_bytes(void* to, const void* from, size_t bytes, int multiprocessors, cuda::Stream stream);  // bytes: a multiple of 16
cuda::Problem read_bytes(const void* from, size_t bytes, uint32_t* sink, int multiprocessors, cuda::Stream stream);
// Products of fragments in registers; operations (a multiply and an add are two) = multiplications(...) * iterations.
enum class Multiply { Int8, Bf16 };
cuda::Problem multiply_fragments(Multiply kind, int iterations, uint32_t* sink, int multiprocessors, cuda::Stream stream);
double fragment_operations(Multiply kind, int multiprocessors);  // of one iteration

}  // namespace shardmesh::bench
