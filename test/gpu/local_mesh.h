// The ranks of a cut as executors of this process, or some of them, each on a thread of its own, joined over shared memory or on one card: what a mesh of workers is, without Node.
#pragma once
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../../kernels/include/executor.h"
#include "exported_model.h"

namespace shardmesh {

struct MeshOptions {
  int threads = 1;  // of a rank that a CPU computes
  int kv_blocks = 64, block_tokens = 16, step_tokens_max = 512, sequences_max = 16;
  bool quiet = false;  // steps end silently (StepTotals counts them)
  std::string cuda_tuning;
  bool one_card = false;  // ranks of a stage do their steps together
};

// What a rank is told of the others.
struct RankSegment {
  PeerAddress address;
  Links::Segment segment;
};

class LocalMesh {
 public:
  // The kind of executor that computes a rank; "" for a rank that lives elsewhere.
  using KindOf = std::function<std::string(PeerAddress)>;

  // Makes the executors and loads their weights, several at a time. Throws std::runtime_error.
  LocalMesh(const ExportedModel& model, const ExportedCut& cut, const KindOf& kind_of, const MeshOptions& options);
  ~LocalMesh();

  // A new epoch. open_segments() tells of the ranks here; connect() takes those of the ranks elsewhere.
  std::vector<RankSegment> open_segments();
  void connect(const std::vector<RankSegment>& elsewhere);

  void open(const std::vector<SlotOpen>& slots);
  void close(const std::vector<int>& slots);
  // To every rank here. Steps are numbered by the caller.
  void submit(const StepInput& step);
  // Waits until every rank here has done the step, or one has failed; the outputs are those of the rank that samples. Throws std::runtime_error with the failure's message.
  std::vector<OutputResult> wait(uint32_t step);
  // The first failure since connect(), waited for. Throws std::runtime_error when there is none after `timeout_ms`.
  StepFailure wait_for_failure(int64_t timeout_ms);
  // Ends what is queued and running on every rank here.
  void abort(const std::string& reason);

  size_t ranks() const { return ranks_.size(); }
  const Executor& executor(size_t i) const { return *ranks_[i].executor; }
  // Called on compute threads whenever a rank here has done a step.
  std::function<void(PeerAddress, const StepDone&)> on_done;

 private:
  struct Rank {
    PeerAddress address;
    bool samples;
    std::unique_ptr<Executor> executor;
    Links::Segment segment{};
    std::vector<StepDone> done;
  };

  void load(const ExportedModel& model, const std::vector<Program>& programs);

  const bool one_card_;
  uint32_t epoch_ = 0;
  std::vector<Rank> ranks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<StepFailure> failures_;
};

}  // namespace shardmesh
