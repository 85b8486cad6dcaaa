// bench_card.h on the emulated machine: everything runs, and no time means anything.
#include <chrono>
#include <stdexcept>

#include "bench_card.h"

namespace shardmesh::bench {

std::string find_bench_card(CardFacts* facts) {
  cuda::Card card{};
  if (const std::string absent = cuda::find_card(&card); !absent.empty()) return absent;
  *facts = {card.name, "none", card.sm, card.multiprocessors, 16 << 10, card.memory_bytes, card.bandwidth_bytes, card.power_watts, true};
  return "";
}

double time_us(int count, int tries, const Repetition& repetition) {
  static cuda::Stream stream = nullptr;
  if (!stream && cuda::open_stream(&stream)) throw std::runtime_error("no stream");
  const auto began = std::chrono::steady_clock::now();
  for (int t = 0; t < tries; t++)
    for (int i = 0; i < count; i++) {
      if (const cuda::Problem problem = repetition(i, stream)) throw std::runtime_error(problem);
      if (const cuda::Problem problem = cuda::synchronise(stream)) throw std::runtime_error(problem);
    }
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - began).count() / (count * tries);
}

}  // namespace shardmesh::bench
