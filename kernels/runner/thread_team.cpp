#include "thread_team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

namespace shardmesh {
namespace {

constexpr int64_t kSpinNs = 100'000;  // a helper waits about this long between two pieces of work of a step with reductions in it

// A thread leaves one in so many items of what it finds for later, or for others.
constexpr int kLeftOver = 4;

uint64_t range_of(int64_t first, int64_t end) { return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(first); }

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

ThreadTeam::ThreadTeam(int threads, std::vector<int> cores, bool spin)
    : threads_(threads), cores_(std::move(cores)), spin_(spin), left_(std::make_unique<Left[]>(static_cast<size_t>(threads))) {
  for (int i = 1; i < threads_; i++) helpers_.emplace_back([this, i] { help(i); });
}

ThreadTeam::~ThreadTeam() {
  stop_ = true;
  wake_helpers();
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

void ThreadTeam::wake_helpers() {
  generation_.fetch_add(1);
  if (helpers_asleep_.load() != 0) syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void ThreadTeam::begin(Call call, const void* context, int items, int grain) {
  call_ = call;
  context_ = context;
  grain_.store(grain, std::memory_order_relaxed);
  pending_.store(static_cast<uint32_t>(items), std::memory_order_relaxed);
  for (int i = 0; i < threads_; i++)
    left_[static_cast<size_t>(i)].range.store(range_of(int64_t{items} * i / threads_, int64_t{items} * (i + 1) / threads_), std::memory_order_release);
  wake_helpers();
}

// Takes a chunk of what is left of the owner's share, off its beginning or, of another's share, its end, and does it. False: nothing is left.
bool ThreadTeam::take(int owner, int thread) {
  std::atomic<uint64_t>& left = left_[static_cast<size_t>(owner)].range;
  for (uint64_t range = left.load(std::memory_order_acquire);;) {
    const int first = static_cast<int>(range & 0xffffffffu), end = static_cast<int>(range >> 32);
    if (first == end) return false;
    const int count = end - first, taken = std::min(count, std::max(grain_.load(std::memory_order_relaxed), count - count / kLeftOver));
    const Chunk chunk = owner == thread ? Chunk{first, first + taken, thread} : Chunk{end - taken, end, thread};
    const uint64_t rest = owner == thread ? range_of(chunk.last, end) : range_of(first, chunk.first);
    if (!left.compare_exchange_weak(range, rest, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    call_(context_, chunk);
    if (pending_.fetch_sub(static_cast<uint32_t>(taken)) == static_cast<uint32_t>(taken) && leader_asleep_.load() != 0)
      syscall(SYS_futex, &pending_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    return true;
  }
}

void ThreadTeam::take_all(int thread) {
  for (int i = 0; i < threads_; i++)
    while (take((thread + i) % threads_, thread)) {
    }
}

void ThreadTeam::wait_until_done() {
  for (uint32_t left; (left = pending_.load(std::memory_order_acquire)) != 0;) wait_while(pending_, left, leader_asleep_);
}

void ThreadTeam::help(int index) {
  flush_denormals();
  pthread_setname_np(pthread_self(), "shard-helper");
  if (static_cast<size_t>(index) < cores_.size()) pin(cores_[static_cast<size_t>(index)]);
  for (uint32_t seen = 0;;) {
    if (spin_) sched_yield();  // whoever else wants this core has it now, when nothing is begun
    wait_while(generation_, seen, helpers_asleep_);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    take_all(index);
  }
}

}  // namespace shardmesh
