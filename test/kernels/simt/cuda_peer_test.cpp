// The reductions of kernels/cuda/peer_reduce.cu on several emulated cards at once, against the reference, bit for bit.
//
//   cuda_peer_test    runs all; prints "ok NAME" or "FAIL NAME: what", a line each
//
// Cards take turns by a seed, short ones and long ones. What one writes is seen by the others at once, or as late as the memory model allows (system_memory.h); both in every
// case. Cases that begin with "finds" run the kernels with one line of them broken (CMakeLists.txt), and ask that some run goes wrong.
#include "cuda_source.h"

#include "../../../kernels/cuda/peer_reduce.h"
#include "../../../kernels/include/program.h"
#include "../test_matrix.h"
#include "kernel_cases.h"

using namespace shardmesh;
using simt::Guarded;
using simt::Visibility;

namespace shardmesh::cuda {
using PeerReduce = Problem(const PeerGroup&, uint32_t, const PeerReduction&, bool, Stream);
using PeerReduceNorm = Problem(const PeerGroup&, uint32_t, const PeerReduction&, bool, const NormAfter&, uint32_t*, Stream);
PeerReduce peer_reduce_meeting_early, peer_reduce_without_release, peer_reduce_without_acquire, peer_reduce_with_one_block, peer_reduce_of_any_epoch;
PeerReduceNorm peer_reduce_norm_without_release, peer_reduce_norm_without_acquire, peer_reduce_norm_with_one_block, peer_reduce_norm_of_any_epoch, peer_reduce_norm_a_block_too_early, peer_reduce_norm_meeting_early;
}  // namespace shardmesh::cuda

namespace {

using cuda::PeerFault;

const KernelSet& reference() { return *reference_kernel_set(); }

// What a partial product leaves: `count` values in the own block, from several blocks of threads.
void write_sums(const float* sums, float* block, int64_t count) {
  cuda::grid_dependency_wait();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x; i < count; i += static_cast<int64_t>(gridDim.x) * 32) block[i] = sums[i];
}

// Units [cut[r], cut[r + 1]) are rank r's.
struct Shape {
  std::vector<int> cut;
  int64_t width;
  int tokens;
  bool bias = false;
  int ranks() const { return static_cast<int>(cut.size()) - 1; }
};

// The kernels of a test: peer_reduce.cu, or its source with one line broken. With `norm` reductions end with the norm of the residual.
struct Kernels {
  cuda::PeerReduce* reduce = cuda::peer_reduce;
  cuda::PeerReduceNorm* norm = nullptr;
  bool operator==(const Kernels&) const = default;
};
constexpr Kernels kPlain{}, kNormed{cuda::peer_reduce, cuda::peer_reduce_norm};
constexpr float kEpsilon = 1e-5f;

struct Mesh;

struct Rank {
  Rank(const Mesh& mesh, int rank);
  simt::CardWork queue;
  std::unique_ptr<simt::SystemMemory> region;
  std::unique_ptr<Guarded<float>> residual, bias, weight;
  std::unique_ptr<Guarded<uint8_t>> normed;  // quantised
  Guarded<uint32_t> arrivals{"arrivals", std::vector<uint32_t>(1, 0)};
  Guarded<cuda::PeerStep> step{"step", 1};
  Guarded<cuda::PeerReport> report{"report", 1};
  cuda::PeerGroup group{};
  cuda::Stream stream() { return static_cast<simt::WorkQueue*>(&queue); }
  cuda::PeerHeader& header() const { return *reinterpret_cast<cuda::PeerHeader*>(region->own()); }
  PeerFault fault() const { return static_cast<PeerFault>(report.data()->fault & 0xff); }
  int fault_rank() const { return static_cast<int>(report.data()->fault >> 8 & 0xff); }
  cuda::NormAfter norm() const { return {weight->data(), kEpsilon, reinterpret_cast<cuda::ActivationGroup*>(normed->data()), 0, {}}; }
  uint32_t fault_exchange() const { return static_cast<uint32_t>(report.data()->fault >> 16); }
};

struct Mesh {
  Shape shape;
  Kernels kernels;
  bool one_block = false;
  uint64_t block_bytes = 0;
  int64_t residual_stride;
  std::vector<std::vector<Subtree>> subtrees;
  std::vector<std::unique_ptr<Rank>> ranks;
  std::vector<std::vector<std::unique_ptr<Guarded<float>>>> sums;  // by reduction, by rank
  std::vector<float> residual, bias, weight;
  Random random{1};

