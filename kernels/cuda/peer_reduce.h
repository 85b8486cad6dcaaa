// Reductions among the ranks of one host, by kernels that read the other ranks' memory: no host waits between a partial product and the norm behind it.
//
// Each rank has a region that it alone writes and its peers read: card memory, or host memory that every card of the group reaches.
//
//   offset 0      stamp, u64     of the newest exchange whose block is complete; written with release, polled with acquire, both at system scope
//          128    failed, u64    not 0: a wait of this rank has failed; only its owner looks
//          256    block 0, block 1, block_bytes each: exchange e lies in block e mod 2
//
// A stamp is 20 bits of the epoch above a count of 44 bits, so what an earlier epoch left is never taken for an exchange of this one. Exchanges of a step are numbered
// from 1, and the step's record in device memory says where its numbers begin: launches are the same for every step.
//
// Two blocks are enough: a rank writes the block of exchange e when its kernel of e - 1 has ended, and that one saw the stamp e - 1 of every peer, whose kernel of e - 2
// had ended before. A step has an even number of exchanges, so that its first one lies in block 1.
#pragma once
#include <cstddef>
#include <cstdint>

#include "operations.h"

namespace shardmesh::cuda {

constexpr int kPeersMax = 16;  // as many ranks as a tree has units
constexpr size_t kPeerHeaderBytes = 256;
constexpr int kStampCountBits = 44;

struct PeerHeader {
  alignas(128) uint64_t stamp;
  alignas(128) uint64_t failed;
};
static_assert(sizeof(PeerHeader) == kPeerHeaderBytes, "the header is a format between processes");

constexpr uint64_t stamp_of(uint64_t epoch, uint64_t exchanges) { return epoch << kStampCountBits | exchanges; }
inline size_t peer_region_bytes(size_t block_bytes) { return kPeerHeaderBytes + 2 * block_bytes; }

// Of a step; device memory.
struct PeerStep {
  uint64_t stamp;       // of the last exchange before the step; its count is even
  uint64_t timeout_ns;  // of each wait
};

// Between the host and its card while kernels run; host memory that the card reads and writes directly.
enum class PeerFault : uint32_t { None, Deadline, Aborted };
struct PeerReport {
  uint32_t abort;  // not 0: every wait ends
  uint32_t reserved;
  uint64_t fault;  // the last one: a PeerFault, then << 8 the rank that was waited for, << 16 the number of the exchange
};

// The group as one rank sees it.
struct PeerGroup {
  int rank, ranks;
  uint8_t* regions[kPeersMax];       // by rank, where this card reaches them
  uint64_t block_bytes[kPeersMax];   // multiples of 256
  const PeerStep* step;
  PeerReport* report;
};

struct PeerReduction {
  int units, node_count;
  const int *lo, *hi;     // host: units of each node, in unit order
  const int* owner;       // host: the rank whose block holds the node; nodes of one rank lie there one after the other, [T, width] each
  const float* bias;      // [width] or null
  float* residual;        // [T, width], residual_stride apart
  int64_t residual_stride, width;
  int tokens;
};

// residual += (tree + bias), as finish_tree, once every rank has published exchange `exchange`; this rank's own sums are complete on the stream.
// In one go every rank reads all sums. In two each rank finishes the tree for its share of the rows and publishes them as exchange + 1, and all gather the shares.
// Limits: 2 to 16 ranks; width and strides multiples of 4; sums and shares fit the blocks. On a fault the residual stays as it was, and every later one ends at once.
Problem peer_reduce(const PeerGroup& group, uint32_t exchange, const PeerReduction& reduction, bool two_goes, Stream stream);
// peer_reduce with the norm of the residual behind it, quantised, in one launch whether in one go or two: at most kFusedTokensMax tokens, width a multiple of 32.
// arrivals: one counter, 0 before and after, on a fault too.
Problem peer_reduce_norm(const PeerGroup& group, uint32_t exchange, const PeerReduction& reduction, bool two_goes, const NormAfter& norm, uint32_t* arrivals, Stream stream);
// An exchange of nothing: makes the number of a step's exchanges even.
Problem peer_meet(const PeerGroup& group, uint32_t exchange, Stream stream);

}  // namespace shardmesh::cuda
