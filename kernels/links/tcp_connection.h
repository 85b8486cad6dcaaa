// One sealed TCP connection between two ranks in one epoch. Nothing here waits: flush() writes what the socket takes, read() takes what has arrived, and the
// compute thread decides how long to go on (tcp_group.h).
//
//   frame on the wire:   length u32 | header 16 bytes | payload | tag 16 bytes        little-endian; header and payload are sealed, the length is authenticated
//   header:              kind u16, operation u16, subtree u16, 0 u16, step u32, rows u32
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "links.h"
#include "seal.h"

namespace shardmesh {

constexpr size_t kTcpPrefixBytes = 4, kTcpHeaderBytes = 16;
constexpr size_t kTcpFrameOverhead = kTcpPrefixBytes + kTcpHeaderBytes + kTagBytes;

struct TcpFrame {
  FrameKey key;
  int rows;
  const uint8_t* payload;
  size_t bytes;
};

class TcpConnection {
 public:
  // Takes the socket, which is connected and does not block. `counters` outlives the connection.
  TcpConnection(int fd, PeerAddress peer, std::unique_ptr<Seal> out, std::unique_ptr<Seal> in, std::shared_ptr<TcpCounters> counters);
  TcpConnection(const TcpConnection&) = delete;
  TcpConnection& operator=(const TcpConnection&) = delete;
  ~TcpConnection();

  PeerAddress peer() const { return peer_; }
  int fd() const { return fd_; }
  // Why it cannot be used any more; empty while it can.
  const std::string& trouble() const { return trouble_; }
  bool has_unsent() const { return sent_ < outbox_.size(); }

  // Frames longer than this are refused before room is made for them.
  void limit_payload(size_t bytes) { payload_bytes_max_ = bytes; }
  // Seals the frame behind what is unsent; flush() sends it.
  void queue(const FrameKey& key, int rows, const void* data, size_t bytes);
  void flush();
  // Reads what has arrived, up to some frames.
  void read();
  // Opens the next frame that is here whole; its payload is valid until the next call. False: there is none, or it is broken, which trouble() says.
  bool take(TcpFrame* frame);

 private:
  void fail(const std::string& why);
  void fail_corrupt(const std::string& why);

  const int fd_;
  const PeerAddress peer_;
  const std::unique_ptr<Seal> out_, in_;
  const std::shared_ptr<TcpCounters> counters_;
  size_t payload_bytes_max_ = 0;
  std::vector<uint8_t> outbox_, inbox_, opened_;
  size_t sent_ = 0;                   // of outbox_
  size_t from_ = 0, until_ = 0;       // bytes of inbox_ that have arrived and are not taken
  std::string trouble_;
};

}  // namespace shardmesh
