// What the two products share: a strip's operands of one group, and one group's contribution to the accumulators.
//   acc = fma(rn(S * float(dot)), sa, acc), then for formats with a minimum acc = fma(M, ms, acc)
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
  float s[2], m[2];
  int half_scale[2][2];  // [row][half], Scales::Halves only
};

__device__ __forceinline__ float byte_of(uint32_t word, int i) { return __int2float_rn(static_cast<int>(word >> 8 * i & 255)); }

// `record`: of the group, in global or shared memory; `head`: of its 256 columns.
template <typename F>
__device__ __forceinline__ StripGroup<F> load_strip_group(const uint8_t* record, const uint8_t* head, int lane) {
  StripGroup<F> w;
  if constexpr (F::bits == 4) {
    const uint2 packed = *reinterpret_cast<const uint2*>(record + 8 * lane);
    w.a[0] = packed.x & 0x0f0f0f0fu;
    w.a[1] = packed.y & 0x0f0f0f0fu;
    w.a[2] = packed.x >> 4 & 0x0f0f0f0fu;
    w.a[3] = packed.y >> 4 & 0x0f0f0f0fu;
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
    w.s[0] = low_half(d);
    w.s[1] = high_half(d);
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

// The integer products of 32 columns, on top of `dot`; for Scales::Halves of each half by itself.
template <typename F>
__device__ __forceinline__ void add_dots(int (&dot)[4], const StripGroup<F>& w, const LaneWords& q) {
  const uint32_t b[2] = {q.x, q.y};
  if constexpr (F::bits == 4) mma_u8s8_k32(dot, w.a, b);
  else mma_s8s8_k32(dot, w.a, b);
}
template <typename F>
__device__ __forceinline__ void half_dots(int (&first)[4], int (&second)[4], const StripGroup<F>& w, const LaneWords& q) {
  const uint32_t a0[2] = {w.a[0], w.a[1]}, a1[2] = {w.a[2], w.a[3]}, b0[1] = {q.x}, b1[1] = {q.y};
  for (int i = 0; i < 4; i++) first[i] = second[i] = 0;
  mma_s8s8_k16(first, a0, b0);
  mma_s8s8_k16(second, a1, b1);
}
// sum of (w - zero) q = sum of w q - zero * sum of q: what the sum of w q begins with, on top of `start`.
template <typename F>
__device__ __forceinline__ void begin_dots(int (&dot)[4], int start, const ActivationGroup& x, int lane) {
  if constexpr (F::zero != 0) {
    const int2 sum = *reinterpret_cast<const int2*>(&x.sum[lane % 4 * 2]);
    dot[0] = dot[2] = start - F::zero * sum.x;
    dot[1] = dot[3] = start - F::zero * sum.y;
  } else {
    for (int i = 0; i < 4; i++) dot[i] = start;
  }
}

// Conversions of integers have a quarter or less of the rate of additions. A sum that begins at the bits of 1.5 * 2^23 is, read as fp32, that plus `dot` while
// |dot| < 2^22, exactly.
constexpr float kBias = 12582912.0f;
constexpr int kBiasBits = 0x4b400000;

// `biased`: the integers are the bits of kBias + dot.
template <bool biased, typename F>
__device__ __forceinline__ void add_scaled(float (&acc)[4], const int (&dot)[4], const StripGroup<F>& w, const ActivationGroup& x, int lane) {
  const float2 sa = *reinterpret_cast<const float2*>(&x.sa[lane % 4 * 2]);
  for (int i = 0; i < 4; i++) {
    const float value = biased ? __fadd_rn(__int_as_float(dot[i]), -kBias) : __int2float_rn(dot[i]);
    acc[i] = __fmaf_rn(__fmul_rn(w.s[i / 2], value), i % 2 ? sa.y : sa.x, acc[i]);
  }
}
template <typename F>
__device__ __forceinline__ void add_minimum(float (&acc)[4], const StripGroup<F>& w, const ActivationGroup& x, int lane) {
  if constexpr (F::minimum) {
    const float2 ms = *reinterpret_cast<const float2*>(&x.ms[lane % 4 * 2]);
    for (int i = 0; i < 4; i++) acc[i] = __fmaf_rn(w.m[i / 2], i % 2 ? ms.y : ms.x, acc[i]);
  }
}

template <typename F>
__device__ __forceinline__ void add_group(float (&acc)[4], const StripGroup<F>& w, const ActivationGroup& x, int lane) {
  const LaneWords q = x.q[lane];
  int dot[4];
  if constexpr (F::scales == Scales::Halves) {
    int first[4], second[4];
    half_dots(first, second, w, q);
    for (int i = 0; i < 4; i++) dot[i] = w.half_scale[i / 2][0] * first[i] + w.half_scale[i / 2][1] * second[i];
    add_scaled<false>(acc, dot, w, x, lane);
  } else {
    begin_dots<F>(dot, kBiasBits, x, lane);
    add_dots(dot, w, q);
    add_scaled<true>(acc, dot, w, x, lane);
  }
  add_minimum(acc, w, x, lane);
}

template <typename F>
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
    add_scaled<false>(acc, first, w, x.high, lane);
    add_scaled<false>(acc, second, w, x.high, lane);
  } else {
    int upper[4] = {0, 0, 0, 0}, dot[4];
    add_dots(upper, w, high);
    begin_dots<F>(dot, 0, x.high, lane);
    for (int i = 0; i < 4; i++) dot[i] += 256 * upper[i];
    add_dots(dot, w, low);
    add_scaled<false>(acc, dot, w, x.high, lane);
  }
  add_minimum(acc, w, x.high, lane);
}

}  // namespace shardmesh::cuda
