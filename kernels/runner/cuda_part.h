// What the addon has of CUDA: kernels/cuda where it was linked (by the set-up where it finds nvcc, or by test/kernels on an emulated machine), else cuda_absent.cpp.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "device.h"

namespace shardmesh {

struct CudaFacts {
  std::string absent;  // why there is no card that a worker could use, one line; empty: there is one, and this is it
  std::string name;
  int sm = 0;          // 80: compute capability 8.0
  uint64_t memory_bytes = 0;
  int multiprocessors = 0;
  double bandwidth_bytes = 0, power_watts = 0;  // a second; 0: unknown
  std::string driver;                           // empty: unknown
};
CudaFacts cuda_facts();

// Throws std::runtime_error, one line, when there is no CUDA part, driver or card, or naming what of the program or configuration is not supported.
std::unique_ptr<Device> make_cuda_device(const Shard& shard);

}  // namespace shardmesh
