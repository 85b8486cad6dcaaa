// What tests and benchmarks ask of a model: sequences whose prompts are computed in chunks and which then decode, several of them side by side. All steps are known
// beforehand, since a row may ask for the token that an earlier step sampled.
#pragma once
#include <string>
#include <vector>

#include "local_mesh.h"

namespace shardmesh {

struct WorkloadSequence {
  std::vector<int32_t> prompt;
  SlotSampling sampling;
  bool score;  // log-probability of every token of the prompt too
};

struct Workload {
  std::vector<WorkloadSequence> sequences;  // sequence i has slot i
  int decode;                               // tokens of each behind the first one
  int stagger = 2;                          // sequence i joins at step i * stagger

  // Three sequences: greedy with candidates and every prompt token scored; at a temperature, by best candidates alone; with penalties and top-p.
  static Workload mixed(const ExportedModel& model, int prompt_tokens, int decode);
  int64_t blocks(int block_tokens) const;
};

SlotSampling greedy_sampling(int logprobs);
std::vector<SlotOpen> slots_of(const Workload& workload);
// Prompts in chunks of at most `chunk` tokens. Blocks of a sequence are scattered over the pool of `options`.
std::vector<StepInput> steps_of(const Workload& workload, int chunk, const MeshOptions& options, int64_t wait_timeout_ms);

// Everything that sampling gave, bit for bit, sequence after sequence: the same for every chunking. Runs on a mesh that is connected and has no open slot.
std::vector<uint8_t> run_workload(LocalMesh& mesh, const Workload& workload, int chunk, const MeshOptions& options, int64_t wait_timeout_ms);

}  // namespace shardmesh
