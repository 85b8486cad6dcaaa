#include "machine.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "guarded.h"

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif
#include <immintrin.h>

extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  pop %rdx
  jmp *%rdx
)");  // not ret: its prediction would be the caller of this fiber, which is hardly ever the one to go on

namespace simt {

const Place* place = nullptr;

namespace {

constexpr size_t kStackBytes = 64 * 1024, kPage = 4096;
constexpr int kSpinsMax = 1'000'000;  // turns in which every thread spins
constexpr int kSpinsOfTurn = 64;      // of those: how many until others get their turn
constexpr uint64_t kToTheEnd = ~uint64_t{0};

struct Copy {
  void* target;
  const void* source;
  unsigned bytes, source_bytes, group;
};

struct Block;

enum class State { Runnable, Spinning, AtWarp, AtBlock, AtDependency, Done };  // AtDependency: of an early start

struct Fiber {
  Place place;
  void* stack_pointer;
  uint8_t* stack = nullptr;  // lowest byte; below it lies a guard page
  State state;
  Block* block;
  unsigned index;  // in the block
  // of the operation it waits in
  const char* operation;
  uint32_t mask;
  Site site;
  std::vector<Copy> copies;
  unsigned copy_group;
  bool waited;  // for the grid before this one
};

struct Warp {
  uint32_t runnable, spinning, waiting, done, exists;  // waiting: in an operation of the warp
  void* slots[32];                                     // of those that wait
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  uint32_t runnable_warps, spinning_warps;  // warps with such a lane
  unsigned live, at_barrier;
  Site barrier;                             // where those wait
  uint8_t* shared_end = nullptr;  // a guard page follows
  uint8_t* shared;
};

// A launch on its way. Several may be under way, of host threads or of cards that run together; one of them runs at a time.
struct Grid {
  Dim size, block;
  size_t shared_bytes;
  std::function<void()> body;
  Schedule schedule;
  std::vector<unsigned> order;                  // of its blocks
  size_t started = 0;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Block*> live;
  uint64_t random_state;
  bool checks_early_start = false;
  bool starts_early = false;  // being run as far as the waits for the grid before
  uint64_t turns = 0;         // that its threads may still have before others get theirs
  int spins = 0;              // turns in a row in which a thread did nothing but spin, since it has these turns
  int idle_spins = 0;         // the same, since ever
  std::string problem = "";
  bool failed = false;
};

Schedule schedule_of_launches;
bool checks_all_early_starts = false;
thread_local int early_starts = 0;
Counts totals{};
std::vector<std::unique_ptr<Block>> spare_blocks;  // kept for their stacks
Grid* running;
Fiber* current;
void* main_stack_pointer;
sigjmp_buf after_signal;
thread_local volatile sig_atomic_t in_fiber;  // a signal comes on the thread that caused it
thread_local std::deque<std::unique_ptr<Grid>>* taken;  // where launches of run_together go
std::mutex one_grid;
uint64_t timer;

uint64_t next_random(uint64_t& state) {  // SplitMix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

std::string where(const Fiber& fiber) {
  char text[120];
  const Place& p = fiber.place;
  std::snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u)", p.block.x, p.block.y, p.block.z, p.thread.x, p.thread.y, p.thread.z);
  return text;
}

std::string name_of(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line()) + ":" + std::to_string(site.column());
}

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same_site(const Site& a, const Site& b) { return a.line() == b.line() && a.column() == b.column() && same_text(a.file_name(), b.file_name()); }

void leave();

void wake(Fiber& fiber) {
  fiber.state = State::Runnable;
  fiber.block->warps[fiber.index / 32].runnable |= 1u << (fiber.index % 32);
  fiber.block->runnable_warps |= 1u << (fiber.index / 32);
}

void enter() {
  running->body();
  if (!current->copies.empty()) fault(Site::current(), "ends with asynchronous copies that it never waited for");
  if (current->block->at_barrier > 0) fault(current->block->barrier, "has ended, but others of the block wait in __syncthreads");
  if (running->checks_early_start && !current->waited) fault(Site::current(), "ends without having waited for the grid before (grid_dependency_wait)");
  current->state = State::Done;
  current->block->warps[current->index / 32].done |= 1u << (current->index % 32);
  current->block->live--;
  leave();
  __builtin_trap();
}

uint8_t* map_guarded(size_t bytes) {  // pages with a guard page before and after
  uint8_t* base = static_cast<uint8_t*>(mmap(nullptr, bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED || mprotect(base + kPage, bytes, PROT_READ | PROT_WRITE) != 0) {
    std::fprintf(stderr, "simt: no memory for %zu bytes\n", bytes);
    std::abort();
  }
  return base + kPage;
}

void start_block(Block& block, Dim grid, Dim size, Dim index, size_t shared_bytes) {
  const unsigned count = size.x * size.y * size.z;
  if (block.fibers.size() < count) block.fibers.resize(count);
  if (!block.shared_end) block.shared_end = map_guarded((kSharedBytesMax + kPage - 1) / kPage * kPage) + (kSharedBytesMax + kPage - 1) / kPage * kPage;
  const size_t room = (shared_bytes + 15) / 16 * 16;
  block.shared = block.shared_end - room;
  std::memset(block.shared, kPoison, room);
  block.warps.assign((count + 31) / 32, Warp{0, 0, 0, 0, 0xffffffffu, {}});
  if (count % 32) block.warps.back().exists = (1u << count % 32) - 1;
  block.runnable_warps = block.spinning_warps = 0;
  block.live = count;
  block.at_barrier = 0;
  for (unsigned i = 0; i < count; i++) {
    Fiber& fiber = block.fibers[i];
    if (!fiber.stack) fiber.stack = map_guarded(kStackBytes);
    fiber.block = &block;
    fiber.index = i;
    fiber.place = {{i % size.x, i / size.x % size.y, i / (size.x * size.y)}, index, size, grid};
    fiber.copies.clear();
    fiber.copy_group = 0;
    fiber.waited = false;
    // Tops at different offsets in their pages: at one offset, they would all compete for the same few lines of the cache.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64 - i * 1088 % 16384);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(enter);
    for (int k = 0; k < 6; k++) *--top = nullptr;
    fiber.stack_pointer = top;
    wake(fiber);
  }
  totals.threads += count;
}

unsigned lowest(uint32_t bits) { return static_cast<unsigned>(__builtin_ctz(bits)); }
unsigned highest(uint32_t bits) { return 31u - static_cast<unsigned>(__builtin_clz(bits)); }
unsigned any_of(uint32_t bits) {  // the first from a random place on
  const unsigned from = static_cast<unsigned>(next_random(running->random_state) % 32);
  const uint32_t above = bits >> from << from;
  return lowest(above ? above : bits);
}

unsigned choose(uint32_t bits, Order order) { return order == Order::Forward ? lowest(bits) : order == Order::Reverse ? highest(bits) : any_of(bits); }
// A runnable thread of a block that has one.
Fiber* runnable_of(Block* block, Order order) {
  const unsigned w = choose(block->runnable_warps, order);
  return &block->fibers[w * 32 + choose(block->warps[w].runnable, order)];
}

// The thread to run next, or null: a runnable one, else a spinning one.
Fiber* pick(const Grid& grid) {
  const std::vector<Block*>& live = grid.live;
  for (const bool spinning : {false, true}) {
    // Spinning threads take turns by chance in every order: a fixed choice could starve the one that is waited for.
    const Order order = spinning ? Order::Random : grid.schedule.order;
    const size_t n = live.size(), from = order == Order::Random && n > 1 ? next_random(running->random_state) % n : 0;
    for (size_t i = 0; i < n; i++) {
      Block* block = live[order == Order::Reverse ? n - 1 - i : (from + i) % n];
      if (!(spinning ? block->spinning_warps : block->runnable_warps)) continue;
      if (!spinning) return runnable_of(block, order);
      const unsigned w = choose(block->spinning_warps, order);
      return &block->fibers[w * 32 + choose(block->warps[w].spinning, order)];
    }
  }
  return nullptr;
}

void on_signal(int signal, siginfo_t* info, void*) {
  if (!in_fiber) {  // not of a kernel: the default action, at the same instruction
    ::signal(signal, SIG_DFL);
    return;
  }
  in_fiber = 0;
  char text[200];
  // SIGILL is the trap of -fsanitize=alignment.
  std::string closed;
  if (running->starts_early && signal == SIGSEGV) closed = describe_closed(info->si_addr);
  if (!closed.empty()) std::snprintf(text, sizeof text, "touches %s before it has waited for the grid before (grid_dependency_wait)", closed.c_str());
  else if (signal == SIGILL) std::snprintf(text, sizeof text, "misaligned access");
  else std::snprintf(text, sizeof text, "access out of bounds: %s", describe_address(info->si_addr, current->stack, current->block->shared, current->block->shared_end).c_str());
  running->problem = where(*current) + ": " + text;
  running->failed = true;
  siglongjmp(after_signal, 1);
}

// While kernels run on this host thread: their faults are caught, and denormals are zero, in and out, as with -ftz=true.
struct KernelScope {
  struct sigaction before[3];
  stack_t stack_before{};
  const unsigned mxcsr = _mm_getcsr();
  static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGILL};
  KernelScope() {
    _mm_setcsr(mxcsr | 0x8040);
    static uint8_t alternate[64 * 1024];
    stack_t stack{};
    stack.ss_sp = alternate;
    stack.ss_size = sizeof alternate;
    sigaltstack(&stack, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &action, &before[i]);
  }
  ~KernelScope() {
    _mm_setcsr(mxcsr);
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

// What everybody waits for, when nobody can go on.
std::string describe_deadlock(const std::vector<Block*>& live) {
  for (const Block* block : live)
    for (const Fiber& fiber : block->fibers)
      if (fiber.state == State::AtWarp) {
        const unsigned first = fiber.index / 32 * 32;
        for (unsigned l = 0; l < 32; l++) {
          if (!(fiber.mask >> l & 1)) continue;
          const Fiber& other = block->fibers[first + l];
          if (other.state != State::AtWarp)
            return where(fiber) + ": waits in " + fiber.operation + " at " + name_of(fiber.site) + " for lane " + std::to_string(l) + ", which " +
                   (other.state == State::AtBlock        ? "waits in __syncthreads at " + name_of(other.site)
                    : other.state == State::AtDependency ? "waits for the grid before"
                                                         : "has ended");
        }
      } else if (fiber.state == State::AtBlock) {
        return where(fiber) + ": waits in __syncthreads at " + name_of(fiber.site) + " for threads that wait for the grid before";
      }
  return "nobody can go on";
}

bool start_next(Grid& grid, Block* into) {
  if (grid.started == grid.order.size()) return false;
  const unsigned i = grid.order[grid.started++];
  start_block(*into, grid.size, grid.block, {i % grid.size.x, i / grid.size.x % grid.size.y, i / (grid.size.x * grid.size.y)}, grid.shared_bytes);
  return true;
}

void make_current(Fiber* fiber) {
  Warp& warp = fiber->block->warps[fiber->index / 32];
  const uint32_t bit = 1u << (fiber->index % 32);
  warp.runnable &= ~bit;
  warp.spinning &= ~bit;
  if (!warp.runnable) fiber->block->runnable_warps &= ~(1u << (fiber->index / 32));
  if (!warp.spinning) fiber->block->spinning_warps &= ~(1u << (fiber->index / 32));
  fiber->state = State::Runnable;
  current = fiber;
  place = &fiber->place;
}

// One turn of a thread, until it meets others, spins or ends; and, one after the other, those that leave() has behind it. Returns the thread whose turn was the last.
Fiber* run_fiber(Fiber* fiber) {
  make_current(fiber);
  in_fiber = 1;
  simt_switch(&main_stack_pointer, fiber->stack_pointer);
  Fiber* last = current;
  if (last->state == State::Spinning) {
    last->block->warps[last->index / 32].spinning |= 1u << (last->index % 32);
    last->block->spinning_warps |= 1u << (last->index / 32);
  }
  return last;
}

// The end of a thread's turn. The next one has its turn straight from here as long as there is nothing else to see to: that is most of the time, and half of the switches.
void leave() {
  Fiber* self = current;
  Grid& grid = *running;
  const std::vector<Block*>& live = grid.live;
  const auto can_go_on = [](const Block* block) { return block->runnable_warps != 0; };
  if (grid.turns > 0 && !grid.failed && self->state != State::Spinning && self->block->live > 0 && (live.size() == 1 ? can_go_on(live[0]) : std::any_of(live.begin(), live.end(), can_go_on))) {
    grid.turns--;
    grid.spins = grid.idle_spins = 0;
    Fiber* next = live.size() == 1 ? runnable_of(live[0], grid.schedule.order) : pick(grid);
    make_current(next);
    if (next != self) simt_switch(&self->stack_pointer, next->stack_pointer);
    return;
  }
  in_fiber = 0;
  simt_switch(&self->stack_pointer, main_stack_pointer);
}

// At most `turns` turns of the grid's threads. False where it has not ended: the turns are over, or its threads have done nothing but spin for a while.
bool run_threads(Grid& grid, uint64_t turns) {
  grid.turns = turns;
  grid.spins = 0;
  while (!grid.live.empty() && !grid.failed) {
    if (grid.turns == 0 || grid.spins > kSpinsOfTurn) return false;
    grid.turns--;
    Fiber* fiber = pick(grid);
    if (!fiber) {
      grid.problem = describe_deadlock(grid.live);
      grid.failed = true;
      break;
    }
    const bool idle = fiber->state == State::Spinning;
    grid.idle_spins = idle ? grid.idle_spins + 1 : 0;
    grid.spins = idle ? grid.spins + 1 : 0;
    if (grid.idle_spins > kSpinsMax && !grid.schedule.wall_clock) {
      grid.problem = where(*fiber) + ": every thread spins and nothing changes";
      grid.failed = true;
      break;
    }
    Block* block = run_fiber(fiber)->block;
    if (block->live == 0 && !start_next(grid, block)) grid.live.erase(std::find(grid.live.begin(), grid.live.end(), block));
  }
  return true;
}

// Every block by itself, every thread as far as its wait for the grid before.
void run_to_waits(Grid& grid, Block& block) {
  grid.live = {&block};
  grid.turns = kToTheEnd;
  while (start_next(grid, &block)) {
    while (Fiber* fiber = pick(grid)) {
      if (fiber->state == State::Spinning) {
        grid.problem = where(*fiber) + ": spins before it has waited for the grid before (grid_dependency_wait)";
        grid.failed = true;
        return;
      }
      run_fiber(fiber);
      if (grid.failed) return;
    }
    const unsigned count = grid.block.x * grid.block.y * grid.block.z;
    for (unsigned i = 0; i < count && !grid.failed; i++) {
      if (block.fibers[i].state == State::AtDependency) continue;
      grid.problem = describe_deadlock(grid.live);
      grid.failed = true;
    }
    if (grid.failed) return;
  }
}

// The first run of a launch that is checked for an early start. The caller holds `one_grid`.
void start_early(Grid& grid) {
  totals.early++;
  if (spare_blocks.empty()) spare_blocks.push_back(std::make_unique<Block>());
  const uint64_t random_state = grid.random_state, threads = totals.threads;
  grid.starts_early = true;
  running = &grid;
  {
    const ClosedMemory closed;
    const KernelScope scope;
    if (sigsetjmp(after_signal, 1) == 0) run_to_waits(grid, *spare_blocks.back());
    in_fiber = 0;
  }
  grid.starts_early = false;
  grid.live.clear();
  grid.started = 0;
  grid.random_state = random_state;
  totals.threads = threads;
}

// run_threads where a thread may fault. The caller holds `one_grid`.
bool run_turns(Grid& grid, uint64_t turns) {
  const KernelScope scope;
  running = &grid;
  bool ended = true;
  if (sigsetjmp(after_signal, 1) == 0) ended = run_threads(grid, turns);
  in_fiber = 0;
  return ended || grid.failed;
}

// "" and a grid that is about to begin, or why none can. The caller holds `one_grid`.
std::string make_grid(Dim size, Dim block, size_t shared_bytes, const std::function<void()>& body, std::unique_ptr<Grid>* made) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, count = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024) return "a block of " + std::to_string(threads) + " threads; 1 to 1024 are possible";
  if (count == 0 || size.x > 0x7fffffffu || size.y > 65535 || size.z > 65535) return "a grid of (" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ") blocks";
  if (shared_bytes > kSharedBytesMax) return std::to_string(shared_bytes) + " bytes of shared memory; " + std::to_string(kSharedBytesMax) + " are possible on every card";
  auto grid = std::unique_ptr<Grid>(new Grid{size, block, shared_bytes, body, schedule_of_launches, std::vector<unsigned>(count), 0, {}, {}, schedule_of_launches.seed});
  for (unsigned i = 0; i < count; i++) grid->order[i] = grid->schedule.order == Order::Reverse ? static_cast<unsigned>(count) - 1 - i : i;
  grid->checks_early_start = checks_all_early_starts || early_starts > 0;
  if (grid->schedule.order == Order::Random)
    for (size_t i = count; i > 1; i--) std::swap(grid->order[i - 1], grid->order[next_random(grid->random_state) % i]);
  totals.launches++;
  *made = std::move(grid);
  return "";
}

void begin_grid(Grid& grid) {
  if (grid.checks_early_start) start_early(grid);
  if (grid.failed) return;
  for (size_t i = std::min<size_t>(grid.schedule.resident, grid.order.size()); i > 0; i--) {
    if (spare_blocks.empty()) spare_blocks.push_back(std::make_unique<Block>());
    grid.resident.push_back(std::move(spare_blocks.back()));
    spare_blocks.pop_back();
    grid.live.push_back(grid.resident.back().get());
    start_next(grid, grid.live.back());
  }
}

void end_grid(Grid& grid) {
  for (auto& block : grid.resident) spare_blocks.push_back(std::move(block));
  grid.resident.clear();
}

}  // namespace

