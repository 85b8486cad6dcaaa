#include "tcp_group.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "segment.h"
#include "stage_exchange.h"

namespace shardmesh {

TcpGroup::TcpGroup(const std::atomic<bool>& aborted, std::string* problem) : aborted_(aborted), problem_(problem), wake_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (wake_fd_ < 0) throw std::runtime_error(std::string("links: eventfd: ") + std::strerror(errno));
}

TcpGroup::~TcpGroup() { ::close(wake_fd_); }

TcpPeer* TcpGroup::add(TcpPeer peer) {
  peers_.push_back(std::make_unique<TcpPeer>(std::move(peer)));
  return peers_.back().get();
}

void TcpGroup::send(TcpPeer* peer, const FrameKey& key, int rows, const void* data, size_t bytes) {
  peer->connection->queue(key, rows, data, bytes);
  peer->connection->flush();
}

void TcpGroup::wake() { ::eventfd_write(wake_fd_, 1); }

namespace {

Mailbox* mailbox_for(const TcpPeer& peer, FrameKind kind) {
  if (kind == FrameKind::Hidden || kind == FrameKind::Tokens) return kind == peer.channel_kind ? peer.channel_frames : nullptr;
  return peer.exchange_frames;
}

// Late and duplicate frames change nothing: a step that was given up may still have some on the way.
bool deliver_held(TcpPeer& peer) {
  Mailbox* mailbox = mailbox_for(peer, peer.frame.key.kind);
  if (mailbox != nullptr && !mailbox->has_room(peer.frame.bytes)) return false;
  if (mailbox != nullptr) mailbox->put(peer.frame.key, peer.frame.rows, peer.frame.payload, peer.frame.bytes);
  peer.held = false;
  return true;
}

}  // namespace

void TcpGroup::pump(TcpPeer& peer) {
  TcpConnection& connection = *peer.connection;
  connection.flush();
  for (bool read = false;;) {
    if (peer.held && !deliver_held(peer)) return;
    if (connection.take(&peer.frame)) {
      peer.held = true;
    } else {
      if (read || !connection.trouble().empty()) return;
      connection.read();
      read = true;
    }
  }
}

void TcpGroup::sleep(int64_t ns) {
  std::vector<pollfd> waits;
  waits.push_back({wake_fd_, POLLIN, 0});
  for (const auto& peer : peers_) {
    TcpConnection& connection = *peer->connection;
    if (!connection.trouble().empty()) continue;
    const int events = (peer->held ? 0 : POLLIN) | (connection.has_unsent() ? POLLOUT : 0);
    if (events != 0) waits.push_back({connection.fd(), static_cast<short>(events), 0});
  }
  const timespec limit{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
  ::ppoll(waits.data(), waits.size(), &limit, nullptr);
}

WaitResult TcpGroup::lost(const TcpPeer& peer) {
  *problem_ = peer_name(peer.connection->peer()) + ": " + peer.connection->trouble();
  return WaitResult::Lost;
}

WaitResult TcpSender::send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) {
  if (key.kind != kind_ || bytes > payload_bytes_) {
    *problem_ = peer_name(peer_->connection->peer()) + ": a " + frame_name(key) + " with " + std::to_string(bytes) + " bytes does not travel on this link";
    return WaitResult::Mismatch;
  }
  if (!begun_ || !same_key(key, last_)) group_->send(peer_, key, rows, data, bytes);
  last_ = key;
  const WaitResult result = group_->wait(peer_, [this] { return !peer_->connection->has_unsent(); }, options);
  begun_ = result == WaitResult::Deadline;
  return result;
}

WaitResult TcpSender::receive(const FrameKey&, void*, size_t, size_t*, const WaitOptions&) {
  *problem_ = peer_name(peer_->connection->peer()) + ": receive on the sending end of a link";
  return WaitResult::Mismatch;
}

WaitResult TcpReceiver::send(const FrameKey&, int, const void*, size_t, const WaitOptions&) {
  *problem_ = peer_name(peer_->connection->peer()) + ": send on the receiving end of a link";
  return WaitResult::Mismatch;
}

WaitResult TcpReceiver::receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) {
  MailboxFrame frame;
  const WaitResult result = group_->wait(peer_, [&] { return peer_->channel_frames->take(key, &frame); }, options);
  if (result != WaitResult::Done) return result;
  if (frame.bytes > capacity) {
    *problem_ = peer_name(peer_->connection->peer()) + ": sent a " + frame_name(key) + " with " + std::to_string(frame.bytes) + " bytes, there is room for " +
                std::to_string(capacity);
    return WaitResult::Mismatch;
  }
  if (frame.bytes > 0) std::memcpy(out, frame.data.get(), frame.bytes);
  *bytes = frame.bytes;
  // Hidden frames are received in order, each once. Sampled ids may be asked for in any order.
  if (key.kind == FrameKind::Hidden) peer_->channel_frames->discard_through(key);
  return WaitResult::Done;
}

}  // namespace shardmesh