  Mesh(Shape s, Visibility visibility, uint64_t seed, const Kernels& of = kPlain) : shape(std::move(s)), kernels(of), residual_stride(shape.width + 4), random(seed) {
    for (int r = 0; r < shape.ranks(); r++) {
      subtrees.push_back(maximal_subtrees(shape.cut.back(), shape.cut[static_cast<size_t>(r)], shape.cut[static_cast<size_t>(r) + 1]));
      block_bytes = std::max(block_bytes, subtrees.back().size() * values() * 4);
    }
    block_bytes = (block_bytes + 255) / 256 * 256;
    residual = make_activations(static_cast<size_t>(residual_stride * shape.tokens), Values::Random, random);
    if (shape.bias) bias = make_activations(static_cast<size_t>(shape.width), Values::Random, random);
    if (kernels.norm) weight = make_activations(static_cast<size_t>(shape.width), Values::Random, random);
    for (int r = 0; r < shape.ranks(); r++) ranks.push_back(std::make_unique<Rank>(*this, r));
    for (int r = 0; r < shape.ranks(); r++) {
      ranks[static_cast<size_t>(r)]->region = std::make_unique<simt::SystemMemory>("region", cuda::peer_region_bytes(block_bytes), shape.ranks() - 1, visibility);
      begin(r, 1);
    }
    for (int r = 0; r < shape.ranks(); r++)
      for (int p = 0; p < shape.ranks(); p++) {
        cuda::PeerGroup& group = ranks[static_cast<size_t>(r)]->group;
        simt::SystemMemory& region = *ranks[static_cast<size_t>(p)]->region;
        group.regions[p] = p == r ? region.own() : region.view(r < p ? r : r - 1);
        group.block_bytes[p] = block_bytes;
      }
  }

  size_t values() const { return static_cast<size_t>(shape.tokens) * static_cast<size_t>(shape.width); }
  Rank& rank(int r) { return *ranks[static_cast<size_t>(r)]; }

  // An epoch as the host begins it.
  void begin(int r, uint64_t epoch, uint64_t timeout_ns = 1'000'000'000) {
    rank(r).header().failed = 0;
    rank(r).header().stamp = cuda::stamp_of(epoch, 0);
    rank(r).region->publish_all();
    *rank(r).step.data() = {cuda::stamp_of(epoch, 0), timeout_ns};
    *rank(r).report.data() = {};
  }

  // Queues reduction number sums.size(), as `exchange` of its step, on every rank but `absent`.
  const char* queue_reduction(uint32_t exchange, bool two_goes, int absent = -1) {
    sums.emplace_back();
    std::vector<int> lo, hi, owner;
    for (int r = 0; r < shape.ranks(); r++) {
      for (const Subtree& s : subtrees[static_cast<size_t>(r)]) {
        lo.push_back(s.first);
        hi.push_back(s.first + s.count);
        owner.push_back(r);
      }
      const std::vector<float> own = make_activations(subtrees[static_cast<size_t>(r)].size() * values(), Values::Random, random);
      sums.back().push_back(std::make_unique<Guarded<float>>("sums", own));
    }
    for (int r = 0; r < shape.ranks(); r++) {
      if (r == absent) continue;
      Rank& self = rank(r);
      float* block = reinterpret_cast<float*>(self.region->own() + cuda::kPeerHeaderBytes + (one_block ? 0 : exchange & 1) * block_bytes);
      const Guarded<float>& own = *sums.back()[static_cast<size_t>(r)];
      if (const char* problem = cuda::launch(write_sums, 3, 32, 0, self.stream(), own.data(), block, static_cast<int64_t>(own.size()))) return problem;
      const cuda::PeerReduction reduction{shape.cut.back(), static_cast<int>(lo.size()), lo.data(), hi.data(), owner.data(), self.bias ? self.bias->data() : nullptr,
                                          self.residual->data(), residual_stride, shape.width, shape.tokens};
      const char* problem = kernels.norm ? kernels.norm(self.group, exchange, reduction, two_goes, self.norm(), self.arrivals.data(), self.stream())
                                         : kernels.reduce(self.group, exchange, reduction, two_goes, self.stream());
      if (problem) return problem;
    }
    return nullptr;
  }

