// Ranks in processes of their own that read each other's sums, as workers do: the peer driver over card memory and over host memory, against the reference, bit for bit; then a
// rank that is killed in mid-step, and a host that gives up. Links with the emulated machine, where each process has a card, and with the CUDA runtime (test/gpu), where all
// have the first one: this shows the protocol, its deadlines and the exporting of memory, and says nothing of speed.
//
//   cuda_peer_processes_test    runs all; prints "ok NAME" or "FAIL NAME: what", a line each; "skip WHY" where no test can run
//
// The first process makes no call of CUDA: what it forks could not use the card any more.
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../../kernels/cuda/peer_driver.h"
#include "../../../kernels/include/program.h"
#include "../test_matrix.h"

using namespace shardmesh;
using namespace shardmesh::cuda;

namespace {

constexpr int kReductions = 4;  // of a step
constexpr int64_t kWidth = 576;
constexpr int kTokensMax = 300;

const char* name_of(PeerMemory::Place place) { return place == PeerMemory::Place::Card ? "card" : "host"; }

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}
void check(Problem problem) { expect(!problem, problem ? problem : ""); }

double seconds_since(std::chrono::steady_clock::time_point began) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(); }

template <typename T>
void send_all(int socket, const T& value) {
  expect(::send(socket, &value, sizeof value, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof value), "the first process is gone");
}
template <typename T>
T receive(int socket) {
  T value;
  expect(::recv(socket, &value, sizeof value, MSG_WAITALL) == static_cast<ssize_t>(sizeof value), "the other end is gone");
  return value;
}

// Of which each rank is one.
struct Case {
  std::vector<int> cut;  // units [cut[r], cut[r + 1]) are rank r's
  PeerMemory::Place place;
  int ranks() const { return static_cast<int>(cut.size()) - 1; }
  std::vector<Subtree> subtrees(int rank) const { return maximal_subtrees(cut.back(), cut[static_cast<size_t>(rank)], cut[static_cast<size_t>(rank) + 1]); }
};

class Rank {
 public:
  Rank(const Case& of, int rank, int socket) : case_(of), rank_(rank), socket_(socket) {
    Card card;
    expect(find_card(&card).empty(), "no card");
    size_t most = 1;
    for (int r = 0; r < of.ranks(); r++) most = std::max(most, of.subtrees(r).size());
    const size_t values = static_cast<size_t>(kTokensMax) * static_cast<size_t>(kWidth);
    driver_ = std::make_unique<PeerDriver>(rank, of.ranks(), most * values * 4);
    check(open_stream(&stream_));
    sums_ = Memory(Place::Card, most * values * 4, "sums");
    residual_ = Memory(Place::Card, values * 4, "residual");
    step_ = Memory(Place::Card, sizeof(PeerStep), "step");
    step_host_ = Memory(Place::Host, sizeof(PeerStep), "step");
    rows_ = Memory(Place::Card, static_cast<size_t>(kTokensMax) * most * 4, "rows");
    std::vector<int32_t> rows(static_cast<size_t>(kTokensMax) * most);
    for (size_t i = 0; i < rows.size(); i++) rows[i] = static_cast<int32_t>(i);
    check(copy_now(rows_.as<void>(), rows.data(), rows.size() * 4));
    const size_t groups = activation_bytes(kFusedTokensMax, kWidth);
    weight_ = Memory(Place::Card, static_cast<size_t>(kWidth) * 4, "weight of the norm");
    normed_ = Memory(Place::Card, groups, "normed");
    normed_apart_ = Memory(Place::Card, groups, "normed apart");
    arrivals_ = Memory(Place::Card, 4, "arrivals");
    std::vector<float> weight(static_cast<size_t>(kWidth));
    for (size_t i = 0; i < weight.size(); i++) weight[i] = 0.5f + static_cast<float>(i % 7);
    check(copy_now(weight_.as<void>(), weight.data(), weight_.size()));
    check(copy_now(arrivals_.as<void>(), std::vector<uint32_t>(1, 0).data(), 4));
    for (const Memory* memory : {&normed_, &normed_apart_}) check(copy_now(memory->as<void>(), std::vector<uint8_t>(groups, 0).data(), groups));
  }
  ~Rank() {
    synchronise(stream_);
    close_stream(stream_);
  }

  void connect(uint32_t epoch) {
    PeerMemory own{};
    own.pid = -1;
    for (const PeerMemory& offer : driver_->offers())
      if (offer.place == case_.place) own = offer;
    expect(own.pid > 0, std::string("this card offers no ") + name_of(case_.place) + " memory");
    send_all(socket_, own);
    std::vector<PeerMemory> all;
    for (int r = 0; r < case_.ranks(); r++) all.push_back(receive<PeerMemory>(socket_));
    driver_->connect(all, epoch);
  }