void set_schedule(const Schedule& schedule) {
  const std::lock_guard lock(one_grid);
  schedule_of_launches = schedule;
}
void check_early_starts(bool all) { checks_all_early_starts = all; }
EarlyStart::EarlyStart() { early_starts++; }
EarlyStart::~EarlyStart() { early_starts--; }
const Counts& counts() { return totals; }
uint64_t timer_now() { return timer; }
std::string absent_machine() { return ""; }
std::string finish() { return ""; }  // a launch ends before it returns

std::string run_grid(Dim size, Dim block, size_t shared_bytes, const std::function<void()>& body) {
  std::unique_ptr<Grid> grid;
  if (taken) {
    const std::string refused = make_grid(size, block, shared_bytes, body, &grid);
    if (refused.empty()) taken->push_back(std::move(grid));
    return refused;
  }
  std::unique_lock lock(one_grid);
  if (const std::string refused = make_grid(size, block, shared_bytes, body, &grid); !refused.empty()) return refused;
  begin_grid(*grid);
  while (!grid->failed && !run_turns(*grid, kToTheEnd)) {
    if (!grid->schedule.wall_clock) continue;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    lock.lock();
  }
  end_grid(*grid);
  return grid->problem;
}

std::string run_together(const std::vector<CardWork*>& cards, uint64_t seed) {
  struct Progress {
    size_t done = 0;
    std::deque<std::unique_ptr<Grid>> grids = {};
  };
  const std::lock_guard lock(one_grid);
  std::vector<Progress> progress(cards.size());
  std::string problem;
  const auto ended = [&](size_t c) { return progress[c].grids.empty() && progress[c].done == cards[c]->work.size(); };
  std::vector<size_t> going;
  while (problem.empty()) {
    going.clear();
    for (size_t c = 0; c < cards.size(); c++)
      if (!ended(c)) going.push_back(c);
    if (going.empty()) break;
    const size_t c = going[next_random(seed) % going.size()];
    Progress& own = progress[c];
    if (own.grids.empty()) {
      taken = &own.grids;
      problem = cards[c]->work[own.done++]();
      taken = nullptr;
      if (!own.grids.empty()) begin_grid(*own.grids.front());
      continue;
    }
    // Short turns and long ones, so that a card may get far ahead of the others.
    Grid& grid = *own.grids.front();
    if (!grid.failed && !run_turns(grid, uint64_t{1} << next_random(seed) % 12)) continue;
    if (grid.failed) problem = "card " + std::to_string(c) + ": " + grid.problem;
    end_grid(grid);
    own.grids.pop_front();
    if (!own.grids.empty()) begin_grid(*own.grids.front());
  }
  for (CardWork* card : cards) card->work.clear();
  return problem;
}

