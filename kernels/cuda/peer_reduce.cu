// residual[t, r] = residual[t, r] + (tree + bias[r]): finish_tree, with the subtree sums of the other ranks read where those ranks left them (peer_reduce.h).
//   sums of rank p in its block: [own subtrees][T, width] fp32          residual [T, width] fp32          four values a thread
// Every block of threads publishes the own stamp, and waits for all peers by itself: blocks wait for none of their own grid, so no number of them must be resident.
// In two goes rank p finishes rows [T p / ranks, T (p + 1) / ranks) into its next block, [rows, width], and all ranks add everybody's rows to the residual.
//   Bytes read from peers: (all sums - own sums) in one go; about 1 / ranks of that, and the result once, in two. Same bits.
// peer_reduce_norm_kernel goes on with the norm of the residual, in the block that comes last (arrivals.cuh): a decode layer has no node for it. In two goes that block is also
// the one that publishes the share, once all of it is written, and gathers those of the others: few rows, and still no block waits for another of its grid.
// A wait ends at its deadline, or when the host says so; then `failed` ends every later one of the epoch at once. Method: one-shot and two-shot all-reduce as in NVIDIA's
// and vLLM's custom kernels, here with flags that only their owner writes, so that a rank of an older epoch cannot hurt a newer one.
#include "arrivals.cuh"
#include "device.cuh"
#include "norm_rows.cuh"
#include "peer_reduce.h"
#include "system_scope.cuh"
#include "tree_walk.cuh"

namespace shardmesh::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocksMax = 64;       // each polls all peers
constexpr unsigned kPollsPerLook = 32;   // at the clock and the host's word, which is further away than a peer

__device__ __forceinline__ const float* block_of(const PeerGroup& group, int rank, uint32_t exchange) {
  return reinterpret_cast<const float*>(group.regions[rank] + kPeerHeaderBytes + (exchange & 1) * group.block_bytes[rank]);
}

__device__ __forceinline__ bool is_reached(uint64_t stamp, uint64_t wanted) { return stamp >> kStampCountBits == wanted >> kStampCountBits && stamp >= wanted; }

// False after noting why.
__device__ bool wait_for(const PeerGroup& group, int rank, uint64_t wanted, uint32_t exchange) {
  const uint64_t* stamp = &reinterpret_cast<const PeerHeader*>(group.regions[rank])->stamp;
  const uint64_t began = global_timer();
  for (unsigned polls = 1;; polls++) {
    if (is_reached(load_acquire_system(stamp), wanted)) return true;
    if (polls % kPollsPerLook) continue;
    const bool late = global_timer() - began > group.step->timeout_ns;
    if (!late && load_relaxed_system(&group.report->abort) == 0) continue;
    const PeerFault fault = late ? PeerFault::Deadline : PeerFault::Aborted;
    reinterpret_cast<PeerHeader*>(group.regions[group.rank])->failed = 1;
    store_relaxed_system(&group.report->fault, static_cast<uint64_t>(fault) | static_cast<uint64_t>(rank) << 8 | static_cast<uint64_t>(exchange) << 16);
    return false;
  }
}

// Publishes what this rank has written for `exchange`, and waits for all others. False, in every thread of the block, when the exchange does not come about.
__device__ __forceinline__ bool meet(const PeerGroup& group, uint32_t exchange) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    const uint64_t wanted = group.step->stamp + exchange;
    PeerHeader* own = reinterpret_cast<PeerHeader*>(group.regions[group.rank]);
    bool here = true;
    if (lane == group.rank) {
      here = own->failed == 0;
      if (here) store_release_system(&own->stamp, wanted);
    }
    here = __all_sync(kWholeWarp, here);
    if (here && lane < group.ranks && lane != group.rank) here = wait_for(group, lane, wanted, exchange);
    here = __all_sync(kWholeWarp, here);
    if (lane == 0) shared[0] = here;
  }
  __syncthreads();
  return shared[0] != 0;
}

struct PeerNodes {
  int8_t owner[kSegmentsMax];
  int8_t index[kSegmentsMax];  // among its owner's
};

__device__ __forceinline__ int first_row_of(int rank, int ranks, int tokens) { return static_cast<int>(static_cast<int64_t>(tokens) * rank / ranks); }

