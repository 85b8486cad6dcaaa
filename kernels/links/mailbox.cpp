#include "mailbox.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

namespace shardmesh {
namespace {

// Keys of one source in the order in which a step runs.
uint64_t order(const FrameKey& key) { return static_cast<uint64_t>(key.step) << 32 | static_cast<uint64_t>(key.operation) << 16 | key.subtree; }

}  // namespace

PutResult Mailbox::put(const FrameKey& key, int rows, const void* data, size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (order(key) < floor_) return PutResult::Late;
    for (const MailboxFrame& frame : frames_)
      if (same_key(frame.key, key)) return PutResult::Duplicate;
    if (bytes > bytes_max_ - bytes_ || frames_.size() >= frames_max_) return PutResult::Full;
    MailboxFrame frame;
    frame.data.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 64) / 64 * 64)));
    if (!frame.data) return PutResult::Full;
    if (bytes > 0) std::memcpy(frame.data.get(), data, bytes);
    frame.key = key;
    frame.rows = rows;
    frame.bytes = bytes;
    frames_.push_back(std::move(frame));
    bytes_ += bytes;
  }
  arrived_.notify_all();
  return PutResult::Kept;
}

bool Mailbox::has_room(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes <= bytes_max_ - bytes_ && frames_.size() < frames_max_;
}

bool Mailbox::take_locked(const FrameKey& key, MailboxFrame* out) {
  const auto found = std::find_if(frames_.begin(), frames_.end(), [&key](const MailboxFrame& frame) { return same_key(frame.key, key); });
  if (found == frames_.end()) return false;
  *out = std::move(*found);
  frames_.erase(found);
  bytes_ -= out->bytes;
  return true;
}

bool Mailbox::take(const FrameKey& key, MailboxFrame* out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return take_locked(key, out);
}

WaitResult Mailbox::wait(const FrameKey& key, MailboxFrame* out, const std::atomic<bool>& aborted, int64_t deadline_ns) {
  // steady_clock is CLOCK_MONOTONIC here.
  const std::chrono::steady_clock::time_point deadline{std::chrono::nanoseconds(deadline_ns)};
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (aborted.load(std::memory_order_relaxed)) return WaitResult::Aborted;
    if (take_locked(key, out)) return WaitResult::Done;
    if (std::chrono::steady_clock::now() >= deadline) return WaitResult::Deadline;
    arrived_.wait_until(lock, deadline);
  }
}

void Mailbox::discard_before(const FrameKey& key) { raise_floor(order(key)); }

void Mailbox::discard_through(const FrameKey& key) { raise_floor(order(key) + 1); }

void Mailbox::raise_floor(uint64_t floor) {
  const std::lock_guard<std::mutex> lock(mutex_);
  floor_ = std::max(floor_, floor);
  for (auto frame = frames_.begin(); frame != frames_.end();) {
    if (order(frame->key) < floor_) {
      bytes_ -= frame->bytes;
      frame = frames_.erase(frame);
    } else {
      ++frame;
    }
  }
}

void Mailbox::wake() {
  { const std::lock_guard<std::mutex> lock(mutex_); }  // a waiter is either before its look at the abort word or already asleep
  arrived_.notify_all();
}

}  // namespace shardmesh
