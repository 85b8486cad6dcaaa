// kernels/cuda/runtime.h on the emulated machine. "Card" memory is guarded (guarded.h); a stream does its work when it is waited for, as late as a card may, and finds
// hosts that do not keep away from what they have handed over: the source of a queued copy must not change, its target is poisoned until the copy is made.
#include "../../../kernels/cuda/runtime.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "guarded.h"
#include "machine.h"

namespace shardmesh::cuda {
namespace {

// Memory of either place, by its first byte.
struct Allocations {
  std::mutex mutex;
  struct One {
    std::unique_ptr<simt::GuardedBytes> bytes;
    Place place;
  };
  std::unordered_map<void*, One> all;
};
Allocations& allocations() {
  static Allocations known;
  return known;
}

using Work = std::function<std::string()>;  // does it; "" or what went wrong
using Make = std::function<Work()>;         // called when the work is queued: from then on the host must keep away from what it has handed over

// What launches and copies are given to.
struct Queue : simt::WorkQueue {
  virtual void make(const Make& make, bool kernel) = 0;
  void make(const Make& make) { this->make(make, false); }
  void add(Work work) override {
    make([work] { return work; }, true);
  }
};

// Host memory that copies read which are queued already.
using Sources = std::vector<std::pair<const uint8_t*, const uint8_t*>>;
thread_local Sources* sources_of_stream;

// Several threads may queue, and wait: one of them does the work of all meanwhile.
struct EmulatedStream final : Queue {
  std::mutex mutex;
  std::deque<Work> work;
  std::map<const uint32_t*, uint32_t> waited_for;  // the last value of each word that reports count
  int graphs_unread = 0;  // launched, less the reports waited for: right where each graph ends with one
  Sources sources;
  using Queue::make;
  void make(const Make& make, bool) override {
    const std::lock_guard lock(mutex);
    sources_of_stream = &sources;
    work.push_back(make());
  }
};

// Nodes that no edge orders may be done in any order, so they are: the first added first, the last first, or by chance, as the schedule has threads and blocks.
// A node that a programmatic edge may start early is checked for that (machine.h) when it is done.
struct EmulatedGraph final : Queue {
  struct Node {
    Make make;
    std::vector<int> after;
    bool kernel;
    int programmatic_edges;  // of those to it
  };
  std::vector<Node> nodes;
  std::vector<int> after;
  Edges edges = Edges::Plain;
  using Queue::make;
  void make(const Make& make, bool kernel) override {
    const bool early = kernel && edges == Edges::Programmatic;
    const auto count = std::count_if(after.begin(), after.end(), [&](int node) { return early && nodes[static_cast<size_t>(node)].kernel; });
    nodes.push_back({make, after, kernel, static_cast<int>(count)});
    after = {static_cast<int>(nodes.size()) - 1};
  }
};

Queue& queue_of(Stream stream) { return *static_cast<Queue*>(static_cast<simt::WorkQueue*>(stream)); }
EmulatedStream& raw(Stream stream) { return static_cast<EmulatedStream&>(queue_of(stream)); }
EmulatedGraph& nodes_of(Graph graph) { return static_cast<EmulatedGraph&>(queue_of(graph)); }

constexpr simt::Order kOrders[] = {simt::Order::Forward, simt::Order::Reverse, simt::Order::Random};

std::string run_nodes(const EmulatedGraph& graph, const std::vector<Work>& work, simt::Order order, uint64_t seed) {
  std::vector<int> ready;
  std::vector<bool> done(work.size(), false), known(work.size(), false);
  for (size_t count = 0; count < work.size(); count++) {
    for (size_t i = 0; i < work.size(); i++) {
      const std::vector<int>& after = graph.nodes[i].after;
      if (known[i] || !std::all_of(after.begin(), after.end(), [&](int node) { return done[static_cast<size_t>(node)]; })) continue;
      known[i] = true;
      ready.push_back(static_cast<int>(i));
    }
    std::sort(ready.begin(), ready.end());
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const size_t which = order == simt::Order::Forward ? 0 : order == simt::Order::Reverse ? ready.size() - 1 : (seed >> 33) % ready.size();
    const size_t node = static_cast<size_t>(ready[which]);
    ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(which));
    std::optional<simt::EarlyStart> early;
    if (graph.nodes[node].programmatic_edges > 0) early.emplace();
    if (std::string problem = work[node](); !problem.empty()) return problem;
    done[node] = true;
  }
  return "";
}

// Tests ask for what goes wrong on cards.
const char* asked(const char* name) { return std::getenv(name); }

size_t card_bytes() {
  const char* bytes = asked("SHARDMESH_EMULATED_CARD_BYTES");
  return bytes ? std::strtoull(bytes, nullptr, 10) : size_t{8} << 30;
}
std::atomic<size_t> used_bytes{0};

// A fault like those of ECC and Xid: it comes when the stream has been waited for so many times, and stays.
struct LastingFault {
  std::atomic<int> waits{0};
  std::atomic<bool> here{false};
  static constexpr const char* kText = "uncorrectable ECC error encountered";
  bool comes() {
    const char* after = asked("SHARDMESH_EMULATED_CARD_FAULT_AFTER");
    if (after && ++waits > std::atoi(after)) here = true;
    if (!after) here = false, waits = 0;  // the test is over
    return here;
  }
};
LastingFault& lasting_fault() {
  static LastingFault fault;
  return fault;
}

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
  if (const char* absent = asked("SHARDMESH_EMULATED_CARD_ABSENT")) return absent;
  const char* sm = asked("SHARDMESH_EMULATED_CARD_SM");
  *card = {"emulated CUDA machine", sm ? std::atoi(sm) : 90, 2, card_bytes(), 1e9, 5, "none"};
  return "";
}

