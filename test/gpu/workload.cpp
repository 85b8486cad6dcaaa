#include "workload.h"

#include <algorithm>
#include <cstring>

#include "../kernels/test_matrix.h"

namespace shardmesh {
namespace {

std::vector<int32_t> random_tokens(const ExportedModel& model, int count, uint64_t seed) {
  const int64_t vocabulary = model.cuts.front().programs.front().vocabulary_size;
  Random random(seed);
  std::vector<int32_t> tokens;
  for (int i = 0; i < count; i++) tokens.push_back(static_cast<int32_t>(random.below(static_cast<uint32_t>(vocabulary))));
  return tokens;
}

template <typename T>
void append(std::vector<uint8_t>* bytes, T value) {
  const size_t at = bytes->size();
  bytes->resize(at + sizeof value);
  std::memcpy(bytes->data() + at, &value, sizeof value);
}

void append_result(std::vector<uint8_t>* bytes, const OutputResult& result) {
  append(bytes, result.token);
  append(bytes, static_cast<int32_t>(result.has_logprob));
  if (result.has_logprob) append(bytes, result.logprob);
  for (const auto& [token, logprob] : result.top) {
    append(bytes, token);
    append(bytes, logprob);
  }
}

}  // namespace

SlotSampling greedy_sampling(int logprobs) { return {0, 1, 0, 1, 0, 0, 0, 0, 0, logprobs, {}}; }

Workload Workload::mixed(const ExportedModel& model, int prompt_tokens, int decode) {
  SlotSampling warm = greedy_sampling(-1), careful = greedy_sampling(0);
  warm.temperature = 0.9;
  warm.seed = 1234567890123456789ull;
  careful.temperature = 0.8;
  careful.top_p = 0.95;
  careful.seed = 77;
  careful.repetition_penalty = 1.3;
  careful.presence_penalty = 0.4;
  careful.frequency_penalty = 0.3;
  return {{{random_tokens(model, prompt_tokens, 1), greedy_sampling(3), true},
           {random_tokens(model, std::max(1, prompt_tokens / 5), 2), warm, false},
           {random_tokens(model, std::max(1, prompt_tokens / 3), 3), careful, false}},
          decode,
          2};
}

int64_t Workload::blocks(int block_tokens) const {
  int64_t blocks = 0;
  for (const WorkloadSequence& s : sequences) blocks += (static_cast<int64_t>(s.prompt.size()) + decode + block_tokens - 1) / block_tokens;
  return blocks;
}

std::vector<SlotOpen> slots_of(const Workload& workload) {
  std::vector<SlotOpen> slots;
  for (size_t i = 0; i < workload.sequences.size(); i++) slots.push_back({static_cast<int>(i), workload.sequences[i].sampling, workload.sequences[i].prompt, {}});
  return slots;
}

std::vector<StepInput> steps_of(const Workload& workload, int chunk, const MeshOptions& options, int64_t wait_timeout_ms) {
  struct Progress {
    size_t position = 0;
    int decoded = 0;
    int32_t sampled_at = 0;
    std::vector<int32_t> blocks;
  };
  std::vector<Progress> progress(workload.sequences.size());
  std::vector<int32_t> pool(static_cast<size_t>(options.kv_blocks));
  for (size_t i = 0; i < pool.size(); i++) pool[i] = static_cast<int32_t>(i);
  Random random(5);
  for (size_t i = pool.size(); i > 1; i--) std::swap(pool[i - 1], pool[random.below(static_cast<uint32_t>(i))]);
  size_t next = 0;
  for (size_t i = 0; i < progress.size(); i++) {
    const size_t tokens = workload.sequences[i].prompt.size() + static_cast<size_t>(workload.decode), block = static_cast<size_t>(options.block_tokens);
    for (size_t b = 0; b < (tokens + block - 1) / block; b++) progress[i].blocks.push_back(pool.at(next++));
  }

  std::vector<StepInput> steps;
  for (;;) {
    StepInput step{};
    step.step = static_cast<uint32_t>(steps.size()) + 1;
    step.wait_timeout_ms = wait_timeout_ms;
    step.block_table_offsets.push_back(0);
    bool waiting = false;
    for (size_t i = 0; i < progress.size(); i++) {
      const WorkloadSequence& sequence = workload.sequences[i];
      Progress& p = progress[i];
      if (p.decoded > workload.decode) continue;  // the token behind the prompt, and `decode` more
      if (steps.size() < static_cast<size_t>(workload.stagger) * i) {
        waiting = true;
        continue;
      }
      const bool decodes = p.position >= sequence.prompt.size();
      const size_t rows = decodes ? 1 : std::min<size_t>(static_cast<size_t>(chunk), sequence.prompt.size() - p.position);
      for (size_t r = 0; r < rows; r++) {
        const size_t position = p.position + r;
        const int row = static_cast<int>(step.token_ids.size());
        step.token_ids.push_back(decodes ? -1 : sequence.prompt[position]);
        step.token_steps.push_back(decodes ? p.sampled_at : 0);
        step.positions.push_back(static_cast<int32_t>(position));
        step.row_sequence.push_back(static_cast<int32_t>(step.slots.size()));
        if (position + 1 < sequence.prompt.size()) {
          if (sequence.score) step.outputs.push_back({row, static_cast<int>(i), sequence.prompt[position + 1], {}});
          continue;
        }
        step.outputs.push_back({row, static_cast<int>(i), -1, {}});
        p.sampled_at = static_cast<int32_t>(step.step);
        p.decoded++;
      }
      p.position += rows;
      step.slots.push_back(static_cast<int32_t>(i));
      step.block_tables.insert(step.block_tables.end(), p.blocks.begin(), p.blocks.end());
      step.block_table_offsets.push_back(static_cast<int32_t>(step.block_tables.size()));
    }
    if (step.slots.empty() && !waiting) return steps;
    steps.push_back(std::move(step));  // sequence 0 runs from the first step on, so no step is empty before all are done
  }
}

std::vector<uint8_t> run_workload(LocalMesh& mesh, const Workload& workload, int chunk, const MeshOptions& options, int64_t wait_timeout_ms) {
  const std::vector<StepInput> steps = steps_of(workload, chunk, options, wait_timeout_ms);
  mesh.open(slots_of(workload));
  for (const StepInput& step : steps) mesh.submit(step);  // all are queued before the first has come back
  std::vector<std::vector<uint8_t>> of_sequence(workload.sequences.size());
  for (const StepInput& step : steps)
    for (const OutputResult& result : mesh.wait(step.step)) append_result(&of_sequence.at(static_cast<size_t>(result.slot)), result);
  std::vector<uint8_t> all;
  for (const std::vector<uint8_t>& bytes : of_sequence) all.insert(all.end(), bytes.begin(), bytes.end());
  return all;
}

}  // namespace shardmesh
