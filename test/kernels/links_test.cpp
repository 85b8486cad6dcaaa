// Native links, tested with real processes. `links_test --list` prints the names, `links_test NAME` runs one test, `links_test --bench` prints the latency of
// one exchange. Exit status 0: passed.
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <fstream>
#include <functional>
#include <sched.h>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "links.h"
#include "seal.h"
#include "segment.h"
#include "tcp_connection.h"
#include "tcp_endpoint.h"
#include "wait.h"

using namespace shardmesh;

namespace {

#define CHECK(condition, ...)                                                        \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: %s is false.", __FILE__, __LINE__, #condition);  \
      std::fprintf(stderr, " " __VA_ARGS__);                                         \
      std::fprintf(stderr, "\n");                                                    \
      std::fflush(stderr);                                                           \
      _exit(1);                                                                      \
    }                                                                                \
  } while (0)

constexpr int kPeersMax = 8;
constexpr int64_t kSecond = 1'000'000'000;
constexpr int64_t kMs = 1'000'000;

WaitOptions within(int64_t ns, bool spin = false) { return WaitOptions{monotonic_ns() + ns, spin}; }

FrameOut no_frames() {
  return [](PeerAddress, const FrameKey&, int, const void*, size_t) { CHECK(false, "a frame left through the host driver"); };
}

LinksOptions options_for(std::vector<int> ranks, int index, size_t exchange_bytes = 16384) {
  LinksOptions options{{0, 0}, static_cast<int>(ranks.size()), std::move(ranks), exchange_bytes, 8192, 512};
  options.self = peer_at(options, index);
  return options;
}

// Memory that all processes of a test write: segments, barriers, notes.
struct Board {
  std::atomic<int> arrived[8];
  Links::Segment segments[kPeersMax];
  std::atomic<int64_t> note[kPeersMax];
};

struct Mesh {
  Board* board;
  std::vector<int> ranks;
  int index;
  int peers;
  std::unique_ptr<Links> links;

  void barrier(int which) const {
    board->arrived[which].fetch_add(1);
    const int64_t end = monotonic_ns() + 20 * kSecond;
    while (board->arrived[which].load() < peers) {
      CHECK(monotonic_ns() < end, "barrier %d: a process did not come", which);
      usleep(200);
    }
  }

  void connect(size_t exchange_bytes = 16384) {
    links = make_links(options_for(ranks, index, exchange_bytes), no_frames());
    board->segments[index] = links->open_segment();
    barrier(0);
    std::vector<PeerLink> peer_links;
    for (int peer = 0; peer < peers; peer++)
      if (peer != index) {
        const Links::Segment& segment = board->segments[peer];
        peer_links.push_back(PeerLink{peer_at(options_for(ranks, 0), peer), true, segment.pid, segment.fd, segment.bytes});
      }
    links->connect(peer_links);
    barrier(1);
  }
};

using Body = std::function<void(Mesh&)>;

// Forks one process a rank and waits for all. `parent` runs meanwhile with the pids. A process ended by a signal that `parent` sent is no failure.
void run_mesh(const std::vector<int>& ranks, const Body& body, const std::function<void(const std::vector<pid_t>&, Board*)>& parent = nullptr,
              int64_t limit_ns = 100 * kSecond) {
  int peers = 0;
  for (const int count : ranks) peers += count;
  Board* board = static_cast<Board*>(mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  CHECK(board != MAP_FAILED);
  std::vector<pid_t> pids;
  for (int index = 0; index < peers; index++) {
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      Mesh mesh{board, ranks, index, peers, nullptr};
      try {
        body(mesh);
      } catch (const std::exception& error) {
        CHECK(false, "process %d: %s", index, error.what());
      }
      mesh.links.reset();
      _exit(0);
    }
    pids.push_back(pid);
  }
  if (parent) parent(pids, board);
  const int64_t end = monotonic_ns() + limit_ns;
  bool failed = false;
  for (const pid_t pid : pids) {
    int status = 0;
    pid_t ended;
    while ((ended = waitpid(pid, &status, WNOHANG)) == 0 && monotonic_ns() < end) usleep(1000);
    if (ended == 0) {
      std::fprintf(stderr, "process %d did not end within the limit\n", pid);
      kill(pid, SIGKILL);
      waitpid(pid, &status, 0);
      failed = true;
    } else if (WIFEXITED(status) && WEXITSTATUS(status) != 0) {
      failed = true;
    }
  }
  munmap(board, sizeof(Board));
  CHECK(!failed);
}

uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}

// Contents of rank's block number `counter`: every 8 bytes differ in every exchange.
size_t block_bytes(uint32_t counter, size_t most) { return 8 + mix(counter) % (most / 8) * 8; }
void fill(uint8_t* data, size_t bytes, int rank, uint32_t counter) {
  const uint64_t seed = mix(static_cast<uint64_t>(rank) << 32 | counter);
  for (size_t i = 0; i < bytes / 8; i++) {
    const uint64_t word = seed + i * 0x9e3779b97f4a7c15ull;
    std::memcpy(data + 8 * i, &word, 8);
  }
}
bool filled(const uint8_t* data, size_t bytes, int rank, uint32_t counter) {
  const uint64_t seed = mix(static_cast<uint64_t>(rank) << 32 | counter);
  for (size_t i = 0; i < bytes / 8; i++) {
    const uint64_t word = seed + i * 0x9e3779b97f4a7c15ull;
    if (std::memcmp(data + 8 * i, &word, 8) != 0) return false;
  }
  return true;
}

FrameKey exchange_key(uint32_t counter) { return FrameKey{FrameKind::Reduce, counter / 60 + 1, static_cast<uint16_t>(counter % 60), 0}; }

void one_exchange(Exchange* exchange, int self, int ranks, uint32_t counter, size_t most, bool spin, bool verify) {
  const size_t bytes = verify ? block_bytes(counter, most) : most;
  uint8_t* own = exchange->begin(exchange_key(counter), bytes);
  CHECK(own != nullptr);
  if (verify) fill(own, bytes, self, counter);
  exchange->publish(1);
  for (int rank = 0; rank < ranks; rank++) {
    if (rank == self) continue;
    const uint8_t* data = nullptr;
    const WaitResult result = exchange->wait(rank, bytes, &data, within(20 * kSecond, spin));
    CHECK(result == WaitResult::Done, "exchange %u of rank %d with %d: result %d", counter, self, rank, static_cast<int>(result));
    if (verify) CHECK(filled(data, bytes, rank, counter), "exchange %u: rank %d read another block of rank %d", counter, self, rank);
  }
}

void pin_to(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core % static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)), &cores);
  sched_setaffinity(0, sizeof cores, &cores);  // a machine that refuses is only slower
}

