#include "memory_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace shardmesh::cuda {
namespace {

constexpr char kName[] = "shardmesh-sums";
constexpr char kLink[] = "/memfd:shardmesh-sums";
constexpr unsigned kNoExecSeal = 0x0008u;  // MFD_NOEXEC_SEAL, Linux 6.3

size_t page() { return static_cast<size_t>(::sysconf(_SC_PAGESIZE)); }
size_t mapped(size_t bytes) { return (bytes + page() - 1) / page() * page() + page(); }

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("a memory file: " + what); }
[[noreturn]] void fail_by(const char* call) { fail(std::string(call) + ": " + std::strerror(errno)); }

}  // namespace

MemoryFile::~MemoryFile() {
  if (data_) ::munmap(data_, mapped(bytes_));
  if (fd_ >= 0) ::close(fd_);
}

void MemoryFile::map(int fd, size_t bytes, bool writable) {
  void* room = ::mmap(nullptr, mapped(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) fail_by("mmap");
  data_ = static_cast<uint8_t*>(room);
  bytes_ = bytes;
  if (::mmap(room, mapped(bytes) - page(), PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) fail_by("mmap");
  ::madvise(room, mapped(bytes) - page(), MADV_DONTDUMP);
}

MemoryFile MemoryFile::create(size_t bytes) {
  MemoryFile file;
  file.fd_ = ::memfd_create(kName, MFD_CLOEXEC | MFD_ALLOW_SEALING | kNoExecSeal);
  if (file.fd_ < 0 && errno == EINVAL) file.fd_ = ::memfd_create(kName, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (file.fd_ < 0) fail_by("memfd_create");
  if (::ftruncate(file.fd_, static_cast<off_t>(bytes)) != 0) fail_by("ftruncate");
  if (::fcntl(file.fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail_by("F_ADD_SEALS");
  file.map(file.fd_, bytes, true);
  return file;
}

MemoryFile MemoryFile::attach(int pid, int fd, size_t bytes, bool writable) {
  char path[64], target[128];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
  const ssize_t length = ::readlink(path, target, sizeof target - 1);
  if (length < 0) fail_by("readlink");
  target[length] = 0;
  if (std::strncmp(target, kLink, sizeof kLink - 1) != 0) fail(std::string(path) + " is " + target + ", no memory of a rank");
  const int opened = ::open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
  if (opened < 0) fail_by("open");
  MemoryFile file;
  struct stat status {};
  std::string problem;
  if (::fstat(opened, &status) != 0) problem = std::string("fstat: ") + std::strerror(errno);
  else if (static_cast<size_t>(status.st_size) != bytes) problem = "it has " + std::to_string(status.st_size) + " bytes, expected " + std::to_string(bytes);
  else if (const int seals = ::fcntl(opened, F_GET_SEALS); seals < 0 || !(seals & F_SEAL_SHRINK)) problem = "it is not sealed against shrinking";
  if (problem.empty()) {
    try {
      file.map(opened, bytes, writable);
    } catch (...) {
      ::close(opened);
      throw;
    }
  }
  ::close(opened);
  if (!problem.empty()) fail(problem);
  return file;
}

}  // namespace shardmesh::cuda
