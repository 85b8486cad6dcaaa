// How a step's frames reach other ranks, seen from the compute thread. Two drivers: shared memory (single-writer segments, spin then futex) and host
// (frames go out through a callback and come in through deliver(), for gRPC and NATS). A wait always ends: data, deadline or abort.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace shardmesh {

struct PeerAddress {
  int stage;
  int rank;
  bool operator==(const PeerAddress& o) const { return stage == o.stage && rank == o.rank; }
};

enum class FrameKind : int { Reduce, Rows, Logits, Hidden, Tokens };

// What tells two frames of one epoch apart.
struct FrameKey {
  FrameKind kind;
  uint32_t step;
  uint16_t operation;
  uint16_t subtree;
};

enum class WaitResult { Done, Deadline, Aborted };

struct WaitOptions {
  int64_t deadline_ns;   // CLOCK_MONOTONIC
  bool spin;
};

// A group in which every rank publishes one block of bytes per exchange and reads those of all others. Exchanges happen in the same order on all ranks.
// Double buffered: the block of exchange c may be overwritten at exchange c + 2, so no closing barrier is needed.
class Exchange {
 public:
  virtual ~Exchange() = default;
  // Room for the next publish, `bytes` long; valid until publish().
  virtual uint8_t* begin(const FrameKey& key, size_t bytes) = 0;
  // Makes the block of begin() visible to the other ranks.
  virtual void publish(int rows) = 0;
  // Waits for rank r's block of the same exchange; *data is valid until the next begin(). Not for the own rank.
  virtual WaitResult wait(int rank, size_t bytes, const uint8_t** data, const WaitOptions& options) = 0;
};

// One direction, one pair of workers: hidden states and sampled ids.
class TensorLink {
 public:
  virtual ~TensorLink() = default;
  virtual WaitResult send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) = 0;
  // Waits for the frame with this key; frames of other keys stay queued. `out` has room for `capacity` bytes; *bytes is the frame's length.
  virtual WaitResult receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) = 0;
};

struct PeerLink {
  PeerAddress peer;
  bool shm;
  int pid, fd;
  size_t bytes;
};

struct LinksOptions {
  PeerAddress self;
  int stages;
  std::vector<int> ranks_per_stage;
  size_t exchange_bytes;   // most bytes one rank publishes in one exchange
  size_t hidden_bytes;     // most bytes of one hidden frame
  size_t tokens_bytes;     // most bytes of one sampled-ids frame
};

using FrameOut = std::function<void(PeerAddress destination, const FrameKey& key, int rows, const void* data, size_t bytes)>;

// All links of one worker in one epoch. open_segment() makes the own outbound segment (memfd); connect() attaches to the peers.
class Links {
 public:
  virtual ~Links() = default;
  struct Segment { int pid, fd; size_t bytes; };
  virtual Segment open_segment() = 0;
  // Throws std::runtime_error naming the peer when a segment cannot be attached or does not have the stated size and layout.
  virtual void connect(const std::vector<PeerLink>& peers) = 0;
  virtual Exchange* exchange() = 0;                        // with the ranks of the own stage; null for one rank
  virtual TensorLink* to(PeerAddress peer) = 0;            // null when this worker never sends there
  virtual TensorLink* from(PeerAddress peer) = 0;
  // Host driver: a frame that arrived. Bytes are copied. False: nobody can want it (unknown peer, wrong kind).
  virtual bool deliver(PeerAddress source, const FrameKey& key, int rows, const void* data, size_t bytes) = 0;
  // Every wait, now and later, returns Aborted.
  virtual void abort() = 0;
};

std::unique_ptr<Links> make_links(const LinksOptions& options, FrameOut frame_out);

}  // namespace shardmesh
