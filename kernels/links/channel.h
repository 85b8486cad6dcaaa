// Tensor links: one direction between two workers. In shared memory the writer owns a ring of slots and the reader a counter of what it consumed; the
// writer waits for room, so a slow reader slows the writer instead of losing frames. Over the host driver a frame leaves through FrameOut at once (the driver
// behind it holds back) and arrives in a mailbox.
#pragma once
#include <atomic>
#include <string>

#include "links.h"
#include "mailbox.h"
#include "segment.h"

namespace shardmesh {

// What both ends of every channel need. References live as long as the Links object.
struct ChannelContext {
  PeerAddress peer;
  int self_index, peer_index;
  FrameKind kind;
  const SegmentView& own;
  const std::atomic<bool>& aborted;
  std::string* problem;
};

class ShmSender final : public TensorLink {
 public:
  ShmSender(const ChannelContext& context, const SegmentView& peer) : context_(context), peer_(peer) {}
  WaitResult send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) override;
  WaitResult receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) override;
  void discard_before(uint32_t) override {}

 private:
  const ChannelContext context_;
  const SegmentView& peer_;
  uint32_t produced_ = 0;
};

class ShmReceiver final : public TensorLink {
 public:
  // `stash` keeps frames that were met while another key was wanted.
  ShmReceiver(const ChannelContext& context, const SegmentView& peer, Mailbox* stash) : context_(context), peer_(peer), stash_(stash) {}
  WaitResult send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) override;
  WaitResult receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) override;
  void discard_before(uint32_t step) override;

 private:
  enum class Drained { Found, Empty, Broken };
  // Walks the ring up to what has been produced, until `key` (null: all of it goes to the stash).
  Drained drain(const FrameKey* key, void* out, size_t capacity, size_t* bytes);
  void consume();

  const ChannelContext context_;
  const SegmentView& peer_;
  Mailbox* stash_;
  uint32_t consumed_ = 0;
};

class HostSender final : public TensorLink {
 public:
  HostSender(const ChannelContext& context, const FrameOut& frame_out, size_t payload_bytes)
      : context_(context), frame_out_(frame_out), payload_bytes_(payload_bytes) {}
  WaitResult send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) override;
  WaitResult receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) override;
  void discard_before(uint32_t) override {}

 private:
  const ChannelContext context_;
  const FrameOut& frame_out_;
  const size_t payload_bytes_;
};

class HostReceiver final : public TensorLink {
 public:
  HostReceiver(const ChannelContext& context, Mailbox* mailbox) : context_(context), mailbox_(mailbox) {}
  WaitResult send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) override;
  WaitResult receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) override;
  void discard_before(uint32_t step) override { mailbox_->discard_before({context_.kind, step, 0, 0}); }

 private:
  const ChannelContext context_;
  Mailbox* mailbox_;
};

}  // namespace shardmesh
