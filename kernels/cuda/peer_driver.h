// The peer link of one CUDA device: its own region, those of the other ranks of its stage, and the numbers of exchanges (peer_reduce.h says how kernels use them).
//
// All ranks run the same operations over the same rows, so all number their exchanges alike without a word. Own sums are written where block() says, then reduce() queues
// what publishes them and finishes the tree; a fault is known when the stream was waited for.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "peer_memory.h"
#include "peer_reduce.h"

namespace shardmesh::cuda {

class PeerDriver {
 public:
  // Regions of two blocks of at least `block_bytes`, one for each place: on the card at once, on the host when an epoch uses it.
  PeerDriver(int rank, int ranks, size_t block_bytes);
  ~PeerDriver();

  size_t bytes() const { return card_->description().bytes; }
  // Of the own regions that peers can open, one of each place at most.
  std::vector<PeerMemory> offers();

  // Opens the regions of all other ranks. Nothing is queued on the device. Throws std::runtime_error naming the rank.
  void connect(const std::vector<PeerMemory>& by_rank, uint32_t epoch);
  void disconnect();
  bool is_connected() const { return connected_; }

  // What the step's record on the card must hold, at `step` there.
  PeerStep begin_step(int64_t timeout_ms, Stream stream);
  void place_step(const PeerStep* step) { group_.step = step; }
  // The exchanges of this step are those of a graph, which was built by reduce() after follow({}): what reductions() then said.
  void follow(const std::vector<int>& reductions) { reductions_ = reductions; }
  const std::vector<int>& reductions() const { return reductions_; }
  // Where own sums go until the next reduce().
  float* block() const { return block_of(connected_ ? reductions_.size() + 1 : 0); }
  // Where those of an exchange lie, while nobody is connected too.
  float* block_of(uint64_t number) const;
  // `sums_most`: subtrees of all ranks less those of the rank that has the fewest, the same on all ranks. `norm`: null, or the norm behind it in the same launch, with the counter of
  // its arrivals.
  Problem reduce(const PeerReduction& reduction, int sums_most, int operation, Stream stream, const NormAfter* norm = nullptr, uint32_t* arrivals = nullptr);

  // Any thread: every wait ends.
  void abort();
  struct Fault {
    PeerFault kind;
    int rank, operation;
  };
  // Of the epoch; when the stream was waited for.
  Fault fault() const;

 private:
  SharedRegion& region(PeerMemory::Place place);

  const size_t block_bytes_;
  std::unique_ptr<SharedRegion> card_, host_;
  std::vector<std::unique_ptr<OpenedRegion>> opened_;
  Memory report_;
  PeerGroup group_{};
  bool connected_ = false;
  uint64_t stamp_ = 0;               // of the last exchange of the steps before
  std::vector<int> reductions_;      // the operation of each exchange of this step
};

}  // namespace shardmesh::cuda