void fault(const Site& site, const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  running->problem = where(*current) + ": " + text + ", at " + name_of(site);
  running->failed = true;
  leave();
  __builtin_trap();  // nobody comes back to a failed grid
}

void meet_warp(const char* operation, uint32_t mask, const Site& site, void* slot, void (*complete)(void* const*, uint32_t, const Site&)) {
  Fiber& self = *current;
  const unsigned first = self.index / 32 * 32, own = self.index % 32;
  if (!(mask >> own & 1)) fault(site, "%s with mask %08x, which lacks its own lane %u", operation, mask, own);
  self.operation = operation;
  self.mask = mask;
  self.site = site;
  Warp& warp = self.block->warps[self.index / 32];
  warp.slots[own] = slot;
  const auto lane_of = [&](unsigned l) -> const Fiber& { return self.block->fibers[first + l]; };
  if (const uint32_t missing = mask & ~warp.exists) fault(site, "%s with mask %08x, but the warp has no lane %u", operation, mask, lowest(missing));
  if (const uint32_t done = mask & warp.done) fault(site, "%s with mask %08x, but lane %u has ended", operation, mask, lowest(done));
  // Those that wait agree already: two of them have come with the same operation, or none is in the other's mask. So it is enough to ask one lane of the own mask,
  // and those outside of it that wait for this one and would wait for ever.
  uint32_t others = mask & warp.waiting ? 1u << lowest(mask & warp.waiting) : 0;
  for (uint32_t outside = warp.waiting & ~mask; outside; outside &= outside - 1)
    if (lane_of(lowest(outside)).mask >> own & 1) others |= 1u << lowest(outside);
  for (; others; others &= others - 1) {
    const unsigned l = lowest(others);
    const Fiber& other = lane_of(l);
    if (!same_text(other.operation, operation) || other.mask != mask || !same_site(other.site, site))
      fault(site, "%s with mask %08x, but lane %u is in %s with mask %08x at %s", operation, mask, l, other.operation, other.mask, name_of(other.site).c_str());
  }
  if (mask & ~(warp.waiting | 1u << own)) {
    self.state = State::AtWarp;
    warp.waiting |= 1u << own;
    leave();
    return;
  }
  warp.waiting &= ~mask;
  void* slots[32] = {};
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) slots[lowest(lanes)] = warp.slots[lowest(lanes)];
  totals.collectives++;
  complete(slots, mask, site);
  warp.runnable |= mask;
  self.block->runnable_warps |= 1u << (self.index / 32);
  leave();  // the order decides who of the warp goes on first
}

