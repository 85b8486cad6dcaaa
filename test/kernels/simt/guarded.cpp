#include "guarded.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr uint8_t kMark = 0xa5;

struct Region {
  const char* name;
  const uint8_t *begin, *end;
  uint8_t* pages;       // to be closed; null: never
  size_t page_bytes;
  bool writable;
};
std::vector<Region>& regions() {
  static std::vector<Region> all;
  return all;
}
std::mutex regions_mutex;

void remove_region(const uint8_t* begin) {
  std::vector<Region>& all = regions();
  all.erase(std::find_if(all.begin(), all.end(), [&](const Region& r) { return r.begin == begin; }));
}

void set_access(const Region& r, int access) {
  if (!r.pages || r.page_bytes == 0) return;
  if (mprotect(r.pages, r.page_bytes, access) == 0) return;
  std::fprintf(stderr, "simt: memory of %s cannot be closed or opened\n", r.name);
  std::abort();
}

}  // namespace

GuardedBytes::GuardedBytes(const char* name, size_t bytes) : bytes_(bytes) {
  const size_t room = (bytes + 15) / 16 * 16, pages = (room + kPage - 1) / kPage * kPage;
  map_bytes_ = pages + 2 * kPage;
  map_ = static_cast<uint8_t*>(mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (map_ == MAP_FAILED || (pages > 0 && mprotect(map_ + kPage, pages, PROT_READ | PROT_WRITE) != 0)) {
    std::fprintf(stderr, "simt: no memory for %zu bytes\n", bytes);
    std::abort();
  }
  end_ = map_ + kPage + pages;
  data_ = end_ - room;
  std::memset(map_ + kPage, kMark, pages);
  std::memset(data_, kPoison, bytes);
  const std::lock_guard lock(regions_mutex);
  regions().push_back({name, data_, data_ + bytes, map_ + kPage, pages, true});
}

GuardedBytes::~GuardedBytes() {
  const std::lock_guard lock(regions_mutex);
  remove_region(data_);
  munmap(map_, map_bytes_);
}

bool GuardedBytes::intact() const {
  const auto marked = [](const uint8_t* from, const uint8_t* to) { return std::all_of(from, to, [](uint8_t b) { return b == kMark; }); };
  return marked(map_ + kPage, data_) && marked(data_ + bytes_, end_);
}

void GuardedBytes::leave_open() {
  const std::lock_guard lock(regions_mutex);
  for (Region& r : regions())
    if (r.begin == data_) r.pages = nullptr;
}

DevicePages::DevicePages(const char* name, uint8_t* data, size_t bytes, bool writable) : data_(data) {
  const std::lock_guard lock(regions_mutex);
  regions().push_back({name, data, data + bytes, data, (bytes + kPage - 1) / kPage * kPage, writable});
}
DevicePages::~DevicePages() {
  const std::lock_guard lock(regions_mutex);
  remove_region(data_);
}

OpenMemory::OpenMemory() { regions_mutex.lock(); }
OpenMemory::~OpenMemory() { regions_mutex.unlock(); }

ClosedMemory::ClosedMemory() {
  regions_mutex.lock();
  for (const Region& r : regions()) set_access(r, PROT_NONE);
}
ClosedMemory::~ClosedMemory() {
  for (const Region& r : regions()) set_access(r, r.writable ? PROT_READ | PROT_WRITE : PROT_READ);
  regions_mutex.unlock();
}

std::string describe_closed(const void* address) {
  const uint8_t* at = static_cast<const uint8_t*>(address);
  for (const Region& r : regions())
    if (r.pages && at >= r.begin && at < r.end) return std::string(r.name) + " (byte " + std::to_string(at - r.begin) + ")";
  return "";
}

std::string describe_address(const void* address, const uint8_t* stack, const uint8_t* shared, const uint8_t* shared_end) {
  const uint8_t* at = static_cast<const uint8_t*>(address);
  char text[160];
  if (at >= shared_end && at < shared_end + kPage) {
    std::snprintf(text, sizeof text, "%td bytes behind the end of shared memory (%td bytes)", at - shared_end, shared_end - shared);
    return text;
  }
  if (at < stack && at >= stack - kPage) return "the thread's stack is full";
  for (const Region& r : regions()) {
    if (at >= r.end && at < r.end + kPage + 16) {
      std::snprintf(text, sizeof text, "%td bytes behind the end of %s (%td bytes)", at - r.end, r.name, r.end - r.begin);
      return text;
    }
    if (at < r.begin && at + 2 * kPage >= r.begin) {
      std::snprintf(text, sizeof text, "%td bytes before %s (%td bytes)", r.begin - at, r.name, r.end - r.begin);
      return text;
    }
  }
  std::snprintf(text, sizeof text, "address %p is in no buffer", address);
  return text;
}

}  // namespace simt
