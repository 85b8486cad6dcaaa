// A libcublasLt whose card is the emulated machine: it checks what it is given, queues its work on that machine's streams, and sums in an order of its own. For the test of
// kernels/cuda/blas_products.cpp, and for whole programs whose bits are free.
//
// A wrong argument answers "invalid value" and says on stderr what is wrong. SHARDMESH_STAND_IN_CUBLASLT="NAME STATUS" has the function cublasLtNAME answer with that status.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../../../kernels/cuda/cublas_lt.h"
#include "../../../kernels/include/arithmetic.h"
#include "machine.h"

using namespace shardmesh::cuda;

namespace {

struct StandInProduct {
  int compute_type, scale_type, transpose_a = lt::kAsItIs, transpose_b = lt::kAsItIs, bias_type = lt::kBf16;
  uint32_t epilogue = lt::kNoEpilogue;
  const float* bias = nullptr;
};
struct StandInLayout {
  int type;
  uint64_t rows, columns;
  int64_t ld;
};
struct StandInPreference {
  uint64_t workspace_max = 0;
  uint32_t alignment[4] = {256, 256, 256, 256};  // the library's own default
};
// What `data` of an algorithm says: for which product it was chosen.
struct Choice {
  uint64_t rows, columns, tokens;
  int64_t ld_a, ld_b;
  uint32_t ld_d, epilogue;
  uint64_t workspace_bytes;
  uint32_t alignment, mark;
};
static_assert(sizeof(Choice) == sizeof(lt::Algorithm));
constexpr uint32_t kMark = 0x5d1a901e;
int open_handles = 0, the_library;

lt::Status wrong(const std::string& what) {
  std::fprintf(stderr, "cublas_lt_stand_in: %s\n", what.c_str());
  return lt::kInvalidValue;
}

// The status that a test asks for.
bool is_asked(const char* name, lt::Status* status) {
  const char* asked = std::getenv("SHARDMESH_STAND_IN_CUBLASLT");
  const size_t length = std::strlen(name);
  if (!asked || std::strncmp(asked, name, length) != 0 || asked[length] != ' ') return false;
  *status = std::atoi(asked + length + 1);
  return true;
}

const StandInLayout& layout_of(lt::Layout layout) { return *static_cast<const StandInLayout*>(layout); }

// "" or what is wrong with a product of these: D = A transposed * B, in fp32, of bf16.
std::string problem_of(lt::Product product, lt::Layout a_layout, lt::Layout b_layout, lt::Layout c_layout, lt::Layout d_layout) {
  const StandInProduct& p = *static_cast<const StandInProduct*>(product);
  const StandInLayout &a = layout_of(a_layout), &b = layout_of(b_layout), &c = layout_of(c_layout), &d = layout_of(d_layout);
  if (p.compute_type != lt::kComputeFloat || p.scale_type != lt::kFloat) return "sums and scales must be fp32";
  if (p.transpose_a != lt::kTransposed || p.transpose_b != lt::kAsItIs) return "A must be transposed, B not";
  if (a.type != lt::kBf16 || b.type != lt::kBf16 || c.type != lt::kFloat || d.type != lt::kFloat) return "A and B must be bf16, C and D fp32";
  if (a.rows != b.rows || a.columns != d.rows || b.columns != d.columns || c.rows != d.rows || c.columns != d.columns) return "A, B, C and D do not belong together";
  if (a.ld < static_cast<int64_t>(a.rows) || b.ld < static_cast<int64_t>(b.rows) || d.ld < static_cast<int64_t>(d.rows) || c.ld != d.ld) return "a column is longer than the way to the next";
  if (a.ld % 8 || b.ld % 8 || d.ld % 4) return "columns are not all 16-byte aligned";
  if (p.epilogue != lt::kNoEpilogue && p.epilogue != lt::kAddBias) return "unknown epilogue";
  if (p.epilogue == lt::kAddBias && (p.bias_type != lt::kFloat || !p.bias)) return "the bias must be there, and fp32";
  return "";
}

float bf16_at(const uint16_t* values, int64_t i) { return shardmesh::bfloat_to_float(values[i]); }

}  // namespace

