// Where a token's K and V lie in the pool: the subblocks of 16 tokens that kernels/include/kernel_set.h draws.
#pragma once
#include "device.cuh"
#include "operations.h"

namespace shardmesh::cuda {

// The subblock of KV head `head` that holds `position` of a sequence; `table` is its block table. The token is its column position % 16.
__device__ __forceinline__ int64_t subblock_offset(const KvLayout& layout, const int32_t* table, int position, int head) {
  const int in_block = position % layout.block_tokens;
  return static_cast<int64_t>(table[position / layout.block_tokens]) * static_cast<int64_t>(layout.block_bytes) + head * static_cast<int64_t>(layout.head_bytes) +
         in_block / 16 * static_cast<int64_t>(layout.subblock_bytes);
}

}  // namespace shardmesh::cuda
