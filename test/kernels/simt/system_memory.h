// Memory of one emulated card as the other cards see it, for kernels that order their accesses at system scope: what a plain write becomes visible at, between the
// earliest and the latest moment that the PTX memory model allows.
//
// Early: readers look at the owner's bytes. Late: what the owner writes is there for the others when it releases, and a reader sees it when it acquires; a relaxed
// access carries its own word and nothing else. So a kernel that lacks a release or an acquire reads poison, and one that writes too early is seen doing so.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "guarded.h"

namespace simt {

enum class Visibility { Early, Late };

class SystemMemory {
 public:
  // `readers`: cards that look at it, the owner's left out.
  SystemMemory(const char* name, size_t bytes, int readers, Visibility visibility);
  ~SystemMemory();
  SystemMemory(const SystemMemory&) = delete;
  SystemMemory& operator=(const SystemMemory&) = delete;

  uint8_t* own() const { return own_.data(); }
  uint8_t* view(int reader) const { return views_.empty() ? own_.data() : views_[static_cast<size_t>(reader)].bytes->data(); }
  bool intact() const { return own_.intact(); }

  // For the operations below. Offset of an address in the own bytes, or in a view, whose number is *reader (the owner's: -1).
  bool find(const void* address, int* reader, size_t* offset) const;
  void publish(size_t from, size_t bytes);
  void refresh(int reader, size_t from, size_t bytes);
  void publish_all();
  void refresh_all(int reader);

 private:
  struct View {
    std::unique_ptr<GuardedBytes> bytes;
    uint64_t version = 0;
  };
  GuardedBytes own_;
  std::vector<uint8_t> published_;
  uint64_t version_ = 1;
  std::vector<View> views_;
};

// In front of a load, and behind a store, of `bytes` bytes. They do nothing for memory that is in no SystemMemory with late visibility.
void acquire_system(const void* address, size_t bytes);
void relax_system(const void* address, size_t bytes);
void release_system(void* address, size_t bytes);
void expose_system(void* address, size_t bytes);

}  // namespace simt
