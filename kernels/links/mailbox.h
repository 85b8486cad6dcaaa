// Frames of one source that arrived and were not asked for yet: all frames of the host and tcp drivers, and those a shared-memory reader met while it looked
// for another key. Bounded in bytes and frames: what is beyond is refused, never queued.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>

#include "links.h"

namespace shardmesh {

inline bool same_key(const FrameKey& a, const FrameKey& b) { return a.kind == b.kind && a.step == b.step && a.operation == b.operation && a.subtree == b.subtree; }

struct FreeBytes {
  void operator()(uint8_t* bytes) const { std::free(bytes); }
};

struct MailboxFrame {
  FrameKey key{};
  int rows = 0;
  size_t bytes = 0;
  std::unique_ptr<uint8_t, FreeBytes> data;  // 64-byte aligned, as a block in shared memory is
};

enum class PutResult { Kept, Late, Duplicate, Full };

class Mailbox {
 public:
  Mailbox(size_t bytes_max, size_t frames_max) : bytes_max_(bytes_max), frames_max_(frames_max) {}

  // Copies the frame. Late: discarded already.
  PutResult put(const FrameKey& key, int rows, const void* data, size_t bytes);
  // False: a frame of `bytes` would be refused now.
  bool has_room(size_t bytes);
  // Takes the frame with this key out, if it is here.
  bool take(const FrameKey& key, MailboxFrame* out);
  // Waits for the frame with this key.
  WaitResult wait(const FrameKey& key, MailboxFrame* out, const std::atomic<bool>& aborted, int64_t deadline_ns);
  // Forgets frames that come before this key in (step, operation, subtree), now and later. The floor never goes back.
  void discard_before(const FrameKey& key);
  // The same, this key included.
  void discard_through(const FrameKey& key);
  // Wakes a waiter, to look at the abort word.
  void wake();

 private:
  bool take_locked(const FrameKey& key, MailboxFrame* out);
  void raise_floor(uint64_t floor);

  const size_t bytes_max_, frames_max_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<MailboxFrame> frames_;
  size_t bytes_ = 0;
  uint64_t floor_ = 0;
};

}  // namespace shardmesh
