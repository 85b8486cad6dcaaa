// The compilations of the reference that reference.cpp chooses from.
#pragma once
#include "../include/kernel_set.h"

namespace shardmesh {
const KernelSet* reference_baseline_kernel_set();
const KernelSet* reference_fma_kernel_set();
const KernelSet* reference_f32_baseline_kernel_set();
const KernelSet* reference_f32_fma_kernel_set();
}  // namespace shardmesh