  // What the residual becomes by the reductions queued so far.
  std::vector<float> expected() const {
    std::vector<float> y = residual;
    for (const auto& of_ranks : sums) {
      std::vector<int> lo, hi;
      std::vector<const float*> nodes;
      std::vector<int64_t> strides;
      for (size_t r = 0; r < of_ranks.size(); r++)
        for (size_t s = 0; s < subtrees[r].size(); s++) {
          lo.push_back(subtrees[r][s].first);
          hi.push_back(subtrees[r][s].first + subtrees[r][s].count);
          nodes.push_back(of_ranks[r]->data() + s * values());
          strides.push_back(shape.width);
        }
      reference().finish_tree(shape.cut.back(), static_cast<int>(lo.size()), lo.data(), hi.data(), nodes.data(), strides.data(), shape.bias ? bias.data() : nullptr, y.data(),
                              residual_stride, shape.width, shape.tokens, {0, 1});
    }
    return y;
  }

  std::string run(uint64_t seed) {
    simt::set_schedule(simt::kSchedules[seed % simt::kScheduleCount]);
    std::vector<simt::CardWork*> cards;
    for (const auto& r : ranks) cards.push_back(&r->queue);
    return simt::run_together(cards, seed);
  }

  std::string compare() {
    const std::vector<float> want = expected();
    std::vector<uint8_t> want_normed;
    if (kernels.norm) {
      const Guarded<float> x("x", want), w("weight", weight);
      const Guarded<uint8_t> groups("groups", rank(0).normed->size());
      simt::set_schedule({});
      if (const char* problem = cuda::rms_norm(x.data(), residual_stride, w.data(), kEpsilon, shape.width, shape.tokens, nullptr, 0, reinterpret_cast<cuda::ActivationGroup*>(groups.data()), nullptr))
        return problem;
      want_normed = groups.values();
    }
    for (int r = 0; r < shape.ranks(); r++) {
      if (rank(r).fault() != PeerFault::None) return "rank " + std::to_string(r) + " has a fault, waiting for rank " + std::to_string(rank(r).fault_rank()) + "; ";
      if (!rank(r).region->intact()) return "bytes beside a region have changed; ";
      if (const std::string what = simt::difference(want, *rank(r).residual); !what.empty()) return "rank " + std::to_string(r) + ": " + what;
      if (!kernels.norm) continue;
      if (const std::string what = simt::difference(want_normed, *rank(r).normed); !what.empty()) return "the norm of rank " + std::to_string(r) + ": " + what;
      if (*rank(r).arrivals.data() != 0) return "arrivals are left; ";
    }
    return "";
  }
};

Rank::Rank(const Mesh& mesh, int rank) {
  residual = std::make_unique<Guarded<float>>("residual", mesh.residual);
  if (mesh.shape.bias) bias = std::make_unique<Guarded<float>>("bias", mesh.bias);
  if (mesh.kernels.norm) {
    weight = std::make_unique<Guarded<float>>("weight", mesh.weight);
    normed = std::make_unique<Guarded<uint8_t>>("normed", cuda::activation_bytes(mesh.shape.tokens, mesh.shape.width));
  }
  group.rank = rank;
  group.ranks = mesh.shape.ranks();
  group.step = step.data();
  group.report = report.data();
}

// Several steps of several reductions, all queued at once; "" or what is wrong.
std::string steps(Mesh& mesh, uint64_t seed, bool two_goes, int step_count = 2, int reductions = 2) {
  const uint32_t each = two_goes ? 2 : 1, exchanges = (static_cast<uint32_t>(reductions) * each + 1) / 2 * 2;
  for (int s = 0; s < step_count; s++) {
    for (const auto& rank : mesh.ranks) {
      Rank* self = rank.get();
      const uint64_t stamp = cuda::stamp_of(1, static_cast<uint64_t>(s) * exchanges);
      self->queue.work.push_back([self, stamp] {
        self->step.data()->stamp = stamp;
        return std::string();
      });
    }
    for (int i = 0; i < reductions; i++)
      if (const char* problem = mesh.queue_reduction(1 + static_cast<uint32_t>(i) * each, two_goes)) return problem;
    if (static_cast<uint32_t>(reductions) * each != exchanges)
      for (const auto& rank : mesh.ranks)
        if (const char* problem = cuda::peer_meet(rank->group, exchanges, rank->stream())) return problem;
  }
  if (const std::string problem = mesh.run(seed); !problem.empty()) return problem + "; ";
  return mesh.compare();
}

constexpr Visibility kVisibilities[] = {Visibility::Early, Visibility::Late};
const char* name_of(Visibility v) { return v == Visibility::Early ? "early" : "late"; }