  // A step of `tokens` rows, with `before` in front of each reduction. What the driver says went wrong; else the residual must have the reference's bits.
  PeerDriver::Fault step(int tokens, uint64_t seed, int64_t timeout_ms, const std::function<void(int)>& before = {}) {
    Random random(seed);  // the same on all ranks
    *step_host_.as<PeerStep>() = driver_->begin_step(timeout_ms, stream_);
    driver_->place_step(step_.as<PeerStep>());
    check(copy_to_card(step_.as<void>(), step_host_.as<void>(), sizeof(PeerStep), stream_));
    const size_t values = static_cast<size_t>(tokens) * static_cast<size_t>(kWidth);
    std::vector<float> residual = make_activations(values, Values::Random, random);
    check(copy_now(residual_.as<void>(), residual.data(), values * 4));
    for (int i = 0; i < kReductions; i++) {
      check(synchronise(stream_));
      if (before) before(i);
      std::vector<int> lo, hi, owner;
      std::vector<std::vector<float>> sums;
      size_t fewest = kSegmentsMax;
      for (int r = 0; r < case_.ranks(); r++) {
        const std::vector<Subtree> subtrees = case_.subtrees(r);
        fewest = std::min(fewest, subtrees.size());
        for (const Subtree& s : subtrees) {
          lo.push_back(s.first);
          hi.push_back(s.first + s.count);
          owner.push_back(r);
          sums.push_back(make_activations(values, Values::Random, random));
        }
      }
      std::vector<const float*> nodes;
      const std::vector<int64_t> strides(sums.size(), kWidth);
      std::vector<float> own;
      for (size_t n = 0; n < sums.size(); n++) {
        nodes.push_back(sums[n].data());
        if (owner[n] == rank_) own.insert(own.end(), sums[n].begin(), sums[n].end());
      }
      reference_kernel_set()->finish_tree(case_.cut.back(), static_cast<int>(lo.size()), lo.data(), hi.data(), nodes.data(), strides.data(), nullptr, residual.data(), kWidth, kWidth, tokens,
                                          {0, 1});
      // The kernel that lays them down stands for a partial product.
      check(copy_now(sums_.as<void>(), own.data(), own.size() * 4));
      check(select_rows(sums_.as<float>(), kWidth, rows_.as<int32_t>(), static_cast<int>(own.size() / static_cast<size_t>(kWidth)), kWidth, driver_->block(), kWidth, stream_));
      const NormAfter norm{weight_.as<float>(), 1e-5f, normed_.as<ActivationGroup>(), 0, {}};
      check(driver_->reduce({case_.cut.back(), static_cast<int>(lo.size()), lo.data(), hi.data(), owner.data(), nullptr, residual_.as<float>(), kWidth, kWidth, tokens},
                            static_cast<int>(lo.size() - fewest), i, stream_, tokens <= kFusedTokensMax && i % 2 == 1 ? &norm : nullptr, arrivals_.as<uint32_t>()));
    }
    std::vector<float> found(values);
    Memory back(Place::Host, values * 4, "residual");
    check(copy_to_host(back.as<void>(), residual_.as<void>(), values * 4, stream_));
    Memory normed(Place::Host, normed_.size(), "normed"), normed_apart(Place::Host, normed_.size(), "normed");
    if (tokens <= kFusedTokensMax) {
      check(rms_norm(residual_.as<float>(), kWidth, weight_.as<float>(), 1e-5f, kWidth, tokens, nullptr, 0, normed_apart_.as<ActivationGroup>(), stream_));
      check(copy_to_host(normed.as<void>(), normed_.as<void>(), normed_.size(), stream_));
      check(copy_to_host(normed_apart.as<void>(), normed_apart_.as<void>(), normed_.size(), stream_));
    }
    check(synchronise(stream_));
    const PeerDriver::Fault fault = driver_->fault();
    if (fault.kind == PeerFault::None && tokens <= kFusedTokensMax)
      expect(std::memcmp(normed.as<void>(), normed_apart.as<void>(), normed_.size()) == 0, "the norm behind the last reduction is not that of the residual");
    if (fault.kind == PeerFault::None) expect(std::memcmp(back.as<void>(), residual.data(), values * 4) == 0, "the residual is not the reference's");
    return fault;
  }

