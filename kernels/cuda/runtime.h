// What the CUDA device needs of a card beside its kernels: memory, copies, one stream, graphs, facts. Two implementations: runtime.cpp on the CUDA runtime, which opens the
// driver at its first call, and test/kernels/simt/runtime.cpp on the emulated machine.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "operations.h"

namespace shardmesh::cuda {

struct Card {
  std::string name;
  int sm;               // 80: compute capability 8.0
  int multiprocessors;
  size_t memory_bytes;
  // Of no use to kernels; 0 and "": unknown.
  double bandwidth_bytes = 0;  // of its memory, a second, by clock and bus
  double power_watts = 0;      // most that it may take
  std::string driver = {};
};

// The first card that this process may use. "" or one line: what was looked for, and which driver is needed.
std::string find_card(Card* card);

size_t free_bytes();

// Names of NVIDIA's library of matrix products, the newest first, for dlopen(). It is no part of what a card needs.
std::vector<std::string> blas_libraries();

// Memory of the card, or memory of the host that the card reads and writes directly. Both throw std::runtime_error naming `what` and the sizes.
enum class Place { Card, Host };
void* allocate(Place place, size_t bytes, const char* what);
// What allocate() then throws: what it was for, what was asked, and what is free.
inline std::string no_room(Place place, size_t bytes, const char* what, const char* answer) {
  const auto mebibytes = [](size_t n) { return std::to_string((n + (1 << 20) - 1) >> 20) + " MiB"; };
  const std::string where = place == Place::Card ? "on the card, where " + mebibytes(free_bytes()) + " are free" : "of host memory that the card reads directly";
  return std::string("no room for ") + what + ": " + mebibytes(bytes) + " " + where + " (" + answer + ")";
}
void release(Place place, void* memory);

Problem open_stream(Stream* stream);
void close_stream(Stream stream);
// Queued. The host's side belongs to the card until the stream is waited for.
Problem copy_to_card(void* card, const void* host, size_t bytes, Stream stream);
Problem copy_to_host(void* host, const void* card, size_t bytes, Stream stream);
Problem fill(void* card, uint8_t value, size_t bytes, Stream stream);
// Waits for all that was queued, and says what went wrong in it.
Problem synchronise(Stream stream);
// Waits until `word`, in memory of the host, is `value` or has counted on from there, without a call that holds the card's lock: something queued writes it (send_report).
// Looks now and then whether the stream has met a fault, or has ended without that. `deadline_ns`: of the monotonic clock. `spin`: this thread has its core to itself.
// `meanwhile`, which may be empty, is called now and then, and may queue more.
Problem wait_for(const uint32_t* word, uint32_t value, Stream stream, int64_t deadline_ns, bool spin, const std::function<void()>& meanwhile);
inline bool has_counted_to(uint32_t value, const uint32_t* word) { return static_cast<int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0; }
// Whether all that was queued has ended, well or not, by then.
bool settles(Stream stream, int64_t deadline_ns, bool spin);
// Why this process can do nothing with the card any more, one line, after a fault that only a new process heals (ECC, Xid, a kernel's fault); "" when the card answers.
std::string lost_card();
// From now on nothing is given back: a card that hangs would let nobody go who asks.
void abandon_card();
bool is_abandoned();

// Work that is described once, node by node, and then done as often as it is launched. Between open_graph() and finish_graph() launchers, copies and fill() of this thread
// take stream_of(graph) for a stream, and add a node each: it waits for the node before it, or for those that come_after() named.
// Programmatic edges (sm_90 and later): a kernel node may start when all blocks of the kernel node before it have started, and waits for its end by itself (device.cuh,
// grid_dependency_wait); edges from and to other nodes, and to a kernel without that wait in it, stay plain.
using Graph = void*;
enum class Edges { Plain, Programmatic };
constexpr int kProgrammaticEdgesSm = 90;
Problem open_graph(Graph* graph, Edges edges = Edges::Plain);
inline Stream stream_of(Graph graph) { return graph; }
// The next node waits for these, numbered from 0 as they were added, and for no other.
void come_after(Graph graph, const std::vector<int>& nodes);
int node_count(Graph graph);
int programmatic_edge_count(Graph graph);
Problem finish_graph(Graph graph);
Problem launch_graph(Graph graph, Stream stream);
void close_graph(Graph graph);

// Not queued: done when it returns. Any thread.
Problem copy_now(void* card, const void* host, size_t bytes);

class Memory {
 public:
  Memory() = default;
  Memory(Place place, size_t bytes, const char* what) : place_(place), bytes_(bytes), data_(bytes ? allocate(place, bytes, what) : nullptr) {}
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() {
    if (data_) release(place_, data_);
  }
  template <typename T>
  T* as() const { return static_cast<T*>(data_); }
  size_t size() const { return bytes_; }

 private:
  void swap(Memory& other) {
    std::swap(place_, other.place_);
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
  }
  Place place_ = Place::Card;
  size_t bytes_ = 0;
  void* data_ = nullptr;
};

}  // namespace shardmesh::cuda
