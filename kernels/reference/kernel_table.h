// The two tables of the reference, in whatever instruction set the including file is compiled for.
#pragma once
#include "operations.h"
#include "operations_f32.h"

namespace shardmesh {
namespace {

constexpr KernelSet kReferenceSet = {
    .name = "reference",
    .packed_bytes = reference_packed_bytes,
    .pack = reference_pack,
    .read_row = reference_read_row,
    .activation_bytes = reference_activation_bytes,
    .quantize_activations = reference_quantize_activations,
    .linear = reference_linear,
    .rms_norm = reference_rms_norm,
    .rope = reference_rope,
    .store_kv = reference_store_kv,
    .attention_scratch_bytes = reference_attention_scratch_bytes,
    .attention = reference_attention,
    .gated_activation = reference_gated_activation,
    .finish_tree = reference_finish_tree,
    .all_finite = reference_all_finite,
};

constexpr KernelSet kReferenceF32Set = {
    .name = "reference-f32",
    .packed_bytes = f32_packed_bytes,
    .pack = f32_pack,
    .read_row = f32_read_row,
    .activation_bytes = f32_activation_bytes,
    .quantize_activations = f32_quantize_activations,
    .linear = f32_linear,
    .rms_norm = f32_rms_norm,
    .rope = reference_rope,
    .store_kv = f32_store_kv,
    .attention_scratch_bytes = f32_attention_scratch_bytes,
    .attention = f32_attention,
    .gated_activation = f32_gated_activation,
    .finish_tree = reference_finish_tree,
    .all_finite = reference_all_finite,
};

}  // namespace
}  // namespace shardmesh
