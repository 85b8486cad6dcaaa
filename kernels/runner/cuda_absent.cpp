// Linked where kernels/cuda is not.
#include <stdexcept>

#include "cuda_part.h"

namespace shardmesh {
namespace {

constexpr const char* kAbsent = "this addon was built without its CUDA part; run: npm run build:cuda   (needs nvcc 12.8 or later)";

}  // namespace

CudaFacts cuda_facts() {
  CudaFacts facts;
  facts.absent = kAbsent;
  return facts;
}

std::unique_ptr<Device> make_cuda_device(const Shard&) { throw std::runtime_error(std::string("executor kind 'cuda': ") + kAbsent); }

}  // namespace shardmesh
