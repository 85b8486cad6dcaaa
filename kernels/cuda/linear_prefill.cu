// The quantised product for many tokens; formula, operands and result as in linear_decode.cu, and the same bits.
// A block is 64 rows x 64 tokens, four warps of 32 x 32. Groups pass through shared memory in stages of four, three stages deep, copied as they lie in memory:
// both operands are in fragment order, so a lane reads its registers without bank conflicts and ldmatrix has nothing to do.
// A warp walks the segments in order and keeps the finished left sides of the tree on a stack of at most four, in local memory: it is touched once a segment.
// Limits: K a multiple of 32, 1 to 16 segments.
#include "device.cuh"
#include "group_product.cuh"
#include "operations.h"
#include "product_plan.h"

namespace shardmesh::cuda {
namespace {

constexpr int kBlockStrips = 4, kBlockTiles = 8, kWarpStrips = 2, kWarpTiles = 4, kThreads = 128;
constexpr int kStageGroups = 4, kStages = 3, kStackDepth = 4;
constexpr int kValues = kWarpStrips * kWarpTiles * 4;  // accumulators of a lane

template <typename F>
constexpr int kStripStageBytes = kStageGroups * F::record_bytes;
template <typename X>
constexpr int kTileStageBytes = kStageGroups * static_cast<int>(sizeof(X));
template <typename F, typename X>
constexpr int kStageBytes = kBlockStrips * kStripStageBytes<F> + kBlockTiles * kTileStageBytes<X>;

// Pieces of 16 bytes of a stage in shared memory: those of its strips, then those of its tiles. Piece i is thread i % kThreads's.
template <typename F>
constexpr int kStripPieces = kStripStageBytes<F> / 16;
template <typename X>
constexpr int kTilePieces = kTileStageBytes<X> / 16;
template <typename F, typename X>
constexpr int kThreadPieces = (kBlockStrips * kStripPieces<F> + kBlockTiles * kTilePieces<X> + kThreads - 1) / kThreads;

template <typename F, typename X>
__global__ void __launch_bounds__(kThreads) linear_prefill_kernel(const ProductPlan plan) {
  grid_dependency_wait();
  uint8_t* shared = dynamic_shared();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int first_strip = static_cast<int>(blockIdx.x) * kBlockStrips, first_tile = static_cast<int>(blockIdx.y) * kBlockTiles;
  const int strips = min(kBlockStrips, plan.strips - first_strip), tiles = min(kBlockTiles, plan.tiles - first_tile);
  const uint8_t* heads = plan.weight + first_strip * plan.strip_bytes;
  const uint8_t* records = heads + plan.heads * F::head_bytes;
  const uint8_t* activations = reinterpret_cast<const uint8_t*>(reinterpret_cast<const X*>(plan.in) + static_cast<int64_t>(first_tile) * plan.groups);
  const int stage_count = (plan.groups + kStageGroups - 1) / kStageGroups;

  constexpr int strip_pieces = kStripPieces<F>, tile_pieces = kTilePieces<X>, of_strips = kBlockStrips * strip_pieces, all = of_strips + kBlockTiles * tile_pieces;
  const uint8_t* sources[kThreadPieces<F, X>];  // of the thread's pieces of stage 0; null: of no strip or tile
#pragma unroll
  for (int k = 0; k < kThreadPieces<F, X>; k++) {
    const int i = static_cast<int>(threadIdx.x) + k * kThreads, strip = i / strip_pieces, tile = (i - of_strips) / tile_pieces;
    if (i < of_strips) sources[k] = strip < strips ? records + strip * plan.strip_bytes + i % strip_pieces * 16 : nullptr;
    else sources[k] = i < all && tile < tiles ? activations + tile * plan.groups * static_cast<int64_t>(sizeof(X)) + (i - of_strips) % tile_pieces * 16 : nullptr;
  }
  const auto copy_stage = [&](int stage) {
    if (stage < stage_count) {
      uint8_t* to = shared + stage % kStages * kStageBytes<F, X> + threadIdx.x * 16;
      const int count = min(kStageGroups, plan.groups - stage * kStageGroups);
      const auto copy_pieces = [&](const auto& is_there) {
#pragma unroll
        for (int k = 0; k < kThreadPieces<F, X>; k++) {
          const int i = static_cast<int>(threadIdx.x) + k * kThreads;
          const bool of_strip = (k + 1) * kThreads <= of_strips || (k * kThreads < of_strips && i < of_strips);
          if (((k + 1) * kThreads <= all || i < all) && is_there(k, i, of_strip)) copy_async<16>(to + k * kThreads * 16, sources[k] + stage * (of_strip ? kStripStageBytes<F> : kTileStageBytes<X>));
        }
      };
      if (strips == kBlockStrips && tiles == kBlockTiles && count == kStageGroups) copy_pieces([](int, int, bool) { return true; });
      else copy_pieces([&](int k, int i, bool of_strip) {
        return sources[k] && (of_strip ? i % strip_pieces * 16 < count * F::record_bytes : (i - of_strips) % tile_pieces * 16 < count * static_cast<int>(sizeof(X)));
      });
    }
    commit_copies();  // an empty group too, so that counting them stays simple
  };
  for (int i = 0; i < kStages - 1; i++) copy_stage(i);

  // Strips and tiles of this warp; what lies behind the matrix or the batch is computed from whatever the stage holds and not stored.
  const int own_strip = warp % 2 * kWarpStrips, own_tile = warp / 2 * kWarpTiles;
  int strip_at[kWarpStrips], tile_at[kWarpTiles];  // in a stage
  const uint8_t* head_of[kWarpStrips];
  for (int s = 0; s < kWarpStrips; s++) {
    const int strip = own_strip + s < strips ? own_strip + s : 0;
    strip_at[s] = strip * kStripStageBytes<F>;
    keep(strip_at[s]);
    head_of[s] = heads + strip * plan.strip_bytes;
  }
  for (int t = 0; t < kWarpTiles; t++) {
    tile_at[t] = kBlockStrips * kStripStageBytes<F> + (own_tile + t < tiles ? own_tile + t : 0) * kTileStageBytes<X>;
    keep(tile_at[t]);
  }
  float acc[kWarpStrips][kWarpTiles][4] = {};
  float stack[kStackDepth][kValues];
  int depth = 0, segment = 0;
  for (int stage = 0; stage < stage_count; stage++) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this stage is here for all, and the one before has been read by all
    copy_stage(stage + kStages - 1);
    const uint8_t* from = shared + stage % kStages * kStageBytes<F, X>;
    const int count = min(kStageGroups, plan.groups - stage * kStageGroups);
    for (int j = 0; j < count;) {
      const int stop = min(count, plan.segment_end[segment] - stage * kStageGroups);  // of the stage or of the segment
      for (; j < stop; j++) {
        StripGroup<F> w[kWarpStrips];
#pragma unroll
        for (int s = 0; s < kWarpStrips; s++)
          w[s] = load_strip_group<F>(from + strip_at[s] + j * F::record_bytes, head_of[s] + (plan.phase + stage * kStageGroups + j) / 8 * F::head_bytes, lane);
#pragma unroll
        for (int t = 0; t < kWarpTiles; t++) {
          const X& x = *reinterpret_cast<const X*>(from + tile_at[t] + j * sizeof(X));
#pragma unroll
          for (int s = 0; s < kWarpStrips; s++) add_group(acc[s][t], w[s], x, lane);
        }
      }
      if (stage * kStageGroups + j < plan.segment_end[segment]) break;

      float* sums = &acc[0][0][0];
      for (int m = 0; m < plan.merges[segment]; m++) {
        depth--;
#pragma unroll
        for (int i = 0; i < kValues; i++) sums[i] = __fadd_rn(stack[depth][i], sums[i]);
      }
      const int subtree = plan.finishes[segment++];
      if (subtree < 0) {
#pragma unroll
        for (int i = 0; i < kValues; i++) stack[depth][i] = sums[i];
        depth++;
      } else {
#pragma unroll
        for (int i = 0; i < kValues; i++) {
          const int s = i / (kWarpTiles * 4), t = i / 4 % kWarpTiles, c = i % 4;
          const int row = (first_strip + own_strip + s) * kStripRows + lane / 4 + 8 * (c / 2), token = (first_tile + own_tile + t) * kTileTokens + lane % 4 * 2 + c % 2;
          if (row >= plan.rows || token >= plan.tokens) continue;
          plan.out[subtree * plan.subtree_stride + token * plan.out_stride + row] = plan.bias ? __fadd_rn(sums[i], plan.bias[row]) : sums[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kValues; i++) sums[i] = 0.0f;
    }
  }
  wait_copies<0>();
}

}  // namespace

Problem linear_prefill(const Product& product, Stream stream) {
  ProductPlan plan;
  if (const Problem problem = make_product_plan(product, &plan)) return problem;
  Problem problem = nullptr;
  with_format(product.type, [&](auto format) {
    using F = decltype(format);
    const dim3 grid(static_cast<unsigned>((plan.strips + kBlockStrips - 1) / kBlockStrips), static_cast<unsigned>((plan.tiles + kBlockTiles - 1) / kBlockTiles));
    const auto run = [&](auto kernel, size_t stage_bytes) { problem = launch(kernel, grid, kThreads, kStages * stage_bytes, stream, plan); };
    if (product.activations == ActivationType::Int16) run(linear_prefill_kernel<F, WideGroup>, kStageBytes<F, WideGroup>);
    else run(linear_prefill_kernel<F, ActivationGroup>, kStageBytes<F, ActivationGroup>);
  });
  return problem;
}

}  // namespace shardmesh::cuda
