// machine.h and guarded.h of test/kernels/simt for a real card: the same test programs, linked with this file, run their kernels there.
// Buffers are host memory that the card reads and writes in place, with marks before and behind them; a schedule means nothing, since the card has its own.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "guarded.h"
#include "machine.h"

namespace simt {
namespace {

constexpr size_t kMarkBytes = 256;
constexpr uint8_t kMark = 0xa5;

}  // namespace

std::string absent_machine() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return std::string("no card: ") + cudaGetErrorString(status);
  if (count == 0) return "no card: the driver knows none";
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return "no card: its properties cannot be read";
  if (properties.major < 8) return std::string(properties.name) + " is sm_" + std::to_string(properties.major) + std::to_string(properties.minor) + "; sm_80 or later is needed";
  std::printf("card %s, sm_%d%d\n", properties.name, properties.major, properties.minor);
  return "";
}

void set_schedule(const Schedule&) {}
void check_early_starts(bool) {}

const Counts& counts() {
  static const Counts none{};
  return none;
}

std::string finish() {
  const cudaError_t status = cudaDeviceSynchronize();
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

GuardedBytes::GuardedBytes(const char* name, size_t bytes) : bytes_(bytes) {
  map_bytes_ = bytes + 2 * kMarkBytes;
  void* memory = nullptr;
  if (cudaHostAlloc(&memory, map_bytes_, cudaHostAllocMapped) != cudaSuccess) {
    std::fprintf(stderr, "no mapped memory for %zu bytes of %s\n", bytes, name);
    std::abort();
  }
  map_ = static_cast<uint8_t*>(memory);
  data_ = map_ + kMarkBytes;
  end_ = map_ + map_bytes_;
  std::memset(map_, kMark, map_bytes_);
  std::memset(data_, kPoison, bytes);
}

GuardedBytes::~GuardedBytes() {
  cudaDeviceSynchronize();
  cudaFreeHost(map_);
}

bool GuardedBytes::intact() const {
  const auto marked = [](const uint8_t* from, const uint8_t* to) { return std::all_of(from, to, [](uint8_t b) { return b == kMark; }); };
  return marked(map_, data_) && marked(data_ + bytes_, end_);
}

}  // namespace simt
