// What the two products share: a strip's operands of one group, and one group's contribution to the accumulators.
//   acc = fma(rn(S * float(dot)), sa, acc), then for formats with a minimum acc = fma(M, ms, acc)
// Instructions are what bounds all but the smallest batches: of a product of 16 x 8 x 32 that is one mma and three fma for each of a lane's four sums.
// int16 activations go through the same integer products twice, dot = 256 * dot(high) + dot(low); of Q6_K each half of the group then has an fma of its own.
// Accumulator i of a lane belongs to row g + 8 (i / 2) of the strip and token 2t + i mod 2 of the tile; g = lane / 4, t = lane % 4.
#pragma once
#include "device.cuh"
#include "weight_layout.h"

namespace shardmesh::cuda {

// Weights and scales of a lane's two rows.
template <typename F>
struct StripGroup {
  uint32_t a[4];
  float s[2], m[2];  // s: S, or S / 16 where `a` holds 16 times the weights
  float unbias[2];   // -kBias * s: exact, since S has at most 17 significant bits, and so fma(S, kBias + dot, -kBias * S) is rn(S * dot)
  int half_scale[2][2];  // [row][half], Scales::Halves only
};

__device__ __forceinline__ float byte_of(uint32_t word, int i) { return __int2float_rn(static_cast<int>(word >> 8 * i & 255)); }

// `record`: of the group, in global or shared memory; `head`: of its 256 columns.
template <typename F>
__device__ __forceinline__ StripGroup<F> load_strip_group(const uint8_t* record, const uint8_t* head, int lane) {
  StripGroup<F> w;
  if constexpr (F::bits == 4) {
    const uint2 packed = *reinterpret_cast<const uint2*>(record + 8 * lane);
    if constexpr (F::zero == 8) {  // 16 (w - 8), signed: a nibble in the upper half of its byte with the sign turned round
      w.a[0] = (packed.x << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
      w.a[1] = (packed.y << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
      w.a[2] = (packed.x & 0xf0f0f0f0u) ^ 0x80808080u;
      w.a[3] = (packed.y & 0xf0f0f0f0u) ^ 0x80808080u;
    } else {
      w.a[0] = packed.x & 0x0f0f0f0fu;
      w.a[1] = packed.y & 0x0f0f0f0fu;
      w.a[2] = packed.x >> 4 & 0x0f0f0f0fu;
      w.a[3] = packed.y >> 4 & 0x0f0f0f0fu;
    }
  } else {
    const uint4 packed = *reinterpret_cast<const uint4*>(record + 16 * lane);
    w.a[0] = packed.x;
    w.a[1] = packed.y;
    w.a[2] = packed.z;
    w.a[3] = packed.w;
  }
  const uint8_t* scales = record + F::weight_bytes + lane / 4 * F::scale_bytes;
  if constexpr (F::scales == Scales::Half) {
    const uint32_t d = *reinterpret_cast<const uint32_t*>(scales);
    constexpr float unit = F::zero == 8 ? 0.0625f : 1.0f;
    w.s[0] = __fmul_rn(low_half(d), unit);
    w.s[1] = __fmul_rn(high_half(d), unit);
  } else if constexpr (F::scales == Scales::HalfMin) {
    const uint2 dm = *reinterpret_cast<const uint2*>(scales);
    w.s[0] = low_half(dm.x);
    w.s[1] = high_half(dm.x);
    w.m[0] = low_half(dm.y);
    w.m[1] = high_half(dm.y);
  } else if constexpr (F::scales == Scales::Super) {
    const uint32_t factors = *reinterpret_cast<const uint32_t*>(scales);
    const uint2 dm = *reinterpret_cast<const uint2*>(head + lane / 4 * 8);
    w.s[0] = __fmul_rn(low_half(dm.x), byte_of(factors, 0));  // exact, as are the other three
    w.s[1] = __fmul_rn(high_half(dm.x), byte_of(factors, 1));
    w.m[0] = __fmul_rn(low_half(dm.y), byte_of(factors, 2));
    w.m[1] = __fmul_rn(high_half(dm.y), byte_of(factors, 3));
  } else {
    const uint32_t factors = *reinterpret_cast<const uint32_t*>(scales), d = *reinterpret_cast<const uint32_t*>(head + lane / 4 * 4);
    for (int i = 0; i < 4; i++) w.half_scale[i / 2][i % 2] = static_cast<int8_t>(factors >> 8 * i);
    w.s[0] = low_half(d);
    w.s[1] = high_half(d);
  }
  for (int i = 0; i < 2; i++) w.unbias[i] = __fmul_rn(-kBias, w.s[i]);
  return w;
}

// What a warp reads first of its groups [begin, end), while it waits for its activations.
template <typename F>
__device__ __forceinline__ void prefetch_groups(const uint8_t* records, const uint8_t* heads, int phase, int begin, int end, int lane) {
  prefetch_weights(records + begin * F::record_bytes, (end - begin) * F::record_bytes, lane);
  if constexpr (F::heads) {
    if (lane == 0) prefetch_l2(heads + (phase + begin) / 8 * F::head_bytes);
  }
}

// `c` and the integer products of 32 columns.
template <typename F>
__device__ __forceinline__ void add_dots(int (&dot)[4], const int (&c)[4], const StripGroup<F>& w, const LaneWords& q) {
  const uint32_t b[2] = {q.x, q.y};
  if constexpr (F::bits == 4 && F::zero == 0) mma_u8s8_k32_onto(dot, c, w.a, b);
  else mma_s8s8_k32_onto(dot, c, w.a, b);
}
// Of each half of the columns by itself, for Scales::Halves.
template <typename F>
__device__ __forceinline__ void half_dots(int (&first)[4], int (&second)[4], const StripGroup<F>& w, const LaneWords& q) {
  const uint32_t a0[2] = {w.a[0], w.a[1]}, a1[2] = {w.a[2], w.a[3]}, b0[1] = {q.x}, b1[1] = {q.y};
  for (int i = 0; i < 4; i++) first[i] = second[i] = 0;
  mma_s8s8_k16(first, a0, b0);
  mma_s8s8_k16(second, a1, b1);
}
// `biased`: the integers are the bits of kBias + dot.
template <bool biased, int columns, typename F>
__device__ __forceinline__ void add_scaled(float (&acc)[4], const int (&dot)[4], const StripGroup<F>& w, const ActivationGroup& x, int lane) {
  const float4 scales = *reinterpret_cast<const float4*>(&x.scale[lane % 4 * 2]);  // sa, ms of two tokens
  for (int i = 0; i < 4; i += 3 - columns) {
    const float scaled = biased ? __fmaf_rn(w.s[i / 2], __int_as_float(dot[i]), w.unbias[i / 2]) : __fmul_rn(w.s[i / 2], __int2float_rn(dot[i]));
    acc[i] = __fmaf_rn(scaled, i % 2 ? scales.z : scales.x, acc[i]);
  }
}
template <int columns, typename F>
__device__ __forceinline__ void add_minimum(float (&acc)[4], const StripGroup<F>& w, const ActivationGroup& x, int lane) {
  if constexpr (F::minimum) {
    const float4 scales = *reinterpret_cast<const float4*>(&x.scale[lane % 4 * 2]);
    for (int i = 0; i < 4; i += 3 - columns) acc[i] = __fmaf_rn(w.m[i / 2], i % 2 ? scales.w : scales.y, acc[i]);
  }
}

// columns: of a lane's two tokens, those that are wanted: 1 where a batch has a single token.
template <int columns = 2, typename F>
__device__ __forceinline__ void add_group(float (&acc)[4], const StripGroup<F>& w, const ActivationGroup& x, int lane) {
  const LaneWords q = x.q[lane];
  int dot[4];
  if constexpr (F::scales == Scales::Halves) {
    int first[4], second[4];
    half_dots(first, second, w, q);
    for (int i = 0; i < 4; i++) dot[i] = w.half_scale[i / 2][0] * first[i] + w.half_scale[i / 2][1] * second[i];
    add_scaled<false, columns>(acc, dot, w, x, lane);
  } else {
    constexpr int bias[4] = {kBiasBits, kBiasBits, kBiasBits, kBiasBits};
    add_dots(dot, bias, w, q);
    add_scaled<true, columns>(acc, dot, w, x, lane);
  }
  add_minimum<columns>(acc, w, x, lane);
}

template <int columns = 2, typename F>
__device__ __forceinline__ void add_group(float (&acc)[4], const StripGroup<F>& w, const WideGroup& x, int lane) {
  const LaneWords high = x.high.q[lane], low = x.low[lane];
  if constexpr (F::scales == Scales::Halves) {
    int first[4], second[4], first_low[4], second_low[4];
    half_dots(first, second, w, high);
    half_dots(first_low, second_low, w, low);
    for (int i = 0; i < 4; i++) {
      first[i] = w.half_scale[i / 2][0] * (256 * first[i] + first_low[i]);
      second[i] = w.half_scale[i / 2][1] * (256 * second[i] + second_low[i]);
    }
    add_scaled<false, columns>(acc, first, w, x.high, lane);
    add_scaled<false, columns>(acc, second, w, x.high, lane);
  } else {
    constexpr int zeros[4] = {0, 0, 0, 0};
    int upper[4], dot[4];
    add_dots(upper, zeros, w, high);
    for (int i = 0; i < 4; i++) upper[i] *= 256;
    add_dots(dot, upper, w, low);
    add_scaled<false, columns>(acc, dot, w, x.high, lane);
  }
  add_minimum<columns>(acc, w, x.high, lane);
}

}  // namespace shardmesh::cuda