std::string check_shapes(const std::vector<Shape>& shapes, bool two_goes, uint64_t seeds, const Kernels& kernels = kPlain) {
  for (const Shape& shape : shapes)
    for (const Visibility visibility : kVisibilities)
      for (uint64_t seed = 1; seed <= seeds; seed++) {
        simt::check_early_starts(seed == 1);
        Mesh mesh(shape, visibility, seed, kernels);
        const std::string what = steps(mesh, seed, two_goes, 2, seed % 2 ? 3 : 2);
        if (!what.empty())
          return what + std::to_string(shape.ranks()) + " ranks, " + std::to_string(shape.tokens) + " x " + std::to_string(shape.width) + ", seen " + name_of(visibility) + ", seed " +
                 std::to_string(seed);
      }
  simt::check_early_starts(false);
  return "";
}

// A broken kernel gives wrong bits in some run, and a right one in none of the same.
std::string finds(const Kernels& broken, bool one_block, bool two_goes, int reductions = 4) {
  int wrong = 0, runs = 0;
  for (const Visibility visibility : kVisibilities)
    for (uint64_t seed = 1; seed <= 10; seed++)
      for (const bool right : {true, false}) {
        Mesh mesh({{0, 5, 8}, 1056, 2}, visibility, seed, !right ? broken : broken.norm ? kNormed : kPlain);
        mesh.one_block = one_block && !right;
        const std::string what = steps(mesh, seed, two_goes, 1, reductions);
        if (!right) wrong += !what.empty(), runs++;
        else if (!what.empty()) return "the right kernel: " + what;
      }
  return wrong > 0 ? "" : "not found in " + std::to_string(runs) + " runs";
}

// Rank 1 still has the counters of an earlier epoch, far ahead, when rank 0 begins; its host gets to the new one late.
std::string stale_epoch(const Kernels& kernels, uint64_t seed, Visibility visibility) {
  Mesh mesh({{0, 4, 8}, 64, 2}, visibility, seed, kernels);
  mesh.begin(0, 8);
  mesh.rank(1).header().stamp = cuda::stamp_of(7, 1'000'000);
  mesh.rank(1).region->publish_all();
  for (int i = 0; i < 200; i++) mesh.rank(1).queue.work.push_back([] { return std::string(); });
  mesh.rank(1).queue.work.push_back([&] {
    mesh.begin(1, 8);
    return std::string();
  });
  for (uint32_t exchange = 1; exchange <= 2; exchange++)
    if (const char* problem = mesh.queue_reduction(exchange, false)) return problem;
  if (const std::string problem = mesh.run(seed); !problem.empty()) return problem;
  return mesh.compare();
}

