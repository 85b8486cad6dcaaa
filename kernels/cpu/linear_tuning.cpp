#include "linear_tuning.h"

#include <cstring>

#include "cpu_features.h"

namespace shardmesh {
namespace {

// AMD's prefetcher follows one stream best (reading 2-4 strips at once halves the bandwidth of Zen 4); Intel needs several streams and a software prefetch
// 2-4 KB ahead to reach its DRAM bandwidth.
struct Make {
  const char* vendor;
  LinearTuning tuning;
};
constexpr Make kMakes[] = {
    {"AuthenticAMD", {1, 1, 2048, 24}},
    {"GenuineIntel", {4, 2, 4096, 16}},
};
constexpr LinearTuning kOther = {1, 1, 2048, 24};

LinearTuning choose() {
  for (const Make& make : kMakes)
    if (std::strcmp(cpu_features().vendor, make.vendor) == 0) return make.tuning;
  return kOther;
}

}  // namespace

LinearTuning& linear_tuning() {
  static LinearTuning tuning = choose();
  return tuning;
}

}  // namespace shardmesh
