// Large anonymous memory for weights, K/V and buffers: zero until written, huge pages advised, released as a whole.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace shardmesh {

class Memory {
 public:
  Memory() = default;
  // Throws std::runtime_error naming `what` and the sizes when the machine cannot hold it.
  Memory(size_t bytes, const char* what) {
    if (bytes == 0) return;
    const size_t huge = size_t{2} << 20, machine = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    if (bytes > machine)
      throw std::runtime_error(std::string(what) + " needs " + mebibytes(bytes) + ", the machine has " + mebibytes(machine) + "; ask for less");
    size_ = bytes >= huge ? (bytes + huge - 1) / huge * huge : bytes;
    const size_t slack = bytes >= huge ? huge : 0;
    void* base = mmap(nullptr, size_ + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
      size_ = 0;
      throw std::runtime_error(std::string(what) + ": no room for " + mebibytes(bytes) + "; ask for less");
    }
    base_ = base;
    mapped_ = size_ + slack;
    const uintptr_t address = reinterpret_cast<uintptr_t>(base);
    data_ = reinterpret_cast<uint8_t*>(slack ? (address + huge - 1) / huge * huge : address);
    if (slack) madvise(data_, size_, MADV_HUGEPAGE);  // a wish: without huge pages it is only slower
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() {
    if (base_) munmap(base_, mapped_);
  }

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Gives the pages back; the memory reads as zero again.
  void clear() {
    if (data_) madvise(data_, size_, MADV_DONTNEED);
  }

 private:
  static std::string mebibytes(size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }
  void swap(Memory& other) {
    std::swap(base_, other.base_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  void* base_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace shardmesh
