#include "peer_memory.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "memory_file.h"

namespace shardmesh::cuda {
namespace {

static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(PeerMemory::handle));

std::array<uint8_t, 16> own_card() {
  std::array<uint8_t, 16> id{};
  cudaDeviceProp properties;
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&properties, device) == cudaSuccess) std::memcpy(id.data(), &properties.uuid, sizeof properties.uuid);
  return id;
}

[[noreturn]] void fail(const std::string& what, cudaError_t status) {
  cudaGetLastError();  // the card is as it was
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// IPC does not open what this process has exported itself.
struct Exported {
  std::mutex mutex;
  std::map<std::array<uint8_t, 64>, uint8_t*> all;
};
Exported& exported() {
  static Exported known;
  return known;
}

class CardRegion final : public SharedRegion {
 public:
  CardRegion(size_t bytes, const char* what) : memory_(Place::Card, bytes, what) {
    card_ = memory_.as<uint8_t>();
    cudaIpcMemHandle_t handle;
    is_open_ = cudaIpcGetMemHandle(&handle, card_) == cudaSuccess;
    if (!is_open_) {  // not everywhere does the driver export memory; the card is as it was
      cudaGetLastError();
      handle = {};
    }
    if (const cudaError_t status = cudaMemset(card_, 0, bytes); status != cudaSuccess) fail(what, status);
    cudaStreamSynchronize(cudaStreamLegacy);
    description_ = {PeerMemory::Place::Card, ::getpid(), -1, {}, own_card(), bytes};
    std::memcpy(description_.handle.data(), &handle, sizeof handle);
    if (!is_open_) return;
    const std::lock_guard lock(exported().mutex);
    exported().all[description_.handle] = card_;
  }
  ~CardRegion() override {
    if (!is_open_) return;
    const std::lock_guard lock(exported().mutex);
    exported().all.erase(description_.handle);
  }

 private:
  Memory memory_;
};

// A memory file that the card reads directly.
struct RegisteredFile {
  MemoryFile file;
  uint8_t* card = nullptr;

  cudaError_t add(unsigned flags) {
    const cudaError_t status = cudaHostRegister(file.data(), file.bytes(), cudaHostRegisterMapped | cudaHostRegisterPortable | flags);
    if (status != cudaSuccess) return status;
    void* there = nullptr;
    const cudaError_t found = cudaHostGetDevicePointer(&there, file.data(), 0);
    card = static_cast<uint8_t*>(there);
    if (found != cudaSuccess) cudaHostUnregister(file.data());
    return found;
  }
  ~RegisteredFile() {
    if (card && !is_abandoned()) cudaHostUnregister(file.data());
  }
};

class HostRegion final : public SharedRegion {
 public:
  HostRegion(size_t bytes, const char* what) : what_(what) {
    registered_.file = MemoryFile::create(bytes);
    description_ = {PeerMemory::Place::Host, ::getpid(), registered_.file.fd(), {}, own_card(), bytes};
  }
  void prepare() override {
    if (card_) return;
    if (const cudaError_t status = registered_.add(0); status != cudaSuccess) fail(std::string(what_) + ": host memory that the cards read directly", status);
    card_ = registered_.card;
  }

 private:
  const char* what_;
  RegisteredFile registered_;
};

class OpenedCard final : public OpenedRegion {
 public:
  explicit OpenedCard(const PeerMemory& memory) {
    if (memory.pid == ::getpid()) {
      const std::lock_guard lock(exported().mutex);
      const auto found = exported().all.find(memory.handle);
      if (found == exported().all.end()) throw std::runtime_error("this process has no such memory any more");
      card_ = found->second;
      return;
    }
    cudaIpcMemHandle_t handle;
    std::memcpy(&handle, memory.handle.data(), sizeof handle);
    void* there = nullptr;
    const cudaError_t status = cudaIpcOpenMemHandle(&there, handle, cudaIpcMemLazyEnablePeerAccess);
    if (status != cudaSuccess) fail("the card does not reach the memory of process " + std::to_string(memory.pid), status);
    card_ = static_cast<uint8_t*>(there);
    foreign_ = true;
  }
  ~OpenedCard() override {
    if (foreign_ && !is_abandoned()) cudaIpcCloseMemHandle(card_);
  }

 private:
  bool foreign_ = false;
};

class OpenedHost final : public OpenedRegion {
 public:
  explicit OpenedHost(const PeerMemory& memory) {
    registered_.file = MemoryFile::attach(memory.pid, memory.fd, memory.bytes, false);
    cudaError_t status = registered_.add(cudaHostRegisterReadOnly);
    if (status != cudaSuccess) {  // cards that take no read-only pages
      cudaGetLastError();
      registered_.file = MemoryFile::attach(memory.pid, memory.fd, memory.bytes, true);
      status = registered_.add(0);
    }
    if (status != cudaSuccess) fail("the card does not reach host memory of process " + std::to_string(memory.pid), status);
    card_ = registered_.card;
  }

 private:
  RegisteredFile registered_;
};

}  // namespace

std::unique_ptr<SharedRegion> make_region(PeerMemory::Place place, size_t bytes, const char* what) {
  if (place == PeerMemory::Place::Card) return std::make_unique<CardRegion>(bytes, what);
  return std::make_unique<HostRegion>(bytes, what);
}

std::unique_ptr<OpenedRegion> open_region(const PeerMemory& memory) {
  if (memory.place == PeerMemory::Place::Card) return std::make_unique<OpenedCard>(memory);
  return std::make_unique<OpenedHost>(memory);
}

std::string absent_peers() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuModuleGetLoadingMode", &entry, 11070, cudaEnableDefault, &found) != cudaSuccess || found != cudaDriverEntryPointSuccess)
    return "the driver does not say how kernels are loaded";
  CUmoduleLoadingMode mode;
  if (reinterpret_cast<CUresult (*)(CUmoduleLoadingMode*)>(entry)(&mode) != CUDA_SUCCESS) return "the driver does not say how kernels are loaded";
  return mode == CU_MODULE_EAGER_LOADING ? "" : "kernels are loaded when they are first launched (CUDA_MODULE_LOADING is not EAGER)";
}

Problem set_words(uint8_t* card, const uint64_t* words, size_t count) {
  cudaError_t status = cudaMemcpy(card, words, count * 8, cudaMemcpyDefault);
  if (status == cudaSuccess) status = cudaStreamSynchronize(cudaStreamLegacy);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace shardmesh::cuda
