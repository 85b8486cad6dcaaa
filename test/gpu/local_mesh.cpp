#include "local_mesh.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace shardmesh {

LocalMesh::LocalMesh(const ExportedModel& model, const ExportedCut& cut, const KindOf& kind_of, const MeshOptions& options) : one_card_(options.one_card) {
  std::vector<Program> programs;
  ranks_.reserve(cut.programs.size());  // events point into it
  for (const Program& program : cut.programs) {
    const PeerAddress address{program.stage, program.rank};
    const std::string kind = kind_of(address);
    if (kind.empty()) continue;
    ranks_.push_back({address, program.stage + 1 == program.stages && program.rank == 0, nullptr, {}, {}});
    Rank* const rank = &ranks_.back();
    ExecutorConfig config;
    config.kind = kind;
    config.program = program;
    config.threads = kind == "cuda" ? 1 : options.threads;
    config.spin = false;
    config.block_tokens = options.block_tokens;
    config.kv_blocks = options.kv_blocks;
    config.step_tokens_max = options.step_tokens_max;
    config.sequences_max = options.sequences_max;
    config.quiet_steps = options.quiet;
    config.cuda_tuning = options.cuda_tuning;
    ExecutorEvents events;
    events.done = [this, rank](std::vector<StepDone>&& steps) {
      for (StepDone& done : steps) {
        if (on_done) on_done(rank->address, done);
        std::lock_guard lock(mutex_);
        rank->done.push_back(std::move(done));
        changed_.notify_all();
      }
    };
    events.failed = [this](StepFailure&& failure) {
      std::lock_guard lock(mutex_);
      failures_.push_back(std::move(failure));
      changed_.notify_all();
    };
    events.frame = [](PeerAddress, const FrameKey&, int, const void*, size_t) {};  // every link is shared memory
    rank->executor = Executor::make(std::move(config), std::move(events));
    programs.push_back(program);
  }
  load(model, programs);
}

LocalMesh::~LocalMesh() {
  for (Rank& rank : ranks_) rank.executor->stop();
}

void LocalMesh::load(const ExportedModel& model, const std::vector<Program>& programs) {
  std::vector<std::pair<size_t, int>> all;  // rank here, weight
  for (size_t i = 0; i < programs.size(); i++)
    for (size_t w = 0; w < programs[i].weights.size(); w++) all.emplace_back(i, static_cast<int>(w));
  std::atomic<size_t> next{0};
  std::mutex failed;
  std::string problem;
  const auto work = [&] {
    for (size_t i = next++; i < all.size(); i = next++) {
      const auto [rank, weight] = all[i];
      try {
        const std::vector<uint8_t> blocks = model.blocks_of(programs[rank].weights[static_cast<size_t>(weight)]);
        ranks_[rank].executor->load_weight(weight, blocks.data(), blocks.size());
      } catch (const std::exception& error) {
        std::lock_guard lock(failed);
        problem = error.what();
      }
    }
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < std::max(1u, std::thread::hardware_concurrency()); i++) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
  if (!problem.empty()) throw std::runtime_error(problem);
}

std::vector<RankSegment> LocalMesh::open_segments() {
  std::vector<RankSegment> all;
  for (Rank& rank : ranks_) rank.executor->wait_idle();  // a result is here a moment before its step has ended
  for (Rank& rank : ranks_) {
    rank.segment = rank.executor->open_segment();
    all.push_back({rank.address, rank.segment});
  }
  return all;
}

void LocalMesh::connect(const std::vector<RankSegment>& elsewhere) {
  epoch_++;
  for (Rank& self : ranks_) {
    std::vector<PeerLink> peers;
    for (const Rank& other : ranks_)
      if (&other != &self)
        peers.push_back({other.address, true, other.segment.pid, other.segment.fd, other.segment.bytes, nullptr, nullptr, epoch_, one_card_ && other.address.stage == self.address.stage});
    for (const RankSegment& other : elsewhere) peers.push_back({other.address, true, other.segment.pid, other.segment.fd, other.segment.bytes});
    self.executor->connect(peers);
  }
  std::lock_guard lock(mutex_);
  failures_.clear();
  for (Rank& rank : ranks_) rank.done.clear();
}

void LocalMesh::open(const std::vector<SlotOpen>& slots) {
  for (Rank& rank : ranks_) rank.executor->open_slots(slots);
}

void LocalMesh::close(const std::vector<int>& slots) {
  for (Rank& rank : ranks_) rank.executor->close_slots(slots);
}

void LocalMesh::submit(const StepInput& step) {
  for (Rank& rank : ranks_) rank.executor->submit(step);
}

std::vector<OutputResult> LocalMesh::wait(uint32_t step) {
  const auto of_step = [step](const StepDone& done) { return done.step == step; };
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] {
    return !failures_.empty() || std::all_of(ranks_.begin(), ranks_.end(), [&](const Rank& rank) { return std::any_of(rank.done.begin(), rank.done.end(), of_step); });
  });
  if (!failures_.empty()) throw std::runtime_error(failures_.front().message);
  std::vector<OutputResult> outputs;
  for (Rank& rank : ranks_) {
    const auto found = std::find_if(rank.done.begin(), rank.done.end(), of_step);
    if (rank.samples) outputs = std::move(found->outputs);
    rank.done.erase(found);
  }
  return outputs;
}

StepFailure LocalMesh::wait_for_failure(int64_t timeout_ms) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] { return !failures_.empty(); }))
    throw std::runtime_error("no step has failed for " + std::to_string(timeout_ms) + " ms");
  return failures_.front();
}

void LocalMesh::abort(const std::string& reason) {
  for (Rank& rank : ranks_) rank.executor->abort(reason);
  for (Rank& rank : ranks_) rank.executor->wait_idle();
}

}  // namespace shardmesh
