// Products by cuBLASLt (kernels/cuda/blas_products.cpp) on the emulated machine, the library being cublas_lt_stand_in.cpp: sums against double precision, what is asked of the
// library and when, and what is said where it is missing, too old or fails.
//
//   cuda_blas_test STAND_IN OTHER    runs all; prints "ok NAME" or "FAIL NAME: what", a line each. OTHER: any other shared library
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "../../../kernels/cuda/blas_products.h"
#include "../test_matrix.h"
#include "kernel_cases.h"

using namespace shardmesh;
using namespace shardmesh::cuda;

namespace {

constexpr int kTokensAbove = 64, kTokensMax = 200;

std::string stand_in, other;

struct OwnStream {
  Stream stream = nullptr;
  OwnStream() { open_stream(&stream); }
  ~OwnStream() { close_stream(stream); }
};

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

std::string expect_error(const std::string& want, const std::function<void()>& body) {
  const std::string found = error_of(body);
  return found == want ? "" : "found '" + found + "', not '" + want + "'";
}

// What the stand-in answers in the place of success.
struct Answer {
  explicit Answer(const char* what) { setenv("SHARDMESH_STAND_IN_CUBLASLT", what, 1); }
  ~Answer() { unsetenv("SHARDMESH_STAND_IN_CUBLASLT"); }
};

// A matrix of which only columns [from, from + columns) are multiplied, in rows that are longer than that; values and rows beside the product are NaN or poison.
struct Scene {
  int64_t rows, columns, from, w_stride, x_stride, out_stride;
  bool biased;
  std::vector<uint16_t> host_w, host_x;
  std::vector<float> host_bias;
  Memory w, x, out, bias;

  Scene(int64_t rows_, int64_t columns_, int64_t from_, bool biased_, uint64_t seed)
      : rows(rows_), columns(columns_), from(from_), w_stride(from + columns + 32), x_stride(w_stride + 32), out_stride((rows + 15) / 16 * 16 + 16), biased(biased_) {
    Random random(seed);
    const auto bf16 = [&] {
      const float value = random.uniform();
      return static_cast<uint16_t>(reinterpret_cast<const uint16_t*>(&value)[1]);
    };
    host_w.assign(static_cast<size_t>(rows * w_stride), 0x7fc0);
    host_x.assign(static_cast<size_t>(kTokensMax * x_stride), 0x7fc0);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < columns; k++) host_w[static_cast<size_t>(r * w_stride + from + k)] = bf16();
    for (int64_t t = 0; t < kTokensMax; t++)
      for (int64_t k = 0; k < columns; k++) host_x[static_cast<size_t>(t * x_stride + from + k)] = bf16();
    for (int64_t r = 0; r < rows; r++) host_bias.push_back(random.uniform());
    const auto on_card = [](const auto& values) {
      Memory memory(Place::Card, values.size() * sizeof values[0], "a test");
      copy_now(memory.as<void>(), values.data(), memory.size());
      return memory;
    };
    w = on_card(host_w);
    x = on_card(host_x);
    bias = on_card(host_bias);
    out = on_card(std::vector<float>(static_cast<size_t>(kTokensMax * out_stride), -7.0f));
  }
  BlasShape shape() const { return {rows, columns, w_stride, x_stride, out_stride, biased ? bias.as<float>() : nullptr}; }
  BlasOperands operands() const { return {w.as<uint8_t>() + 2 * from, x.as<uint8_t>() + 2 * from, out.as<float>()}; }

  // Rows of the step are right, those that pad it to `written` hold anything, and all else is as it was.
  std::string check(int tokens, int written) const {
    for (int64_t t = 0; t < kTokensMax; t++)
      for (int64_t r = 0; r < out_stride; r++) {
        const float found = out.as<float>()[t * out_stride + r];
        if (t >= written || r >= rows) {
          if (found != -7.0f) return "row " + std::to_string(t) + ", value " + std::to_string(r) + " was written";
          continue;
        }
        if (t >= tokens) continue;
        double sum = biased ? static_cast<double>(host_bias[static_cast<size_t>(r)]) : 0, magnitude = 1;
        for (int64_t k = from; k < from + columns; k++) {
          const double term = static_cast<double>(bfloat_to_float(host_w[static_cast<size_t>(r * w_stride + k)])) * static_cast<double>(bfloat_to_float(host_x[static_cast<size_t>(t * x_stride + k)]));
          sum += term;
          magnitude += std::fabs(term);
        }
        if (!(std::fabs(static_cast<double>(found) - sum) <= 0x1p-18 * magnitude)) return "a sum is " + std::to_string(found) + ", in double precision " + std::to_string(sum);
      }
    return "";
  }
};

std::string check_sums() {
  // Steps of 65 tokens run as 128, of 129 as 192, of 193 as the 200 of the largest step.
  const struct {
    int tokens, written;
  } steps[] = {{65, 128}, {128, 128}, {129, 192}, {193, 200}, {200, 200}};
  uint64_t seed = 0;
  for (const auto& [rows, columns, from] : {std::array<int64_t, 3>{16, 32, 0}, {50, 96, 64}, {130, 288, 32}}) {
    const bool biased = seed % 2 == 0;
    for (const auto& step : steps) {
      BlasProducts blas({stand_in}, kTokensAbove, kTokensMax);
      const Scene scene(rows, columns, from, biased, ++seed);
      const int plan = blas.plan(scene.shape());
      blas.allocate_workspace();
      if ((blas.workspace_bytes() > 0) != (columns >= 96)) return "the workspace has " + std::to_string(blas.workspace_bytes()) + " bytes";
      if (blas.serves(kTokensAbove) || !blas.serves(step.tokens)) return "it serves other numbers of tokens";
      OwnStream s;
      if (const Problem problem = blas.run(plan, scene.shape(), scene.operands(), step.tokens, s.stream)) return problem;
      if (const Problem problem = synchronise(s.stream)) return problem;
      if (const std::string what = scene.check(step.tokens, step.written); !what.empty())
        return what + "; " + std::to_string(rows) + " x " + std::to_string(columns) + ", " + std::to_string(step.tokens) + " tokens";
    }
  }
  return "";
}

