// kernels/cuda/peer_memory.h on the emulated machine: memory of a card that other processes read is a memory file as well, whose process and descriptor stand in the handle.
// What a card opened it can read only, and a page that faults follows.
#include "../../../kernels/cuda/peer_memory.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "../../../kernels/cuda/memory_file.h"
#include "../../../kernels/cuda/peer_reduce.h"
#include "guarded.h"
#include "machine.h"

namespace shardmesh::cuda {
namespace {

struct EmulatedHandle {
  int pid, fd;
};

class EmulatedRegion final : public SharedRegion {
 public:
  EmulatedRegion(PeerMemory::Place place, size_t bytes) : file_(MemoryFile::create(bytes)) {
    card_ = file_.data();
    std::memset(card_ + kPeerHeaderBytes, simt::kPoison, bytes - kPeerHeaderBytes);
    description_ = {place, ::getpid(), -1, {}, {}, bytes};
    if (place == PeerMemory::Place::Host) description_.fd = file_.fd();
    const EmulatedHandle handle{::getpid(), file_.fd()};
    std::memcpy(description_.card.data(), &handle.pid, sizeof handle.pid);  // a process, a card
    if (place == PeerMemory::Place::Card) std::memcpy(description_.handle.data(), &handle, sizeof handle);
    pages_.emplace("sums that peers read", card_, bytes, true);
  }

 private:
  MemoryFile file_;
  std::optional<simt::DevicePages> pages_;
};

class EmulatedOpened final : public OpenedRegion {
 public:
  explicit EmulatedOpened(const PeerMemory& memory) {
    EmulatedHandle handle{memory.pid, memory.fd};
    if (memory.place == PeerMemory::Place::Card) {
      // Tests ask for cards that do not reach each other.
      if (std::getenv("SHARDMESH_EMULATED_CARDS_APART")) throw std::runtime_error("the card does not reach the memory of process " + std::to_string(memory.pid) + ": cards are apart");
      std::memcpy(&handle, memory.handle.data(), sizeof handle);
    }
    file_ = MemoryFile::attach(handle.pid, handle.fd, memory.bytes, false);
    card_ = file_.data();
    pages_.emplace("sums of a peer", file_.data(), memory.bytes, false);
  }

 private:
  MemoryFile file_;
  std::optional<simt::DevicePages> pages_;
};

}  // namespace

std::unique_ptr<SharedRegion> make_region(PeerMemory::Place place, size_t bytes, const char*) { return std::make_unique<EmulatedRegion>(place, bytes); }
std::unique_ptr<OpenedRegion> open_region(const PeerMemory& memory) { return std::make_unique<EmulatedOpened>(memory); }
std::string absent_peers() { return ""; }

Problem set_words(uint8_t* card, const uint64_t* words, size_t count) {
  const simt::OpenMemory open;
  std::memcpy(card, words, count * 8);
  return nullptr;
}

}  // namespace shardmesh::cuda
