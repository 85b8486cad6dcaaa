// A machine that runs CUDA kernels on the CPU, thread by thread and without a GPU: what is behind cuda_source.h. For tests only.
//
// Every CUDA thread is a fiber. It runs until it meets others (a warp operation, a barrier), spins, or ends; then another one goes on, in the order that the
// test asks for. All of a launch happens on one thread of the operating system, so a run repeats exactly.
//
// Programmatic dependent launch (device.cuh, grid_dependency_wait): a card may start a kernel while the one before it runs, so everything that a thread does before that wait
// may happen at any earlier moment. A launch that is checked for it is run twice. First every thread of every block, in the launch's order, goes as far as its wait and no further,
// and all memory of the card is closed meanwhile (guarded.h): a load, a store, an atomic operation or an asynchronous copy there is a fault at its instruction, as is a thread that
// ends without a wait. What is left before the wait then hangs on parameters, indexes and shared memory alone, so that it gives the same whenever it is done, and the second run,
// from the beginning and with all predecessors at their end, is what any early start comes to. Nothing follows for prefetches, which have no result. In whole programs memory of the
// host that a card reads directly stays open, since other threads use it: there an early access to that alone (report.cu, the words of peer_reduce.cu) would not be found.
// That the wait of every thread of every kernel is enough needs one more step, on paper: a grid ends after its wait, so after the end of the grid before it, and so on to the first.
//
// What a run proves: indexes, the use of barriers, masks and asynchronous copies, and every bit of the arithmetic. What it cannot show: speed, coalescing,
// bank conflicts, and races that need weakly ordered memory or two blocks in the same instant. fp32 sums inside a bf16 or f16 mma have an order of their own
// on every card; here they are made in k order, so those are for tolerances.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>
#if !defined(__CUDACC__)
#include <source_location>
#endif

namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Which runnable thread goes first, and which block. Forward: the lowest warp as far as it comes, lanes ascending. Reverse: the opposite.
enum class Order { Forward, Reverse, Random };

struct Schedule {
  Order order = Order::Forward;
  uint64_t seed = 1;         // of Order::Random
  unsigned resident = 1;     // blocks alive at the same time; kernels whose blocks wait for each other need all of them
  // The card's timer is the host's clock, and a grid that only spins lets those of other host threads run: for whole programs, where they are what it waits for.
  // Otherwise the timer steps at each look, and a spin that nobody ends is a fault.
  bool wall_clock = false;
};

// The schedule of the launches to come.
void set_schedule(const Schedule& schedule);

// What takes launches: a stream, or a graph that is being built (runtime.cpp). Work returns "" or what went wrong.
struct WorkQueue {
  virtual ~WorkQueue() = default;
  // A kernel.
  virtual void add(std::function<std::string()> work) = 0;
};

// All the work of a card that runs together with others.
struct CardWork final : WorkQueue {
  std::vector<std::function<std::string()>> work;
  void add(std::function<std::string()> one) override { work.push_back(std::move(one)); }
};

// Runs `body` once for every thread of the grid. Returns "" or what the kernel did wrong, with block, thread and source line; it ends at the first fault. Callers on
// several threads take turns: one grid after the other, or, by the wall clock, whenever one only spins.
std::string run_grid(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& body);

// Whether launches are checked for an early start, from now on, and those of this host thread while an EarlyStart lives.
void check_early_starts(bool all);
struct EarlyStart {
  EarlyStart();
  ~EarlyStart();
  EarlyStart(const EarlyStart&) = delete;
  EarlyStart& operator=(const EarlyStart&) = delete;
};

// Does the work of several cards at the same time, that of each in its order; who goes on, and how far, hangs on the seed. Returns "" or the first fault, with its card.
// Nothing of a queue is left, whether it was done or not.
std::string run_together(const std::vector<CardWork*>& cards, uint64_t seed);

// Why nothing can be run here, or "". The emulated machine is always there; test/gpu/card.cpp has the real one behind this file and guarded.h.
std::string absent_machine();
// Waits for all that was launched; "" or what went wrong since.
std::string finish();

// Counts since the start of the program, for the tests' reports.
struct Counts {
  uint64_t launches, threads, collectives;
  uint64_t early;  // launches that were checked for an early start
};
const Counts& counts();
// The timer that steps at each look, in nanoseconds, without a look.
uint64_t timer_now();

constexpr size_t kSharedBytesMax = 99 * 1024;  // what a block may have on every card from sm_86 on
constexpr uint8_t kPoison = 0xff;              // a NaN in every float format, -1 in every integer

#if !defined(__CUDACC__)
// ---------------------------------------------------------------- for cuda_source.h

using Site = std::source_location;

struct Place {
  Dim thread, block, block_size, grid_size;
};
extern const Place* place;  // of the running thread
inline unsigned lane() { return (place->thread.x + place->block_size.x * (place->thread.y + place->block_size.y * place->thread.z)) & 31; }

[[noreturn]] void fault(const Site& site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// One warp operation: waits until every lane of `mask` has come with the same operation, site and mask. The last one runs `complete` over the slots of all
// (null for lanes outside the mask), then all go on.
void meet_warp(const char* operation, uint32_t mask, const Site& site, void* slot, void (*complete)(void* const* slots, uint32_t mask, const Site& site));
// __syncthreads: every thread of the block, at one site.
void meet_block(const Site& site);
// griddepcontrol.wait.
void grid_dependency_wait();
// A prefetch: the address must be that of memory, when it is done.
void prefetch(const void* address);
// A thread that waits for memory to change lets the others run first.
void spin();

uint8_t* shared_memory();
uint64_t global_timer();

// Asynchronous copies into shared memory. The target is poisoned at once and filled as late as wait_copies allows.
void copy_async(const Site& site, void* target, const void* source, unsigned bytes, unsigned source_bytes);
void commit_copies();
void wait_copies(unsigned groups_left);
#endif

}  // namespace simt
