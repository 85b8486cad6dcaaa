// The compute threads of an executor (kernels/runner/thread_team.h), with real threads. A line for each case: "ok NAME" or
// "FAIL NAME: why".
#include "../../kernels/runner/thread_team.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace shardmesh;

namespace {

struct Case {
  const char* name;
  std::function<std::string()> run;  // what went wrong; empty: nothing
};

// `runs` pieces of work of random size, one right after the other.
std::string every_item_once(int threads, bool spin, int runs) {
  ThreadTeam team(threads, {}, spin);
  std::mt19937 random(7);
  std::vector<std::atomic<int>> done(64);
  for (int run = 0; run < runs; run++) {
    const int items = 1 + static_cast<int>(random() % 64), grain = 1 + static_cast<int>(random() % 8);
    for (std::atomic<int>& count : done) count.store(0, std::memory_order_relaxed);
    int plain[64] = {};  // no atomic: what a thread wrote is to be seen when run() returns
    team.run(items, grain, [&](Chunk chunk) {
      if (chunk.thread < 0 || chunk.thread >= threads) done[0] += 1000;
      for (int i = chunk.first; i < chunk.last; i++) {
        done[static_cast<size_t>(i)]++;
        plain[i] = run;
      }
    });
    for (int i = 0; i < 64; i++) {
      const int count = done[static_cast<size_t>(i)].load(std::memory_order_relaxed);
      if (count != (i < items ? 1 : 0)) return "item " + std::to_string(i) + " of " + std::to_string(items) + " was done " + std::to_string(count) + " times";
      if (i < items && plain[i] != run) return "what item " + std::to_string(i) + " wrote is not seen";
    }
  }
  return "";
}

// Items that each thread did of 64, where the helper of two needs 5 ms for an item.
std::string slow_thread() {
  ThreadTeam team(2, {}, true);
  int done[2] = {};
  team.run(64, 1, [&](Chunk chunk) {
    if (chunk.thread == 1) std::this_thread::sleep_for(std::chrono::milliseconds(5 * (chunk.last - chunk.first)));
    done[chunk.thread] += chunk.last - chunk.first;
  });
  if (done[0] + done[1] != 64) return std::to_string(done[0]) + " and " + std::to_string(done[1]) + " items";
  // Three quarters of its share of 32 are its first chunk; the leader is through with everything else long before.
  return done[1] <= 24 ? "" : "the slow thread did " + std::to_string(done[1]) + " of 64 items, the other " + std::to_string(done[0]);
}

// Of the chunks of a share only the last may be below the grain.
std::string chunk_sizes() {
  ThreadTeam team(2, {}, false);
  std::atomic<int> small{0};
  for (int run = 0; run < 2000; run++)
    team.run(41, 4, [&](Chunk chunk) {
      if (chunk.last - chunk.first < 4) small++;
    });
  // Shares of 20 and 21: 15 and 4 and 1, 16 and 4 and 1; whoever takes them, at most one chunk of each share is that small.
  return small <= 2 * 2000 ? "" : std::to_string(small) + " small chunks in 2000 runs";
}

const std::vector<Case> cases = {
    {"thread team - 2 threads that spin do every item once", [] { return every_item_once(2, true, 100'000); }},
    {"thread team - 2 threads that sleep do every item once", [] { return every_item_once(2, false, 20'000); }},
    {"thread team - 5 threads on few cores do every item once", [] { return every_item_once(5, false, 5'000); }},
    {"thread team - 1 thread does every item once", [] { return every_item_once(1, true, 1'000); }},
    {"thread team - what a slow thread has not begun is done by the others", slow_thread},
    {"thread team - chunks are as large as asked for, but for the end of a share", chunk_sizes},
};

}  // namespace

int main() {
  bool failed = false;
  for (const Case& one : cases) {
    const std::string problem = one.run();
    failed |= !problem.empty();
    std::printf(problem.empty() ? "ok %s\n" : "FAIL %s: %s\n", one.name, problem.c_str());
  }
  return failed ? 1 : 0;
}
