// Rotation tables from our own double-precision sin, cos and pow: no library's last bit enters, so every machine has the same tables.
#pragma once
#include <cstdint>
#include <vector>

#include "../include/kernel_set.h"

namespace shardmesh {

struct RopeParameters {
  int dimensions;
  bool half_style;
  double base, scale;
  std::vector<float> factors;  // empty or [dimensions / 2]
  bool operator==(const RopeParameters&) const = default;
};

// Tables [context, dimensions / 2]: angle = position * scale * base^(-2i / dimensions) / factors[i].      Su et al. 2021
class RopeTables {
 public:
  RopeTables(const RopeParameters& parameters, int64_t context);
  const RopeParameters& parameters() const { return parameters_; }
  RopeTable view() const { return {parameters_.dimensions, parameters_.half_style ? 1 : 0, cosine_.data(), sine_.data()}; }
  // Continues a 64-bit FNV-1a hash over all entries.
  uint64_t checksum(uint64_t hash) const;

 private:
  RopeParameters parameters_;
  std::vector<float> cosine_, sine_;
};

// The functions behind the tables, for tests. Absolute error of sin and cos below 1e-15 for |x| < 10^6; relative error of pow below 1e-14.
void sine_cosine(double x, double* sine, double* cosine);
double power(double base, double exponent);

}  // namespace shardmesh
