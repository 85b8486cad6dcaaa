// The passes of the sampler over a whole vocabulary, and the scalar functions they share. Compiled twice, for any x86-64 and for AVX2
// (sampler_loops_baseline.cpp, sampler_loops_avx2.cpp), with the same bits.
#pragma once
#include <cstdint>

namespace shardmesh {

// Key of the noise of one choice: 64 bits, split.
struct NoiseKey {
  uint32_t low, high;
};

struct SamplerLoops {
  // Largest of x[0, count).
  float (*maximum)(const float* x, int64_t count);
  // z[i] = x[i] / divisor
  void (*divide)(const float* x, float divisor, int64_t count, float* z);
  // sum over i of exp(x[i] - maximum): slices of 1,024, in each 128 interleaved partial sums, halved; slices joined by the tree. `slices` has room for
  // one value a slice.
  float (*sum_exp)(const float* x, float maximum, int64_t count, float* slices);
  // Sum over i of mass_of(z[i] - zmax): an exact integer.
  uint64_t (*total_mass)(const float* z, float zmax, int64_t count);
  // bound[i] >= z[i] + noise(first + i), for i < count <= 128; returns the largest bound.
  float (*noise_bounds)(const float* z, NoiseKey key, uint32_t first, int count, float* bound);
};

constexpr int kVocabularySlice = 1024;
constexpr int kNoiseBlock = 128;
constexpr float kNoiseMax = 23.0f;   // no noise is above it
constexpr float kMassDistance = 28.5f;  // exp(-28.5) * 2^40 rounds to 0

const SamplerLoops& sampler_loops();           // the one this machine runs
const SamplerLoops& sampler_loops_baseline();
const SamplerLoops& sampler_loops_avx2();

}  // namespace shardmesh
