// Products of BF16 weights by cuBLASLt, for programs whose bits are free: sums in fp32, in whatever order its algorithm has, so that bits hang on the number of tokens,
// the card and the version of the library.
//   out[t, r] = sum over k of w[r, k] * x[t, k] (+ bias[r])        w [rows, w_stride] bf16        x [T, x_stride] bf16        out [T, out_stride] fp32, bias fp32
// All pointers and strides in bytes are multiples of 16.
//
// Everything is planned when an executor is made: for each shape an algorithm for every number of tokens that is asked for, which are the multiples of kBlasTokens and the
// most tokens of a step. A step takes the next larger number and computes rows that nobody reads, so that it only runs what the library has agreed to; x and out have room
// for them. A call queues work and allocates nothing.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cublas_lt.h"
#include "runtime.h"

namespace shardmesh::cuda {

constexpr int kBlasTokens = 64;

struct BlasShape {
  int64_t rows, columns, w_stride, x_stride, out_stride;
  const float* bias;  // null: none
};
struct BlasOperands {
  const uint8_t* w;
  const uint8_t* x;
  float* out;
};

class BlasProducts {
 public:
  // Opens the first of `libraries` that is here, for steps of more than `tokens_above` and at most `tokens_max` tokens. Throws std::runtime_error, one line, when there is
  // none, or when it lacks a function or answers with an error.
  BlasProducts(const std::vector<std::string>& libraries, int tokens_above, int tokens_max);
  ~BlasProducts();
  BlasProducts(const BlasProducts&) = delete;
  BlasProducts& operator=(const BlasProducts&) = delete;

  // "cuBLASLt 13.1.0".
  std::string name() const;
  // The number of a plan for products of this shape; shapes that differ in their bias only share one. Throws when the library has no algorithm for it.
  int plan(const BlasShape& shape);
  // The workspace that the algorithms planned so far need, in card memory.
  void allocate_workspace();
  size_t workspace_bytes() const { return workspace_.size(); }

  bool serves(int tokens) const { return tokens > tokens_above_; }
  // The answer stays valid until the next call.
  Problem run(int plan, const BlasShape& shape, const BlasOperands& operands, int tokens, Stream stream);
  // Runs every algorithm of a plan once, so that its kernels are loaded before a kernel of ours waits for another card.
  Problem warm(int plan, const BlasShape& shape, const BlasOperands& operands, Stream stream);

 private:
  struct Sized {
    int tokens;
    lt::Layout x, out;
    lt::Algorithm algorithm;
  };
  struct Plan {
    lt::Product product;
    lt::Layout w;
    std::vector<Sized> sizes;  // ascending
  };
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

  void open(const std::vector<std::string>& libraries);
  void expect(lt::Status status, const char* function) const;
  std::string answer(lt::Status status, const char* function) const;
  lt::Layout layout(int type, int64_t rows, int64_t columns, int64_t stride);
  void choose(const BlasShape& shape, Plan* plan, int tokens);
  Problem run_sized(const Plan& plan, const Sized& sized, const BlasShape& shape, const BlasOperands& operands, Stream stream);
  void close();

  int tokens_above_, tokens_max_;
  std::string library_;  // as it was opened
  void* opened_ = nullptr;
  lt::Functions lt_{};
  lt::Handle handle_ = nullptr;
  lt::Preference preference_ = nullptr;
  std::vector<Plan> plans_;
  std::map<Key, int> by_shape_;
  size_t workspace_needed_ = 0;
  Memory workspace_;
  std::string problem_;
};

}  // namespace shardmesh::cuda