extern "C" {

lt::Status cublasLtCreate(lt::Handle* handle) {
  if (lt::Status status; is_asked("Create", &status)) return status;
  open_handles++;
  *handle = &the_library;
  return lt::kSuccess;
}
lt::Status cublasLtDestroy(lt::Handle handle) { return handle == &the_library && open_handles-- > 0 ? lt::kSuccess : wrong("a handle that is not open"); }
size_t cublasLtGetVersion() { return 130100; }
const char* cublasLtGetStatusString(lt::Status status) {
  switch (status) {
    case lt::kSuccess: return "success";
    case lt::kInvalidValue: return "an unsupported value or parameter was passed to the function";
    case lt::kNotSupported: return "the functionality requested is not supported";
    case lt::kExecutionFailed: return "the function failed to launch on the GPU";
    default: return "another status";
  }
}

lt::Status cublasLtMatmulDescCreate(lt::Product* product, int compute_type, int scale_type) {
  *product = new StandInProduct{compute_type, scale_type};
  return lt::kSuccess;
}
lt::Status cublasLtMatmulDescDestroy(lt::Product product) {
  delete static_cast<StandInProduct*>(product);
  return lt::kSuccess;
}
lt::Status cublasLtMatmulDescSetAttribute(lt::Product product, int attribute, const void* value, size_t bytes) {
  StandInProduct& p = *static_cast<StandInProduct*>(product);
  const auto set = [&](auto* to) {
    if (bytes != sizeof *to) return wrong("attribute " + std::to_string(attribute) + " has another size");
    std::memcpy(to, value, bytes);
    return lt::kSuccess;
  };
  switch (attribute) {
    case lt::kTransposeA: return set(&p.transpose_a);
    case lt::kTransposeB: return set(&p.transpose_b);
    case lt::kEpilogue: return set(&p.epilogue);
    case lt::kBiasPointer: return set(&p.bias);
    case lt::kBiasType: return set(&p.bias_type);
    default: return wrong("unknown attribute " + std::to_string(attribute));
  }
}

lt::Status cublasLtMatrixLayoutCreate(lt::Layout* layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  *layout = new StandInLayout{type, rows, columns, ld};
  return lt::kSuccess;
}
lt::Status cublasLtMatrixLayoutDestroy(lt::Layout layout) {
  delete static_cast<StandInLayout*>(layout);
  return lt::kSuccess;
}

lt::Status cublasLtMatmulPreferenceCreate(lt::Preference* preference) {
  *preference = new StandInPreference;
  return lt::kSuccess;
}
lt::Status cublasLtMatmulPreferenceDestroy(lt::Preference preference) {
  delete static_cast<StandInPreference*>(preference);
  return lt::kSuccess;
}
lt::Status cublasLtMatmulPreferenceSetAttribute(lt::Preference preference, int attribute, const void* value, size_t bytes) {
  StandInPreference& p = *static_cast<StandInPreference*>(preference);
  const bool alignment = attribute >= lt::kAlignmentA && attribute <= lt::kAlignmentD;
  if (!alignment && attribute != lt::kWorkspaceMax) return wrong("unknown preference " + std::to_string(attribute));
  if (bytes != (alignment ? sizeof(uint32_t) : sizeof(uint64_t))) return wrong("preference " + std::to_string(attribute) + " has another size");
  if (alignment) std::memcpy(&p.alignment[attribute - lt::kAlignmentA], value, bytes);
  else std::memcpy(&p.workspace_max, value, bytes);
  return lt::kSuccess;
}

lt::Status cublasLtMatmulAlgoGetHeuristic(lt::Handle handle, lt::Product product, lt::Layout a, lt::Layout b, lt::Layout c, lt::Layout d, lt::Preference preference, int asked,
                                          lt::Heuristic* found, int* found_count) {
  if (lt::Status status; is_asked("MatmulAlgoGetHeuristic", &status)) return status;
  if (handle != &the_library || asked != 1) return wrong("a handle that is not open, or several algorithms");
  if (const std::string what = problem_of(product, a, b, c, d); !what.empty()) return wrong(what);
  const StandInPreference& p = *static_cast<const StandInPreference*>(preference);
  uint32_t alignment = 256;
  for (const uint32_t one : p.alignment) alignment = std::min(alignment, one);
  // Large products split their sums and need room for them, others none.
  const uint64_t workspace = layout_of(a).rows >= 96 ? 1000 + layout_of(a).columns % 64 : 0;
  if (workspace > p.workspace_max) return wrong("no room for a workspace");
  const Choice choice{layout_of(a).columns, layout_of(a).rows, layout_of(b).columns, layout_of(a).ld, layout_of(b).ld, static_cast<uint32_t>(layout_of(d).ld),
                      static_cast<const StandInProduct*>(product)->epilogue, workspace, alignment, kMark};
  *found = {};
  std::memcpy(found->algorithm.data, &choice, sizeof choice);
  found->workspace_bytes = workspace;
  *found_count = 1;
  return lt::kSuccess;
}

lt::Status cublasLtMatmul(lt::Handle handle, lt::Product product, const void* alpha, const void* a, lt::Layout a_layout, const void* b, lt::Layout b_layout, const void* beta, const void* c,
                          lt::Layout c_layout, void* d, lt::Layout d_layout, const lt::Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
  if (lt::Status status; is_asked("Matmul", &status)) return status;
  if (handle != &the_library) return wrong("a handle that is not open");
  if (const std::string what = problem_of(product, a_layout, b_layout, c_layout, d_layout); !what.empty()) return wrong(what);
  if (*static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0) return wrong("alpha must be 1, beta 0");
  const StandInLayout &la = layout_of(a_layout), &lb = layout_of(b_layout), &ld = layout_of(d_layout);
  const StandInProduct p = *static_cast<const StandInProduct*>(product);
  Choice choice;
  std::memcpy(&choice, algorithm->data, sizeof choice);
  if (choice.mark != kMark || choice.rows != la.columns || choice.columns != la.rows || choice.tokens != lb.columns || choice.ld_a != la.ld || choice.ld_b != lb.ld ||
      choice.ld_d != static_cast<uint32_t>(ld.ld) || choice.epilogue != p.epilogue)
    return wrong("the algorithm was chosen for another product");
  if (workspace_bytes < choice.workspace_bytes || (choice.workspace_bytes && (!workspace || reinterpret_cast<uintptr_t>(workspace) % 256))) return wrong("the workspace is too small, or not aligned");
  for (const void* operand : {a, b, c, static_cast<const void*>(d)})
    if (!operand || reinterpret_cast<uintptr_t>(operand) % choice.alignment) return wrong("an operand is not aligned as was promised");
  if (c != d) return wrong("C must be D");
  if (!stream) return wrong("no stream");
  static_cast<simt::WorkQueue*>(stream)->add([=]() -> std::string {
    if (choice.workspace_bytes) std::memset(workspace, 0xa5, choice.workspace_bytes);
    const auto *w = static_cast<const uint16_t*>(a), *x = static_cast<const uint16_t*>(b);
    auto* out = static_cast<float*>(d);
    const int64_t K = static_cast<int64_t>(choice.columns);
    for (int64_t t = 0; t < static_cast<int64_t>(choice.tokens); t++)
      for (int64_t r = 0; r < static_cast<int64_t>(choice.rows); r++) {
        float sum[4] = {};
        for (int64_t k = 0; k < K; k++) sum[k % 4] += bf16_at(w, r * choice.ld_a + k) * bf16_at(x, t * choice.ld_b + k);
        const float all = (sum[3] + sum[2]) + (sum[1] + sum[0]);
        out[t * choice.ld_d + r] = p.epilogue == lt::kAddBias ? all + p.bias[r] : all;
      }
    return "";
  });
  return lt::kSuccess;
}

}  // extern "C"

// They are what blas_products.cpp takes them for.
[[maybe_unused]] static const lt::Functions kFunctions{cublasLtCreate,
                                                       cublasLtDestroy,
                                                       cublasLtGetVersion,
                                                       cublasLtGetStatusString,
                                                       cublasLtMatmulDescCreate,
                                                       cublasLtMatmulDescDestroy,
                                                       cublasLtMatmulDescSetAttribute,
                                                       cublasLtMatrixLayoutCreate,
                                                       cublasLtMatrixLayoutDestroy,
                                                       cublasLtMatmulPreferenceCreate,
                                                       cublasLtMatmulPreferenceDestroy,
                                                       cublasLtMatmulPreferenceSetAttribute,
                                                       cublasLtMatmulAlgoGetHeuristic,
                                                       cublasLtMatmul};
