#include "system_memory.h"

#include <algorithm>
#include <cstring>

namespace simt {
namespace {

// Those with late visibility. Kernels of programs on several host threads look here too, where there are none.
std::vector<SystemMemory*>& late() {
  static std::vector<SystemMemory*> all;
  return all;
}

SystemMemory* find(const void* address, int* reader, size_t* offset) {
  for (SystemMemory* memory : late())
    if (memory->find(address, reader, offset)) return memory;
  return nullptr;
}

}  // namespace

SystemMemory::SystemMemory(const char* name, size_t bytes, int readers, Visibility visibility) : own_(name, bytes) {
  if (visibility == Visibility::Early) return;
  published_.assign(bytes, kPoison);
  for (int r = 0; r < readers; r++) views_.push_back({std::make_unique<GuardedBytes>(name, bytes), 0});
  late().push_back(this);
}

SystemMemory::~SystemMemory() { late().erase(std::remove(late().begin(), late().end(), this), late().end()); }

bool SystemMemory::find(const void* address, int* reader, size_t* offset) const {
  const auto in = [&](const GuardedBytes& bytes) {
    const uint8_t* at = static_cast<const uint8_t*>(address);
    if (at < bytes.data() || at >= bytes.data() + bytes.size()) return false;
    *offset = static_cast<size_t>(at - bytes.data());
    return true;
  };
  *reader = -1;
  if (in(own_)) return true;
  for (size_t r = 0; r < views_.size(); r++)
    if (in(*views_[r].bytes)) {
      *reader = static_cast<int>(r);
      return true;
    }
  return false;
}

void SystemMemory::publish(size_t from, size_t bytes) { std::memcpy(published_.data() + from, own_.data() + from, bytes); }

void SystemMemory::refresh(int reader, size_t from, size_t bytes) { std::memcpy(view(reader) + from, published_.data() + from, bytes); }

void SystemMemory::publish_all() {
  if (views_.empty()) return;
  publish(0, own_.size());
  version_++;
}

void SystemMemory::refresh_all(int reader) {
  View& v = views_[static_cast<size_t>(reader)];
  if (v.version == version_) return;
  refresh(reader, 0, own_.size());
  v.version = version_;
}

void acquire_system(const void* address, size_t bytes) {
  int reader;
  size_t offset;
  SystemMemory* memory = find(address, &reader, &offset);
  if (!memory || reader < 0) return;
  memory->refresh_all(reader);
  memory->refresh(reader, offset, bytes);  // words that were published alone
}

void relax_system(const void* address, size_t bytes) {
  int reader;
  size_t offset;
  if (SystemMemory* memory = find(address, &reader, &offset); memory && reader >= 0) memory->refresh(reader, offset, bytes);
}

void release_system(void* address, size_t) {
  int reader;
  size_t offset;
  if (SystemMemory* memory = find(address, &reader, &offset); memory && reader < 0) memory->publish_all();
}

void expose_system(void* address, size_t bytes) {
  int reader;
  size_t offset;
  if (SystemMemory* memory = find(address, &reader, &offset); memory && reader < 0) memory->publish(offset, bytes);
}

}  // namespace simt
