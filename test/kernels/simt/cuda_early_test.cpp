// Graphs of kernels with programmatic edges on the emulated machine (machine.h, "Programmatic dependent launch"): linear_fused, and the same source broken in one line each
// (CMakeLists.txt). What is broken gives the right bits where edges are plain, so that nothing but the check of an early start can find it.
//
//   cuda_early_test    runs all; prints "ok NAME" or "FAIL NAME: what", a line each
#include "../../../kernels/cuda/operations.h"
#include "../../../kernels/cuda/runtime.h"
#include "../../../kernels/cuda/weight_layout.h"
#include "../test_matrix.h"
#include "kernel_cases.h"

using namespace shardmesh;
using cuda::Edges;
using cuda::FusedProducts;
using cuda::Memory;
using cuda::Place;
using cuda::Problem;
using cuda::Stream;

namespace shardmesh::cuda {
using Fused = Problem(const FusedProducts&, Stream);
Fused linear_fused_without_wait, linear_fused_waiting_late, linear_fused_resetting_early, linear_fused_waiting_with_one_lane;
}  // namespace shardmesh::cuda

namespace {

constexpr int kTokens = 3, kColumns = 128, kRows = 64;

// x is quantised, multiplied into the residual by `fused`, whose last block norms it.
class Chain {
 public:
  Chain() {
    Random random(5);
    const Source source(TensorType::Q4_K, kRows, kColumns, 0, Values::Random, random);
    weight_ = Memory(Place::Card, cuda::packed_bytes(source.view), "weight");
    std::vector<uint8_t> bytes(weight_.size());
    PackedMatrix packed{TensorType::Q4_K, kRows, kColumns, bytes.size(), bytes.data(), 0, 0};
    cuda::pack(source.view, &packed, {0, 1});
    phase_ = packed.layout;
    cuda::copy_now(weight_.as<void>(), bytes.data(), bytes.size());
    fill(x_, make_activations(kTokens * kColumns, Values::Random, random));
    fill(norm_, make_activations(kRows, Values::Random, random));
    start_ = make_activations(kTokens * kRows, Values::Random, random);
    cuda::open_stream(&stream_);
  }
  ~Chain() { cuda::close_stream(stream_); }

  // What the residual becomes, or the fault.
  std::string run(cuda::Fused* fused, Edges edges, std::vector<float>* residual) {
    const uint32_t none = 0;
    cuda::copy_now(arrivals_.as<void>(), &none, 4);
    fill(residual_, start_);
    const int ends[] = {2, 4};
    const Subtree whole{0, 2};
    FusedProducts f{};
    f.count = 1;
    f.product[0] = {TensorType::Q4_K, kRows, kColumns, phase_, weight_.as<uint8_t>(), groups_.as<cuda::ActivationGroup>(), kTokens, 2, ends, 1, &whole, nullptr, residual_.as<float>(), kRows, 0};
    f.then = cuda::Then::ResidualNorm;
    f.norm = {norm_.as<float>(), 1e-5f, normed_.as<cuda::ActivationGroup>(), 0, {}};
    f.arrivals = arrivals_.as<uint32_t>();
    cuda::Graph graph = nullptr;
    cuda::open_graph(&graph, edges);
    Problem problem = cuda::quantize(x_.as<float>(), kColumns, kTokens, kColumns, groups_.as<cuda::ActivationGroup>(), cuda::stream_of(graph));
    if (!problem) problem = fused(f, cuda::stream_of(graph));
    cuda::finish_graph(graph);
    if (!problem) problem = cuda::launch_graph(graph, stream_);
    if (!problem) problem = cuda::synchronise(stream_);
    const int count = cuda::programmatic_edge_count(graph);
    cuda::close_graph(graph);
    if (problem) return problem;
    if (count != (edges == Edges::Programmatic)) return "the graph has other edges";
    residual->assign(residual_.as<float>(), residual_.as<float>() + kTokens * kRows);
    return "";
  }

 private:
  static void fill(const Memory& memory, const std::vector<float>& values) { cuda::copy_now(memory.as<void>(), values.data(), values.size() * 4); }
  Memory weight_, x_{Place::Card, kTokens * kColumns * 4, "x"}, groups_{Place::Card, cuda::activation_bytes(kTokens, kColumns), "activations"}, residual_{Place::Card, kTokens * kRows * 4, "residual"},
      norm_{Place::Card, kRows * 4, "weight of the norm"}, normed_{Place::Card, cuda::activation_bytes(kTokens, kRows), "normed"}, arrivals_{Place::Card, 4, "arrivals"};
  std::vector<float> start_;
  int phase_ = 0;
  Stream stream_ = nullptr;
};

// Plain edges: the right bits. Programmatic ones: `expected` in the fault, in every order of threads and blocks that streams go through; "": the right bits too.
std::string check(cuda::Fused* fused, const std::string& expected) {
  Chain chain;
  std::vector<float> want, found;
  if (const std::string fault = chain.run(cuda::linear_fused, Edges::Plain, &want); !fault.empty()) return fault;
  for (int turn = 0; turn < 6; turn++) {
    if (const std::string fault = chain.run(fused, Edges::Plain, &found); !fault.empty()) return "with plain edges: " + fault;
    if (want != found) return "with plain edges: other bits";
    const std::string fault = chain.run(fused, Edges::Programmatic, &found);
    if (expected.empty() ? !fault.empty() : fault.find(expected) == std::string::npos) return fault.empty() ? "not found" : "the fault is: " + fault;
    if (expected.empty() && want != found) return "other bits";
  }
  return "";
}

}  // namespace

int main() {
  flush_denormals();
  simt::test_case("cuda early - a chain with programmatic edges has the bits of one with plain edges", [] { return check(cuda::linear_fused, ""); });
  simt::test_case("cuda early - finds a product that never waits", [] { return check(cuda::linear_fused_without_wait, "touches "); });
  simt::test_case("cuda early - finds a product that waits when it has read its activations", [] { return check(cuda::linear_fused_waiting_late, "touches "); });
  simt::test_case("cuda early - finds a counter that is set before the wait", [] { return check(cuda::linear_fused_resetting_early, "touches arrivals (byte 0) before it has waited"); });
  simt::test_case("cuda early - finds a product in which one lane waits for its warp", [] { return check(cuda::linear_fused_waiting_with_one_lane, "touches "); });
  return simt::end_of_tests();
}
