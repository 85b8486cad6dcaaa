// Takes the place of kernels/cpu/cpu_features.cpp where the avx512 and amx sets are built on emulated_avx512.h: with AVX2 this machine "has" AVX-512 and AMX.
#define cpu_features detected_cpu_features
#include "../../kernels/cpu/cpu_features.cpp"
#undef cpu_features

namespace shardmesh {

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = [] {
    CpuFeatures f = detected_cpu_features();
    f.avx512 = f.amx = f.avx2;
    return f;
  }();
  return features;
}

}  // namespace shardmesh
