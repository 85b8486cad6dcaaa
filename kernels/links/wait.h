// How a compute thread waits for a word in shared memory: a bounded spin, then futex sleeps in slices, so that an abort or the deadline is noticed
// even when nobody wakes it.
//
// A reader maps its peer's segment read-only and cannot announce there that it sleeps. It sets a flag in its own segment, which the peer maps:
//
//   sleeper:    flag = 1;     fence; read word; still old? FUTEX_WAIT(word, old)
//   publisher:  word = new;   fence; read flag; set?       FUTEX_WAKE(word)
//
// One of the two always sees the other (both fences are sequentially consistent), and the kernel compares the word again before it sleeps: no wake-up is lost.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#include "links.h"

namespace shardmesh {

static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free, "a futex word is a plain 32-bit word");

constexpr int64_t kSpinNs = 80'000;              // longer than a decode-sized exchange, shorter than two futex wake-ups
constexpr int64_t kSleepSliceNs = 5'000'000;     // an abort is noticed at most this late
constexpr int kPausesPerClockRead = 32;

inline int64_t monotonic_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` is a no-op on most cores; isb takes about as long as a pause
#endif
}

// Not FUTEX_PRIVATE: the word is shared between processes. Waiting on a read-only mapping of shared memory is allowed.
inline void futex_sleep(const std::atomic<uint32_t>* word, uint32_t seen, int64_t ns) {
  const timespec limit{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

inline void futex_wake_all(const std::atomic<uint32_t>* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

// Counters wrap (2^32 exchanges are two days of decoding); two of them are never further apart than a ring is long.
inline bool reached(uint32_t counter, uint32_t target) { return static_cast<int32_t>(counter - target) >= 0; }

// Makes `value` visible and wakes the sleepers among those whose flags are asked by `anyone_sleeps`.
template <typename AnyoneSleeps>
inline void publish_word(std::atomic<uint32_t>* word, uint32_t value, AnyoneSleeps anyone_sleeps) {
  word->store(value, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (anyone_sleeps()) futex_wake_all(word);
}

// Waits until `word` has reached `target`. `flag` (own segment) holds `flag_value` while this thread sleeps, else 0.
inline WaitResult wait_for_word(const std::atomic<uint32_t>* word, uint32_t target, std::atomic<uint32_t>* flag, uint32_t flag_value,
                                const std::atomic<bool>& aborted, const WaitOptions& options) {
  if (aborted.load(std::memory_order_relaxed)) return WaitResult::Aborted;
  if (reached(word->load(std::memory_order_acquire), target)) return WaitResult::Done;

  int64_t now = monotonic_ns();
  if (options.spin) {
    const int64_t spin_end = now + kSpinNs < options.deadline_ns ? now + kSpinNs : options.deadline_ns;
    while (now < spin_end) {
      for (int i = 0; i < kPausesPerClockRead; i++) {
        if (reached(word->load(std::memory_order_acquire), target)) return WaitResult::Done;
        pause_core();
      }
      if (aborted.load(std::memory_order_relaxed)) return WaitResult::Aborted;
      now = monotonic_ns();
    }
  }

  WaitResult result;
  flag->store(flag_value, std::memory_order_relaxed);
  for (;;) {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const uint32_t seen = word->load(std::memory_order_acquire);
    if (reached(seen, target)) { result = WaitResult::Done; break; }
    if (aborted.load(std::memory_order_relaxed)) { result = WaitResult::Aborted; break; }
    const int64_t left = options.deadline_ns - monotonic_ns();
    if (left <= 0) { result = WaitResult::Deadline; break; }
    futex_sleep(word, seen, left < kSleepSliceNs ? left : kSleepSliceNs);
  }
  flag->store(0, std::memory_order_relaxed);
  return result;
}

}  // namespace shardmesh
