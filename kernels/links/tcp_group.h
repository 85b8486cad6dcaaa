// The tcp connections of one worker, driven by whoever waits on the compute thread: while it waits for one peer, frames of all of them come in and unsent
// bytes to all of them go out, so two ranks that send each other more than the sockets hold never stand still.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "links.h"
#include "mailbox.h"
#include "tcp_connection.h"
#include "wait.h"

namespace shardmesh {

constexpr int64_t kTcpSpinNs = 100'000;  // about one round trip in a fast network; a sleeping core takes as long to wake

// One peer: its connection and where its frames go. Null: frames of that kind do not come from this peer.
struct TcpPeer {
  std::shared_ptr<TcpConnection> connection;
  Mailbox* exchange_frames;
  Mailbox* channel_frames;
  FrameKind channel_kind;
  // A frame whose mailbox is full. Until there is room nothing more is read, and the sender is held back by its socket.
  bool held = false;
  TcpFrame frame{};
};

class TcpGroup {
 public:
  TcpGroup(const std::atomic<bool>& aborted, std::string* problem);
  TcpGroup(const TcpGroup&) = delete;
  TcpGroup& operator=(const TcpGroup&) = delete;
  ~TcpGroup();

  // The reference is valid as long as the group; add all before the first send or wait.
  TcpPeer* add(TcpPeer peer);
  // Sends what the socket takes now; the rest goes out during waits.
  void send(TcpPeer* peer, const FrameKey& key, int rows, const void* data, size_t bytes);
  // Until `done()`, which looks at mailboxes and at has_unsent().
  template <typename Done>
  WaitResult wait(TcpPeer* peer, const Done& done, const WaitOptions& options);
  // Ends a sleep, to look at the abort word. Any thread.
  void wake();

 private:
  void pump(TcpPeer& peer);
  void sleep(int64_t ns);
  WaitResult lost(const TcpPeer& peer);

  const std::atomic<bool>& aborted_;
  std::string* problem_;
  std::vector<std::unique_ptr<TcpPeer>> peers_;
  int wake_fd_;
};

template <typename Done>
WaitResult TcpGroup::wait(TcpPeer* peer, const Done& done, const WaitOptions& options) {
  const int64_t began = monotonic_ns();
  for (int64_t now = began;; now = monotonic_ns()) {
    if (aborted_.load(std::memory_order_relaxed)) return WaitResult::Aborted;
    pump(*peer);
    if (done()) return WaitResult::Done;
    for (const auto& other : peers_)
      if (other.get() != peer) pump(*other);
    // What a peer sent before it went is still good.
    if (!peer->connection->trouble().empty()) return lost(*peer);
    const int64_t left = options.deadline_ns - now;
    if (left <= 0) return WaitResult::Deadline;
    if (!options.spin || now - began >= kTcpSpinNs) sleep(left < kSleepSliceNs ? left : kSleepSliceNs);
  }
}

// One direction of a tcp peer, as a TensorLink.
class TcpSender final : public TensorLink {
 public:
  TcpSender(TcpGroup* group, TcpPeer* peer, FrameKind kind, size_t payload_bytes, std::string* problem)
      : group_(group), peer_(peer), kind_(kind), payload_bytes_(payload_bytes), problem_(problem) {}
  WaitResult send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) override;
  WaitResult receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) override;
  void discard_before(uint32_t) override {}

 private:
  TcpGroup* group_;
  TcpPeer* peer_;
  const FrameKind kind_;
  const size_t payload_bytes_;
  std::string* problem_;
  bool begun_ = false;  // `last_` is queued, but a deadline came before all of it was sent
  FrameKey last_{};
};

class TcpReceiver final : public TensorLink {
 public:
  TcpReceiver(TcpGroup* group, TcpPeer* peer, std::string* problem) : group_(group), peer_(peer), problem_(problem) {}
  WaitResult send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) override;
  WaitResult receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) override;
  void discard_before(uint32_t step) override { peer_->channel_frames->discard_before({peer_->channel_kind, step, 0, 0}); }

 private:
  TcpGroup* group_;
  TcpPeer* peer_;
  std::string* problem_;
};

}  // namespace shardmesh
