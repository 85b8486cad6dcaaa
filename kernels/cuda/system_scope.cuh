// Accesses at system scope, for memory that other cards, other processes or the host read and write while a kernel runs. PTX ISA, "Memory Consistency Model": what a
// thread did before its release, or saw done, is seen by whoever acquires the word and finds the value released there, or a later one.
// Under test these come from test/kernels/simt/cuda_source.h, which shows other cards a write as early or as late as that allows.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)

namespace shardmesh::cuda {

__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_relaxed_system(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release_system(uint64_t* p, uint64_t v) { asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
__device__ __forceinline__ void store_relaxed_system(uint64_t* p, uint64_t v) { asm volatile("st.relaxed.sys.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }

// Nanoseconds since some moment; steps of about a microsecond.
__device__ __forceinline__ uint64_t global_timer() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

}  // namespace shardmesh::cuda

#endif
