#include "thread_team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace shardmesh {
namespace {

constexpr int64_t kSpinNs = 100'000;  // a helper waits about this long between two pieces of work of a step with reductions in it

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // best effort: a core may be outside the container's set
}

}  // namespace

ThreadTeam::ThreadTeam(int threads, std::vector<int> cores, bool spin) : threads_(threads), cores_(std::move(cores)), spin_(spin) {
  for (int i = 1; i < threads_; i++) helpers_.emplace_back([this, i] { help(i); });
}

ThreadTeam::~ThreadTeam() {
  stop_ = true;
  dispatch(nullptr, nullptr);
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadTeam::lead() const {
  flush_denormals();
  pthread_setname_np(pthread_self(), "shard-compute");
  if (!cores_.empty()) pin(cores_[0]);
}

// Returns when `word` is not `value` any more: a bounded spin, then the futex.
void ThreadTeam::wait_while(std::atomic<uint32_t>& word, uint32_t value, std::atomic<uint32_t>& sleepers) const {
  if (spin_) {
    const int64_t end = now_ns() + kSpinNs;
    do {
      for (int i = 0; i < 64; i++) {
        if (word.load(std::memory_order_acquire) != value) return;
        pause_core();
      }
    } while (now_ns() < end);
  }
  sleepers.fetch_add(1);
  while (word.load() == value) syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
  sleepers.fetch_sub(1);
}

void ThreadTeam::dispatch(Call call, const void* context) {
  call_ = call;
  context_ = context;
  pending_.store(static_cast<uint32_t>(threads_ - 1), std::memory_order_relaxed);
  generation_.fetch_add(1);
  if (helpers_asleep_.load() != 0) syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void ThreadTeam::join() {
  for (uint32_t left; (left = pending_.load(std::memory_order_acquire)) != 0;) wait_while(pending_, left, leader_asleep_);
}

void ThreadTeam::help(int index) {
  flush_denormals();
  pthread_setname_np(pthread_self(), "shard-helper");
  if (static_cast<size_t>(index) < cores_.size()) pin(cores_[static_cast<size_t>(index)]);
  for (uint32_t seen = 0;;) {
    wait_while(generation_, seen, helpers_asleep_);
    seen++;
    if (stop_) return;
    call_(context_, Part{index, threads_});
    pending_.fetch_sub(1);
    if (leader_asleep_.load() != 0) syscall(SYS_futex, &pending_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
}

}  // namespace shardmesh