std::string check_deadline(bool two_goes, const Kernels& kernels) {
  for (uint64_t seed = 1; seed <= 5; seed++) {
    Mesh mesh({{0, 3, 5, 6}, 64, 3}, kVisibilities[seed % 2], seed, kernels);
    for (int r = 0; r < 3; r++) mesh.begin(r, 1, 50'000);
    for (uint32_t i = 0; i < 4; i++)
      if (const char* problem = mesh.queue_reduction(1 + i * (two_goes ? 2 : 1), two_goes, 2)) return problem;
    const uint64_t began = simt::timer_now();
    if (const std::string problem = mesh.run(seed); !problem.empty()) return problem;
    // Three lanes look at the clock, each of several blocks; eight failed exchanges in a row would take eight times as long.
    if (const uint64_t spent = simt::timer_now() - began; spent > 2'000'000) return "the clock went on by " + std::to_string(spent / 1000) + " us";
    for (int r = 0; r < 2; r++) {
      const Rank& rank = mesh.rank(r);
      if (rank.fault() != PeerFault::Deadline || rank.fault_rank() != 2 || rank.fault_exchange() != 1) return "rank " + std::to_string(r) + " says something else";
      if (const std::string what = simt::difference(mesh.residual, *rank.residual); !what.empty()) return "the residual has changed: " + what;
      if (!kernels.norm) continue;
      if (const std::string what = simt::difference(simt::poisoned<uint8_t>(rank.normed->size()), *rank.normed); !what.empty()) return "there is a norm: " + what;
      if (*rank.arrivals.data() != 0) return "arrivals are left";
    }
    // The same memory serves the next epoch.
    mesh.sums.clear();
    for (int r = 0; r < 3; r++) mesh.begin(r, 2);
    for (uint32_t i = 0; i < 2; i++)
      if (const char* problem = mesh.queue_reduction(1 + i * (two_goes ? 2 : 1), two_goes)) return problem;
    if (const std::string problem = mesh.run(seed); !problem.empty()) return problem;
    if (const std::string what = mesh.compare(); !what.empty()) return "the next epoch: " + what;
  }
  return "";
}

std::string check_abort() {
  for (uint64_t seed = 1; seed <= 5; seed++) {
    Mesh mesh({{0, 4, 8}, 64, 1}, kVisibilities[seed % 2], seed);
    for (uint32_t exchange = 1; exchange <= 2; exchange++)
      if (const char* problem = mesh.queue_reduction(exchange, false, 1)) return problem;
    for (int i = 0; i < 100; i++) mesh.rank(1).queue.work.push_back([] { return std::string(); });
    mesh.rank(1).queue.work.push_back([&] {
      mesh.rank(0).report.data()->abort = 1;
      return std::string();
    });
    if (const std::string problem = mesh.run(seed); !problem.empty()) return problem;
    if (mesh.rank(0).fault() != PeerFault::Aborted || mesh.rank(0).fault_rank() != 1) return "rank 0 says something else";
  }
  return "";
}

std::string check_refusals() {
  Mesh mesh({{0, 4, 8}, 64, 1}, Visibility::Early, 1);
  const int lo[] = {0, 4}, hi[] = {4, 8}, owner[] = {0, 1}, gap[] = {0, 5}, stranger[] = {0, 2};
  Rank& rank = mesh.rank(0);
  const cuda::PeerReduction right{8, 2, lo, hi, owner, nullptr, rank.residual->data(), mesh.residual_stride, 64, 1};
  const auto refused = [&](const auto& change, const char* why) {
    cuda::PeerReduction reduction = right;
    cuda::PeerGroup group = rank.group;
    change(reduction, group);
    const char* problem = cuda::peer_reduce(group, 1, reduction, false, rank.stream());
    return problem && std::string(problem).find(why) != std::string::npos && rank.queue.work.empty();
  };
  using R = cuda::PeerReduction;
  using G = cuda::PeerGroup;
  if (!refused([](R& r, G&) { r.width = 66; }, "multiples of 4")) return "width 66";
  if (!refused([](R& r, G&) { r.tokens = 2; }, "do not fit")) return "two tokens in the room of one";
  if (!refused([&](R& r, G&) { r.lo = gap; }, "maximal subtrees")) return "a gap in the tree";
  if (!refused([&](R& r, G&) { r.owner = stranger; }, "the group lacks")) return "a node of nobody";
  if (!refused([](R&, G& g) { g.ranks = 17; }, "2 to 16 ranks")) return "17 ranks";
  cuda::PeerReduction narrow = right;
  narrow.width = 60;
  uint32_t arrivals = 0;
  const char* problem = cuda::peer_reduce_norm(rank.group, 1, narrow, false, {}, &arrivals, rank.stream());
  if (!problem || std::string(problem) != "peer_reduce_norm: at most 8 tokens, the width a multiple of 32" || !rank.queue.work.empty()) return "a norm of 60 values";
  return "";
}

}  // namespace

