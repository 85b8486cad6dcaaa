// Picks the compilation of the reference that this machine runs.
#include "../include/kernel_set.h"
#include "variants.h"

namespace shardmesh {
namespace {
bool has_fma() { return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2"); }
}  // namespace

const KernelSet* reference_kernel_set() {
  static const KernelSet* const set = has_fma() ? reference_fma_kernel_set() : reference_baseline_kernel_set();
  return set;
}

const KernelSet* reference_f32_kernel_set() {
  static const KernelSet* const set = has_fma() ? reference_f32_fma_kernel_set() : reference_f32_baseline_kernel_set();
  return set;
}
}  // namespace shardmesh
