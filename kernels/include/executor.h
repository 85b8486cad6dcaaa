// An executor: one shard of a model (one stage, one rank) with its weights, its slice of the KV cache, its compute threads and its links. Steps are
// queued and run back to back on the compute threads; results leave through callbacks. No Node here: kernels/binding wraps this class.
//
// Threads: load_weight() may be called from several threads at once. Everything else but wait_idle() belongs to one control thread. Events are called on the
// compute thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "links.h"
#include "program.h"
#include "wire.h"

namespace shardmesh {

struct ExecutorConfig {
  std::string kind;           // cpu, reference, reference-f32
  std::string isa;            // for cpu: amx, avx512, avx2, portable, or empty for the best
  Program program;
  std::vector<int> cores;     // empty: `threads` threads, not pinned
  int threads;
  bool spin;
  int block_tokens;           // multiple of 16
  int64_t kv_blocks;
  int step_tokens_max;
  int sequences_max;
  bool quiet_steps = false;   // steps end silently: they are counted, no event tells of them (traced ones excepted)
  std::vector<int> ranks_per_stage;  // empty: every stage has the program's number of ranks
  WireType wire = WireType::F32;     // of reductions and hidden states, the same on all ranks of the mesh
  std::string cuda_tuning;           // what `shardmesh tune` wrote (kernels/cuda/tuning.h), for cuda; empty: what is built in
};

struct SlotSampling {
  double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int32_t top_k;
  uint64_t seed;
  uint32_t choice;
  int logprobs;               // -1: none
  std::vector<std::pair<int32_t, float>> logit_bias;
};

struct SlotOpen {
  int slot;
  SlotSampling sampling;
  std::vector<int32_t> prompt_tokens, output_tokens;
};

// Rows of a sequence that follow each other may sample, all but the first holding the draft of the token before it: such a row has a result only if the row
// before it has one and sampled this row's token.
struct OutputRow {
  int row, slot;
  int32_t score;              // -1: sample
  std::vector<int32_t> banned;
};

// Fields: kernels/binding-types.ts, StepInput.
struct StepInput {
  uint32_t step;
  std::vector<int32_t> token_ids, token_steps, positions, row_sequence, slots, block_table_offsets, block_tables;
  std::vector<OutputRow> outputs;
  int64_t wait_timeout_ms;
  bool result_waits = false;  // told of together with the next step's
};

struct OutputResult {
  int slot;
  int32_t token;
  bool has_logprob;
  float logprob;
  std::vector<std::pair<int32_t, float>> top;
};

struct StepTimings {
  double total_us = 0, collective_us = 0, receive_us = 0, sample_us = 0, idle_us = 0;
};

// A span of a traced step, on the monotonic clock; `name` is a literal.
struct StepSpan {
  const char* name;
  int64_t began_ns, ended_ns;
};

struct StepDone {
  uint32_t step;
  std::vector<OutputResult> outputs;
  StepTimings timings;
  int64_t began_ns = 0, ended_ns = 0;
  std::vector<StepSpan> spans;  // empty unless traced
};

// Of a device that has decode steps as graphs of kernels, for steps of up to `rows` rows: nodes of each piece between two actions of the host, how many edges between
// them are programmatic (kernels/cuda/runtime.h), how many steps took it, and how many of those the device had before the host knew the result of the step in front of them.
struct GraphFacts {
  int rows;
  std::vector<int> nodes, programmatic_edges;
  uint64_t steps, steps_behind;
};

// Sums over all steps that were done.
struct StepTotals {
  uint64_t steps = 0;
  uint32_t last_step = 0;
  StepTimings timings;
};

// DeviceLost: this process can do nothing more with its device; a new one may.
enum class FailureCode { WaitTimeout, LinkLost, NonFinite, Aborted, DeviceLost, Internal };

struct StepFailure {
  uint32_t step;
  FailureCode code;
  std::string message;
  bool has_peer = false;
  PeerAddress peer{};
};

struct ExecutorEvents {
  std::function<void(std::vector<StepDone>&&)> done;  // steps that ended one after the other, mostly one
  std::function<void(StepFailure&&)> failed;
  FrameOut frame;
};

struct WeightReport {
  double repack_error;
  size_t bytes;
};

class Executor {
 public:
  // Allocates weights, KV pool and buffers. Throws std::runtime_error when the configuration is wrong, too large, or not for this machine.
  static std::unique_ptr<Executor> make(ExecutorConfig config, ExecutorEvents events);
  virtual ~Executor() = default;  // stop(), then frees everything

  virtual const char* isa() const = 0;
  virtual size_t bytes() const = 0;
  // One line on how it computes, for people; empty: nothing to say.
  virtual std::string note() const = 0;
  // `data`: the raw blocks of weight slice `index`, rows in order. Throws when the length is not the slice's, or when it is loaded already.
  virtual WeightReport load_weight(int index, const uint8_t* data, size_t length) = 0;
  // FNV-1a of the rope tables. Throws while weights are missing.
  virtual uint64_t tables_checksum() const = 0;
  // A new epoch: all links of the old one are let go. Throws while a step is running.
  virtual Links::Segment open_segment() = 0;
  // Memory that peers may read by themselves, one of each place that this executor has; empty: none, its sums leave as frames.
  virtual std::vector<PeerMemory> peer_memory() = 0;
  // Attaches to the peers, forgets slots, K/V and failures. Where links have a PeerMemory, or say that they share the card, those to all other ranks of the stage must. Throws while a step is running,
  // while weights are missing, or naming the peer that cannot be had.
  virtual void connect(const std::vector<PeerLink>& peers) = 0;
  // These three check everything they are given and throw std::runtime_error naming field, value and limit.
  virtual void open_slots(std::vector<SlotOpen> slots) = 0;
  virtual void close_slots(const std::vector<int>& slots) = 0;
  virtual void submit(StepInput step) = 0;
  // A frame of the host driver that arrived. False: nobody wants it.
  virtual bool deliver(PeerAddress source, const FrameKey& key, int rows, const void* data, size_t bytes) = 0;
  // Any thread.
  virtual StepTotals totals() const = 0;
  // While no step runs. Empty where steps are no graphs.
  virtual std::vector<GraphFacts> graphs() const = 0;
  // From the next step on, every action and every wait leaves a span. Any thread.
  virtual void trace(bool on) = 0;
  // Fails the running and the queued steps; none runs until the next connect(). Returns at once.
  virtual void abort(const std::string& reason) = 0;
  // Blocks until nothing is running or queued. Any thread.
  virtual void wait_idle() = 0;
  // abort(), then ends the compute threads. Blocks for as long as one operation lasts. Idempotent.
  virtual void stop() = 0;
};

// Bytes that one block of the KV cache takes on this shard.
size_t kv_bytes_per_block(const Program& program, int block_tokens);

// Digest of everything that could change a bit of a result (version of the arithmetic, not of the code).
const char* arithmetic_version();

}  // namespace shardmesh
