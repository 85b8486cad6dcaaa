// The memory one worker publishes in one epoch: an anonymous file (memfd), written by its owner only, mapped read-only by its peers through
// /proc/<pid>/fd/<fd>. It has no name, so there is nothing to unlink, and the last process that maps it takes it along, however that process ends.
//
//   offset 0      SegmentHeader                        one page
//          4096   ExchangeLine, SleepLine              the stage exchange: stamp and descriptions; whom the owner sleeps for
//                 ChannelLines[all ranks of the mesh]  per peer g: what was sent to g, what was consumed from g
//          page   exchange block 0, exchange block 1   exchange_bytes each, rounded up to pages
//          page   ring of each outbound channel        slots of RingSlot + payload, by peer index
//
// The layout follows from the owner's LinksOptions alone, so a peer computes it again and compares.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "links.h"

namespace shardmesh {

constexpr uint64_t kSegmentMagic = 0x31304b4e494c4d53ull;  // "SMLINK01"
constexpr uint32_t kSegmentVersion = 1;
constexpr size_t kLine = 64;
constexpr size_t kPage = 4096;

struct SegmentHeader {
  uint64_t magic;
  uint32_t version;
  uint32_t header_bytes;
  uint64_t bytes;            // whole segment
  uint64_t topology;         // digest of stages and ranks per stage
  uint64_t exchange_bytes, hidden_bytes, tokens_bytes;
  int32_t stage, rank;       // the owner
  int32_t pid;
  uint32_t reserved;
};
static_assert(sizeof(SegmentHeader) == 72, "the segment header is a format between processes");

// What one block or ring slot holds, checked by the reader against what it expects.
struct BlockInfo {
  uint16_t kind, operation, subtree, reserved;
  uint32_t step;
  int32_t rows;
  uint64_t bytes;
};
static_assert(sizeof(BlockInfo) == 24, "two descriptions and the stamp share one cache line");

// `stamp` counts exchanges; block[c & 1] describes exchange c.
struct alignas(kLine) ExchangeLine {
  std::atomic<uint32_t> stamp;
  uint32_t reserved;
  BlockInfo block[2];
};
static_assert(sizeof(ExchangeLine) == kLine, "one line, so that a waiting rank pulls stamp and description at once");

// Written only when the owner goes to sleep, so it stays shared in its peers' caches while everybody spins.
struct alignas(kLine) SleepLine {
  std::atomic<uint32_t> exchange_rank;  // rank + 1 whose stamp the owner sleeps on, 0: awake
};

// Towards one peer g: line 0 as the writer of the channel to g, line 1 as the reader of the channel from g.
struct ChannelLines {
  alignas(kLine) std::atomic<uint32_t> produced;
  std::atomic<uint32_t> writer_sleeps;
  alignas(kLine) std::atomic<uint32_t> consumed;
  std::atomic<uint32_t> reader_sleeps;
};
static_assert(sizeof(ChannelLines) == 2 * kLine);

struct alignas(kLine) RingSlot {
  BlockInfo info;
};
static_assert(sizeof(RingSlot) == kLine);

// What travels from one rank to another on a TensorLink; at most one kind for an ordered pair.
enum class ChannelKind { None, Hidden, Tokens };
ChannelKind channel_kind(const LinksOptions& options, PeerAddress from, PeerAddress to);

// Ranks of the mesh counted through all stages; -1 for an address outside it.
int peer_index(const LinksOptions& options, PeerAddress address);
PeerAddress peer_at(const LinksOptions& options, int index);
int peer_count(const LinksOptions& options);
std::string peer_name(PeerAddress address);

struct RingLayout {
  ChannelKind kind = ChannelKind::None;
  size_t offset = 0;        // of slot 0
  size_t slot_bytes = 0;    // RingSlot + payload, multiple of a line
  size_t payload_bytes = 0;
  uint32_t slots = 0;       // power of two, so that a wrapping counter finds its slot
};

struct SegmentLayout {
  size_t exchange_line, sleep_line, channels;
  size_t exchange_block[2];
  std::vector<RingLayout> rings;  // by peer index of the reader
  size_t bytes;
};
// Layout of the segment of `owner`. Throws std::runtime_error when a size is beyond what can be mapped.
SegmentLayout segment_layout(const LinksOptions& options, PeerAddress owner, size_t exchange_bytes);

// A mapped segment, own (writable, keeps its descriptor open for the peers) or a peer's (read-only). Movable.
class SegmentView {
 public:
  SegmentView() = default;
  SegmentView(SegmentView&& other) noexcept;
  SegmentView& operator=(SegmentView&& other) noexcept;
  ~SegmentView();

  // Throws std::runtime_error naming the failing call.
  static SegmentView create(const LinksOptions& options);
  // Throws std::runtime_error naming the peer, what was found and what was expected.
  static SegmentView attach(const LinksOptions& options, const PeerLink& link);

  explicit operator bool() const { return base_ != nullptr; }
  int fd() const { return fd_; }
  const SegmentLayout& layout() const { return layout_; }
  const SegmentHeader& header() const { return *reinterpret_cast<const SegmentHeader*>(base_); }
  size_t exchange_bytes() const { return exchange_bytes_; }

  ExchangeLine* exchange_line() const { return reinterpret_cast<ExchangeLine*>(base_ + layout_.exchange_line); }
  SleepLine* sleep_line() const { return reinterpret_cast<SleepLine*>(base_ + layout_.sleep_line); }
  ChannelLines* channel(int peer) const { return reinterpret_cast<ChannelLines*>(base_ + layout_.channels) + peer; }
  uint8_t* exchange_block(uint32_t counter) const { return base_ + layout_.exchange_block[counter & 1]; }
  RingSlot* slot(int reader, uint32_t counter) const {
    const RingLayout& ring = layout_.rings[static_cast<size_t>(reader)];
    return reinterpret_cast<RingSlot*>(base_ + ring.offset + (counter & (ring.slots - 1)) * ring.slot_bytes);
  }

 private:
  uint8_t* base_ = nullptr;
  int fd_ = -1;
  size_t exchange_bytes_ = 0;
  SegmentLayout layout_{};
};

}  // namespace shardmesh