size_t free_bytes() { return card_bytes() - std::min(card_bytes(), used_bytes.load()); }

// A test names the stand-in (cublas_lt_stand_in.cpp), or what is none.
std::vector<std::string> blas_libraries() {
  const char* path = asked("SHARDMESH_EMULATED_CUBLASLT");
  return {path ? path : "libcublasLt.so.emulated"};
}

void* allocate(Place place, size_t bytes, const char* what) {
  if (place == Place::Card && bytes > free_bytes()) throw std::runtime_error(no_room(place, bytes, what, "out of memory"));
  auto memory = std::make_unique<simt::GuardedBytes>(what, bytes);
  if (place == Place::Host) memory->leave_open();
  void* data = memory->data();
  std::lock_guard lock(allocations().mutex);
  allocations().all.emplace(data, Allocations::One{std::move(memory), place});
  if (place == Place::Card) used_bytes += bytes;
  return data;
}

void release(Place, void* memory) {
  std::lock_guard lock(allocations().mutex);
  const auto found = allocations().all.find(memory);
  const Allocations::One& one = found->second;
  const bool intact = [&] {
    const simt::OpenMemory open;
    return one.bytes->intact();
  }();
  if (!intact) {
    std::fprintf(stderr, "simt: bytes beside a buffer have changed\n");
    std::abort();
  }
  if (one.place == Place::Card) used_bytes -= one.bytes->size();
  allocations().all.erase(found);
}

Problem open_stream(Stream* stream) {
  *stream = static_cast<simt::WorkQueue*>(new EmulatedStream);
  return nullptr;
}
void close_stream(Stream stream) { delete &raw(stream); }

Problem copy_to_card(void* card, const void* host, size_t bytes, Stream stream) {
  queue_of(stream).make([=]() -> Work {
    sources_of_stream->emplace_back(static_cast<const uint8_t*>(host), static_cast<const uint8_t*>(host) + bytes);
    return [=, before = digest(host, bytes)]() -> std::string {
      if (digest(host, bytes) != before) return "the host has changed what a queued copy reads";
      const simt::OpenMemory open;
      std::memcpy(card, host, bytes);
      return "";
    };
  });
  return nullptr;
}

Problem copy_to_host(void* host, const void* card, size_t bytes, Stream stream) {
  queue_of(stream).make([=]() -> Work {
    // A copy that is queued in front of this one may still read there.
    const uint8_t* at = static_cast<const uint8_t*>(host);
    if (std::none_of(sources_of_stream->begin(), sources_of_stream->end(), [&](const auto& s) { return s.first < at + bytes && at < s.second; })) std::memset(host, simt::kPoison, bytes);
    return [=]() -> std::string {
      const simt::OpenMemory open;
      std::memcpy(host, card, bytes);
      return "";
    };
  });
  return nullptr;
}

Problem fill(void* card, uint8_t value, size_t bytes, Stream stream) {
  queue_of(stream).make([=]() -> Work {
    return [=]() -> std::string {
      const simt::OpenMemory open;
      std::memset(card, value, bytes);
      return "";
    };
  });
  return nullptr;
}

namespace {

// Does what was queued, up to where `enough` holds.
template <typename Enough>
Problem work_on(EmulatedStream& s, const Enough& enough) {
  thread_local std::string problem;  // what is returned stays valid to the next call
  problem.clear();
  const std::lock_guard lock(s.mutex);
  // Steps meet every order of threads and blocks, and of the nodes of a graph.
  static std::atomic<uint64_t> turns{0};
  const uint64_t turn = turns++;
  simt::set_schedule({kOrders[turn % 3], turn + 1, 1, true});
  if (lasting_fault().comes()) problem = LastingFault::kText;
  while (problem.empty() && !s.work.empty() && !enough()) {
    problem = s.work.front()();
    s.work.pop_front();
  }
  if (!problem.empty()) s.work.clear();
  if (s.work.empty()) s.sources.clear();
  return problem.empty() ? nullptr : problem.c_str();
}

// A card that is busy leaves the host some milliseconds to queue more; as soon as it has, the card goes on.
void be_busy(EmulatedStream& s, const std::function<void()>& meanwhile) {
  const auto count = [&] {
    const std::lock_guard lock(s.mutex);
    return s.work.size();
  };
  const char* milliseconds = asked("SHARDMESH_EMULATED_CARD_BUSY_MS");
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds ? std::atoi(milliseconds) : 3);
  const size_t queued = count();
  for (meanwhile(); count() == queued && std::chrono::steady_clock::now() < end; meanwhile()) std::this_thread::sleep_for(std::chrono::microseconds(50));  // others need the core
}

}  // namespace

