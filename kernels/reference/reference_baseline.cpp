// The reference for any x86-64; std::fma is the library's.
#include "kernel_table.h"
#include "variants.h"

namespace shardmesh {
const KernelSet* reference_baseline_kernel_set() { return &kReferenceSet; }
const KernelSet* reference_f32_baseline_kernel_set() { return &kReferenceF32Set; }
}  // namespace shardmesh
