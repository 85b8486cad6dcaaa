// Bodies of SamplerLoops, in whatever instruction set the including file is compiled for. Loops run over fixed blocks, so that a compiler may put the
// iterations of a block side by side; none of them is reassociated.
#pragma once
#include "sampler_math.h"

namespace shardmesh {
namespace {

float pass_maximum(const float* x, int64_t count) {
  constexpr int kLanes = 32;
  float lane[kLanes];
  for (int i = 0; i < kLanes; i++) lane[i] = -INFINITY;
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes)
    for (int i = 0; i < kLanes; i++) lane[i] = lane[i] < x[at + i] ? x[at + i] : lane[i];
  float largest = -INFINITY;
  for (int i = 0; i < kLanes; i++) largest = largest < lane[i] ? lane[i] : largest;
  for (; at < count; at++) largest = largest < x[at] ? x[at] : largest;
  return largest;
}

void pass_divide(const float* x, float divisor, int64_t count, float* z) {
  for (int64_t i = 0; i < count; i++) z[i] = x[i] / divisor;
}

float pass_tree(const float* leaf, int64_t count) {
  if (count == 1) return leaf[0];
  const int64_t left = (count + 1) / 2;
  return pass_tree(leaf, left) + pass_tree(leaf + left, count - left);
}

float pass_sum_exp(const float* x, float maximum, int64_t count, float* slices) {
  const int64_t slice_count = (count + kVocabularySlice - 1) / kVocabularySlice;
  for (int64_t s = 0; s < slice_count; s++) {
    const float* slice = x + s * kVocabularySlice;
    const int64_t left = count - s * kVocabularySlice;
    const int length = left < kVocabularySlice ? static_cast<int>(left) : kVocabularySlice;
    float partial[128] = {};
    int at = 0;
    for (; at + 128 <= length; at += 128)
      for (int i = 0; i < 128; i++) partial[i] = partial[i] + exp_fixed(slice[at + i] - maximum);
    for (int i = 0; at + i < length; i++) partial[i] = partial[i] + exp_fixed(slice[at + i] - maximum);
    slices[s] = halving_sum(partial, 128);
  }
  return pass_tree(slices, slice_count);
}

uint64_t pass_total_mass(const float* z, float zmax, int64_t count) {
  uint64_t total = 0;
  for (int64_t i = 0; i < count; i++) total += mass_of(z[i] - zmax);
  return total;
}

float pass_noise_bounds(const float* z, NoiseKey key, uint32_t first, int count, float* bound) {
  float value[kNoiseBlock];
  for (int i = 0; i < count; i++) {
    // e = -log(u) >= w >= floor(w * 2^24) / 2^24, so noise = -log(e) <= (24 - exponent) ln 2; a little is added for rounding.
    const int32_t distance = static_cast<int32_t>(~noise_bits(key, first + static_cast<uint32_t>(i)) >> 8);
    const float f = static_cast<float>(distance);
    int32_t bits;
    std::memcpy(&bits, &f, 4);
    const int32_t exponent = (bits >> 23) - 127;
    value[i] = z[i] + (static_cast<float>(24 - exponent) * 0.6931473f + 0.001f);
  }
  float largest = -INFINITY;
  for (int i = 0; i < count; i++) {
    bound[i] = value[i];
    largest = largest < value[i] ? value[i] : largest;
  }
  return largest;
}

constexpr SamplerLoops kPasses = {
    .maximum = pass_maximum, .divide = pass_divide, .sum_exp = pass_sum_exp, .total_mass = pass_total_mass, .noise_bounds = pass_noise_bounds};

}  // namespace
}  // namespace shardmesh
