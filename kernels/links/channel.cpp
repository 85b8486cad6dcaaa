#include "channel.h"

#include <cstring>

#include "stage_exchange.h"
#include "wait.h"

namespace shardmesh {
namespace {

WaitResult problem(const ChannelContext& context, const std::string& what) {
  *context.problem = peer_name(context.peer) + ": " + what;
  return WaitResult::Mismatch;
}

WaitResult wrong_direction(const ChannelContext& context, const char* call) {
  return problem(context, std::string(call) + " on the " + (call[0] == 's' ? "receiving" : "sending") + " end of a link");
}

// Checks shared by both drivers' senders.
bool sendable(const ChannelContext& context, const FrameKey& key, size_t bytes, size_t payload_bytes) {
  if (key.kind != context.kind) {
    problem(context, "a " + frame_name(key) + " does not travel on this link");
    return false;
  }
  if (bytes > payload_bytes) {
    problem(context, "a " + frame_name(key) + " has " + std::to_string(bytes) + " bytes, at most " + std::to_string(payload_bytes) + " are laid out");
    return false;
  }
  return true;
}

WaitResult hand_out(const ChannelContext& context, const FrameKey& key, const void* data, size_t length, void* out, size_t capacity, size_t* bytes, Mailbox* box) {
  if (length > capacity)
    return problem(context, "sent a " + frame_name(key) + " with " + std::to_string(length) + " bytes, there is room for " + std::to_string(capacity));
  if (length > 0) std::memcpy(out, data, length);
  *bytes = length;
  // Hidden frames are received in order, each once. Sampled ids may be asked for in any order.
  if (key.kind == FrameKind::Hidden) box->discard_through(key);
  return WaitResult::Done;
}

}  // namespace

WaitResult ShmSender::send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) {
  const RingLayout& ring = context_.own.layout().rings[static_cast<size_t>(context_.peer_index)];
  if (!sendable(context_, key, bytes, ring.payload_bytes)) return WaitResult::Mismatch;
  ChannelLines* own = context_.own.channel(context_.peer_index);
  ChannelLines* reader = peer_.channel(context_.self_index);
  // Room: all but the last `slots - 1` frames are consumed.
  const WaitResult room = wait_for_word(&reader->consumed, produced_ + 1 - ring.slots, &own->writer_sleeps, 1, context_.aborted, options);
  if (room != WaitResult::Done) return room;
  RingSlot* slot = context_.own.slot(context_.peer_index, produced_);
  slot->info = BlockInfo{static_cast<uint16_t>(key.kind), key.operation, key.subtree, 0, key.step, rows, bytes};
  if (bytes > 0) std::memcpy(slot + 1, data, bytes);
  publish_word(&own->produced, ++produced_, [reader] { return reader->reader_sleeps.load(std::memory_order_relaxed) != 0; });
  return WaitResult::Done;
}

WaitResult ShmSender::receive(const FrameKey&, void*, size_t, size_t*, const WaitOptions&) { return wrong_direction(context_, "receive"); }

void ShmReceiver::consume() {
  const ChannelLines* writer = peer_.channel(context_.self_index);
  publish_word(&context_.own.channel(context_.peer_index)->consumed, ++consumed_, [writer] { return writer->writer_sleeps.load(std::memory_order_relaxed) != 0; });
}

ShmReceiver::Drained ShmReceiver::drain(const FrameKey* key, void* out, size_t capacity, size_t* bytes) {
  const RingLayout& ring = peer_.layout().rings[static_cast<size_t>(context_.self_index)];
  const uint32_t produced = peer_.channel(context_.self_index)->produced.load(std::memory_order_acquire);
  if (produced - consumed_ > ring.slots) {
    problem(context_, "its ring says " + std::to_string(produced - consumed_) + " frames wait, but has " + std::to_string(ring.slots) + " slots");
    return Drained::Broken;
  }
  while (consumed_ != produced) {
    const RingSlot* slot = peer_.slot(context_.self_index, consumed_);
    const BlockInfo info = slot->info;
    const FrameKey found{static_cast<FrameKind>(info.kind), info.step, info.operation, info.subtree};
    if (info.bytes > ring.payload_bytes) {
      problem(context_, "sent a " + frame_name(found) + " with " + std::to_string(info.bytes) + " bytes, at most " + std::to_string(ring.payload_bytes) + " fit a slot");
      return Drained::Broken;
    }
    if (key != nullptr && same_key(found, *key)) {
      const WaitResult handed = hand_out(context_, found, slot + 1, info.bytes, out, capacity, bytes, stash_);
      consume();
      return handed == WaitResult::Done ? Drained::Found : Drained::Broken;
    }
    if (stash_->put(found, info.rows, slot + 1, info.bytes) == PutResult::Full) {
      problem(context_, "too many frames wait that nobody receives; the next is a " + frame_name(found));
      return Drained::Broken;
    }
    consume();
  }
  return Drained::Empty;
}

WaitResult ShmReceiver::receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) {
  if (context_.aborted.load(std::memory_order_relaxed)) return WaitResult::Aborted;
  MailboxFrame stashed;
  if (stash_->take(key, &stashed)) return hand_out(context_, key, stashed.data.get(), stashed.bytes, out, capacity, bytes, stash_);
  for (;;) {
    const Drained drained = drain(&key, out, capacity, bytes);
    if (drained == Drained::Found) return WaitResult::Done;
    if (drained == Drained::Broken) return WaitResult::Mismatch;
    std::atomic<uint32_t>* flag = &context_.own.channel(context_.peer_index)->reader_sleeps;
    const WaitResult waited = wait_for_word(&peer_.channel(context_.self_index)->produced, consumed_ + 1, flag, 1, context_.aborted, options);
    if (waited != WaitResult::Done) return waited;
  }
}

WaitResult ShmReceiver::send(const FrameKey&, int, const void*, size_t, const WaitOptions&) { return wrong_direction(context_, "send"); }

void ShmReceiver::discard_before(uint32_t step) {
  stash_->discard_before({context_.kind, step, 0, 0});
  drain(nullptr, nullptr, 0, nullptr);
}

WaitResult HostSender::send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions&) {
  if (context_.aborted.load(std::memory_order_relaxed)) return WaitResult::Aborted;
  if (!sendable(context_, key, bytes, payload_bytes_)) return WaitResult::Mismatch;
  frame_out_(context_.peer, key, rows, data, bytes);
  return WaitResult::Done;
}

WaitResult HostSender::receive(const FrameKey&, void*, size_t, size_t*, const WaitOptions&) { return wrong_direction(context_, "receive"); }

WaitResult HostReceiver::receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) {
  MailboxFrame frame;
  const WaitResult result = mailbox_->wait(key, &frame, context_.aborted, options.deadline_ns);
  if (result != WaitResult::Done) return result;
  return hand_out(context_, key, frame.data.get(), frame.bytes, out, capacity, bytes, mailbox_);
}

WaitResult HostReceiver::send(const FrameKey&, int, const void*, size_t, const WaitOptions&) { return wrong_direction(context_, "send"); }

}  // namespace shardmesh
