// The end of what the host waits for: what it wants to know goes into memory of the host, then a word there counts up. Who sees the new count sees all of it, and
// everything that was queued before.
//   least, candidates: found by this step (finite.cuh, head.cu)      began: when it did (embed.cu)
//   reports: the count, in device memory, so that a graph needs no number of its own; it also tells the place
// One block; the host polls `word` and calls nothing of CUDA meanwhile (runtime.h, wait_for).
#include "device.cuh"
#include "operations.h"
#include "system_scope.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads) report_kernel(const Report report) {
  grid_dependency_wait();
  const uint32_t count = *report.reports + 1, place = count % kReportPlaces;
  Candidate* const candidates = report.host_candidates + static_cast<int64_t>(place) * report.candidates_max;
  for (int i = static_cast<int>(threadIdx.x); i < report.candidate_count; i += kThreads) candidates[i] = report.candidates[i];
  if (threadIdx.x == 0) {
    report.host_least[place] = *report.least;
    report.host_times[place] = {*report.began, global_timer()};
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x > 0) return;
  *report.reports = count;
  store_release_system(report.word, count);
}

}  // namespace

Problem send_report(const Report& report, Stream stream) {
  if (report.candidate_count < 0) return "send_report: a count is not negative";
  return launch(report_kernel, 1, kThreads, 0, stream, report);
}

}  // namespace shardmesh::cuda
