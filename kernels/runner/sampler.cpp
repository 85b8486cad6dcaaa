#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "sampler_math.h"

namespace shardmesh {
namespace {

// Orders tokens by z descending, then id ascending, as one descending integer.
uint64_t order_key(float z, int32_t token) {
  z = z + 0.0f;  // -0 and 0 are equal
  uint32_t bits;
  std::memcpy(&bits, &z, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | ~static_cast<uint32_t>(token);
}

int32_t token_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

// Bin of top-p: distance from the maximum in sixteenths. Monotone in z.
constexpr int kBinsPerUnit = 16;
constexpr int kBins = static_cast<int>(kMassDistance * kBinsPerUnit) + 2;
int bin_of(float z, float zmax) {
  const float scaled = (zmax - z) * static_cast<float>(kBinsPerUnit);
  return scaled < static_cast<float>(kBins - 1) ? static_cast<int>(scaled) : kBins - 1;
}

// mass * 2^32 >= p * total
bool reaches(uint64_t mass, uint64_t p, uint64_t total) { return static_cast<unsigned __int128>(mass) << 32 >= static_cast<unsigned __int128>(p) * total; }

}  // namespace

const SamplerLoops& sampler_loops() {
  static const SamplerLoops& loops = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? sampler_loops_avx2() : sampler_loops_baseline();
  return loops;
}

SlotState::SlotState(const SamplingParameters& parameters, const std::vector<std::pair<int32_t, float>>& bias, const std::vector<int32_t>& prompt,
                     const std::vector<int32_t>& output)
    : parameters_(parameters) {
  penalties_ = parameters.repetition_penalty != 1.0f || parameters.presence_penalty != 0.0f || parameters.frequency_penalty != 0.0f;
  for (const auto& [token, value] : bias) seen_[token].bias = value;
  if (!penalties_) return;
  for (const int32_t token : prompt) seen_[token].repeated = true;
  for (const int32_t token : output) count(token);
}

bool SlotState::plain() const {
  const SamplingParameters& p = parameters_;
  if (penalties_ || !seen_.empty()) return false;
  return p.temperature < kTemperatureMin || (p.top_p >= 1ull << 32 && p.top_k == 0 && p.min_p <= 0.0f);
}

void SlotState::count(int32_t token) {
  if (!penalties_) return;
  Seen& seen = seen_[token];
  seen.repeated = true;
  seen.output++;
}

Sampler::Sampler(int64_t vocabulary)
    : vocabulary_(vocabulary),
      loops_(sampler_loops()),
      z_(static_cast<size_t>(vocabulary)),
      slices_(static_cast<size_t>((vocabulary + kVocabularySlice - 1) / kVocabularySlice)) {}

SampledToken Sampler::sample(const float* logits, const SlotState& state, uint32_t position, const int32_t* banned, size_t banned_count) {
  SampledToken result;
  result.token = choose(logits, state, position, banned, banned_count);
  if (state.parameters_.logprobs >= 0) report(logits, result.token, state.parameters_.logprobs, &result);
  return result;
}

Candidate Sampler::candidate(const float* logits, int32_t first, int64_t count, const SlotState& state, uint32_t position) {
  if (count == 0) return {INT32_MAX, -INFINITY};
  const SamplingParameters& p = state.parameters_;
  if (p.temperature < kTemperatureMin) {
    const int32_t best = argmax(logits, count);
    return {first + best, logits[best]};
  }
  loops_.divide(logits, p.temperature, count, z_.data());
  return gumbel_argmax(p, position, z_.data(), first, count, argmax(z_.data(), count), {-INFINITY, INT32_MAX});
}

SampledToken Sampler::score(const float* logits, int32_t token, int top) {
  SampledToken result;
  result.token = token;
  report(logits, token, top, &result);
  return result;
}

int32_t Sampler::choose(const float* logits, const SlotState& state, uint32_t position, const int32_t* banned, size_t banned_count) {
  const SamplingParameters& p = state.parameters_;
  if (banned_count == 0 && state.plain()) return candidate(logits, 0, vocabulary_, state, position).token;
  const bool greedy = p.temperature < kTemperatureMin;
  adjust(logits, state, banned, banned_count, greedy ? 1.0f : p.temperature);
  const int32_t best = argmax(z_.data(), vocabulary_);
  if (greedy) return best;
  const float zmax = z_[static_cast<size_t>(best)];
  Cut cut{-INFINITY, INT32_MAX};
  const bool some = p.top_k > 0 && p.top_k < vocabulary_;
  if (some) keep_top_k(p.top_k, &cut);
  if (p.top_p < 1ull << 32) {
    if (some) keep_top_p_of_keys(p.top_p, zmax, &cut);
    else keep_top_p(p.top_p, zmax, &cut);
  }
  return gumbel_argmax(p, position, z_.data(), 0, vocabulary_, best, cut).token;
}

// z = (logit with penalties and bias) / divisor; banned tokens are -inf.
void Sampler::adjust(const float* logits, const SlotState& state, const int32_t* banned, size_t banned_count, float divisor) {
  loops_.divide(logits, divisor, vocabulary_, z_.data());
  const SamplingParameters& p = state.parameters_;
  for (const auto& [token, seen] : state.seen_) {
    float x = logits[token];
    if (seen.repeated) x = x > 0.0f ? x / p.repetition_penalty : x * p.repetition_penalty;
    if (seen.output > 0) x = (x - p.frequency_penalty * static_cast<float>(seen.output)) - p.presence_penalty;
    if (seen.bias != 0.0f) x = x + seen.bias;
    z_[static_cast<size_t>(token)] = x / divisor;
  }
  for (size_t i = 0; i < banned_count; i++) z_[static_cast<size_t>(banned[i])] = -INFINITY;
}

int32_t Sampler::argmax(const float* x, int64_t count) const {
  const float largest = loops_.maximum(x, count);
  int64_t i = 0;
  while (i + 1 < count && x[i] != largest) i++;
  return static_cast<int32_t>(i);
}

// The k best. Candidates gather in a buffer of 4k; when it is full the k best stay, and what is not above the worst of them is passed by.
void Sampler::keep_top_k(int32_t k, Cut* cut) {
  const size_t keep = static_cast<size_t>(k), room = keep * 4;
  keys_.clear();
  uint64_t floor = 0;
  const auto shrink = [&] {
    std::nth_element(keys_.begin(), keys_.begin() + static_cast<ptrdiff_t>(keep - 1), keys_.end(), std::greater<>());
    keys_.resize(keep);
    floor = keys_.back();
  };
  for (int64_t i = 0; i < vocabulary_; i++) {
    const uint64_t key = order_key(z_[static_cast<size_t>(i)], static_cast<int32_t>(i));
    if (key <= floor) continue;
    keys_.push_back(key);
    if (keys_.size() == room) shrink();
  }
  shrink();
  const int32_t last = token_of(floor);
  *cut = {z_[static_cast<size_t>(last)], last};
}

// The fewest best of the tokens in keys_ whose masses reach p times their total.
void Sampler::keep_top_p_of_keys(uint64_t p, float zmax, Cut* cut) {
  std::sort(keys_.begin(), keys_.end(), std::greater<>());
  const auto mass = [&](uint64_t key) { return mass_of(z_[static_cast<size_t>(token_of(key))] - zmax); };
  uint64_t total = 0, sum = 0;
  for (const uint64_t key : keys_) total += mass(key);
  for (const uint64_t key : keys_) {
    sum += mass(key);
    if (!reaches(sum, p, total)) continue;
    *cut = {z_[static_cast<size_t>(token_of(key))], token_of(key)};
    return;
  }
}

// The fewest best tokens whose masses reach p times the total. Masses of the tokens near the maximum are added up in bins; the bin in which p is reached
// is sorted. When that needs tokens further away than `near`, all are taken.
void Sampler::keep_top_p(uint64_t p, float zmax, Cut* cut) {
  const uint64_t total = loops_.total_mass(z_.data(), zmax, vocabulary_);
  for (const int near : {8 * kBinsPerUnit, kBins}) {
    uint64_t bins[kBins] = {};
    const float lowest = zmax - static_cast<float>(near) / static_cast<float>(kBinsPerUnit);
    const auto each_near = [&](auto use) {
      for (int64_t from = 0; from < vocabulary_; from += kNoiseBlock) {
        const int64_t to = std::min<int64_t>(from + kNoiseBlock, vocabulary_);
        if (loops_.maximum(z_.data() + from, to - from) < lowest) continue;
        for (int64_t i = from; i < to; i++) {
          const float z = z_[static_cast<size_t>(i)];
          const int bin = z < lowest ? kBins : bin_of(z, zmax);
          if (bin < near) use(static_cast<int32_t>(i), z, bin);
        }
      }
    };
    each_near([&](int32_t, float z, int bin) { bins[bin] += mass_of(z - zmax); });
    uint64_t sum = 0;
    int reached = 0;
    while (reached < near && !reaches(sum + bins[reached], p, total)) sum += bins[reached++];
    if (reached == near) continue;
    keys_.clear();
    each_near([&](int32_t token, float z, int bin) { if (bin == reached) keys_.push_back(order_key(z, token)); });
    std::sort(keys_.begin(), keys_.end(), std::greater<>());
    for (const uint64_t key : keys_) {
      const int32_t token = token_of(key);
      sum += mass_of(z_[static_cast<size_t>(token)] - zmax);
      if (!reaches(sum, p, total)) continue;
      *cut = {z_[static_cast<size_t>(token)], token};
      return;
    }
  }
}

// argmax of rn(z + noise) over the tokens inside the cut and above min-p; ties go to the lower id. A token is looked at closely only when a cheap upper
// bound of its noise could make it win.
Candidate Sampler::gumbel_argmax(const SamplingParameters& p, uint32_t position, const float* z, int32_t first, int64_t token_count, int32_t best, const Cut& cut) const {
  const NoiseKey key = noise_key(p.seed, p.choice, position);
  const auto value = [&](int32_t i) { return z[i] + gumbel_noise(noise_bits(key, static_cast<uint32_t>(first + i))); };
  const float zmax = z[best];
  float best_value = value(best);
  float bound[kNoiseBlock];
  for (int64_t from = 0; from < token_count; from += kNoiseBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kNoiseBlock, token_count - from));
    const float highest = loops_.maximum(z + from, count);
    if (highest < cut.z || highest + kNoiseMax < best_value) continue;
    if (loops_.noise_bounds(z + from, key, static_cast<uint32_t>(first + from), count, bound) < best_value) continue;
    for (int i = 0; i < count; i++) {
      const int32_t at = static_cast<int32_t>(from) + i;
      if (bound[i] < best_value || z[at] < cut.z || (z[at] == cut.z && first + at > cut.token)) continue;
      const float v = value(at);
      if (v < best_value || (v == best_value && at >= best)) continue;
      if (p.min_p > 0.0f && exp_fixed(z[at] - zmax) < p.min_p) continue;
      best_value = v;
      best = at;
    }
  }
  return {first + best, best_value};
}

