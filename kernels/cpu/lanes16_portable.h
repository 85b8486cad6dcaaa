// Sixteen fp32 or int32 lanes without an instruction set of their own: the portable kernel set. The kernels written against these names (attention_lanes16.h,
// elementwise_lanes16.h, attention_dots_vnni.h) are the very source of the AVX-512 set, so a machine without AVX-512 still compiles and runs it.
//
// Lanes are vectors of the compiler (gcc and clang), which it cuts into whatever registers there are.
// `Lanes` has the same members in lanes16_avx2.h and lanes16_avx512.h; include one of the three in a file. Everything has internal linkage.
//   F  16 fp32     I  16 int32     M  16 truth values
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>

#include "../include/arithmetic.h"

// 64-byte vectors are passed between functions of this file only, and all of them are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace shardmesh {
namespace {

#define SHARDMESH_LANES [[maybe_unused]] static inline __attribute__((always_inline))
// Before a loop over registers: there are none to spare here, so it stays a loop.
#define SHARDMESH_UNROLL _Pragma("GCC unroll 1")

struct Lanes {
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef I M;  // 0 or -1

  static constexpr int kExpTogether = 8;  // vectors that exp_each takes step by step together

  // --- memory
  SHARDMESH_LANES F load(const float* p) {
    F r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  SHARDMESH_LANES void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  // The first n (0..16) values, zero after them; nothing behind them is touched.
  SHARDMESH_LANES F load_first(const float* p, int n) {
    F r = {};
    std::memcpy(&r, p, static_cast<size_t>(n) * 4);
    return r;
  }
  SHARDMESH_LANES void store_first(float* p, F x, int n) { std::memcpy(p, &x, static_cast<size_t>(n) * 4); }
  SHARDMESH_LANES I load_int(const void* p) {
    I r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  SHARDMESH_LANES void store_int(int32_t* p, I x) { std::memcpy(p, &x, sizeof x); }
  // Values must fit.
  SHARDMESH_LANES void store_int8(int8_t* p, I x) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    const Bytes bytes = __builtin_convertvector(x, Bytes);
    std::memcpy(p, &bytes, sizeof bytes);
  }
  // Lane i to p[4 * i + byte]. The bytes between are neither read nor written: other threads may be writing them.
  SHARDMESH_LANES void store_int8_apart(int8_t* p, int byte, I x) {
    int8_t bytes[16];
    store_int8(bytes, x);
    for (int i = 0; i < 16; i++) p[4 * i + byte] = bytes[i];
  }
  // The low byte of each lane.
  SHARDMESH_LANES void store_uint8(uint8_t* p, I x) { store_int8(reinterpret_cast<int8_t*>(p), x); }
  // Lanes 4 * i to 4 * i + 3 of vector k (0: a .. 3: d) to p + 16 * i + 4 * k. Values must be 0..255.
  SHARDMESH_LANES void store_uint8_quads(uint8_t* p, I a, I b, I c, I d) {
    const I x[4] = {a, b, c, d};
    for (int k = 0; k < 4; k++) {
      uint8_t bytes[16];
      store_uint8(bytes, x[k]);
      for (int i = 0; i < 4; i++) std::memcpy(p + 16 * i + 4 * k, bytes + 4 * i, 4);
    }
  }
  // The same four bytes in every lane.
  SHARDMESH_LANES I broadcast4(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return set_int(x);
  }
  SHARDMESH_LANES F load_half(const uint16_t* p) {
    float r[16];
    for (int i = 0; i < 16; i++) r[i] = half_to_float(p[i]);
    return load(r);
  }
  // To nearest even. Must not be NaN.
  SHARDMESH_LANES void store_half(uint16_t* p, F x) {
    for (int i = 0; i < 16; i++) p[i] = float_to_half(x[i]);
  }

  // --- fp32
  // Not F{} + x: 0 + -0 is 0.
  SHARDMESH_LANES F set(float x) { return F{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
  SHARDMESH_LANES F add(F a, F b) { return a + b; }
  SHARDMESH_LANES F sub(F a, F b) { return a - b; }
  SHARDMESH_LANES F mul(F a, F b) { return a * b; }
  SHARDMESH_LANES F div(F a, F b) { return a / b; }
  // a * b + c, rounded once
  SHARDMESH_LANES F fma(F a, F b, F c) {
    float x[16], y[16], z[16];
    store(x, a);
    store(y, b);
    store(z, c);
    SHARDMESH_UNROLL
    for (int i = 0; i < 16; i++) z[i] = fmaf(x[i], y[i], z[i]);
    return load(z);
  }
  SHARDMESH_LANES F max(F a, F b) { return a > b ? a : b; }
  SHARDMESH_LANES F min(F a, F b) { return a < b ? a : b; }
  SHARDMESH_LANES F abs(F a) { return from_bits(bits(a) & 0x7fffffff); }
  SHARDMESH_LANES F negate(F a) { return -a; }
  SHARDMESH_LANES float highest(F a) {
    float m = a[0];
    for (int i = 1; i < 16; i++) m = a[i] > m ? a[i] : m;
    return m;
  }
  // Distance 8, 4, 2, 1.
  SHARDMESH_LANES float halving_sum(F a) {
    float v[16];
    store(v, a);
    return shardmesh::halving_sum(v, 16);
  }
  // Maxima or halving sums of many vectors at once. First each vector i's lanes are joined at distance 8: pair 2 * k and 2 * k + 1 is one vector. Then all eight
  // pairs give one vector, whose lane i is the maximum, or the halving sum (distance 8, 4, 2, 1), of vector i.
  SHARDMESH_LANES F pair_max(F a, F b) {
    return pair_by(a, b, [](float x, float y) { return x > y ? x : y; });
  }
  SHARDMESH_LANES F pair_sum(F a, F b) {
    return pair_by(a, b, [](float x, float y) { return x + y; });
  }
  SHARDMESH_LANES F each_max(const F* pairs) {
    return each_by(pairs, [](float x, float y) { return x > y ? x : y; });
  }
  SHARDMESH_LANES F each_sum(const F* pairs) {
    return each_by(pairs, [](float x, float y) { return x + y; });
  }
  template <class Join>
  SHARDMESH_LANES F pair_by(F a, F b, Join join) {
    float r[16];
    for (int i = 0; i < 8; i++) {
      r[i] = join(a[i], a[i + 8]);
      r[8 + i] = join(b[i], b[i + 8]);
    }
    return load(r);
  }
  template <class Join>
  SHARDMESH_LANES F each_by(const F* pairs, Join join) {
    float v[8][16], r[16];
    for (int k = 0; k < 8; k++) store(v[k], pairs[k]);
    for (int i = 0; i < 16; i++) {
      const float* x = v[i / 2] + i % 2 * 8;
      r[i] = join(join(join(x[0], x[4]), join(x[2], x[6])), join(join(x[1], x[5]), join(x[3], x[7])));
    }
    return load(r);
  }

  // --- int32
  SHARDMESH_LANES I set_int(int32_t x) { return I{} + x; }
  SHARDMESH_LANES I bit_and(I a, I b) { return a & b; }
  SHARDMESH_LANES I bit_xor(I a, I b) { return a ^ b; }
  // Has x in a register here: compilers would load it again at each use, or compute it later.
  template <class Vector>
  SHARDMESH_LANES void hold(Vector&) {}
  SHARDMESH_LANES I sub_int(I a, I b) { return a - b; }
  SHARDMESH_LANES I max_int(I a, I b) { return a > b ? a : b; }
  SHARDMESH_LANES int32_t sum_int(I a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += a[i];
    return sum;
  }
  SHARDMESH_LANES void sum_two(I a, I b, int32_t* first, int32_t* second) {
    *first = sum_int(a);
    *second = sum_int(b);
  }
  SHARDMESH_LANES int32_t highest_int(I a) {
    int32_t m = a[0];
    for (int i = 1; i < 16; i++) m = a[i] > m ? a[i] : m;
    return m;
  }
  // Lane by lane: c + sum of the four products of an unsigned byte of a and a signed byte of b. A product fits into 16 bits, the sum of two does not.
  SHARDMESH_LANES I dot4(I c, I a, I b) {
    typedef int16_t Pairs __attribute__((vector_size(64)));
    const Pairs x = reinterpret_cast<Pairs>(a), y = reinterpret_cast<Pairs>(b);
    const I even = reinterpret_cast<I>((x & 255) * ((y << 8) >> 8)), odd = reinterpret_cast<I>(((x >> 8) & 255) * (y >> 8));
    return c + ((even << 16) >> 16) + (even >> 16) + ((odd << 16) >> 16) + (odd >> 16);
  }

  // --- between the two
  SHARDMESH_LANES F to_float(I a) { return __builtin_convertvector(a, F); }
  // To nearest even; INT32_MIN where |x| >= 2^22 (the callers stay below 256 or drop the lane).
  SHARDMESH_LANES I to_int(F a) {
    const I near = bits(a + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23: the last bit of the sum is worth 1
    return abs(a) < 4194304.0f ? near : set_int(INT32_MIN);
  }
  SHARDMESH_LANES I bits(F a) { return reinterpret_cast<I>(a); }
  SHARDMESH_LANES F from_bits(I a) { return reinterpret_cast<F>(a); }
  // x * 2^n where m, else 0; x and the product must be normal numbers where m.
  SHARDMESH_LANES F scale_where(M m, F x, I n) { return from_bits((bits(x) + (n << 23)) & m); }

  // --- truth values
  SHARDMESH_LANES M greater(F a, F b) { return a > b; }
  // Lanes from <= i < to.
  SHARDMESH_LANES M range(int from, int to) {
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (lane >= from) & (lane < to);
  }
  // Lane i where bit i of x is set.
  SHARDMESH_LANES M mask_of(uint32_t x) {
    const I bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (set_int(static_cast<int32_t>(x)) & bit) == bit;
  }
  SHARDMESH_LANES F select(M m, F yes, F no) { return m ? yes : no; }

  // --- 16 pairs: x[0..31] = e0 o0 e1 o1 ...
  SHARDMESH_LANES void load_pairs(const float* x, F* even, F* odd) {
    float e[16], o[16];
    for (int i = 0; i < 16; i++) {
      e[i] = x[2 * i];
      o[i] = x[2 * i + 1];
    }
    *even = load(e);
    *odd = load(o);
  }
  SHARDMESH_LANES void store_pairs(float* x, F even, F odd) {
    for (int i = 0; i < 16; i++) {
      x[2 * i] = even[i];
      x[2 * i + 1] = odd[i];
    }
  }
};

}  // namespace
}  // namespace shardmesh