Problem synchronise(Stream stream) {
  return work_on(raw(stream), [] { return false; });
}

// A card that hangs does nothing more.
bool hangs() { return asked("SHARDMESH_EMULATED_CARD_HANGS") != nullptr; }

// A card may be as late as to end what is waited for and nothing behind it, or so early that it has ended all: both come by turns. A test asks for how many graphs there
// were on it each time.
Problem wait_for(const uint32_t* word, uint32_t value, Stream stream, int64_t, bool, const std::function<void()>& meanwhile) {
  EmulatedStream& s = raw(stream);
  const auto is_here = [&] { return has_counted_to(value, word); };
  {
    const std::lock_guard lock(s.mutex);
    if (value <= std::exchange(s.waited_for[word], value)) return "the word is there before anything was done";
  }
  if (meanwhile) be_busy(s, meanwhile);
  {
    const std::lock_guard lock(s.mutex);
    if (const char* log = asked("SHARDMESH_EMULATED_CARD_LOG")) std::ofstream(log, std::ios::app) << s.graphs_unread << '\n';
    if (s.graphs_unread > 0) s.graphs_unread--;
  }
  if (hangs()) return "the card has not finished in time";
  static std::atomic<uint64_t> waits{0};
  const bool is_late = waits++ / 3 % 2 == 0;
  if (const Problem problem = work_on(s, [&] { return is_late && is_here(); })) return problem;
  return is_here() ? nullptr : "the card has done everything and reported nothing";
}

bool settles(Stream stream, int64_t, bool) {
  if (hangs()) return false;
  synchronise(stream);
  return true;
}

std::string lost_card() { return lasting_fault().here ? LastingFault::kText : ""; }

void abandon_card() {}  // other executors of this process go on
bool is_abandoned() { return false; }

Problem open_graph(Graph* graph, Edges edges) {
  auto* made = new EmulatedGraph;
  made->edges = edges;
  *graph = static_cast<simt::WorkQueue*>(made);
  return nullptr;
}

void come_after(Graph graph, const std::vector<int>& nodes) { nodes_of(graph).after = nodes; }
int node_count(Graph graph) { return static_cast<int>(nodes_of(graph).nodes.size()); }
int programmatic_edge_count(Graph graph) {
  int count = 0;
  for (const EmulatedGraph::Node& node : nodes_of(graph).nodes) count += node.programmatic_edges;
  return count;
}

Problem finish_graph(Graph graph) {
  // A test asks for graphs without one of their edges, to see that this is found.
  // "12": node 12 waits for none; "12:1": not for the second of those that it waits for.
  if (const char* text = asked("SHARDMESH_EMULATED_GRAPH_WITHOUT_EDGE")) {
    char* rest = nullptr;
    const size_t node = std::strtoull(text, &rest, 10);
    EmulatedGraph& g = nodes_of(graph);
    if (node >= g.nodes.size()) return nullptr;
    std::vector<int>& after = g.nodes[node].after;
    if (*rest != ':') after.clear();
    else if (const size_t edge = std::strtoull(rest + 1, nullptr, 10); edge < after.size()) after.erase(after.begin() + static_cast<std::ptrdiff_t>(edge));
  }
  return nullptr;
}

Problem launch_graph(Graph graph, Stream stream) {
  const EmulatedGraph& g = nodes_of(graph);
  {
    const std::lock_guard lock(raw(stream).mutex);
    raw(stream).graphs_unread++;
  }
  raw(stream).make([&g]() -> Work {
    std::vector<Work> work;
    for (const EmulatedGraph::Node& node : g.nodes) work.push_back(node.make());
    return [&g, work = std::move(work)] {
      static std::atomic<uint64_t> launches{0};
      const uint64_t turn = launches++;
      return run_nodes(g, work, kOrders[turn % 3], turn);
    };
  });
  return nullptr;
}

void close_graph(Graph graph) { delete &nodes_of(graph); }

Problem copy_now(void* card, const void* host, size_t bytes) {
  const simt::OpenMemory open;
  std::memcpy(card, host, bytes);
  return nullptr;
}

}  // namespace shardmesh::cuda
