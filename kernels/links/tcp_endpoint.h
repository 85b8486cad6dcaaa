// Where a worker's tcp connections begin: a listening socket for its whole life, and a meeting in each epoch, in which every pair of ranks gets one connection
// and both ends prove to each other that they know the epoch's key. The rank whose address sorts first dials.
//
//   dialler  → answerer   Hello                    answerer closes the connection when epoch or address are not its own
//   answerer → dialler    Hello, proof             proof = HMAC(key, role, both Hellos)
//   dialler  → answerer   proof
//   then frames, sealed under HMAC(key, direction, both Hellos): two connections never share a key, so nonces may count from zero in each
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "links.h"
#include "seal.h"

namespace shardmesh {

struct TcpMeeting {
  struct Peer {
    PeerAddress address;
    std::string host_port;  // where it listens
  };
  PeerAddress self;
  uint32_t epoch;
  Key key;                  // known to the workers of this epoch only
  std::vector<Peer> peers;
  int64_t timeout_ms;
};

class TcpEndpoint {
 public:
  // Listens. Port 0: a free one. Throws std::runtime_error: no cryptography here, or the address cannot be had.
  TcpEndpoint(const std::string& host, int port);
  TcpEndpoint(const TcpEndpoint&) = delete;
  TcpEndpoint& operator=(const TcpEndpoint&) = delete;
  ~TcpEndpoint();

  int port() const { return port_; }
  const TcpCounters& counters() const { return *counters_; }

  // Blocks until there is a connection with every peer. One meeting at a time. Throws std::runtime_error naming the peers that did not come, and why.
  std::vector<std::shared_ptr<TcpConnection>> meet(const TcpMeeting& meeting);
  // Ends the meeting that is going on, and every later one. Any thread.
  void close();

 private:
  int listener_ = -1, wake_fd_ = -1, port_ = 0;
  std::shared_ptr<TcpCounters> counters_ = std::make_shared<TcpCounters>();
  std::mutex meeting_;
  std::atomic<bool> closed_{false};
};

}  // namespace shardmesh
