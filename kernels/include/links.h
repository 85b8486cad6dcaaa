// How a step's frames reach other ranks, seen from the compute thread. Three drivers: shared memory (single-writer segments, spin then futex), tcp (sealed
// sockets that the compute thread itself reads and writes, spin then poll) and host (frames go out through a callback and come in through deliver(), for gRPC
// and NATS). A wait always ends: data, deadline, abort, or a connection that broke.
#pragma once
#include <array>
#include <atomic>
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

// Mismatch: the peer's frame has another key or length than expected, or a frame is larger than LinksOptions allows. The two ranks do not run the same
// step; Links::problem() says what was found. Lost: the connection to the peer cannot be used any more; Links::problem() says why.
enum class WaitResult { Done, Deadline, Aborted, Mismatch, Lost };

struct WaitOptions {
  int64_t deadline_ns;   // CLOCK_MONOTONIC
  bool spin;
};

// A group in which every rank publishes one block of bytes per exchange and reads those of all others. Exchanges happen in the same order on all ranks, with
// the same key on all ranks (ascending in step, operation, subtree), and every rank waits for all others before it begins the next one.
// Double buffered: the block of exchange c may be overwritten at exchange c + 2, so no closing barrier is needed.
class Exchange {
 public:
  virtual ~Exchange() = default;
  // Room for the next publish, `bytes` long, 64-byte aligned; valid until publish(). Null when `bytes` is above LinksOptions::exchange_bytes.
  virtual uint8_t* begin(const FrameKey& key, size_t bytes) = 0;
  // Makes the block of begin() visible to the other ranks.
  virtual void publish(int rows) = 0;
  // Waits for rank r's block of the same exchange; *data is 64-byte aligned and valid until the next begin(). Not for the own rank.
  virtual WaitResult wait(int rank, size_t bytes, const uint8_t** data, const WaitOptions& options) = 0;
};

// One direction, one pair of workers: hidden states and sampled ids.
class TensorLink {
 public:
  virtual ~TensorLink() = default;
  virtual WaitResult send(const FrameKey& key, int rows, const void* data, size_t bytes, const WaitOptions& options) = 0;
  // Waits for the frame with this key; frames of other keys stay queued. `out` has room for `capacity` bytes; *bytes is the frame's length.
  virtual WaitResult receive(const FrameKey& key, void* out, size_t capacity, size_t* bytes, const WaitOptions& options) = 0;
  // Frames of earlier steps are not wanted any more, queued or still to come (sampled ids that nobody asked for). Hidden frames are
  // received in ascending (step, operation, subtree); those before the last one received are forgotten without it.
  virtual void discard_before(uint32_t step) = 0;
};

// Sums of one tcp endpoint over all its epochs. `corrupt`: frames that did not open or announced an impossible length, each of which ended its connection;
// `refused`: callers that were not let in (wrong key, epoch or address, or silent).
struct TcpCounters {
  std::atomic<uint64_t> frames_out{0}, bytes_out{0}, frames_in{0}, bytes_in{0}, corrupt{0}, refused{0};
};

class TcpConnection;

// Memory of one rank that its peers' cards read by themselves, so that reductions need no frames and no host: what is needed to open it. Card: exported by CUDA IPC.
// Host: an anonymous memory file, opened through /proc/<pid>/fd/<fd>.
struct PeerMemory {
  enum class Place { Card, Host };
  Place place = Place::Host;
  int pid = 0;
  int fd = -1;                          // Host
  std::array<uint8_t, 64> handle = {};  // Card
  std::array<uint8_t, 16> card = {};    // which card writes it: its UUID
  size_t bytes = 0;
};

struct PeerLink {
  PeerAddress peer;
  bool shm;
  int pid, fd;
  size_t bytes;
  std::shared_ptr<TcpConnection> tcp = nullptr;  // the tcp driver, when there is one
  // Reductions with this peer go through its memory, everything else through its segment. `epoch`: of the stamps in it.
  std::shared_ptr<const PeerMemory> memory = nullptr;
  uint32_t epoch = 0;
  // This peer is an executor of this process on the same card: steps are done together there, everything else goes through its segment.
  bool same_card = false;
};

struct LinksOptions {
  PeerAddress self;
  int stages;
  std::vector<int> ranks_per_stage;
  size_t exchange_bytes;   // most bytes one rank publishes in one exchange (own; ranks may differ)
  size_t hidden_bytes;     // most bytes of one hidden frame
  size_t tokens_bytes;     // most bytes of one sampled-ids frame
};

// Frames that deliver() did not keep. `refused`: unknown peer, wrong kind, or beyond what one source may have waiting; `late`: of an exchange or step that
// is over; `duplicate`: already here.
struct LinkCounters {
  uint64_t refused, late, duplicate;
};

// Called on the compute thread, from publish() and send(); `data` is valid during the call. It must not throw.
using FrameOut = std::function<void(PeerAddress destination, const FrameKey& key, int rows, const void* data, size_t bytes)>;

// All links of one worker in one epoch. open_segment() makes the own outbound segment (memfd); connect() attaches to the peers, once.
// deliver(), abort() and counters() may be called from any thread after connect(); an Exchange or TensorLink belongs to one thread at a time. Before the object is
// destroyed, abort() and let the compute thread return: everything mapped and open is then let go.
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
  // Host driver: a frame that arrived. Bytes are copied. False: not kept, and counted (LinkCounters). What one source may have waiting is bounded.
  virtual bool deliver(PeerAddress source, const FrameKey& key, int rows, const void* data, size_t bytes) = 0;
  // Every wait, now and later, returns Aborted.
  virtual void abort() = 0;
  virtual LinkCounters counters() const = 0;
  // What the last Mismatch or Lost was, for the error message. Read it on the thread that got it.
  virtual std::string problem() const = 0;
};

// Throws std::runtime_error when the options cannot be laid out.
std::unique_ptr<Links> make_links(const LinksOptions& options, FrameOut frame_out);

}  // namespace shardmesh