void exchanges(int ranks, uint32_t count, bool spin) {
  run_mesh({ranks}, [=](Mesh& mesh) {
    mesh.connect();
    if (spin) pin_to(mesh.index);
    for (uint32_t counter = 0; counter < count; counter++) one_exchange(mesh.links->exchange(), mesh.index, ranks, counter, 2304, spin, true);
    // The last block stays readable until all have read it.
    mesh.barrier(2);
  });
}

void ping_pong() {
  run_mesh({1, 1}, [](Mesh& mesh) {
    mesh.connect();
    const PeerAddress other{1 - mesh.index, 0};
    TensorLink* to = mesh.links->to(other);
    TensorLink* from = mesh.links->from(other);
    CHECK(to != nullptr && from != nullptr && mesh.links->exchange() == nullptr);
    std::vector<uint8_t> buffer(8192);
    for (uint32_t step = 1; step <= 20000; step++) {
      const size_t hidden = block_bytes(step, 8192), tokens = block_bytes(step, 512);
      size_t bytes = 0;
      if (mesh.index == 0) {
        fill(buffer.data(), hidden, 0, step);
        CHECK(to->send({FrameKind::Hidden, step, 7, 0}, 3, buffer.data(), hidden, within(20 * kSecond)) == WaitResult::Done);
        CHECK(from->receive({FrameKind::Tokens, step, 9, 0}, buffer.data(), buffer.size(), &bytes, within(20 * kSecond)) == WaitResult::Done);
        CHECK(bytes == tokens && filled(buffer.data(), tokens, 1, step));
      } else {
        CHECK(from->receive({FrameKind::Hidden, step, 7, 0}, buffer.data(), buffer.size(), &bytes, within(20 * kSecond, true)) == WaitResult::Done);
        CHECK(bytes == hidden && filled(buffer.data(), hidden, 0, step));
        fill(buffer.data(), tokens, 1, step);
        CHECK(to->send({FrameKind::Tokens, step, 9, 0}, 1, buffer.data(), tokens, within(20 * kSecond)) == WaitResult::Done);
      }
    }
    mesh.barrier(2);
  });
}

void stream_through_full_ring() {
  run_mesh({1, 1}, [](Mesh& mesh) {
    mesh.connect();
    std::vector<uint8_t> buffer(8192);
    for (uint32_t step = 1; step <= 20000; step++) {
      const size_t hidden = block_bytes(step, 8192);
      size_t bytes = 0;
      if (mesh.index == 0) {
        fill(buffer.data(), hidden, 0, step);
        CHECK(mesh.links->to({1, 0})->send({FrameKind::Hidden, step, 7, 0}, 3, buffer.data(), hidden, within(20 * kSecond, step % 2 == 0)) == WaitResult::Done);
      } else {
        if (step % 1000 == 0) usleep(3000);
        CHECK(mesh.links->from({0, 0})->receive({FrameKind::Hidden, step, 7, 0}, buffer.data(), buffer.size(), &bytes, within(20 * kSecond)) == WaitResult::Done);
        CHECK(bytes == hidden && filled(buffer.data(), hidden, 0, step), "step %u", step);
      }
    }
    mesh.barrier(2);
  });
}

void frames_of_other_keys_stay_queued() {
  run_mesh({1, 1}, [](Mesh& mesh) {
    mesh.connect();
    const auto key = [](uint32_t step) { return FrameKey{FrameKind::Tokens, step, 0, 0}; };
    if (mesh.index == 1) {
      // More than the ring has slots: the reader must drain what it does not want yet.
      for (int64_t step = 1; step <= 1000; step++)
        CHECK(mesh.links->to({0, 0})->send(key(static_cast<uint32_t>(step)), 1, &step, 8, within(20 * kSecond)) == WaitResult::Done);
    } else {
      TensorLink* from = mesh.links->from({1, 0});
      int64_t value = 0;
      size_t bytes = 0;
      for (const uint32_t step : {1000u, 3u, 1u, 2u, 500u}) {
        CHECK(from->receive(key(step), &value, 8, &bytes, within(20 * kSecond)) == WaitResult::Done);
        CHECK(bytes == 8 && value == step);
      }
      from->discard_before(600);
      CHECK(from->receive(key(599), &value, 8, &bytes, within(20 * kMs)) == WaitResult::Deadline);
      CHECK(from->receive(key(600), &value, 8, &bytes, within(20 * kMs)) == WaitResult::Done && value == 600);
      CHECK(from->receive(key(600), &value, 8, &bytes, within(20 * kMs)) == WaitResult::Deadline, "a frame is received once");
      CHECK(from->receive(key(601), &value, 4, &bytes, within(20 * kMs)) == WaitResult::Mismatch);
      CHECK(mesh.links->problem() == "stage 1 rank 0: sent a tokens frame of step 601 operation 0 subtree 0 with 8 bytes, there is room for 4", "%s", mesh.links->problem().c_str());
    }
    mesh.barrier(2);
  });
}

void full_ring_ends_at_deadline() {
  run_mesh({1, 1}, [](Mesh& mesh) {
    mesh.connect();
    std::vector<uint8_t> buffer(8192);
    const uint32_t slots = 32;
    if (mesh.index == 0) {
      TensorLink* to = mesh.links->to({1, 0});
      for (uint32_t step = 1; step <= slots; step++) CHECK(to->send({FrameKind::Hidden, step, 0, 0}, 1, buffer.data(), 8192, within(kSecond)) == WaitResult::Done);
      const int64_t begin = monotonic_ns();
      CHECK(to->send({FrameKind::Hidden, slots + 1, 0, 0}, 1, buffer.data(), 8192, within(100 * kMs)) == WaitResult::Deadline);
      const int64_t took = monotonic_ns() - begin;
      CHECK(took >= 100 * kMs && took < 1000 * kMs, "took %ld ns", static_cast<long>(took));
      mesh.barrier(2);
      CHECK(to->send({FrameKind::Hidden, slots + 1, 0, 0}, 1, buffer.data(), 8192, within(20 * kSecond)) == WaitResult::Done);
      CHECK(to->send({FrameKind::Hidden, slots + 2, 0, 0}, 1, buffer.data(), 8193, within(kSecond)) == WaitResult::Mismatch);
      CHECK(to->send({FrameKind::Tokens, slots + 2, 0, 0}, 1, buffer.data(), 8, within(kSecond)) == WaitResult::Mismatch);
    } else {
      mesh.barrier(2);
      size_t bytes = 0;
      for (uint32_t step = 1; step <= slots + 1; step++)
        CHECK(mesh.links->from({0, 0})->receive({FrameKind::Hidden, step, 0, 0}, buffer.data(), 8192, &bytes, within(20 * kSecond)) == WaitResult::Done);
    }
    mesh.barrier(3);
  });
}

