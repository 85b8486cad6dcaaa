// Device memory of a test: each buffer ends at a page that faults, so that reading or writing behind it is found at the instruction that does it. All of it can be closed for a
// while, so that every access is.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "machine.h"

namespace simt {

// `bytes` bytes, 16-byte aligned, poisoned. What rounding to 16 leaves between the last byte and the guard page holds a mark that intact() checks, as do
// the bytes before the first one.
class GuardedBytes {
 public:
  GuardedBytes(const char* name, size_t bytes);
  ~GuardedBytes();
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }
  bool intact() const;
  // It is memory of the host, which its threads use while kernels run: never closed.
  void leave_open();

 private:
  uint8_t *map_, *data_, *end_;  // the mapped pages; end_: the guard page behind
  size_t map_bytes_, bytes_;
};

template <typename T>
class Guarded {
 public:
  Guarded(const char* name, size_t count) : bytes_(name, count * sizeof(T)), count_(count) {}
  Guarded(const char* name, const std::vector<T>& values) : Guarded(name, values.size()) {
    if (!values.empty()) std::memcpy(bytes_.data(), values.data(), values.size() * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(bytes_.data()); }
  size_t size() const { return count_; }
  bool intact() const { return bytes_.intact(); }
  std::vector<T> values() const { return std::vector<T>(data(), data() + count_); }

 private:
  GuardedBytes bytes_;
  size_t count_;
};

// Whole pages that are device memory though they are in no GuardedBytes; `writable`: else they can only be read.
class DevicePages {
 public:
  DevicePages(const char* name, uint8_t* data, size_t bytes, bool writable);
  ~DevicePages();
  DevicePages(const DevicePages&) = delete;
  DevicePages& operator=(const DevicePages&) = delete;

 private:
  const uint8_t* data_;
};

// While one lives, device memory stays open: for host threads that stand for a card's copies. Not for threads that hold one already.
class OpenMemory {
 public:
  OpenMemory();
  ~OpenMemory();
  OpenMemory(const OpenMemory&) = delete;
  OpenMemory& operator=(const OpenMemory&) = delete;
};
// While one lives, any access to device memory faults.
class ClosedMemory {
 public:
  ClosedMemory();
  ~ClosedMemory();
  ClosedMemory(const ClosedMemory&) = delete;
  ClosedMemory& operator=(const ClosedMemory&) = delete;
};
// What of closed memory an address is in, or "".
std::string describe_closed(const void* address);

// Which memory of a kernel lies nearest to an address.
std::string describe_address(const void* address, const uint8_t* stack, const uint8_t* shared, const uint8_t* shared_end);

}  // namespace simt