std::string check_plans() {
  BlasProducts blas({stand_in}, kTokensAbove, kTokensMax);
  const Scene one(48, 64, 0, false, 1), same(48, 64, 0, false, 2), biased(48, 64, 0, true, 3), longer(48, 96, 0, false, 4);
  if (blas.plan(one.shape()) != 0 || blas.plan(same.shape()) != 0 || blas.plan(biased.shape()) != 1 || blas.plan(longer.shape()) != 2) return "shapes that are alike do not share a plan";
  if (blas.name() != "cuBLASLt 13.1.0") return "it is " + blas.name();
  blas.allocate_workspace();
  OwnStream s;
  if (const Problem problem = blas.warm(0, one.shape(), one.operands(), s.stream)) return problem;
  if (const Problem problem = synchronise(s.stream)) return problem;
  if (const std::string what = one.check(kTokensMax, kTokensMax); !what.empty()) return "after warming: " + what;
  // A plan of another matrix with the same shape takes that matrix's bias.
  const Scene other_bias(48, 64, 0, true, 5);
  if (const Problem problem = blas.run(blas.plan(other_bias.shape()), other_bias.shape(), other_bias.operands(), kTokensMax, s.stream)) return problem;
  if (const Problem problem = synchronise(s.stream)) return problem;
  return other_bias.check(kTokensMax, kTokensMax);
}

std::string check_refusals() {
  BlasProducts blas({stand_in}, kTokensAbove, kTokensMax);
  const Scene scene(48, 96, 0, false, 1);
  const int plan = blas.plan(scene.shape());
  OwnStream s;
  const auto run = [&](const BlasOperands& operands, int tokens) {
    const Problem problem = blas.run(plan, scene.shape(), operands, tokens, s.stream);
    return std::string(problem ? problem : "");
  };
  const std::string invalid = "cublasLtMatmul of " + stand_in.substr(stand_in.rfind('/') + 1) + " answers 7 (an unsupported value or parameter was passed to the function)";
  if (run(scene.operands(), kTokensMax) != invalid) return "a workspace that is not there is taken";
  blas.allocate_workspace();
  if (const std::string what = run(scene.operands(), kTokensMax); !what.empty()) return what;
  for (const int tokens : {kTokensAbove, kTokensMax + 1})
    if (run(scene.operands(), tokens) != "blas: no algorithm was chosen for so many tokens") return std::to_string(tokens) + " tokens are taken";
  BlasOperands apart = scene.operands();
  apart.x += 8;
  if (run(apart, kTokensMax) != "blas: w, x and out must be 16-byte aligned") return "x that is not aligned is taken";
  const Problem problem = synchronise(s.stream);
  return problem ? problem : "";
}

std::string check_answers() {
  const std::string name = stand_in.substr(stand_in.rfind('/') + 1), other_name = other.substr(other.rfind('/') + 1);
  const auto open = [](const std::string& library) { return [library] { BlasProducts({library}, kTokensAbove, kTokensMax); }; };
  const std::string absent = error_of([] { BlasProducts({"libcublasLt.so.none", "/nowhere/libcublasLt.so.none"}, kTokensAbove, kTokensMax); });
  if (absent.rfind("cuBLASLt is not here (libcublasLt.so.none: cannot open shared object file", 0) != 0 || absent.find("; /nowhere/libcublasLt.so.none: ") == std::string::npos) return absent;
  if (const std::string what = expect_error(other_name + " has no cublasLtGetStatusString", open(other)); !what.empty()) return what;
  {
    const Answer answer("Create 1");
    if (const std::string what = expect_error("cublasLtCreate of " + name + " answers 1 (another status)", open(stand_in)); !what.empty()) return what;
  }
  BlasProducts blas({stand_in}, kTokensAbove, kTokensMax);
  const Scene scene(48, 96, 0, false, 1);
  {
    const Answer answer("MatmulAlgoGetHeuristic 15");
    const std::string want =
        name + " has no algorithm for 48 x 96 weights and 128 tokens: cublasLtMatmulAlgoGetHeuristic of " + name + " answers 15 (the functionality requested is not supported)";
    if (const std::string what = expect_error(want, [&] { blas.plan(scene.shape()); }); !what.empty()) return what;
  }
  const int plan = blas.plan(scene.shape());
  blas.allocate_workspace();
  OwnStream s;
  const Answer answer("Matmul 13");
  const Problem problem = blas.run(plan, scene.shape(), scene.operands(), 100, s.stream);
  const std::string want = "cublasLtMatmul of " + name + " answers 13 (the function failed to launch on the GPU)";
  return problem && problem == want ? "" : std::string("found '") + (problem ? problem : "") + "'";
}

}  // namespace

int main(int argc, char** argv) {
  if (!simt::can_run()) return 0;
  if (argc != 3) return 2;
  stand_in = argv[1];
  other = argv[2];
  simt::test_case("cuda blas - has the sums of double precision for any shape and number of tokens, parts of rows, with and without a bias", check_sums);
  simt::test_case("cuda blas - products of one shape share a plan, and each keeps its bias", check_plans);
  simt::test_case("cuda blas - refuses operands that are not aligned and numbers of tokens that were not planned; the library refuses what it was not asked for", check_refusals);
  simt::test_case("cuda blas - says in one line that the library is missing, lacks a function, or answers with an error", check_answers);
  return simt::end_of_tests();
}
