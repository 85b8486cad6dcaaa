#include "peer_driver.h"

#include <stdexcept>
#include <string>

namespace shardmesh::cuda {
namespace {

// Two goes where they save the links this much: about what one more launch and one more meeting take on 25 GB/s. Not measured on cards yet. All ranks must
// decide alike, and two cards are needed to measure it, so it is no value of one card's tuning (tuning.h).
constexpr int64_t kTwoGoesSaveBytes = 256 * 1024;

const char* const kRegion = "the sums that other ranks read (stepTokensMax)";

}  // namespace

PeerDriver::PeerDriver(int rank, int ranks, size_t block_bytes)
    : block_bytes_((block_bytes + 255) / 256 * 256),
      card_(make_region(PeerMemory::Place::Card, peer_region_bytes(block_bytes_), kRegion)),
      report_(Place::Host, sizeof(PeerReport), kRegion) {
  group_.rank = rank;
  group_.ranks = ranks;
  group_.report = report_.as<PeerReport>();
  *group_.report = {};
  group_.regions[rank] = card_->card();
}

PeerDriver::~PeerDriver() = default;

SharedRegion& PeerDriver::region(PeerMemory::Place place) {
  if (place == PeerMemory::Place::Card) return *card_;
  if (!host_) host_ = make_region(place, peer_region_bytes(block_bytes_), kRegion);
  return *host_;
}

std::vector<PeerMemory> PeerDriver::offers() {
  std::vector<PeerMemory> offers;
  if (!absent_peers().empty()) return offers;
  if (card_->is_open()) offers.push_back(card_->description());
  try {
    offers.push_back(region(PeerMemory::Place::Host).description());
  } catch (const std::runtime_error&) {  // no memory files here: there are other links
  }
  return offers;
}

void PeerDriver::connect(const std::vector<PeerMemory>& by_rank, uint32_t epoch) {
  disconnect();
  if (const std::string absent = absent_peers(); !absent.empty()) throw std::runtime_error("sums cannot be read in the memory of other ranks: " + absent);
  const PeerMemory::Place place = by_rank[static_cast<size_t>(group_.rank)].place;
  SharedRegion& own = region(place);
  own.prepare();
  for (int r = 0; r < group_.ranks; r++) {
    const PeerMemory& memory = by_rank[static_cast<size_t>(r)];
    if (r == group_.rank) {
      group_.regions[r] = own.card();
      group_.block_bytes[r] = block_bytes_;
      continue;
    }
    try {
      if (memory.place != place) throw std::runtime_error("it is of another kind than the own");
      if (memory.bytes < peer_region_bytes(256) || (memory.bytes - kPeerHeaderBytes) % 512) throw std::runtime_error("it has " + std::to_string(memory.bytes) + " bytes, which is no two blocks");
      opened_.push_back(open_region(memory));
    } catch (const std::runtime_error& error) {
      disconnect();
      throw std::runtime_error("memory of rank " + std::to_string(r) + " cannot be read here: " + error.what());
    }
    group_.regions[r] = opened_.back()->card();
    group_.block_bytes[r] = (memory.bytes - kPeerHeaderBytes) / 2;
  }
  // Nobody takes the old stamp for one of this epoch, so peers may be ahead of this.
  stamp_ = stamp_of(epoch, 0);
  reductions_.clear();
  *group_.report = {};
  PeerHeader header{};
  header.stamp = stamp_;
  const uint64_t words[] = {header.stamp, header.failed};
  const Problem problem = set_words(own.card() + offsetof(PeerHeader, failed), &words[1], 1);
  if (const Problem second = problem ? problem : set_words(own.card() + offsetof(PeerHeader, stamp), &words[0], 1)) {
    disconnect();
    throw std::runtime_error(std::string("the own sums cannot be laid out: ") + second);
  }
  connected_ = true;
}

void PeerDriver::disconnect() {
  connected_ = false;
  opened_.clear();
  group_.regions[group_.rank] = card_->card();
}

PeerStep PeerDriver::begin_step(int64_t timeout_ms, Stream stream) {
  if (reductions_.size() % 2) {
    reductions_.push_back(reductions_.back());
    peer_meet(group_, static_cast<uint32_t>(reductions_.size()), stream);
  }
  stamp_ += reductions_.size();
  reductions_.clear();
  return {stamp_, static_cast<uint64_t>(timeout_ms) * 1'000'000};
}

float* PeerDriver::block_of(uint64_t number) const {
  return reinterpret_cast<float*>(group_.regions[group_.rank] + kPeerHeaderBytes + (number & 1) * block_bytes_);
}

Problem PeerDriver::reduce(const PeerReduction& reduction, int sums_most, int operation, Stream stream, const NormAfter* norm, uint32_t* arrivals) {
  const int64_t saved = int64_t{reduction.tokens} * reduction.width * 4 * (sums_most - 1) / group_.ranks * (group_.ranks - 1);
  const bool two_goes = saved > kTwoGoesSaveBytes;
  const uint32_t exchange = static_cast<uint32_t>(reductions_.size()) + 1;
  reductions_.resize(reductions_.size() + (two_goes ? 2 : 1), operation);
  return norm ? peer_reduce_norm(group_, exchange, reduction, two_goes, *norm, arrivals, stream) : peer_reduce(group_, exchange, reduction, two_goes, stream);
}

void PeerDriver::abort() { __atomic_store_n(&report_.as<PeerReport>()->abort, 1u, __ATOMIC_RELAXED); }

PeerDriver::Fault PeerDriver::fault() const {
  const uint64_t fault = __atomic_load_n(&report_.as<PeerReport>()->fault, __ATOMIC_RELAXED);
  const size_t exchange = fault >> 16;
  const bool known = exchange >= 1 && exchange <= reductions_.size();
  return {static_cast<PeerFault>(fault & 0xff), static_cast<int>(fault >> 8 & 0xff), known ? reductions_[exchange - 1] : -1};
}

}  // namespace shardmesh::cuda
