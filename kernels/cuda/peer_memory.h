// Memory that several cards of one host read: made by its owner, opened by the others. Two implementations, as of runtime.h: peer_memory.cpp on the CUDA runtime, and
// test/kernels/simt/peer_memory.cpp on the emulated machine.
#pragma once
#include <memory>
#include <string>

#include "../include/links.h"
#include "runtime.h"

namespace shardmesh::cuda {

// Only its owner writes it.
class SharedRegion {
 public:
  virtual ~SharedRegion() = default;
  // Makes it ready for the owner's card; memory that is only offered costs nothing. Throws std::runtime_error, one line.
  virtual void prepare() {}
  uint8_t* card() const { return card_; }                      // where the owner's card reaches it, when it is ready
  const PeerMemory& description() const { return description_; }  // for the peers
  bool is_open() const { return is_open_; }                    // false: no other process can open it

 protected:
  uint8_t* card_ = nullptr;
  bool is_open_ = true;
  PeerMemory description_;
};
// `bytes` bytes, of which the header (peer_reduce.h) begins as zeros. Throws std::runtime_error, one line.
std::unique_ptr<SharedRegion> make_region(PeerMemory::Place place, size_t bytes, const char* what);

// Another rank's region, as long as this object lives.
class OpenedRegion {
 public:
  virtual ~OpenedRegion() = default;
  uint8_t* card() const { return card_; }

 protected:
  uint8_t* card_ = nullptr;
};
// Throws std::runtime_error, one line: why this card does not reach it.
std::unique_ptr<OpenedRegion> open_region(const PeerMemory& memory);

// Why no kernel here may wait for one of another process, or "": a kernel that is loaded when it is first launched may have to wait for the one that spins.
// Source: CUDA programming guide, "Lazy Loading".
std::string absent_peers();

// Not queued: done when it returns. Of own regions, of either place.
Problem set_words(uint8_t* card, const uint64_t* words, size_t count);

}  // namespace shardmesh::cuda
