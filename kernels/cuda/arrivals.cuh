// The block that comes last of several goes on with what all of them have written: no block waits for another, and no launch is spent on it.
#pragma once
#include "device.cuh"

namespace shardmesh::cuda {

// Called by whole blocks behind their last write. True in every thread of the block that is the last of `blocks` at this counter: it sees what the others have written.
// The counter is 0 again for whoever comes next. `flag`: a word of shared memory.
__device__ __forceinline__ bool comes_last(uint32_t* counter, uint32_t blocks, uint32_t* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *flag = atomicAdd(counter, 1u) + 1 == blocks;
    if (*flag) *counter = 0;
  }
  __syncthreads();
  if (*flag) __threadfence();
  return *flag != 0;
}

}  // namespace shardmesh::cuda