int main() {
  using simt::test_case;
  const std::vector<Shape> shapes = {
      {{0, 4, 8}, 64, 1},       {{0, 8, 16}, 2084, 1, true}, {{0, 5, 9}, 128, 7},     {{0, 3, 6, 9}, 96, 2, true},
      {{0, 3, 5, 6}, 256, 3},   {{0, 8, 12, 16}, 32, 33},    {{0, 1, 2, 3, 4}, 60, 1}, {{0, 7, 14}, 512, 2},
  };
  test_case("cuda peers - two ranks and more, 3:2:1 too, have the reference's bits in one go", [&] { return check_shapes(shapes, false, 6); });
  test_case("cuda peers - they have them in two goes, with fewer rows than ranks too", [&] { return check_shapes(shapes, true, 6); });
  const std::vector<Shape> small = {{{0, 4, 8}, 64, 1}, {{0, 8, 16}, 2080, 1, true}, {{0, 5, 9}, 128, 7}, {{0, 3, 6, 9}, 96, 2, true}, {{0, 3, 5, 6}, 256, 8}, {{0, 1, 2, 3, 4}, 544, 3}};
  test_case("cuda peers - with the norm of the residual in the same launch they have its bits too, in one go", [&] { return check_shapes(small, false, 6, kNormed); });
  test_case("cuda peers - so they have in two goes, with fewer rows than ranks too", [&] { return check_shapes(small, true, 6, kNormed); });
  test_case("cuda peers - sixteen ranks of one unit each", [] {
    std::vector<int> cut;
    for (int i = 0; i <= 16; i++) cut.push_back(i);
    const std::string what = check_shapes({{cut, 32, 2}}, false, 2);
    return what.empty() ? check_shapes({{cut, 32, 2}}, true, 2) : what;
  });
  test_case("cuda peers - counters of an earlier epoch are not taken for this one's", [] {
    for (const Kernels& kernels : {kPlain, kNormed})
      for (const Visibility visibility : kVisibilities)
        for (uint64_t seed = 1; seed <= 10; seed++)
          if (const std::string what = stale_epoch(kernels, seed, visibility); !what.empty()) return what;
    return std::string();
  });
  test_case("cuda peers - a peer that never comes is named when the deadline is over, and the next epoch works", [] {
    for (const Kernels& kernels : {kPlain, kNormed})
      for (const bool two_goes : {false, true})
        if (const std::string what = check_deadline(two_goes, kernels); !what.empty()) return what;
    return std::string();
  });
  test_case("cuda peers - a host that gives up ends the wait", check_abort);
  test_case("cuda peers - refuse shapes by name before any launch", check_refusals);
  // The same lines broken, in the kernels alone and in the one with the norm.
  const auto of_any_epoch = [](const Kernels& kernels) {
    for (const Visibility visibility : kVisibilities)
      for (uint64_t seed = 1; seed <= 10; seed++)
        if (!stale_epoch(kernels, seed, visibility).empty()) return std::string();
    return std::string("not found");
  };
  const Kernels without_release{cuda::peer_reduce_without_release}, without_acquire{cuda::peer_reduce_without_acquire}, with_one_block{cuda::peer_reduce_with_one_block};
  const Kernels norm_without_release{nullptr, cuda::peer_reduce_norm_without_release}, norm_without_acquire{nullptr, cuda::peer_reduce_norm_without_acquire},
      norm_with_one_block{nullptr, cuda::peer_reduce_norm_with_one_block}, norm_too_early{nullptr, cuda::peer_reduce_norm_a_block_too_early};
  test_case("cuda peers - finds a stamp without release", [&] { return finds(without_release, false, false); });
  test_case("cuda peers - finds a second stamp without release", [&] { return finds(without_release, false, true); });
  test_case("cuda peers - finds a poll without acquire", [&] { return finds(without_acquire, false, false); });
  test_case("cuda peers - finds a single block", [&] { return finds(with_one_block, true, false); });
  test_case("cuda peers - finds stamps that are compared without their epoch", [&] { return of_any_epoch({cuda::peer_reduce_of_any_epoch}); });
  test_case("cuda peers - with the norm, finds a stamp without release", [&] { return finds(norm_without_release, false, false); });
  test_case("cuda peers - with the norm, finds a second stamp without release", [&] { return finds(norm_without_release, false, true); });
  test_case("cuda peers - with the norm, finds a poll without acquire", [&] { return finds(norm_without_acquire, false, false); });
  test_case("cuda peers - with the norm, finds a second poll without acquire", [&] { return finds(norm_without_acquire, false, true); });
  test_case("cuda peers - with the norm, finds a single block", [&] { return finds(norm_with_one_block, true, false); });
  test_case("cuda peers - with the norm, finds stamps that are compared without their epoch", [&] { return of_any_epoch({nullptr, cuda::peer_reduce_norm_of_any_epoch}); });
  test_case("cuda peers - with the norm, finds a norm that a block has not added to yet", [&] { return finds(norm_too_early, false, false, 3); });
  test_case("cuda peers - with the norm, finds shares that are published a block too early", [&] { return finds(norm_too_early, false, true, 3); });
  test_case("cuda peers - finds a stamp that is published before the wait for the product", [] {
    for (const Kernels& kernels : {Kernels{cuda::peer_reduce_meeting_early}, Kernels{nullptr, cuda::peer_reduce_norm_meeting_early}}) {
      simt::check_early_starts(true);
      Mesh mesh({{0, 4, 8}, 64, 2}, Visibility::Early, 1, kernels);
      const std::string what = steps(mesh, 1, false);
      simt::check_early_starts(false);
      if (what.find("before it has waited for the grid before") == std::string::npos) return what.empty() ? std::string("not found") : "the fault is: " + what;
    }
    return std::string();
  });
  return simt::end_of_tests();
}