void killed_peer(bool spin) {
  run_mesh(
      {2},
      [spin](Mesh& mesh) {
        mesh.connect();
        for (uint32_t counter = 0; counter < 100; counter++) one_exchange(mesh.links->exchange(), mesh.index, 2, counter, 2304, spin, true);
        mesh.board->note[mesh.index] = 1;
        if (mesh.index == 1) {
          for (;;) pause();
        }
        while (mesh.board->note[2].load() == 0) usleep(500);  // the parent has killed rank 1
        Exchange* exchange = mesh.links->exchange();
        exchange->begin(exchange_key(100), 64);
        exchange->publish(1);
        const uint8_t* data = nullptr;
        const int64_t begin = monotonic_ns();
        CHECK(exchange->wait(1, 64, &data, within(300 * kMs, spin)) == WaitResult::Deadline);
        const int64_t took = monotonic_ns() - begin;
        CHECK(took >= 300 * kMs && took < 1000 * kMs, "took %ld ns", static_cast<long>(took));
      },
      [](const std::vector<pid_t>& pids, Board* board) {
        while (board->note[1].load() == 0) usleep(500);
        kill(pids[1], SIGKILL);
        while (kill(pids[1], 0) == 0) {
          siginfo_t info{};
          waitid(P_PID, static_cast<id_t>(pids[1]), &info, WEXITED | WNOWAIT);
          break;
        }
        board->note[2] = 1;
      });
}

void frozen_peer() {
  run_mesh(
      {2},
      [](Mesh& mesh) {
        mesh.connect();
        uint32_t counter = 0;
        for (; counter < 100; counter++) one_exchange(mesh.links->exchange(), mesh.index, 2, counter, 2304, false, true);
        mesh.board->note[mesh.index] = 1;
        if (mesh.index == 1) {
          while (mesh.board->note[2].load() == 0) usleep(500);
        } else {
          while (mesh.board->note[2].load() == 0) usleep(500);  // rank 1 is stopped
          Exchange* exchange = mesh.links->exchange();
          CHECK(exchange->begin(exchange_key(counter), 64) != nullptr);
          exchange->publish(1);
          const uint8_t* data = nullptr;
          CHECK(exchange->wait(1, 64, &data, within(100 * kMs)) == WaitResult::Deadline);
          mesh.board->note[3] = 1;  // the parent thaws it
          CHECK(exchange->wait(1, 64, &data, within(20 * kSecond)) == WaitResult::Done);
          CHECK(filled(data, 64, 1, counter));
          counter++;
        }
        if (mesh.index == 1) {
          Exchange* exchange = mesh.links->exchange();
          uint8_t* own = exchange->begin(exchange_key(counter), 64);
          fill(own, 64, 1, counter);
          exchange->publish(1);
          const uint8_t* data = nullptr;
          CHECK(exchange->wait(0, 64, &data, within(20 * kSecond)) == WaitResult::Done);
          counter++;
        }
        for (; counter < 1000; counter++) one_exchange(mesh.links->exchange(), mesh.index, 2, counter, 2304, false, true);
        mesh.barrier(2);
      },
      [](const std::vector<pid_t>& pids, Board* board) {
        while (board->note[0].load() == 0 || board->note[1].load() == 0) usleep(500);
        kill(pids[1], SIGSTOP);
        int status = 0;
        waitpid(pids[1], &status, WUNTRACED);
        CHECK(WIFSTOPPED(status));
        board->note[2] = 1;
        while (board->note[3].load() == 0) usleep(500);
        kill(pids[1], SIGCONT);
      });
}

// All ranks as Links of this one process, so that threads and counters can be looked at. Host frames go straight into the destination's deliver().
struct Local {
  std::vector<std::unique_ptr<Links>> links;

  Local(const std::vector<int>& ranks, const std::function<bool(int, int)>& shm, size_t exchange_bytes = 16384) {
    const LinksOptions first = options_for(ranks, 0, exchange_bytes);
    const int peers = peer_count(first);
    std::vector<Links::Segment> segments;
    for (int index = 0; index < peers; index++) {
      const PeerAddress self = peer_at(first, index);
      links.push_back(make_links(options_for(ranks, index, exchange_bytes), [this, first, self](PeerAddress to, const FrameKey& key, int rows, const void* data, size_t bytes) {
        CHECK(links[static_cast<size_t>(peer_index(first, to))]->deliver(self, key, rows, data, bytes));
      }));
      segments.push_back(links.back()->open_segment());
    }
    for (int index = 0; index < peers; index++) {
      std::vector<PeerLink> peer_links;
      for (int peer = 0; peer < peers; peer++) {
        const Links::Segment& segment = segments[static_cast<size_t>(peer)];
        if (peer != index) peer_links.push_back({peer_at(first, peer), shm(index, peer), segment.pid, segment.fd, segment.bytes});
      }
      links[static_cast<size_t>(index)]->connect(peer_links);
    }
  }
};

void abort_wakes() {
  for (const bool shm : {true, false})
    for (const bool spin : {true, false})
      for (int what = 0; what < 3; what++) {
        Local local({1, 2}, [shm](int, int) { return shm; });
        Links* links = local.links[1].get();  // stage 1 rank 0: exchanges with rank 1, receives from stage 0, sends tokens to it
        if (what == 2 && !shm) continue;      // a host sender never waits
        std::atomic<bool> waiting{false};
        std::atomic<int64_t> ended{0};
        WaitResult result = WaitResult::Done;
        std::thread waiter([&] {
          const uint8_t* data = nullptr;
          uint8_t buffer[8192];
          size_t bytes = 0;
          if (what == 0) {
            links->exchange()->begin(exchange_key(0), 64);
            if (shm) links->exchange()->publish(1);
            waiting = true;
            result = links->exchange()->wait(1, 64, &data, within(30 * kSecond, spin));
          } else if (what == 1) {
            waiting = true;
            result = links->from({0, 0})->receive({FrameKind::Hidden, 1, 0, 0}, buffer, sizeof buffer, &bytes, within(30 * kSecond, spin));
          } else {
            for (uint32_t step = 1; step <= 256; step++) links->to({0, 0})->send({FrameKind::Tokens, step, 0, 0}, 1, buffer, 8, within(kSecond));
            waiting = true;
            result = links->to({0, 0})->send({FrameKind::Tokens, 257, 0, 0}, 1, buffer, 8, within(30 * kSecond, spin));
          }
          ended = monotonic_ns();
        });
        while (!waiting) usleep(100);
        usleep(20000);
        const int64_t begin = monotonic_ns();
        links->abort();
        waiter.join();
        CHECK(result == WaitResult::Aborted, "shm %d, spin %d, wait %d: result %d", shm, spin, what, static_cast<int>(result));
        CHECK(ended - begin < 50 * kMs, "shm %d, spin %d, wait %d: took %ld us", shm, spin, what, static_cast<long>((ended - begin) / 1000));
        size_t bytes = 0;
        uint8_t byte = 0;
        CHECK(links->from({0, 0})->receive({FrameKind::Hidden, 1, 0, 0}, &byte, 1, &bytes, within(kSecond)) == WaitResult::Aborted, "a later wait is aborted too");
      }
}