// logprob = rn(rn(x - M) - log(sum))
void Sampler::report(const float* logits, int32_t token, int top, SampledToken* out) {
  const float maximum = loops_.maximum(logits, vocabulary_);
  const float log_sum = log_fixed(loops_.sum_exp(logits, maximum, vocabulary_, slices_.data()));
  const auto logprob = [&](int32_t t) { return (logits[t] - maximum) - log_sum; };
  out->has_logprob = true;
  out->logprob = logprob(token);
  out->top.clear();
  const size_t wanted = static_cast<size_t>(std::min<int64_t>(top, vocabulary_));
  if (wanted == 0) return;
  keys_.clear();  // best first
  for (int64_t from = 0; from < vocabulary_; from += kNoiseBlock) {
    const int64_t to = std::min<int64_t>(from + kNoiseBlock, vocabulary_);
    if (keys_.size() == wanted && order_key(loops_.maximum(logits + from, to - from), static_cast<int32_t>(from)) < keys_.back()) continue;
    for (int64_t i = from; i < to; i++) {
      const uint64_t key = order_key(logits[i], static_cast<int32_t>(i));
      if (keys_.size() == wanted) {
        if (key < keys_.back()) continue;
        keys_.pop_back();
      }
      keys_.insert(std::upper_bound(keys_.begin(), keys_.end(), key, std::greater<>()), key);
    }
  }
  for (const uint64_t key : keys_) out->top.push_back({token_of(key), logprob(token_of(key))});
}

}  // namespace shardmesh
