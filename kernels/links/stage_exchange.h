// The exchange among the ranks of one stage. Shared-memory peers read this rank's block where it was computed; tcp and host peers get it as a frame.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "links.h"
#include "mailbox.h"
#include "segment.h"
#include "tcp_group.h"

namespace shardmesh {

// One other rank of the stage, as the exchange sees it: a segment (shm), or a mailbox (host) that a connection fills (tcp).
struct ExchangePeer {
  PeerAddress address;
  const SegmentView* segment;
  Mailbox* mailbox;
  TcpPeer* tcp;
};

class StageExchange final : public Exchange {
 public:
  // `peers` by rank; the own rank's entry has neither segment nor mailbox.
  StageExchange(PeerAddress self, const SegmentView& own, std::vector<ExchangePeer> peers, const FrameOut& frame_out, TcpGroup* tcp,
                const std::atomic<bool>& aborted, std::string* problem);

  uint8_t* begin(const FrameKey& key, size_t bytes) override;
  void publish(int rows) override;
  WaitResult wait(int rank, size_t bytes, const uint8_t** data, const WaitOptions& options) override;

 private:
  WaitResult wait_shm(const ExchangePeer& peer, size_t bytes, const uint8_t** data, const WaitOptions& options);
  WaitResult wait_frame(const ExchangePeer& peer, size_t bytes, const uint8_t** data, const WaitOptions& options);
  WaitResult mismatch(const ExchangePeer& peer, const std::string& what);

  const PeerAddress self_;
  const SegmentView& own_;
  const std::vector<ExchangePeer> peers_;
  const FrameOut& frame_out_;
  TcpGroup* tcp_;
  const std::atomic<bool>& aborted_;
  std::string* problem_;
  bool frame_peers_ = false;
  uint32_t counter_ = 0;  // exchanges published
  FrameKey key_{};
  size_t bytes_ = 0;
  std::vector<MailboxFrame> held_;  // frames handed out by wait(), by rank, until the next begin()
};

std::string frame_name(const FrameKey& key);

}  // namespace shardmesh
