#include "bench_card.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

namespace shardmesh::bench {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct Clock {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  Clock() {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
  }
};

}  // namespace

std::string find_bench_card(CardFacts* facts) {
  cuda::Card card{};
  if (const std::string absent = cuda::find_card(&card); !absent.empty()) return absent;
  facts->name = card.name;
  facts->sm = card.sm;
  facts->multiprocessors = card.multiprocessors;
  facts->memory_bytes = card.memory_bytes;
  int l2 = 0, driver = 0;
  check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0), "L2 size");
  check(cudaDriverGetVersion(&driver), "driver version");
  facts->l2_bytes = static_cast<size_t>(l2);
  facts->driver = (card.driver.empty() ? "" : card.driver + ", ") + "CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  facts->bandwidth_bytes = card.bandwidth_bytes;
  facts->power_watts = card.power_watts;
  return "";
}

double time_us(int count, int tries, const Repetition& repetition) {
  static Clock clock;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t runnable = nullptr;
  check(cudaStreamBeginCapture(clock.stream, cudaStreamCaptureModeThreadLocal), "capture");
  cuda::Problem problem = nullptr;
  for (int i = 0; i < count && !problem; i++) problem = repetition(i, clock.stream);
  const cudaError_t captured = cudaStreamEndCapture(clock.stream, &graph);
  if (problem) throw std::runtime_error(problem);
  check(captured, "capture");
  check(cudaGraphInstantiate(&runnable, graph, 0), "graph");
  std::vector<double> times;
  for (int i = 0; i <= tries; i++) {  // the first one warms up
    check(cudaEventRecord(clock.begin, clock.stream), "event");
    check(cudaGraphLaunch(runnable, clock.stream), "graph");
    check(cudaEventRecord(clock.end, clock.stream), "event");
    check(cudaStreamSynchronize(clock.stream), "run");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, clock.begin, clock.end), "event");
    if (i > 0) times.push_back(static_cast<double>(ms) * 1000.0 / count);
  }
  cudaGraphExecDestroy(runnable);
  cudaGraphDestroy(graph);
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

}  // namespace shardmesh::bench