  void steps(uint32_t epoch) {
    for (const int tokens : {1, 3, kTokensMax, 1, 17})
      expect(step(tokens, epoch * 1000 + static_cast<uint64_t>(tokens), 20'000).kind == PeerFault::None, "a wait of 20 s was too short");
  }

  PeerDriver& driver() { return *driver_; }

 private:
  const Case& case_;
  const int rank_, socket_;
  std::unique_ptr<PeerDriver> driver_;
  Stream stream_ = nullptr;
  Memory sums_, residual_, step_, step_host_, rows_, weight_, normed_, normed_apart_, arrivals_;
};

// Runs `body` in a process for each rank, and hands their memory around `meetings` times. "" or what the first that failed says; a killed one says nothing.
std::string run_ranks(const Case& of, int meetings, const std::function<void(Rank&, int)>& body) {
  std::vector<pid_t> children;
  std::vector<int> sockets;
  for (int r = 0; r < of.ranks(); r++) {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return "socketpair";
    const pid_t child = ::fork();
    if (child == 0) {
      ::close(pair[0]);
      std::string what;
      try {
        Rank rank(of, r, pair[1]);
        body(rank, r);
      } catch (const std::exception& error) {
        what = std::string(error.what()) + " (rank " + std::to_string(r) + ")";
      }
      if (!what.empty()) std::printf("# %s\n", what.c_str());
      std::fflush(stdout);
      ::_exit(what.empty() ? 0 : 1);
    }
    ::close(pair[1]);
    children.push_back(child);
    sockets.push_back(pair[0]);
  }
  std::string what;
  try {
    for (int m = 0; m < meetings; m++) {
      std::vector<PeerMemory> all;
      for (const int socket : sockets) all.push_back(receive<PeerMemory>(socket));
      for (const int socket : sockets)
        for (const PeerMemory& memory : all) send_all(socket, memory);
    }
  } catch (const std::exception& error) {
    what = error.what();
  }
  for (const int socket : sockets) ::close(socket);
  for (size_t r = 0; r < children.size(); r++) {
    int status = 0;
    ::waitpid(children[r], &status, 0);
    if (WIFEXITED(status) ? WEXITSTATUS(status) != 0 : WTERMSIG(status) != SIGKILL) what = "rank " + std::to_string(r) + " failed";
  }
  return what;
}

int failures = 0;
void test_case(const std::string& name, const std::string& what) {
  if (!what.empty()) failures++;
  std::printf("%s %s%s%s\n", what.empty() ? "ok" : "FAIL", name.c_str(), what.empty() ? "" : ": ", what.c_str());
  std::fflush(stdout);
}

// Asks a process for the card, so that this one stays clean.
std::string absent_card() {
  int ends[2];
  if (::pipe(ends) != 0) return "pipe";
  const pid_t child = ::fork();
  if (child == 0) {
    Card card;
    std::string why = find_card(&card);
    if (why.empty()) why = absent_peers();
    const ssize_t written = ::write(ends[1], why.data(), why.size());
    ::_exit(written == static_cast<ssize_t>(why.size()) ? 0 : 1);
  }
  ::close(ends[1]);
  char text[400];
  ssize_t length = 0, got;
  while ((got = ::read(ends[0], text + length, sizeof text - static_cast<size_t>(length))) > 0) length += got;
  ::close(ends[0]);
  ::waitpid(child, nullptr, 0);
  return std::string(text, static_cast<size_t>(length));
}

}  // namespace

int main() {
  if (const std::string why = absent_card(); !why.empty()) {
    std::printf("skip %s\n", why.c_str());
    return 0;
  }
  for (const PeerMemory::Place place : {PeerMemory::Place::Card, PeerMemory::Place::Host}) {
    const std::string name = std::string("cuda peer processes - ") + name_of(place) + " memory: ";
    const Case two{{0, 8, 16}, place}, uneven{{0, 8, 13, 16}, place};
    // The second epoch finds the stamps of the first one.
    const auto two_epochs = [](Rank& rank, int) {
      for (const uint32_t epoch : {7u, 8u}) {
        rank.connect(epoch);
        rank.steps(epoch);
      }
    };
    test_case(name + "two ranks have the reference's bits, in two epochs", run_ranks(two, 2, two_epochs));
    test_case(name + "three uneven ranks have them too", run_ranks(uneven, 2, two_epochs));
    test_case(name + "a rank killed in mid-step is named by the others at the deadline", run_ranks(uneven, 1, [](Rank& rank, int r) {
                rank.connect(3);
                rank.step(3, 1, 20'000);
                const auto began = std::chrono::steady_clock::now();
                const PeerDriver::Fault fault = rank.step(2, 2, 1'000, [r](int reduction) {
                  if (r == 2 && reduction == 1) ::raise(SIGKILL);
                });
                expect(fault.kind == PeerFault::Deadline && fault.rank == 2 && fault.operation == 1, "it says something else");
                expect(seconds_since(began) < 3, "it took " + std::to_string(seconds_since(began)) + " s");
              }));
    test_case(name + "a host that gives up ends the wait", run_ranks(two, 1, [](Rank& rank, int r) {
                rank.connect(4);
                rank.step(3, 1, 20'000);
                if (r == 1) return;
                const auto began = std::chrono::steady_clock::now();
                std::thread host([&] {
                  std::this_thread::sleep_for(std::chrono::milliseconds(200));
                  rank.driver().abort();
                });
                PeerDriver::Fault fault{};
                try {
                  fault = rank.step(3, 2, 60'000);
                } catch (...) {
                  host.join();
                  throw;
                }
                host.join();
                expect(fault.kind == PeerFault::Aborted && fault.rank == 1, "it says something else");
                expect(seconds_since(began) < 5, "it took " + std::to_string(seconds_since(began)) + " s");
              }));
  }
  return failures ? 1 : 0;
}
