// The same source with fma and AVX2 instructions allowed: the same bits, faster.
#include "kernel_table.h"
#include "variants.h"

namespace shardmesh {
const KernelSet* reference_fma_kernel_set() { return &kReferenceSet; }
const KernelSet* reference_f32_fma_kernel_set() { return &kReferenceF32Set; }
}  // namespace shardmesh
