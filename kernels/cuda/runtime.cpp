// runtime.h on the CUDA runtime, which is linked statically and needs no CUDA library but the driver's, opened when the first of these is called.
#include "runtime.h"

#include <cuda_runtime.h>

#include <stdexcept>

#include "nvml.h"

namespace shardmesh::cuda {
namespace {

constexpr int kMajor = CUDART_VERSION / 1000, kMinor = CUDART_VERSION % 1000 / 10;
// Drivers of one major version run programs of all its minor ones.      CUDA compatibility guide
constexpr const char* kDriverNeeded = kMajor == 12 ? "525.60" : kMajor == 13 ? "580" : "a newer one";

Problem problem_of(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }
cudaStream_t raw(Stream stream) { return static_cast<cudaStream_t>(stream); }

std::string mebibytes(size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

}  // namespace

std::string find_card(Card* card) {
  const std::string needed = "CUDA " + std::to_string(kMajor) + "." + std::to_string(kMinor) + " needs the NVIDIA driver " + kDriverNeeded + " or later";
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (driver == 0) return "no NVIDIA driver here (libcuda.so.1 was looked for); " + needed;
  if (status == cudaErrorInsufficientDriver) return "the driver here knows CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) + " only; " + needed;
  if (status != cudaSuccess) return std::string("no card can be used: ") + cudaGetErrorString(status);
  if (count == 0) return "the NVIDIA driver knows no card";
  cudaDeviceProp properties;
  if (const cudaError_t read = cudaGetDeviceProperties(&properties, 0); read != cudaSuccess) return std::string("the card's properties cannot be read: ") + cudaGetErrorString(read);
  *card = {properties.name, properties.major * 10 + properties.minor, properties.multiProcessorCount, properties.totalGlobalMem};
  int kilohertz = 0, bits = 0;
  char bus_id[32] = "";
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, 0) == cudaSuccess && cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, 0) == cudaSuccess)
    card->bandwidth_bytes = 2.0 * 1000.0 * kilohertz * (bits / 8.0);  // two transfers a cycle
  if (cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, 0) == cudaSuccess) {
    const ManagementFacts facts = management_facts(bus_id);
    card->power_watts = facts.power_watts;
    card->driver = facts.driver;
  }
  if (card->sm < 80) return card->name + " is sm_" + std::to_string(card->sm) + "; sm_80 or later is needed";
  return "";
}

size_t free_bytes() {
  size_t free = 0, total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
}

void* allocate(Place place, size_t bytes, const char* what) {
  void* memory = nullptr;
  const cudaError_t status = place == Place::Card ? cudaMalloc(&memory, bytes) : cudaMallocHost(&memory, bytes);
  if (status == cudaSuccess) return memory;
  cudaGetLastError();  // an allocation that failed leaves the card as it was
  const std::string where = place == Place::Card ? "on the card, where " + mebibytes(free_bytes()) + " are free" : "of host memory that the card reads directly";
  throw std::runtime_error(std::string(what) + ": no room for " + mebibytes(bytes) + " " + where + " (" + cudaGetErrorString(status) + "); ask for less");
}

void release(Place place, void* memory) {
  if (place == Place::Card) cudaFree(memory);
  else cudaFreeHost(memory);
}

Problem open_stream(Stream* stream) {
  cudaStream_t created = nullptr;
  const cudaError_t status = cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking);
  *stream = created;
  return problem_of(status);
}
void close_stream(Stream stream) { cudaStreamDestroy(raw(stream)); }

Problem copy_to_card(void* card, const void* host, size_t bytes, Stream stream) { return problem_of(cudaMemcpyAsync(card, host, bytes, cudaMemcpyHostToDevice, raw(stream))); }
Problem copy_to_host(void* host, const void* card, size_t bytes, Stream stream) { return problem_of(cudaMemcpyAsync(host, card, bytes, cudaMemcpyDeviceToHost, raw(stream))); }
Problem fill(void* card, uint8_t value, size_t bytes, Stream stream) { return problem_of(cudaMemsetAsync(card, value, bytes, raw(stream))); }
Problem synchronise(Stream stream) { return problem_of(cudaStreamSynchronize(raw(stream))); }
// From pageable memory cudaMemcpy may return when the bytes are staged, in front of their last hop, and our stream does not wait for the default one.
Problem copy_now(void* card, const void* host, size_t bytes) {
  const cudaError_t status = cudaMemcpy(card, host, bytes, cudaMemcpyHostToDevice);
  return problem_of(status == cudaSuccess ? cudaStreamSynchronize(cudaStreamLegacy) : status);
}

}  // namespace shardmesh::cuda