void meet_block(const Site& site) {
  Fiber& self = *current;
  Block& block = *self.block;
  const unsigned count = self.place.block_size.x * self.place.block_size.y * self.place.block_size.z;
  if (block.live < count) fault(site, "__syncthreads, but a thread of the block has ended");
  if (block.at_barrier > 0 && !same_site(site, block.barrier)) fault(site, "__syncthreads, but others wait in the one at %s", name_of(block.barrier).c_str());
  block.barrier = site;
  self.site = site;
  self.state = State::AtBlock;
  if (++block.at_barrier == count) {
    block.at_barrier = 0;
    for (unsigned i = 0; i < count; i++) wake(block.fibers[i]);
  }
  leave();
}

void spin() {
  current->state = State::Spinning;
  leave();
}

void grid_dependency_wait() {
  current->waited = true;
  if (!running->starts_early) return;
  current->state = State::AtDependency;
  leave();  // for ever
}

void prefetch(const void* address) {
  if (!running->starts_early) static_cast<void>(*static_cast<const volatile uint8_t*>(address));
}

uint8_t* shared_memory() { return current->block->shared; }
uint64_t global_timer() {
  if (!running->schedule.wall_clock) return timer += 1000;
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

void copy_async(const Site& site, void* target, const void* source, unsigned bytes, unsigned source_bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(target);
  if (at < current->block->shared || at + bytes > current->block->shared_end) fault(site, "an asynchronous copy whose target is not in shared memory");
  if (reinterpret_cast<uintptr_t>(target) % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0)
    fault(site, "an asynchronous copy of %u bytes that are not aligned to %u", bytes, bytes);
  if (source_bytes > bytes) fault(site, "an asynchronous copy of %u bytes into %u", source_bytes, bytes);
  if (running->starts_early && source_bytes > 0) static_cast<void>(*static_cast<const volatile uint8_t*>(source));  // it may be made at once
  std::memset(target, kPoison, bytes);
  current->copies.push_back({target, source, bytes, source_bytes, current->copy_group});
}

void commit_copies() { current->copy_group++; }

void wait_copies(unsigned groups_left) {
  std::vector<Copy>& copies = current->copies;
  // Copies outside a committed group are not waited for.
  const auto lands = [&](const Copy& c) { return c.group + groups_left < current->copy_group; };
  for (const Copy& c : copies) {
    if (!lands(c)) continue;
    std::memset(c.target, 0, c.bytes);
    std::memcpy(c.target, c.source, c.source_bytes);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), lands), copies.end());
}

}  // namespace simt
