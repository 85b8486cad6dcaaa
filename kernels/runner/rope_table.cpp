#include "rope_table.h"

#include <cmath>
#include <cstring>

namespace shardmesh {
namespace {

constexpr double kLn2High = 6.93147180369123816490e-01;  // 32 bits: n * high is exact for |n| < 2^20
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kHalfPi1 = 1.57079632673412561417e+00;  // pi/2 in three parts, the first two of 33 bits
constexpr double kHalfPi2 = 6.07710050630396597660e-11;
constexpr double kHalfPi3 = 2.02226624879595063154e-21;

// sin and cos on [-pi/4, pi/4] by their Taylor series (last term below 2^-60).
double sine_core(double r) {
  const double z = r * r;
  double p = 0.0;
  for (int n = 19; n >= 3; n -= 2) p = (1.0 - p) * z / static_cast<double>((n - 1) * n);
  return r * (1.0 - p);
}

double cosine_core(double r) {
  const double z = r * r;
  double p = 0.0;
  for (int n = 20; n >= 2; n -= 2) p = (1.0 - p) * z / static_cast<double>((n - 1) * n);
  return 1.0 - p;
}

// ln(x), x > 0: x = 2^e * m, ln m = 2 artanh((m - 1) / (m + 1)).
double natural_log(double x) {
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752440) {
    m *= 2.0;
    exponent--;
  }
  const double f = (m - 1.0) / (m + 1.0), z = f * f;
  double p = 0.0;
  for (int n = 27; n >= 3; n -= 2) p = (p + 1.0 / static_cast<double>(n)) * z;
  const double e = static_cast<double>(exponent);
  return e * kLn2High + (2.0 * (f + f * p) + e * kLn2Low);
}

double exponential(double x) {
  const double n = std::nearbyint(x / 0.69314718055994530942);
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double p = 1.0;
  for (int k = 16; k >= 1; k--) p = 1.0 + p * r / static_cast<double>(k);
  return std::ldexp(p, static_cast<int>(n));
}

uint64_t fnv1a(uint64_t hash, const std::vector<float>& values) {
  for (const float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    hash = (hash ^ bits) * 1099511628211ull;
  }
  return hash;
}

}  // namespace

void sine_cosine(double x, double* sine, double* cosine) {
  const double n = std::nearbyint(x * 0.63661977236758134308);
  const double r = ((x - n * kHalfPi1) - n * kHalfPi2) - n * kHalfPi3;
  const double s = sine_core(r), c = cosine_core(r);
  switch (static_cast<int64_t>(n) & 3) {
    case 0: *sine = s; *cosine = c; break;
    case 1: *sine = c; *cosine = -s; break;
    case 2: *sine = -s; *cosine = -c; break;
    default: *sine = -c; *cosine = s;
  }
}

double power(double base, double exponent) { return exponential(exponent * natural_log(base)); }

RopeTables::RopeTables(const RopeParameters& parameters, int64_t context) : parameters_(parameters) {
  const int pairs = parameters.dimensions / 2;
  cosine_.resize(static_cast<size_t>(context * pairs));
  sine_.resize(cosine_.size());
  std::vector<double> frequency(static_cast<size_t>(pairs));
  for (int i = 0; i < pairs; i++) {
    double f = parameters.scale * power(parameters.base, -2.0 * i / parameters.dimensions);
    if (!parameters.factors.empty()) f = f / static_cast<double>(parameters.factors[static_cast<size_t>(i)]);
    frequency[static_cast<size_t>(i)] = f;
  }
  size_t at = 0;
  for (int64_t position = 0; position < context; position++) {
    for (int i = 0; i < pairs; i++, at++) {
      double s, c;
      sine_cosine(static_cast<double>(position) * frequency[static_cast<size_t>(i)], &s, &c);
      cosine_[at] = static_cast<float>(c);
      sine_[at] = static_cast<float>(s);
    }
  }
}

uint64_t RopeTables::checksum(uint64_t hash) const { return fnv1a(fnv1a(hash, cosine_), sine_); }

}  // namespace shardmesh
