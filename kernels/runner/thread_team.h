// The compute threads of one executor: a leader, which runs the step, and helpers that join it for one piece of work at a time.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "../include/kernel_set.h"

namespace shardmesh {

class ThreadTeam {
 public:
  // Starts `threads` - 1 helpers. Helper i is pinned to cores[i] when `cores` is not empty; the leader pins itself with pin().
  ThreadTeam(int threads, std::vector<int> cores, bool spin);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;

  int size() const { return threads_; }
  // Call on the leader thread, first.
  void lead() const;

  // Runs work(part) on all threads, part 0 on the caller; returns when all are done. Leader only.
  template <typename Work>
  void run(const Work& work) {
    if (threads_ == 1) {
      work(Part{0, 1});
      return;
    }
    dispatch([](const void* context, Part part) { (*static_cast<const Work*>(context))(part); }, &work);
    work(Part{0, threads_});
    join();
  }

 private:
  using Call = void (*)(const void* context, Part part);
  void dispatch(Call call, const void* context);
  void join();
  void help(int index);
  void wait_while(std::atomic<uint32_t>& word, uint32_t value, std::atomic<uint32_t>& sleepers) const;

  const int threads_;
  const std::vector<int> cores_;
  const bool spin_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> helpers_asleep_{0};
  alignas(64) std::atomic<uint32_t> pending_{0};
  std::atomic<uint32_t> leader_asleep_{0};
  std::vector<std::thread> helpers_;
};

// Runs work on the team, or on this thread alone when it is too small to share (about `cost` floating-point operations).
template <typename Work>
void share(ThreadTeam& team, double cost, const Work& work) {
  constexpr double kShareCost = 30'000;  // below this a second thread costs more than it brings
  if (cost < kShareCost) work(Part{0, 1});
  else team.run(work);
}

}  // namespace shardmesh