__device__ __forceinline__ const float4* at(const float* values, int64_t offset) { return reinterpret_cast<const float4*>(values + offset); }
__device__ __forceinline__ float4* at(float* values, int64_t offset) { return reinterpret_cast<float4*>(values + offset); }

struct PeerRows {
  const float* bias;
  float* residual;
  int64_t residual_stride, width;
  int tokens, first, rows;
  bool two_goes;
};

// Rows [first, first + rows) of all: to the residual, or in two goes into the block of the next exchange. Every block of the grid has a part of them.
__device__ __forceinline__ void finish_rows(const PeerGroup& group, uint32_t exchange, const TreeWalk& walk, const PeerNodes& nodes, const PeerRows& r) {
  float* share = const_cast<float*>(block_of(group, group.rank, exchange + 1));
  const int64_t quads = r.width / 4, count = r.rows * quads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / quads, column = (i - row * quads) * 4;
    float4 y = walk_tree<float4>(walk, [&](int n) { return *at(block_of(group, nodes.owner[n], exchange), (nodes.index[n] * static_cast<int64_t>(r.tokens) + r.first + row) * r.width + column); });
    if (r.bias) y = tree_walk::add(y, *at(r.bias, column));
    float4* to = r.two_goes ? at(share, row * r.width + column) : at(r.residual, (r.first + row) * r.residual_stride + column);
    *to = r.two_goes ? y : tree_walk::add(*to, y);
  }
}

// Every rank's share of the rows is added to the residual, by the blocks from `block` on, `blocks` of them.
__device__ __forceinline__ void gather_rows(const PeerGroup& group, uint32_t exchange, const PeerRows& r, int block, int blocks) {
  const int64_t quads = r.width / 4, count = r.tokens * quads;
  for (int64_t i = static_cast<int64_t>(block) * kThreads + threadIdx.x; i < count; i += static_cast<int64_t>(blocks) * kThreads) {
    const int64_t row = i / quads, column = (i - row * quads) * 4;
    int owner = 0;
    while (row >= first_row_of(owner + 1, group.ranks, r.tokens)) owner++;
    float4* to = at(r.residual, row * r.residual_stride + column);
    *to = tree_walk::add(*to, *at(block_of(group, owner, exchange), (row - first_row_of(owner, group.ranks, r.tokens)) * r.width + column));
  }
}

__global__ void __launch_bounds__(kThreads) peer_reduce_kernel(const PeerGroup group, const uint32_t exchange, const TreeWalk walk, const PeerNodes nodes, const PeerRows rows) {
  grid_dependency_wait();
  if (meet(group, exchange)) finish_rows(group, exchange, walk, nodes, rows);
}

