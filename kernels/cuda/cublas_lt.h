// cuBLASLt as far as it is used here. It is opened at run time and needed by nobody to build, so the few types, values and functions of its header are declared by
// ourselves; where a toolkit has the header, blas_products.cpp holds them against it.      cublasLt.h of CUDA 12 and 13
#pragma once
#include <cstddef>
#include <cstdint>

namespace shardmesh::cuda::lt {

using Status = int;  // cublasStatus_t
constexpr Status kSuccess = 0, kInvalidValue = 7, kExecutionFailed = 13, kNotSupported = 15;

// cudaDataType, cublasComputeType_t, cublasOperation_t
constexpr int kFloat = 0, kBf16 = 14, kComputeFloat = 68, kAsItIs = 0, kTransposed = 1;
// cublasLtMatmulDescAttributes_t
constexpr int kTransposeA = 3, kTransposeB = 4, kEpilogue = 7, kBiasPointer = 8, kBiasType = 26;
// cublasLtEpilogue_t
constexpr uint32_t kNoEpilogue = 1, kAddBias = 4;
// cublasLtMatmulPreferenceAttributes_t
constexpr int kWorkspaceMax = 1, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8;

using Handle = void*;
using Product = void*;     // cublasLtMatmulDesc_t
using Layout = void*;      // cublasLtMatrixLayout_t: columns one after the other, `ld` values apart
using Preference = void*;  // cublasLtMatmulPreference_t

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "the library fills these");

// cublasLtCreate() and so on.
struct Functions {
  Status (*create)(Handle* handle);
  Status (*destroy)(Handle handle);
  size_t (*get_version)();
  const char* (*get_status_string)(Status status);
  Status (*product_create)(Product* product, int compute_type, int scale_type);
  Status (*product_destroy)(Product product);
  Status (*product_set)(Product product, int attribute, const void* value, size_t bytes);
  Status (*layout_create)(Layout* layout, int type, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*layout_destroy)(Layout layout);
  Status (*preference_create)(Preference* preference);
  Status (*preference_destroy)(Preference preference);
  Status (*preference_set)(Preference preference, int attribute, const void* value, size_t bytes);
  Status (*get_heuristic)(Handle handle, Product product, Layout a, Layout b, Layout c, Layout d, Preference preference, int asked, Heuristic* found, int* found_count);
  Status (*multiply)(Handle handle, Product product, const void* alpha, const void* a, Layout a_layout, const void* b, Layout b_layout, const void* beta, const void* c, Layout c_layout,
                     void* d, Layout d_layout, const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream);
};

}  // namespace shardmesh::cuda::lt
