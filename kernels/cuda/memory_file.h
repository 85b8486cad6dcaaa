// An anonymous memory file (memfd), mapped: what its owner writes is there for every process that maps it too, through /proc/<pid>/fd/<fd>. It has no name, so nothing is
// left when the last process that maps it ends, however it ends.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace shardmesh::cuda {

class MemoryFile {
 public:
  MemoryFile() = default;
  MemoryFile(MemoryFile&& other) noexcept { swap(other); }
  MemoryFile& operator=(MemoryFile&& other) noexcept {
    swap(other);
    return *this;
  }
  ~MemoryFile();

  // `bytes` zeros of its own; it cannot shrink under whoever maps it. A page that faults follows the last page. Throws std::runtime_error naming the failing call.
  static MemoryFile create(size_t bytes);
  // That of another process, or of this one. Throws std::runtime_error saying what was found instead.
  static MemoryFile attach(int pid, int fd, size_t bytes, bool writable);

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }  // -1 where attached

 private:
  void map(int fd, size_t bytes, bool writable);
  void swap(MemoryFile& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(fd_, other.fd_);
  }
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  int fd_ = -1;
};

}  // namespace shardmesh::cuda
