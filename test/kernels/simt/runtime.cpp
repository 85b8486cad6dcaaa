// kernels/cuda/runtime.h on the emulated machine. "Card" memory is guarded (guarded.h); a stream does its work when it is waited for, as late as a card may, and finds
// hosts that do not keep away from what they have handed over: the source of a queued copy must not change, its target is poisoned until the copy is made.
#include "../../../kernels/cuda/runtime.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "guarded.h"
#include "machine.h"

namespace shardmesh::cuda {
namespace {

// Memory of either place, by its first byte.
struct Allocations {
  std::mutex mutex;
  std::unordered_map<void*, std::unique_ptr<simt::GuardedBytes>> all;
};
Allocations& allocations() {
  static Allocations known;
  return known;
}

struct EmulatedStream : simt::WorkQueue {
  std::string problem;  // what synchronise() returns stays valid to the next one
};
EmulatedStream& raw(Stream stream) { return *static_cast<EmulatedStream*>(static_cast<simt::WorkQueue*>(stream)); }

uint64_t digest(const void* data, size_t bytes) {  // FNV-1a over words
  uint64_t hash = 14695981039346656037ull;
  const uint8_t* at = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, at + i, bytes - i < 8 ? bytes - i : 8);
    hash = (hash ^ word) * 1099511628211ull;
  }
  return hash;
}

}  // namespace

std::string find_card(Card* card) {
  // Tests ask for a machine without a card.
  if (const char* absent = std::getenv("SHARDMESH_EMULATED_CARD_ABSENT")) return absent;
  *card = {"emulated CUDA machine", 80, 2, size_t{8} << 30, 1e9, 5, "none"};
  return "";
}

size_t free_bytes() { return size_t{8} << 30; }

void* allocate(Place, size_t bytes, const char* what) {
  auto memory = std::make_unique<simt::GuardedBytes>(what, bytes);
  void* data = memory->data();
  std::lock_guard lock(allocations().mutex);
  allocations().all.emplace(data, std::move(memory));
  return data;
}

void release(Place, void* memory) {
  std::lock_guard lock(allocations().mutex);
  const auto found = allocations().all.find(memory);
  if (!found->second->intact()) {
    std::fprintf(stderr, "simt: bytes beside a buffer have changed\n");
    std::abort();
  }
  allocations().all.erase(found);
}

Problem open_stream(Stream* stream) {
  *stream = static_cast<simt::WorkQueue*>(new EmulatedStream);
  return nullptr;
}
void close_stream(Stream stream) { delete &raw(stream); }

Problem copy_to_card(void* card, const void* host, size_t bytes, Stream stream) {
  raw(stream).work.push_back([=, before = digest(host, bytes)]() -> std::string {
    if (digest(host, bytes) != before) return "the host has changed what a queued copy reads";
    std::memcpy(card, host, bytes);
    return "";
  });
  return nullptr;
}

Problem copy_to_host(void* host, const void* card, size_t bytes, Stream stream) {
  std::memset(host, simt::kPoison, bytes);
  raw(stream).work.push_back([=]() -> std::string {
    std::memcpy(host, card, bytes);
    return "";
  });
  return nullptr;
}

Problem fill(void* card, uint8_t value, size_t bytes, Stream stream) {
  raw(stream).work.push_back([=]() -> std::string {
    std::memset(card, value, bytes);
    return "";
  });
  return nullptr;
}

Problem synchronise(Stream stream) {
  EmulatedStream& s = raw(stream);
  s.problem.clear();
  // Steps meet every order of threads and blocks.
  static std::atomic<uint64_t> turns{0};
  const uint64_t turn = turns++;
  constexpr simt::Order kOrders[] = {simt::Order::Forward, simt::Order::Reverse, simt::Order::Random};
  simt::set_schedule({kOrders[turn % 3], turn + 1, 1});
  for (const auto& work : s.work)
    if (s.problem.empty()) s.problem = work();
  s.work.clear();
  return s.problem.empty() ? nullptr : s.problem.c_str();
}

Problem copy_now(void* card, const void* host, size_t bytes) {
  std::memcpy(card, host, bytes);
  return nullptr;
}

}  // namespace shardmesh::cuda
