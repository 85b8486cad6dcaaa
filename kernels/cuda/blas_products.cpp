#include "blas_products.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#endif

namespace shardmesh::cuda {
namespace {

constexpr size_t kWorkspaceBytesMax = size_t{32} << 20;  // what cuBLAS itself takes on sm_90      cuBLAS documentation, "cublasSetWorkspace"
constexpr uint32_t kAlignment = 16;                      // of operands and of their rows; tensor cores and TMA need no more

#if __has_include(<cublasLt.h>)
static_assert(lt::kInvalidValue == CUBLAS_STATUS_INVALID_VALUE && lt::kExecutionFailed == CUBLAS_STATUS_EXECUTION_FAILED && lt::kNotSupported == CUBLAS_STATUS_NOT_SUPPORTED);
static_assert(lt::kFloat == CUDA_R_32F && lt::kBf16 == CUDA_R_16BF && lt::kComputeFloat == CUBLAS_COMPUTE_32F && lt::kAsItIs == CUBLAS_OP_N && lt::kTransposed == CUBLAS_OP_T);
static_assert(lt::kTransposeA == CUBLASLT_MATMUL_DESC_TRANSA && lt::kTransposeB == CUBLASLT_MATMUL_DESC_TRANSB && lt::kEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(lt::kBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER && lt::kBiasType == CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
static_assert(lt::kNoEpilogue == CUBLASLT_EPILOGUE_DEFAULT && lt::kAddBias == CUBLASLT_EPILOGUE_BIAS && lt::kWorkspaceMax == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(lt::kAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES && lt::kAlignmentB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(lt::kAlignmentC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES && lt::kAlignmentD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(sizeof(lt::Algorithm) == sizeof(cublasLtMatmulAlgo_t) && sizeof(lt::Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(lt::Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
#endif

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0; }

}  // namespace

BlasProducts::BlasProducts(const std::vector<std::string>& libraries, int tokens_above, int tokens_max) : tokens_above_(tokens_above), tokens_max_(tokens_max) {
  try {
    open(libraries);
  } catch (...) {
    close();
    throw;
  }
}

BlasProducts::~BlasProducts() { close(); }

void BlasProducts::open(const std::vector<std::string>& libraries) {
  std::string absent;
  for (const std::string& name : libraries) {
    opened_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    library_ = name.substr(name.rfind('/') + 1);
    if (opened_) break;
    absent += (absent.empty() ? "" : "; ") + std::string(dlerror());
  }
  if (!opened_) throw std::runtime_error("cuBLASLt is not here (" + absent + ")");
  const auto find = [&](const char* name, auto* function) {
    void* symbol = dlsym(opened_, name);
    if (!symbol) throw std::runtime_error(library_ + " has no " + name);
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(symbol);
  };
  find("cublasLtGetStatusString", &lt_.get_status_string);
  find("cublasLtGetVersion", &lt_.get_version);
  find("cublasLtMatmulDescCreate", &lt_.product_create);
  find("cublasLtMatmulDescDestroy", &lt_.product_destroy);
  find("cublasLtMatmulDescSetAttribute", &lt_.product_set);
  find("cublasLtMatrixLayoutCreate", &lt_.layout_create);
  find("cublasLtMatrixLayoutDestroy", &lt_.layout_destroy);
  find("cublasLtMatmulPreferenceCreate", &lt_.preference_create);
  find("cublasLtMatmulPreferenceDestroy", &lt_.preference_destroy);
  find("cublasLtMatmulPreferenceSetAttribute", &lt_.preference_set);
  find("cublasLtMatmulAlgoGetHeuristic", &lt_.get_heuristic);
  find("cublasLtMatmul", &lt_.multiply);
  find("cublasLtDestroy", &lt_.destroy);
  find("cublasLtCreate", &lt_.create);
  expect(lt_.create(&handle_), "cublasLtCreate");
  expect(lt_.preference_create(&preference_), "cublasLtMatmulPreferenceCreate");
  const uint64_t most = kWorkspaceBytesMax;
  expect(lt_.preference_set(preference_, lt::kWorkspaceMax, &most, sizeof most), "cublasLtMatmulPreferenceSetAttribute");
  for (const int operand : {lt::kAlignmentA, lt::kAlignmentB, lt::kAlignmentC, lt::kAlignmentD})
    expect(lt_.preference_set(preference_, operand, &kAlignment, sizeof kAlignment), "cublasLtMatmulPreferenceSetAttribute");
}

// What a card that is lost holds ends with the process.
void BlasProducts::close() {
  if (!opened_ || is_abandoned()) return;
  for (const Plan& plan : plans_) {
    for (const Sized& sized : plan.sizes) {
      if (sized.x) lt_.layout_destroy(sized.x);
      if (sized.out) lt_.layout_destroy(sized.out);
    }
    if (plan.w) lt_.layout_destroy(plan.w);
    if (plan.product) lt_.product_destroy(plan.product);
  }
  if (preference_) lt_.preference_destroy(preference_);
  if (handle_) lt_.destroy(handle_);
  dlclose(opened_);
}

std::string BlasProducts::answer(lt::Status status, const char* function) const {
  return std::string(function) + " of " + library_ + " answers " + std::to_string(status) + " (" + lt_.get_status_string(status) + ")";
}

void BlasProducts::expect(lt::Status status, const char* function) const {
  if (status != lt::kSuccess) throw std::runtime_error(answer(status, function));
}

std::string BlasProducts::name() const {
  const size_t version = lt_.get_version();
  return "cuBLASLt " + std::to_string(version / 10'000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
}

lt::Layout BlasProducts::layout(int type, int64_t rows, int64_t columns, int64_t stride) {
  lt::Layout made = nullptr;
  expect(lt_.layout_create(&made, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), stride), "cublasLtMatrixLayoutCreate");
  return made;
}

// The library counts columns: a row of ours is a column of its matrix, so w is transposed, and out [T, rows] is its rows x T.
int BlasProducts::plan(const BlasShape& shape) {
  const Key key{shape.rows, shape.columns, shape.w_stride, shape.x_stride, shape.out_stride, shape.bias != nullptr};
  if (const auto known = by_shape_.find(key); known != by_shape_.end()) return known->second;
  plans_.push_back({});
  Plan& plan = plans_.back();
  expect(lt_.product_create(&plan.product, lt::kComputeFloat, lt::kFloat), "cublasLtMatmulDescCreate");
  const auto set = [&](int attribute, const auto& value) { expect(lt_.product_set(plan.product, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute"); };
  set(lt::kTransposeA, int32_t{lt::kTransposed});
  set(lt::kTransposeB, int32_t{lt::kAsItIs});
  if (shape.bias) {
    set(lt::kEpilogue, lt::kAddBias);
    set(lt::kBiasType, int32_t{lt::kFloat});
    set(lt::kBiasPointer, shape.bias);
  }
  plan.w = layout(lt::kBf16, shape.columns, shape.rows, shape.w_stride);
  for (int tokens = tokens_above_ / kBlasTokens * kBlasTokens + kBlasTokens; tokens < tokens_max_; tokens += kBlasTokens) choose(shape, &plan, tokens);
  choose(shape, &plan, tokens_max_);
  return by_shape_[key] = static_cast<int>(plans_.size()) - 1;
}

void BlasProducts::choose(const BlasShape& shape, Plan* plan, int tokens) {
  plan->sizes.push_back({tokens, nullptr, nullptr, {}});
  Sized& sized = plan->sizes.back();
  sized.x = layout(lt::kBf16, shape.columns, tokens, shape.x_stride);
  sized.out = layout(lt::kFloat, shape.rows, tokens, shape.out_stride);
  lt::Heuristic found{};
  int count = 0;
  const lt::Status status = lt_.get_heuristic(handle_, plan->product, plan->w, sized.x, sized.out, sized.out, preference_, 1, &found, &count);
  if (status != lt::kSuccess || count < 1 || found.state != lt::kSuccess)
    throw std::runtime_error(library_ + " has no algorithm for " + std::to_string(shape.rows) + " x " + std::to_string(shape.columns) + " weights and " + std::to_string(tokens) + " tokens: " +
                             answer(status != lt::kSuccess ? status : found.state, "cublasLtMatmulAlgoGetHeuristic"));
  sized.algorithm = found.algorithm;
  workspace_needed_ = std::max(workspace_needed_, found.workspace_bytes);
}

void BlasProducts::allocate_workspace() {
  if (workspace_needed_ > workspace_.size()) workspace_ = Memory(Place::Card, (workspace_needed_ + 255) / 256 * 256, "the workspace of cuBLASLt");
}

Problem BlasProducts::run(int plan, const BlasShape& shape, const BlasOperands& operands, int tokens, Stream stream) {
  const Plan& p = plans_[static_cast<size_t>(plan)];
  const auto sized = std::find_if(p.sizes.begin(), p.sizes.end(), [&](const Sized& s) { return s.tokens >= tokens; });
  if (!serves(tokens) || sized == p.sizes.end()) return "blas: no algorithm was chosen for so many tokens";
  return run_sized(p, *sized, shape, operands, stream);
}

Problem BlasProducts::warm(int plan, const BlasShape& shape, const BlasOperands& operands, Stream stream) {
  const Plan& p = plans_[static_cast<size_t>(plan)];
  for (const Sized& sized : p.sizes)
    if (const Problem problem = run_sized(p, sized, shape, operands, stream)) return problem;
  return nullptr;
}

Problem BlasProducts::run_sized(const Plan& plan, const Sized& sized, const BlasShape& shape, const BlasOperands& operands, Stream stream) {
  if (!is_aligned(operands.w) || !is_aligned(operands.x) || !is_aligned(operands.out)) return "blas: w, x and out must be 16-byte aligned";
  lt::Status status = shape.bias ? lt_.product_set(plan.product, lt::kBiasPointer, &shape.bias, sizeof shape.bias) : lt::kSuccess;
  const float one = 1, zero = 0;
  if (status == lt::kSuccess)
    status = lt_.multiply(handle_, plan.product, &one, operands.w, plan.w, operands.x, sized.x, &zero, operands.out, sized.out, operands.out, sized.out, &sized.algorithm,
                        workspace_.as<void>(), workspace_.size(), stream);
  if (status == lt::kSuccess) return nullptr;
  problem_ = answer(status, "cublasLtMatmul");
  return problem_.c_str();
}

}  // namespace shardmesh::cuda
