// The sampler: from one row of raw logits to a token and its log-probabilities. One implementation for every executor, in fp32 and integers, so the same
// seed gives the same text everywhere (ARCHITECTURE.md, "Output head" and "Sampling").
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sampler_loops.h"

namespace shardmesh {

struct SamplingParameters {
  float temperature = 0;      // below kTemperatureMin: the best token
  uint64_t top_p = 1ull << 32;  // in units of 2^-32, rounded down; 2^32: off
  int32_t top_k = 0;          // 0: off
  float min_p = 0;            // 0: off
  uint64_t seed = 0;
  uint32_t choice = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  int logprobs = -1;          // best tokens to report, 0..20; -1: not even the token's own
};
constexpr float kTemperatureMin = 1e-5f;
constexpr int kLogprobsMax = 20;

// What the sampler remembers of one sequence.
class SlotState {
 public:
  SlotState() = default;
  SlotState(const SamplingParameters& parameters, const std::vector<std::pair<int32_t, float>>& bias, const std::vector<int32_t>& prompt,
            const std::vector<int32_t>& output);
  const SamplingParameters& parameters() const { return parameters_; }
  // The token is the best one by logit, or by logit / temperature and noise: no other token has a say in it.
  bool plain() const;
  // Plain, and no log-probability asked for: the best candidates of parts of the vocabulary tell the token.
  bool by_candidates() const { return plain() && parameters_.logprobs < 0; }
  // A token was sampled.
  void count(int32_t token);

 private:
  friend class Sampler;
  struct Seen {
    bool repeated = false;    // in prompt or output
    int32_t output = 0;       // times in output
    float bias = 0;
  };
  SamplingParameters parameters_;
  bool penalties_ = false;
  std::unordered_map<int32_t, Seen> seen_;  // tokens whose logit is changed
};

struct TokenLogprob {
  int32_t token;
  float logprob;
};

struct SampledToken {
  int32_t token = 0;
  bool has_logprob = false;
  float logprob = 0;
  std::vector<TokenLogprob> top;  // best first
};

// The best of some tokens, and what it is compared by.
struct Candidate {
  int32_t token;
  float value;
};
inline bool is_better(const Candidate& a, const Candidate& b) { return a.value > b.value || (a.value == b.value && a.token < b.token); }

// One a thread: it owns scratch of a few vocabularies.
class Sampler {
 public:
  explicit Sampler(int64_t vocabulary);

  // Samples the token at absolute position `position` (one past the row's own). All logits are finite. The state is not changed: call state->count().
  SampledToken sample(const float* logits, const SlotState& state, uint32_t position, const int32_t* banned, size_t banned_count);
  // The best of the tokens [first, first + count) for a plain state, from their finite logits. None of no tokens: a token beyond all others.
  Candidate candidate(const float* logits, int32_t first, int64_t count, const SlotState& state, uint32_t position);
  // Log-probability of `token`, and of the `top` best.
  SampledToken score(const float* logits, int32_t token, int top);

 private:
  // Tokens that top-k and top-p leave: those that come at or before `token` with value `z` in the order (z descending, id ascending).
  struct Cut {
    float z;
    int32_t token;
  };

  int32_t choose(const float* logits, const SlotState& state, uint32_t position, const int32_t* banned, size_t banned_count);
  void adjust(const float* logits, const SlotState& state, const int32_t* banned, size_t banned_count, float divisor);
  // Leaves the kept tokens' keys in keys_, best first.
  void keep_top_k(int32_t k, Cut* cut);
  void keep_top_p_of_keys(uint64_t p, float zmax, Cut* cut);
  void keep_top_p(uint64_t p, float zmax, Cut* cut);
  int32_t argmax(const float* x, int64_t count) const;
  // Of the tokens [first, first + count) with values z; `best` is the index of the largest.
  Candidate gumbel_argmax(const SamplingParameters& parameters, uint32_t position, const float* z, int32_t first, int64_t count, int32_t best, const Cut& cut) const;
  void report(const float* logits, int32_t token, int top, SampledToken* out);

  const int64_t vocabulary_;
  const SamplerLoops& loops_;
  std::vector<float> z_, slices_;
  std::vector<uint64_t> keys_;
};

}  // namespace shardmesh