int count_entries(const char* folder) {
  int count = 0;
  DIR* dir = opendir(folder);
  while (readdir(dir) != nullptr) count++;
  closedir(dir);
  return count;
}
int count_segment_mappings() {
  std::ifstream maps("/proc/self/maps");
  std::string line;
  int count = 0;
  while (std::getline(maps, line)) count += line.find("memfd:shardmesh-links") != std::string::npos;
  return count;
}

void nothing_leaks() {
  const int fds = count_entries("/proc/self/fd"), shm_objects = count_entries("/dev/shm");
  CHECK(count_segment_mappings() == 0);
  for (int round = 0; round < 100; round++) {
    Local local({2, 3}, [round](int a, int b) { return round % 2 == 0 || (a + b) % 2 == 0; });
    CHECK(count_entries("/proc/self/fd") == fds + 5, "each worker keeps its own descriptor and closes those of its peers");
    CHECK(count_segment_mappings() > 0);
    // A connect that fails half way lets go what it had attached.
    std::unique_ptr<Links> half = make_links(options_for({2, 3}, 0), no_frames());
    bool thrown = false;
    const Links::Segment segment = local.links[1]->open_segment();
    try {
      half->connect({{{0, 1}, true, segment.pid, segment.fd, segment.bytes}, {{1, 0}, true, segment.pid, 9999, segment.bytes}});
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    CHECK(thrown);
  }
  CHECK(count_segment_mappings() == 0, "%d mappings left", count_segment_mappings());
  CHECK(count_entries("/proc/self/fd") == fds, "%d descriptors, %d before", count_entries("/proc/self/fd"), fds);
  CHECK(count_entries("/dev/shm") == shm_objects);
}

void mixed_group(const std::function<bool(int, int)>& shm) {
  Local local({3}, shm);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 3; rank++)
    threads.emplace_back([&local, rank] {
      for (uint32_t counter = 0; counter < 20000; counter++) one_exchange(local.links[static_cast<size_t>(rank)]->exchange(), rank, 3, counter, 2304, false, true);
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& links : local.links) {
    const LinkCounters counters = links->counters();
    CHECK(counters.refused == 0 && counters.late == 0 && counters.duplicate == 0);
  }
}

void host_channel() {
  Local local({2, 3}, [](int, int) { return false; });
  const int64_t value = 42;
  int64_t got = 0;
  size_t bytes = 0;
  // Stage 1 rank 2 is served by stage 0 rank 0; rank 1 by rank 1.
  CHECK(local.links[0]->to({1, 2}) != nullptr && local.links[0]->to({1, 1}) == nullptr && local.links[1]->to({1, 1}) != nullptr);
  CHECK(local.links[2]->to({0, 1}) != nullptr && local.links[3]->to({0, 1}) == nullptr, "only rank 0 of the last stage sends sampled ids");
  CHECK(local.links[0]->to({1, 2})->send({FrameKind::Hidden, 1, 4, 0}, 2, &value, 8, within(kSecond)) == WaitResult::Done);
  CHECK(local.links[4]->from({0, 0})->receive({FrameKind::Hidden, 1, 4, 0}, &got, 8, &bytes, within(kSecond)) == WaitResult::Done);
  CHECK(got == 42 && bytes == 8);
  CHECK(!local.links[4]->deliver({0, 0}, {FrameKind::Hidden, 1, 4, 0}, 2, &value, 8), "a hidden frame of a step that is over");
  CHECK(local.links[4]->counters().late == 1);
}

void hidden_pieces() {
  for (const bool shm : {true, false}) {
    Local local({1, 1}, [shm](int, int) { return shm; });
    TensorLink* to = local.links[0]->to({1, 0});
    TensorLink* from = local.links[1]->from({0, 0});
    for (uint32_t step = 1; step <= 3; step++)
      for (uint16_t piece = 0; piece < 4; piece++) {
        const int64_t value = step * 10 + piece;
        CHECK(to->send({FrameKind::Hidden, step, 0, piece}, 1, &value, 8, within(kSecond)) == WaitResult::Done);
      }
    for (uint32_t step = 1; step <= 3; step++)
      for (uint16_t piece = 0; piece < 4; piece++) {
        int64_t value = 0;
        size_t bytes = 0;
        // A deadline that has passed asks without waiting.
        CHECK(from->receive({FrameKind::Hidden, step, 0, piece}, &value, 8, &bytes, WaitOptions{0, false}) == WaitResult::Done, "step %u piece %d", step, piece);
        CHECK(value == step * 10 + piece && bytes == 8);
      }
    int64_t value = 0;
    size_t bytes = 0;
    CHECK(from->receive({FrameKind::Hidden, 4, 0, 0}, &value, 8, &bytes, WaitOptions{0, true}) == WaitResult::Deadline);
  }
}

void single_stage_tokens() {
  Local local({3}, [](int, int) { return true; });
  const int64_t value = 7;
  int64_t got = 0;
  size_t bytes = 0;
  for (int rank = 1; rank < 3; rank++) {
    CHECK(local.links[0]->to({0, rank})->send({FrameKind::Tokens, 1, 4, 0}, 1, &value, 8, within(kSecond)) == WaitResult::Done);
    CHECK(local.links[static_cast<size_t>(rank)]->from({0, 0})->receive({FrameKind::Tokens, 1, 4, 0}, &got, 8, &bytes, within(kSecond)) == WaitResult::Done && got == 7);
  }
  CHECK(local.links[1]->to({0, 2}) == nullptr);
}

void flooding_is_refused() {
  std::unique_ptr<Links> links = make_links(options_for({2, 1}, 0, 1024), no_frames());
  links->connect({{{0, 1}, false, 0, 0, 0}, {{1, 0}, false, 0, 0, 0}});
  std::vector<uint8_t> data(65536);
  // 1 MiB may wait for one source here: 16 frames of 64 KiB.
  int kept = 0;
  for (uint32_t step = 1; step <= 1000; step++) kept += links->deliver({0, 1}, {FrameKind::Reduce, step, 0, 0}, 1, data.data(), data.size());
  CHECK(kept == 16, "%d frames kept", kept);
  CHECK(links->counters().refused == 984);
  CHECK(links->deliver({1, 0}, {FrameKind::Tokens, 1, 0, 0}, 1, data.data(), 8), "another source has its own room");
  CHECK(!links->deliver({0, 1}, {FrameKind::Hidden, 1, 0, 0}, 1, data.data(), 8), "wrong kind");
  CHECK(!links->deliver({0, 0}, {FrameKind::Reduce, 1, 0, 0}, 1, data.data(), 8), "own address");
  CHECK(!links->deliver({0, 2}, {FrameKind::Reduce, 1, 0, 0}, 1, data.data(), 8), "outside the mesh");
  CHECK(!links->deliver({-1, 0}, {FrameKind::Reduce, 1, 0, 0}, 1, data.data(), 8), "outside the mesh");
  CHECK(links->counters().refused == 988);
}

void late_and_duplicate() {
  Local local({2}, [](int, int) { return false; });
  uint64_t word = 0;
  CHECK(local.links[0]->deliver({0, 1}, exchange_key(5), 1, &word, 8));
  CHECK(!local.links[0]->deliver({0, 1}, exchange_key(5), 1, &word, 8));
  CHECK(local.links[0]->counters().duplicate == 1);
  CHECK(local.links[0]->exchange()->begin(exchange_key(6), 8) != nullptr);
  CHECK(!local.links[0]->deliver({0, 1}, exchange_key(5), 1, &word, 8));
  CHECK(local.links[0]->counters().late == 1);
  const uint8_t* data = nullptr;
  CHECK(local.links[0]->deliver({0, 1}, exchange_key(6), 1, &word, 8));
  CHECK(local.links[0]->exchange()->wait(1, 16, &data, within(kSecond)) == WaitResult::Mismatch);
  CHECK(local.links[0]->problem() == "stage 0 rank 1 sent a reduce frame of step 1 operation 6 subtree 0 with 8 bytes, expected 16", "%s", local.links[0]->problem().c_str());
}

void other_block_is_a_mismatch() {
  Local local({2}, [](int, int) { return true; });
  CHECK(local.links[0]->exchange()->begin(exchange_key(0), 16385) == nullptr, "above exchange_bytes");
  const uint8_t* data = nullptr;
  const auto publish = [&local](size_t rank, const FrameKey& key, size_t bytes) {
    CHECK(local.links[rank]->exchange()->begin(key, bytes) != nullptr);
    local.links[rank]->exchange()->publish(1);
  };
  publish(0, exchange_key(0), 64);
  publish(1, exchange_key(0), 72);
  CHECK(local.links[0]->exchange()->wait(1, 64, &data, within(kSecond)) == WaitResult::Mismatch);
  CHECK(local.links[0]->problem() ==
            "stage 0 rank 1 published a reduce frame of step 1 operation 0 subtree 0 with 72 bytes, expected a reduce frame of step 1 operation 0 subtree 0 with 64 bytes",
        "%s", local.links[0]->problem().c_str());
  publish(0, exchange_key(1), 64);
  publish(1, exchange_key(2), 64);
  CHECK(local.links[0]->exchange()->wait(1, 64, &data, within(kSecond)) == WaitResult::Mismatch);
  publish(0, exchange_key(2), 64);
  publish(1, exchange_key(3), 64);
  publish(1, exchange_key(4), 64);
  publish(1, exchange_key(5), 64);
  CHECK(local.links[0]->exchange()->wait(1, 64, &data, within(kSecond)) == WaitResult::Mismatch);
  CHECK(local.links[0]->problem() == "stage 0 rank 1 is 2 exchanges ahead", "%s", local.links[0]->problem().c_str());
}

std::string connect_error(const std::vector<PeerLink>& peers, size_t hidden_bytes = 8192) {
  LinksOptions options = options_for({2}, 0);
  options.hidden_bytes = hidden_bytes;
  std::unique_ptr<Links> links = make_links(options, no_frames());
  try {
    links->connect(peers);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void wrong_segments_are_refused() {
  const std::unique_ptr<Links> peer = make_links(options_for({2}, 1), no_frames());
  const Links::Segment good = peer->open_segment();
  CHECK(good.pid == getpid());
  const auto link = [&](int fd, size_t bytes) { return PeerLink{{0, 1}, true, good.pid, fd, bytes}; };
  CHECK(connect_error({link(good.fd, good.bytes)}) == "");
  const auto expect = [](const std::string& error, const char* part) {
    CHECK(error.find("stage 0 rank 1") != std::string::npos && error.find(part) != std::string::npos, "'%s' does not say '%s'", error.c_str(), part);
  };
  expect(connect_error({link(good.fd, good.bytes + 4096)}), ("its size in bytes is " + std::to_string(good.bytes) + ", expected " + std::to_string(good.bytes + 4096)).c_str());
  expect(connect_error({link(9999, good.bytes)}), "No such file or directory");
  expect(connect_error({{{0, 1}, true, 4194304 + 5, good.fd, good.bytes}}), "No such file or directory");
  expect(connect_error({link(good.fd, good.bytes)}, 4096), "its largest hidden frame is 8192, expected 4096");
  expect(connect_error({}), "no link to stage 0 rank 1 is given");
  expect(connect_error({link(good.fd, good.bytes), link(good.fd, good.bytes)}), "stage 0 rank 1 is given twice");
  CHECK(connect_error({{{0, 2}, false, 0, 0, 0}}).find("stage 0 rank 2 is outside the mesh") != std::string::npos);

  const int null_device = open("/dev/null", O_RDONLY | O_CLOEXEC);
  expect(connect_error({link(null_device, good.bytes)}), "it is /dev/null, not a links segment");
  close(null_device);

  const std::unique_ptr<Links> own = make_links(options_for({2}, 0), no_frames());
  const Links::Segment other = own->open_segment();
  expect(connect_error({link(other.fd, other.bytes)}), "it belongs to stage 0 rank 0");
  const std::unique_ptr<Links> larger = make_links(options_for({3}, 1), no_frames());
  const Links::Segment wide = larger->open_segment();
  expect(connect_error({link(wide.fd, wide.bytes)}), "it was made for another number of stages or ranks");

  // Forged files with the right name.
  const auto forge = [&](const SegmentHeader& header, bool seal) {
    const int fd = memfd_create("shardmesh-links", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(fd >= 0 && ftruncate(fd, static_cast<off_t>(good.bytes)) == 0);
    CHECK(pwrite(fd, &header, sizeof header, 0) == sizeof header);
    if (seal) CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
    const std::string error = connect_error({link(fd, good.bytes)});
    close(fd);
    return error;
  };
  SegmentHeader header{};
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", good.fd);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  CHECK(pread(fd, &header, sizeof header, 0) == sizeof header);
  close(fd);
  CHECK(forge(header, true) == "", "the forger itself works");
  expect(forge(header, false), "not sealed against shrinking");
  SegmentHeader bad = header;
  bad.magic++;
  expect(forge(bad, true), "its magic is");
  bad = header;
  bad.version = 2;
  expect(forge(bad, true), "its layout version is 2, expected 1");
  bad = header;
  bad.exchange_bytes = uint64_t{1} << 60;
  expect(forge(bad, true), "its exchange block is 1152921504606846976");
  bad = header;
  bad.exchange_bytes = header.exchange_bytes + 8192;
  expect(forge(bad, true), "its size in bytes is");
  bad = header;
  bad.pid++;
  expect(forge(bad, true), "its owner's process is");
}

// ---------------------------------------------------------------- tcp

Key test_key(uint8_t seed) {
  Key key;
  key.fill(seed);
  return key;
}

TcpMeeting meeting_of(const std::vector<int>& ranks, int index, const std::vector<int>& ports, uint32_t epoch = 1, uint8_t seed = 7, int64_t timeout_ms = 10000) {
  const LinksOptions first = options_for(ranks, 0);
  TcpMeeting meeting{peer_at(first, index), epoch, test_key(seed), {}, timeout_ms};
  for (size_t peer = 0; peer < ports.size(); peer++)
    if (static_cast<int>(peer) != index) meeting.peers.push_back({peer_at(first, static_cast<int>(peer)), "127.0.0.1:" + std::to_string(ports[peer])});
  return meeting;
}

std::unique_ptr<Links> tcp_links(const std::vector<int>& ranks, int index, std::vector<std::shared_ptr<TcpConnection>> connections, size_t exchange_bytes = 16384) {
  std::unique_ptr<Links> links = make_links(options_for(ranks, index, exchange_bytes), no_frames());
  std::vector<PeerLink> peers;
  for (const auto& connection : connections) peers.push_back({connection->peer(), false, 0, -1, 0, connection});
  links->connect(peers);
  return links;
}

// All ranks over tcp, each in a process of its own.
void run_tcp(const std::vector<int>& ranks, const std::function<void(Mesh&, TcpEndpoint&)>& body, size_t exchange_bytes = 16384) {
  run_mesh(ranks, [&](Mesh& mesh) {
    TcpEndpoint endpoint("127.0.0.1", 0);
    mesh.board->note[mesh.index] = endpoint.port();
    mesh.barrier(0);
    std::vector<int> ports;
    for (int peer = 0; peer < mesh.peers; peer++) ports.push_back(static_cast<int>(mesh.board->note[peer].load()));
    mesh.links = tcp_links(ranks, mesh.index, endpoint.meet(meeting_of(ranks, mesh.index, ports)), exchange_bytes);
    mesh.barrier(1);
    body(mesh, endpoint);
    mesh.barrier(2);
  });
}

void tcp_exchanges(int ranks, uint32_t count, bool spin, size_t most) {
  run_tcp(
      {ranks},
      [=](Mesh& mesh, TcpEndpoint& endpoint) {
        for (uint32_t counter = 0; counter < count; counter++) one_exchange(mesh.links->exchange(), mesh.index, ranks, counter, most, spin, true);
        mesh.barrier(3);
        CHECK(endpoint.counters().frames_out == static_cast<uint64_t>(count) * static_cast<uint64_t>(ranks - 1));
        CHECK(endpoint.counters().corrupt == 0 && endpoint.counters().refused == 0);
      },
      most);
}

void tcp_stream() {
  run_tcp({1, 1}, [](Mesh& mesh, TcpEndpoint&) {
    std::vector<uint8_t> buffer(8192);
    for (uint32_t step = 1; step <= 5000; step++) {
      const size_t hidden = block_bytes(step, 8192);
      size_t bytes = 0;
      if (mesh.index == 0) {
        fill(buffer.data(), hidden, 0, step);
        CHECK(mesh.links->to({1, 0})->send({FrameKind::Hidden, step, 0, 0}, 3, buffer.data(), hidden, within(20 * kSecond, step % 2 == 0)) == WaitResult::Done);
      } else {
        if (step % 1000 == 0) usleep(100000);  // the writer fills the mailbox and both sockets meanwhile
        CHECK(mesh.links->from({0, 0})->receive({FrameKind::Hidden, step, 0, 0}, buffer.data(), buffer.size(), &bytes, within(20 * kSecond)) == WaitResult::Done);
        CHECK(bytes == hidden && filled(buffer.data(), hidden, 0, step), "step %u", step);
      }
    }
  });
}

// Two ranks of one process, with a relay between them that may do harm to what rank 0 sends.
struct Relayed {
  enum class Harm { None, Flip, Repeat, Skip, Cut, Hold };

  int listener = -1, to_answerer = -1, to_dialler = -1;
  std::thread relay;
  std::atomic<Harm> harm{Harm::None};
  std::atomic<bool> stop{false};
  std::unique_ptr<TcpEndpoint> endpoints[2];
  std::unique_ptr<Links> links[2];

  explicit Relayed(size_t exchange_bytes = 16384) {
    for (auto& endpoint : endpoints) endpoint = std::make_unique<TcpEndpoint>("127.0.0.1", 0);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    CHECK(bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0 && listen(listener, 4) == 0);
    CHECK(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    const int relay_port = ntohs(address.sin_port);
    relay = std::thread([this] { run(endpoints[1]->port()); });
    std::vector<std::shared_ptr<TcpConnection>> answerer, dialler;
    std::thread other([&] { answerer = endpoints[1]->meet(meeting_of({2}, 1, {endpoints[0]->port(), endpoints[1]->port()})); });
    dialler = endpoints[0]->meet(meeting_of({2}, 0, {endpoints[0]->port(), relay_port}));
    other.join();
    links[0] = tcp_links({2}, 0, std::move(dialler), exchange_bytes);
    links[1] = tcp_links({2}, 1, std::move(answerer), exchange_bytes);
  }
  ~Relayed() {
    stop = true;
    relay.join();
    close(listener);
  }

  void run(int port) {
    to_dialler = accept(listener, nullptr, nullptr);
    to_answerer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(connect(to_answerer, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    std::vector<uint8_t> buffer(1 << 16);
    while (!stop) {
      pollfd waits[2] = {{harm == Harm::Hold ? -1 : to_dialler, POLLIN, 0}, {to_answerer, POLLIN, 0}};
      poll(waits, 2, 5);
      for (int from = 0; from < 2; from++) {
        if (waits[from].revents == 0) continue;
        ssize_t got = read(waits[from].fd, buffer.data(), buffer.size());
        if (got <= 0) {
          stop = true;
          break;
        }
        const int out = from == 0 ? to_answerer : to_dialler;
        const Harm now = from == 0 ? harm.exchange(Harm::None) : Harm::None;
        if (now == Harm::Flip) buffer[static_cast<size_t>(got) - 20] ^= 1;
        if (now == Harm::Repeat) CHECK(write(out, buffer.data(), static_cast<size_t>(got)) == got);
        if (now == Harm::Skip) continue;
        if (now == Harm::Cut) {
          CHECK(write(out, buffer.data(), static_cast<size_t>(got / 2)) == got / 2);
          shutdown(to_answerer, SHUT_WR);  // and reads on: closing over unread bytes would reset the connection
          continue;
        }
        for (ssize_t sent = 0, one; sent < got; sent += one) {
          one = send(out, buffer.data() + sent, static_cast<size_t>(got - sent), MSG_NOSIGNAL);
          if (one < 0) break;
        }
      }
    }
    close(to_answerer);
    close(to_dialler);
  }

  void publish(int rank, uint32_t counter) {
    uint8_t* own = links[rank]->exchange()->begin(exchange_key(counter), 2304);
    fill(own, 2304, rank, counter);
    links[rank]->exchange()->publish(1);
  }
  WaitResult wait(int rank, int64_t ns) {
    const uint8_t* data = nullptr;
    return links[rank]->exchange()->wait(1 - rank, 2304, &data, within(ns));
  }
  void good_round(uint32_t counter) {
    publish(0, counter);
    publish(1, counter);
    for (int rank = 0; rank < 2; rank++) {
      const uint8_t* data = nullptr;
      CHECK(links[rank]->exchange()->wait(1 - rank, 2304, &data, within(5 * kSecond)) == WaitResult::Done);
      CHECK(filled(data, 2304, 1 - rank, counter));
    }
  }
};

void tcp_harm(Relayed::Harm harm, const char* problem, uint64_t corrupt) {
  Relayed pair;
  for (uint32_t counter = 0; counter < 3; counter++) pair.good_round(counter);
  pair.harm = harm;
  pair.publish(0, 3);
  pair.publish(1, 3);
  WaitResult result = pair.wait(1, 500 * kMs);
  if (harm == Relayed::Harm::Repeat || harm == Relayed::Harm::Skip) {  // shows with the next frame
    CHECK(result == (harm == Relayed::Harm::Repeat ? WaitResult::Done : WaitResult::Deadline), "result %d", static_cast<int>(result));
    CHECK(pair.wait(0, kSecond) == WaitResult::Done);
    pair.publish(0, 4);
    if (harm == Relayed::Harm::Repeat) pair.publish(1, 4);
    result = pair.wait(1, kSecond);
  }
  CHECK(result == WaitResult::Lost, "result %d", static_cast<int>(result));
  CHECK(pair.links[1]->problem().find("stage 0 rank 0") == 0 && pair.links[1]->problem().find(problem) != std::string::npos, "%s", pair.links[1]->problem().c_str());
  CHECK(pair.endpoints[1]->counters().corrupt == corrupt);
  CHECK(pair.wait(1, 20 * kMs) == WaitResult::Lost, "a connection that broke stays broken");
}

void tcp_slow_peer() {
  Relayed pair(4 << 20);
  pair.good_round(0);
  // A peer that sends nothing.
  pair.publish(0, 1);
  const int64_t begin = monotonic_ns();
  CHECK(pair.wait(0, 200 * kMs) == WaitResult::Deadline);
  CHECK(monotonic_ns() - begin >= 200 * kMs && monotonic_ns() - begin < 1000 * kMs);
  pair.publish(1, 1);
  CHECK(pair.wait(1, kSecond) == WaitResult::Done && pair.wait(0, kSecond) == WaitResult::Done, "late is not lost");
  // A network that takes nothing more: the wait does not end before what this rank owes is sent.
  pair.harm = Relayed::Harm::Hold;
  usleep(50000);
  const size_t large = 4 << 20;
  std::vector<uint8_t> block(large);
  for (uint32_t counter = 2; counter < 6; counter++) {
    CHECK(pair.links[0]->exchange()->begin(exchange_key(counter), large) != nullptr);
    pair.links[0]->exchange()->publish(1);
  }
  pair.publish(1, 5);
  const uint8_t* data = nullptr;
  CHECK(pair.links[0]->exchange()->wait(1, 2304, &data, within(200 * kMs)) == WaitResult::Deadline);
}

void tcp_strangers() {
  const std::vector<int> ranks{2};
  TcpEndpoint a("127.0.0.1", 0), b("127.0.0.1", 0);
  const std::vector<int> ports{a.port(), b.port()};
  const auto meet = [&](uint32_t epoch_a, uint32_t epoch_b, uint8_t key_a, uint8_t key_b) {
    std::string errors[2];
    const auto one = [&](TcpEndpoint& endpoint, int index, uint32_t epoch, uint8_t key) {
      try {
        CHECK(endpoint.meet(meeting_of(ranks, index, ports, epoch, key, 400)).size() == 1);
      } catch (const std::runtime_error& error) {
        errors[index] = error.what();
      }
    };
    std::thread other([&] { one(b, 1, epoch_b, key_b); });
    one(a, 0, epoch_a, key_a);
    other.join();
    return errors[0] + "|" + errors[1];
  };
  CHECK(meet(1, 1, 7, 7) == "|");
  const std::string wrong_key = meet(2, 2, 7, 8);
  CHECK(wrong_key.find("stage 0 rank 1 at 127.0.0.1:") != std::string::npos && wrong_key.find("does not know the key of this epoch") != std::string::npos, "%s", wrong_key.c_str());
  CHECK(a.counters().refused > 0);
  const uint64_t refused = b.counters().refused;
  const std::string wrong_epoch = meet(4, 3, 7, 7);
  CHECK(wrong_epoch.find("stage 0 rank 0 (a caller is in another epoch, or no peer)") != std::string::npos || wrong_epoch.find("it closed the connection") != std::string::npos, "%s",
        wrong_epoch.c_str());
  CHECK(b.counters().refused > refused);

  // Strangers who say nothing, too much, or nonsense stand in nobody's way.
  std::vector<int> strangers;
  for (int i = 0; i < 100; i++) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(b.port()));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    const std::string text(i % 3 == 0 ? 0 : static_cast<size_t>(i * 50), static_cast<char>(i));
    if (!text.empty()) CHECK(send(fd, text.data(), text.size(), MSG_NOSIGNAL) > 0);
    strangers.push_back(fd);
  }
  CHECK(meet(5, 5, 9, 9) == "|");
  for (const int fd : strangers) close(fd);
}

void tcp_killed_peer() {
  run_mesh(
      {2},
      [](Mesh& mesh) {
        TcpEndpoint endpoint("127.0.0.1", 0);
        mesh.board->note[mesh.index] = endpoint.port();
        mesh.barrier(0);
        mesh.links = tcp_links({2}, mesh.index, endpoint.meet(meeting_of({2}, mesh.index, {static_cast<int>(mesh.board->note[0]), static_cast<int>(mesh.board->note[1])})));
        mesh.barrier(1);
        for (uint32_t counter = 0; counter < 100; counter++) one_exchange(mesh.links->exchange(), mesh.index, 2, counter, 2304, false, true);
        mesh.board->note[2 + mesh.index] = 1;
        if (mesh.index == 1) {
          for (;;) pause();
        }
        mesh.links->exchange()->begin(exchange_key(100), 64);
        mesh.links->exchange()->publish(1);
        const uint8_t* data = nullptr;
        const int64_t begin = monotonic_ns();
        CHECK(mesh.links->exchange()->wait(1, 64, &data, within(20 * kSecond)) == WaitResult::Lost);
        CHECK(monotonic_ns() - begin < 5 * kSecond, "a closed socket is noticed at once");
        CHECK(mesh.links->problem().find("stage 0 rank 1: it") == 0, "%s", mesh.links->problem().c_str());
      },
      [](const std::vector<pid_t>& pids, Board* board) {
        while (board->note[2].load() == 0 || board->note[3].load() == 0) usleep(500);
        usleep(20000);
        kill(pids[1], SIGKILL);
      });
}

void tcp_abort() {
  for (const bool spin : {true, false}) {
    Relayed pair;
    pair.publish(0, 0);
    WaitResult result = WaitResult::Done;
    std::thread waiter([&] {
      const uint8_t* data = nullptr;
      result = pair.links[0]->exchange()->wait(1, 2304, &data, within(30 * kSecond, spin));
    });
    usleep(20000);
    const int64_t begin = monotonic_ns();
    pair.links[0]->abort();
    waiter.join();
    CHECK(result == WaitResult::Aborted && monotonic_ns() - begin < 50 * kMs);
  }
}

void bench() {
  for (const bool spin : {true, false})
    for (const size_t bytes : {size_t{2304}, size_t{16384}}) {
      run_mesh({2}, [=](Mesh& mesh) {
        mesh.connect();
        pin_to(mesh.index);
        std::vector<int64_t> times;
        std::vector<uint8_t> source(bytes, 1);
        for (uint32_t counter = 0; counter < 20000; counter++) {
          const int64_t begin = monotonic_ns();
          std::memcpy(mesh.links->exchange()->begin(exchange_key(counter), bytes), source.data(), bytes);
          mesh.links->exchange()->publish(1);
          const uint8_t* data = nullptr;
          CHECK(mesh.links->exchange()->wait(1 - mesh.index, bytes, &data, within(20 * kSecond, spin)) == WaitResult::Done);
          for (size_t i = 0; i < bytes; i += 64) source[i] = static_cast<uint8_t>(source[i] + data[i]);
          times.push_back(monotonic_ns() - begin);
        }
        mesh.barrier(2);
        if (mesh.index != 0) return;
        std::sort(times.begin(), times.end());
        std::printf("one exchange, 2 ranks, %zu bytes, %s: p50 %.2f us, p99 %.2f us, best %.2f us\n", bytes, spin ? "spin" : "futex",
                    static_cast<double>(times[times.size() / 2]) / 1000, static_cast<double>(times[times.size() * 99 / 100]) / 1000, static_cast<double>(times[0]) / 1000);
        std::fflush(stdout);
      });
    }
}

// Null once libcrypto is in this process.
const char* missing_library() {
  for (const char* library : {"libcrypto.so.3", "libcrypto.so.1.1"})
    if (dlopen(library, RTLD_NOW | RTLD_GLOBAL) != nullptr) return nullptr;
  return "this machine has no libcrypto";
}

struct Test {
  const char* name;
  std::function<void()> run;
};

const Test tests[] = {
    {"exchange - 2 ranks that spin read 100000 blocks right", [] { exchanges(2, 100000, true); }},
    {"exchange - 2 ranks that sleep read 100000 blocks right", [] { exchanges(2, 100000, false); }},
    {"exchange - 3 ranks on few cores read 30000 blocks right", [] { exchanges(3, 30000, false); }},
    {"exchange - 5 ranks on few cores read 100000 blocks right", [] { exchanges(5, 100000, false); }},
    {"exchange - 5 ranks that spin on few cores still come through", [] { exchanges(5, 5000, true); }},
    {"exchange - a block of another length or key is a mismatch that names the rank", other_block_is_a_mismatch},
    {"exchange - a killed rank ends the wait at its deadline", [] { killed_peer(false); killed_peer(true); }},
    {"exchange - a frozen rank ends the wait at its deadline, and thawed goes on", frozen_peer},
    {"exchange - a group of shared-memory and host ranks reads the same blocks", [] { mixed_group([](int a, int b) { return a != 2 && b != 2; }); }},
    {"exchange - a group of host ranks only reads the same blocks", [] { mixed_group([](int, int) { return false; }); }},
    {"tcp exchange - 2 ranks that spin read 5000 blocks right", [] { tcp_exchanges(2, 5000, true, 2304); }},
    {"tcp exchange - 3 ranks on few cores read 3000 blocks right", [] { tcp_exchanges(3, 3000, false, 2304); }},
    {"tcp exchange - 5 ranks on few cores read 1000 blocks right", [] { tcp_exchanges(5, 1000, false, 2304); }},
    {"tcp exchange - 3 ranks send each other more than sockets hold", [] { tcp_exchanges(3, 12, false, 16 << 20); }},
    {"tcp link - a fast writer waits for a slow reader and loses nothing", tcp_stream},
    {"tcp link - a flipped byte ends the connection and is counted", [] { tcp_harm(Relayed::Harm::Flip, "does not open", 1); }},
    {"tcp link - a repeated frame ends the connection and is counted", [] { tcp_harm(Relayed::Harm::Repeat, "does not open", 1); }},
    {"tcp link - a frame left out ends the connection and is counted", [] { tcp_harm(Relayed::Harm::Skip, "does not open", 1); }},
    {"tcp link - a frame cut short ends the connection", [] { tcp_harm(Relayed::Harm::Cut, "closed its connection in the middle of a frame", 0); }},
    {"tcp link - a slow peer or network ends the wait at its deadline", tcp_slow_peer},
    {"tcp link - a wrong key, a wrong epoch and strangers are refused and counted", tcp_strangers},
    {"tcp link - a killed rank is noticed at once and named", tcp_killed_peer},
    {"tcp link - abort wakes a wait within 50 ms", tcp_abort},
    {"tensor link - hidden states and sampled ids go round 20000 times", ping_pong},
    {"tensor link - a fast writer waits for a slow reader and loses nothing", stream_through_full_ring},
    {"tensor link - frames of other keys stay queued", frames_of_other_keys_stay_queued},
    {"tensor link - a full ring ends the send at its deadline", full_ring_ends_at_deadline},
    {"tensor link - host frames reach the rank that is served, and no other", host_channel},
    {"tensor link - pieces of one step arrive one after the other, shared memory and host", hidden_pieces},
    {"tensor link - sampled ids travel inside a single stage", single_stage_tokens},
    {"links - abort wakes every kind of wait within 50 ms", abort_wakes},
    {"links - no descriptor, mapping or shared memory object is left", nothing_leaks},
    {"links - a source that floods is refused and counted", flooding_is_refused},
    {"links - late and duplicate frames change nothing and are counted", late_and_duplicate},
    {"links - a segment that is not the peer's is refused by name", wrong_segments_are_refused},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: links_test --list | --bench | NAME\n");
    return 2;
  }
  const std::string name = argv[1];
  // What Node carries in itself: the tcp driver looks its functions up in the process.
  if (missing_library() != nullptr && name.rfind("tcp ", 0) == 0) {
    std::fprintf(stderr, "%s\n", missing_library());
    return 77;
  }
  if (name == "--bench") {
    bench();
    return 0;
  }
  for (const Test& test : tests) {
    if (name == "--list") {
      std::printf("%s\n", test.name);
    } else if (name == test.name) {
      test.run();
      return 0;
    }
  }
  if (name == "--list") return 0;
  std::fprintf(stderr, "no test is called '%s'\n", name.c_str());
  return 2;
}