__global__ void __launch_bounds__(kThreads) peer_gather_kernel(const PeerGroup group, const uint32_t exchange, const PeerRows rows) {
  grid_dependency_wait();
  if (meet(group, exchange)) gather_rows(group, exchange, rows, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

// A block whose wait has failed arrives as well, so that the counter is 0 again for the next epoch.
__global__ void __launch_bounds__(kThreads) peer_reduce_norm_kernel(const PeerGroup group, const uint32_t exchange, const TreeWalk walk, const PeerNodes nodes, const PeerRows rows, const NormAfter norm,
                                                                    uint32_t* arrivals) {
  grid_dependency_wait();
  if (meet(group, exchange)) finish_rows(group, exchange, walk, nodes, rows);
  if (!comes_last(arrivals, gridDim.x, reinterpret_cast<uint32_t*>(dynamic_shared()) + 1)) return;
  if (reinterpret_cast<const PeerHeader*>(group.regions[group.rank])->failed) return;  // in any of the blocks
  if (rows.two_goes) {
    if (!meet(group, exchange + 1)) return;
    gather_rows(group, exchange + 1, rows, 0, 1);
    __syncthreads();
  }
  norm_rows(norm, rows.residual, rows.residual_stride, static_cast<int>(rows.width), rows.tokens, reinterpret_cast<float*>(dynamic_shared() + 16));
}

unsigned blocks_for(int64_t values) {
  const int64_t blocks = (values / 4 + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kBlocksMax ? kBlocksMax : blocks);
}

Problem check_group(const PeerGroup& group) {
  return group.ranks < 2 || group.ranks > kPeersMax || group.rank < 0 || group.rank >= group.ranks ? "peer_reduce: 2 to 16 ranks are possible" : nullptr;
}

struct PeerPlan {
  TreeWalk walk{};
  PeerNodes nodes{};
  PeerRows rows{};
};

Problem make_plan(const PeerGroup& group, const PeerReduction& r, bool two_goes, PeerPlan* plan) {
  if (const Problem problem = check_group(group)) return problem;
  if (r.units < 1 || r.units > kSegmentsMax || r.node_count < 1 || r.node_count > kSegmentsMax) return "peer_reduce: 1 to 16 units and nodes are possible";
  if (r.width < 4 || r.width % 4 || r.residual_stride % 4 || r.tokens < 1) return "peer_reduce: width and stride must be positive multiples of 4, tokens positive";
  if (!plan_tree_walk(r.units, r.node_count, r.lo, r.hi, &plan->walk)) return "peer_reduce: the nodes are not the maximal subtrees of a cut of the units";
  int counts[kPeersMax] = {};
  for (int n = 0; n < r.node_count; n++) {
    if (r.owner[n] < 0 || r.owner[n] >= group.ranks) return "peer_reduce: a node of a rank that the group lacks";
    plan->nodes.owner[n] = static_cast<int8_t>(r.owner[n]);
    plan->nodes.index[n] = static_cast<int8_t>(counts[r.owner[n]]++);
  }
  const uint64_t node_bytes = static_cast<uint64_t>(r.tokens) * static_cast<uint64_t>(r.width) * 4;
  for (int p = 0; p < group.ranks; p++)
    if (static_cast<uint64_t>(counts[p] > 1 ? counts[p] : 1) * node_bytes > group.block_bytes[p]) return "peer_reduce: the sums do not fit a block";
  const auto row = [&](int rank) { return static_cast<int>(static_cast<int64_t>(r.tokens) * rank / group.ranks); };
  const int first = two_goes ? row(group.rank) : 0, rows = two_goes ? row(group.rank + 1) - first : r.tokens;
  plan->rows = {r.bias, r.residual, r.residual_stride, r.width, r.tokens, first, rows, two_goes};
  return nullptr;
}

}  // namespace

Problem peer_reduce(const PeerGroup& group, uint32_t exchange, const PeerReduction& reduction, bool two_goes, Stream stream) {
  PeerPlan plan;
  if (const Problem problem = make_plan(group, reduction, two_goes, &plan)) return problem;
  if (const Problem problem = launch(peer_reduce_kernel, blocks_for(plan.rows.rows * reduction.width), kThreads, 16, stream, group, exchange, plan.walk, plan.nodes, plan.rows)) return problem;
  if (!two_goes) return nullptr;
  return launch(peer_gather_kernel, blocks_for(reduction.tokens * reduction.width), kThreads, 16, stream, group, exchange + 1, plan.rows);
}

Problem peer_reduce_norm(const PeerGroup& group, uint32_t exchange, const PeerReduction& reduction, bool two_goes, const NormAfter& norm, uint32_t* arrivals, Stream stream) {
  PeerPlan plan;
  if (const Problem problem = make_plan(group, reduction, two_goes, &plan)) return problem;
  if (reduction.tokens > kFusedTokensMax || reduction.width % 32 != 0 || reduction.width > (1 << 24)) return "peer_reduce_norm: at most 8 tokens, the width a multiple of 32";
  return launch(peer_reduce_norm_kernel, blocks_for(plan.rows.rows * reduction.width), kThreads, kFusedTokensMax * kPartials * 4 + 16, stream, group, exchange, plan.walk, plan.nodes, plan.rows, norm,
                arrivals);
}

Problem peer_meet(const PeerGroup& group, uint32_t exchange, Stream stream) {
  if (const Problem problem = check_group(group)) return problem;
  return launch(peer_gather_kernel, 1, kThreads, 16, stream, group, exchange, PeerRows{nullptr, nullptr, 0, 4, 0, 0, 0, false});
}

}  // namespace shardmesh::cuda
