// The ranks of one stage that are devices of one process on one card. They do each step together: when all have come with theirs, the one that came last launches or queues the
// work of all on one stream, where a reduction is a node behind the partial products of every rank (cuda_device_graphs.cpp) and reads their sums where those lie. So nothing on the
// card waits for a flag, and ranks need not run at the same time.
//
// Only the hosts' threads meet here, and each meeting ends: with all, at its rank's deadline, with an abort, or when a rank leaves.
#pragma once
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime.h"

namespace shardmesh::cuda {

class CudaDevice;

class CardGroup {
 public:
  static constexpr int kRanksMax = 16;  // as many as a tree has units
  // By rank.
  using Ranks = std::vector<CudaDevice*>;
  // Does something of all ranks; "" or what went wrong. The devices are its own meanwhile.
  using Together = std::function<std::string(const Ranks&)>;

  // What a rank comes with: the same for all, or the step fails. `action`: the first of those that are done together.
  struct Part {
    uint32_t step;
    size_t action;
    int rows, output_rows;
    uint64_t tokens;  // a digest of what the rows hold
    bool operator==(const Part&) const = default;
  };
  // Deadline, Aborted, Left: without `rank`. Fault: for all.
  struct Outcome {
    enum class Kind { Done, Deadline, Aborted, Left, Fault } kind = Kind::Done;
    int rank = -1;
    std::string fault = "";
  };

  explicit CardGroup(int ranks);
  ~CardGroup();
  CardGroup(const CardGroup&) = delete;
  CardGroup& operator=(const CardGroup&) = delete;

  // The group of this name in this process; whoever asks first makes it, and it lasts as long as somebody has it. Throws std::runtime_error, one line.
  static std::shared_ptr<CardGroup> named(const std::string& name, int ranks);
  // The device that comes last does `complete`. Throws std::runtime_error, one line: what that said, or that the rank is taken.
  void join(int rank, CudaDevice* device, const Together& complete);
  // Nothing that was queued may use the rank's memory any more. Meetings that wait for it end, and there are no more.
  void leave(int rank);

  Stream stream() const { return stream_; }
  // In a Together.
  const Ranks& ranks() const { return ranks_; }

  // Until every rank has joined.
  Outcome await_ranks(int rank, int64_t deadline_ns);
  // Until every rank has come with the same part; the last one does `together`.
  Outcome meet(int rank, const Part& part, int64_t deadline_ns, const Together& together);
  // Ends the waits of a rank, now and later. Any thread.
  void abort(int rank);

 private:
  template <typename Done>
  Outcome wait(std::unique_lock<std::mutex>& lock, int rank, int64_t deadline_ns, const Done& done, const std::function<int()>& missing);

  Stream stream_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  Ranks ranks_;
  bool complete_ = false;
  int left_ = -1;
  std::vector<std::optional<Part>> parts_;  // of those that wait for the others
  std::vector<bool> gave_up_;               // those that wait no more: they were not what was missing
  uint64_t meetings_ = 0;
  Outcome outcome_;  // of the last one
  std::array<std::atomic<bool>, kRanksMax> aborted_{};
};

}  // namespace shardmesh::cuda
