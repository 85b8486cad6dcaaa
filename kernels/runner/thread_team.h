// The compute threads of one executor: a leader, which runs the step, and helpers that join it for one piece of work at a time.
//
// A piece of work is a row of items. Each thread begins with its own share of them and takes a chunk of it after the other, a large one first; when that is done it
// takes chunks off the end of what is left of another's. So a thread whose core is slower holds up the others by one small chunk, and one that comes late by nothing.
// Which thread does an item changes no bit.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "../include/kernel_set.h"

namespace shardmesh {

// Items [first, last), done by a thread of the team.
struct Chunk {
  int first, last;
  int thread;
};

class ThreadTeam {
 public:
  // Starts `threads` - 1 helpers. Helper i is pinned to cores[i] when `cores` is not empty; the leader pins itself with lead().
  ThreadTeam(int threads, std::vector<int> cores, bool spin);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;

  int size() const { return threads_; }
  // Call on the leader thread, first.
  void lead() const;

  // Runs work(chunk) on all threads until items [0, items) are done. A chunk has `grain` items at least, where so many are left. Leader only.
  template <typename Work>
  void run(int items, int grain, const Work& work) {
    if (threads_ == 1) {
      work(Chunk{0, items, 0});
      return;
    }
    begin([](const void* context, Chunk chunk) { (*static_cast<const Work*>(context))(chunk); }, &work, items, grain);
    take_all(0);
    wait_until_done();
  }

 private:
  using Call = void (*)(const void* context, Chunk chunk);
  // What nobody has taken yet of a thread's share: its first item in the low half, its end in the high half.
  struct alignas(64) Left {
    std::atomic<uint64_t> range{0};
  };
  void begin(Call call, const void* context, int items, int grain);
  void take_all(int thread);
  bool take(int owner, int thread);
  void wait_until_done();
  void help(int index);
  void wake_helpers();
  void wait_while(std::atomic<uint32_t>& word, uint32_t value, std::atomic<uint32_t>& sleepers) const;

  const int threads_;
  const std::vector<int> cores_;
  const bool spin_;
  // Of the work under way. A thread reads them when it has taken a chunk: that work cannot end before it.
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<int> grain_{1};
  std::unique_ptr<Left[]> left_;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> helpers_asleep_{0};
  alignas(64) std::atomic<uint32_t> pending_{0};  // items
  std::atomic<uint32_t> leader_asleep_{0};
  std::vector<std::thread> helpers_;
};

constexpr double kShareCost = 30'000;  // below this, in floating-point operations, a second thread costs more than it brings

// Runs work on the team, a part a thread, or on this thread alone when it is too small to share (about `cost` floating-point operations).
template <typename Work>
void share(ThreadTeam& team, double cost, const Work& work) {
  if (cost < kShareCost) {
    work(Part{0, 1});
    return;
  }
  team.run(team.size(), 1, [&](Chunk chunk) {
    for (int i = chunk.first; i < chunk.last; i++) work(Part{i, team.size()});
  });
}

// The same for items, shared in chunks.
template <typename Work>
void share_items(ThreadTeam& team, double cost, int items, int grain, const Work& work) {
  if (cost < kShareCost) work(Chunk{0, items, 0});
  else team.run(items, grain, work);
}

}  // namespace shardmesh
