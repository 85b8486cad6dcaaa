#include "stage_exchange.h"

#include <utility>

#include "wait.h"

namespace shardmesh {
namespace {

std::string block_name(uint16_t kind, uint32_t step, uint16_t operation, uint16_t subtree, size_t bytes) {
  return frame_name(FrameKey{static_cast<FrameKind>(kind), step, operation, subtree}) + " with " + std::to_string(bytes) + " bytes";
}

}  // namespace

std::string frame_name(const FrameKey& key) {
  static const char* const kinds[] = {"reduce", "rows", "logits", "hidden", "tokens"};
  const int kind = static_cast<int>(key.kind);
  return std::string(kind >= 0 && kind < 5 ? kinds[kind] : "unknown") + " frame of step " + std::to_string(key.step) + " operation " + std::to_string(key.operation) +
         " subtree " + std::to_string(key.subtree);
}

StageExchange::StageExchange(PeerAddress self, const SegmentView& own, std::vector<ExchangePeer> peers, const FrameOut& frame_out, TcpGroup* tcp,
                             const std::atomic<bool>& aborted, std::string* problem)
    : self_(self), own_(own), peers_(std::move(peers)), frame_out_(frame_out), tcp_(tcp), aborted_(aborted), problem_(problem), held_(peers_.size()) {
  for (const ExchangePeer& peer : peers_) frame_peers_ |= peer.mailbox != nullptr;
}

uint8_t* StageExchange::begin(const FrameKey& key, size_t bytes) {
  if (bytes > own_.exchange_bytes()) return nullptr;
  key_ = key;
  bytes_ = bytes;
  if (frame_peers_) {
    for (size_t rank = 0; rank < peers_.size(); rank++) {
      if (peers_[rank].mailbox == nullptr) continue;
      held_[rank] = MailboxFrame{};
      peers_[rank].mailbox->discard_before(key);
    }
  }
  return own_.exchange_block(counter_ + 1);
}

void StageExchange::publish(int rows) {
  const uint32_t counter = counter_ + 1;
  ExchangeLine* line = own_.exchange_line();
  line->block[counter & 1] = BlockInfo{static_cast<uint16_t>(key_.kind), key_.operation, key_.subtree, 0, key_.step, rows, bytes_};
  publish_word(&line->stamp, counter, [this] {
    const uint32_t own_rank = static_cast<uint32_t>(self_.rank) + 1;
    for (const ExchangePeer& peer : peers_)
      if (peer.segment != nullptr && peer.segment->sleep_line()->exchange_rank.load(std::memory_order_relaxed) == own_rank) return true;
    return false;
  });
  counter_ = counter;
  if (!frame_peers_) return;
  for (const ExchangePeer& peer : peers_) {
    if (peer.tcp != nullptr)
      tcp_->send(peer.tcp, key_, rows, own_.exchange_block(counter), bytes_);
    else if (peer.mailbox != nullptr)
      frame_out_(peer.address, key_, rows, own_.exchange_block(counter), bytes_);
  }
}

WaitResult StageExchange::wait(int rank, size_t bytes, const uint8_t** data, const WaitOptions& options) {
  const ExchangePeer& peer = peers_[static_cast<size_t>(rank)];
  if (peer.segment != nullptr) return wait_shm(peer, bytes, data, options);
  return wait_frame(peer, bytes, data, options);
}

WaitResult StageExchange::wait_shm(const ExchangePeer& peer, size_t bytes, const uint8_t** data, const WaitOptions& options) {
  const ExchangeLine* line = peer.segment->exchange_line();
  std::atomic<uint32_t>* flag = &own_.sleep_line()->exchange_rank;
  const WaitResult result = wait_for_word(&line->stamp, counter_, flag, static_cast<uint32_t>(peer.address.rank) + 1, aborted_, options);
  if (result != WaitResult::Done) return result;
  // The peer may have published the next exchange, but cannot begin the one after it before this rank has published too.
  const uint32_t ahead = line->stamp.load(std::memory_order_acquire) - counter_;
  const BlockInfo& info = line->block[counter_ & 1];
  if (ahead > 1) return mismatch(peer, "is " + std::to_string(ahead) + " exchanges ahead");
  if (info.kind != static_cast<uint16_t>(key_.kind) || info.step != key_.step || info.operation != key_.operation || info.subtree != key_.subtree ||
      info.bytes != bytes || bytes > peer.segment->exchange_bytes())
    return mismatch(peer, "published a " + block_name(info.kind, info.step, info.operation, info.subtree, info.bytes) + ", expected a " +
                              block_name(static_cast<uint16_t>(key_.kind), key_.step, key_.operation, key_.subtree, bytes));
  *data = peer.segment->exchange_block(counter_);
  return WaitResult::Done;
}

WaitResult StageExchange::wait_frame(const ExchangePeer& peer, size_t bytes, const uint8_t** data, const WaitOptions& options) {
  MailboxFrame& frame = held_[static_cast<size_t>(peer.address.rank)];
  WaitResult result;
  if (peer.tcp == nullptr) {
    result = peer.mailbox->wait(key_, &frame, aborted_, options.deadline_ns);
  } else {
    // Done only when the peer has ours as well: nobody pushes the rest out while this thread computes.
    bool here = false;
    const auto done = [&] { return (here = here || peer.mailbox->take(key_, &frame)) && !peer.tcp->connection->has_unsent(); };
    here = frame.data != nullptr;
    result = tcp_->wait(peer.tcp, done, options);
  }
  if (result != WaitResult::Done) return result;
  if (frame.bytes != bytes)
    return mismatch(peer, "sent a " + frame_name(key_) + " with " + std::to_string(frame.bytes) + " bytes, expected " + std::to_string(bytes));
  *data = frame.data.get();
  return WaitResult::Done;
}

WaitResult StageExchange::mismatch(const ExchangePeer& peer, const std::string& what) {
  *problem_ = peer_name(peer.address) + " " + what;
  return WaitResult::Mismatch;
}

}  // namespace shardmesh
