// The machine of machine.h itself: right kernels give the right values in every order, and each kind of wrong kernel is found.
//
//   simt_test    runs all; prints "ok NAME" or "FAIL NAME: what", a line each
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_source.h"

#include "../../../kernels/cuda/arrivals.cuh"
#include "../../../kernels/cuda/runtime.h"
#include "guarded.h"

using namespace shardmesh::cuda;
using simt::Guarded;
using simt::Order;

namespace {

int failures = 0;

void test_case(const std::string& name, const std::function<std::string()>& body) {
  const std::string what = body();
  if (!what.empty()) failures++;
  std::printf("%s %s%s%s\n", what.empty() ? "ok" : "FAIL", name.c_str(), what.empty() ? "" : ": ", what.c_str());
}

const simt::Schedule kSchedules[] = {{Order::Forward, 1, 1}, {Order::Reverse, 1, 1}, {Order::Random, 1, 1}, {Order::Random, 2, 1}, {Order::Random, 3, 1}};

// `run` in every order; "" when each gives "".
std::string in_every_order(const std::function<std::string()>& run) {
  for (const simt::Schedule& schedule : kSchedules) {
    simt::set_schedule(schedule);
    const std::string what = run();
    if (!what.empty()) return what;
  }
  return "";
}

// A kernel that is wrong in every order: the fault must say `expected` each time.
std::string caught_always(const std::string& expected, const std::function<const char*()>& run) {
  return in_every_order([&]() -> std::string {
    const char* fault = run();
    if (!fault) return "not caught";
    return std::string(fault).find(expected) == std::string::npos ? std::string("the fault is: ") + fault : "";
  });
}

// A kernel whose result is wrong in some order.
std::string caught_sometimes(const std::function<bool()>& right) {
  int wrong = 0;
  for (const simt::Schedule& schedule : kSchedules) {
    simt::set_schedule(schedule);
    wrong += right() ? 0 : 1;
  }
  return wrong ? "" : "right in every order";
}

constexpr unsigned kAll = 0xffffffffu;

struct OpenGraph {
  Graph graph = nullptr;
  OpenGraph() { open_graph(&graph); }
  ~OpenGraph() { close_graph(graph); }
};

// A stream with memory of the card and of the host beside it.
struct OpenStream {
  Stream stream = nullptr;
  Memory card{Place::Card, 64, "card"}, host{Place::Host, 64, "host"}, back{Place::Host, 64, "back"};
  OpenStream() { open_stream(&stream); }
  ~OpenStream() { close_stream(stream); }
};

// ---------------------------------------------------------------- right kernels

void last_block_kernel(uint32_t* values, uint32_t* count, uint32_t* out, unsigned waited_for) {
  if (threadIdx.x == 0) values[blockIdx.x] = blockIdx.x;
  if (!comes_last(count, waited_for, reinterpret_cast<uint32_t*>(dynamic_shared())) || threadIdx.x > 0) return;
  for (unsigned i = 0; i < gridDim.x; i++) *out += values[i];
}

void append_kernel(int* value, int digit) { value[0] = value[0] * 10 + digit; }
void increment_kernel(int* values) { values[threadIdx.x]++; }

// values[t] += 3 (t + 1 of the block's threads): what comes from shared memory is made before the wait for the grid before, as it may be; or something that may not be there is.
enum class Early { Right, Loads, Stores, Adds, Copies, Prefetches, Forgets, Ends, Spins, Halts };
void early_kernel(Early how, uint32_t* values) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const unsigned t = threadIdx.x, next = (t + 1) % blockDim.x;
  shared[t] = 3 * t;
  __syncthreads();
  uint32_t early = shared[next];
  if (how == Early::Loads) early += *static_cast<volatile uint32_t*>(values + t);
  if (how == Early::Stores) values[t] = 0;
  if (how == Early::Adds) atomicAdd(values, 1);
  if (how == Early::Copies) {
    copy_async<4>(shared + blockDim.x + t, values + t);
    commit_copies();
  }
  if (how == Early::Ends && t == 5) return;
  if (how == Early::Spins) __nanosleep(1);
  if (how == Early::Halts) {
    if (t < 5) grid_dependency_wait();
    __syncthreads();
  }
  prefetch_l2(values + (how == Early::Prefetches ? 64 : t));
  if (how != Early::Forgets) grid_dependency_wait();
  if (how == Early::Copies) wait_copies<0>();
  values[t] += early;
}

// Sum of a block's values: through registers in the warp, through shared memory between warps.
void sum_kernel(const int* in, int* out, bool with_barrier) {
  int* partial = reinterpret_cast<int*>(dynamic_shared());
  const unsigned thread = threadIdx.x;
  int v = in[blockIdx.x * blockDim.x + thread];
  for (int distance = 16; distance; distance /= 2) v += __shfl_xor_sync(kAll, v, distance);
  if (thread % 32 == 0) partial[thread / 32] = v;
  if (with_barrier) __syncthreads();
  if (thread == 0) {
    int total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) total += partial[w];
    out[blockIdx.x] = total;
  }
}

std::string run_sum(bool with_barrier) {
  std::vector<int> values(5 * 128);
  for (size_t i = 0; i < values.size(); i++) values[i] = static_cast<int>(i * i % 1001);
  const Guarded<int> in("in", values), out("out", 5);
  if (const char* fault = launch(sum_kernel, 5, 128, 16, nullptr, in.data(), out.data(), with_barrier)) return fault;
  for (size_t b = 0; b < 5; b++) {
    int expected = 0;
    for (size_t i = 0; i < 128; i++) expected += values[b * 128 + i];
    if (out.data()[b] != expected) return "block " + std::to_string(b) + " has a wrong sum";
  }
  return out.intact() ? "" : "a byte beside out has changed";
}

void shuffles_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* row = out + lane * 12;
  row[0] = __shfl_sync(kAll, lane * 3, 7);
  row[1] = __shfl_sync(kAll, lane * 3, 9, 8);
  row[2] = __shfl_xor_sync(kAll, lane * 3, 5);
  row[3] = __shfl_down_sync(kAll, lane * 3, 3);
  row[4] = __shfl_up_sync(kAll, lane * 3, 3, 16);
  row[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  row[6] = __any_sync(kAll, lane == 31);
  row[7] = __all_sync(kAll, lane != 31);
  row[8] = __reduce_add_sync(kAll, lane - 7);
  row[9] = __reduce_max_sync(kAll, (lane * 13) % 29);
  row[10] = 0;
  row[11] = static_cast<int>(__reduce_or_sync(kAll, 1u << (lane / 4)));
  if (lane & 1) row[10] = __shfl_xor_sync(0xaaaaaaaau, lane * 3, 2);  // odd lanes among themselves
}

std::string run_shuffles() {
  const Guarded<int> out("out", 32 * 12);
  if (const char* fault = launch(shuffles_kernel, 1, 32, 0, nullptr, out.data())) return fault;
  for (int l = 0; l < 32; l++) {
    const int expected[12] = {21, (l / 8 * 8 + 1) * 3, (l ^ 5) * 3, (l + 3 < 32 ? l + 3 : l) * 3, (l % 16 >= 3 ? l - 3 : l) * 3, 0x49249249, 1, 0, 496 - 224, 28, l & 1 ? (l ^ 2) * 3 : 0, 0xff};
    for (int i = 0; i < 12; i++)
      if (out.data()[l * 12 + i] != expected[i]) return "operation " + std::to_string(i) + ", lane " + std::to_string(l) + ": " + std::to_string(out.data()[l * 12 + i]);
  }
  return "";
}

// Fragment maps element by element, as the PTX ISA states them: i counts a lane's values.
int a_row(int lane, int i) { return lane / 4 + ((i >= 4 && i < 8) || i >= 12 ? 8 : 0); }
int a_column(int lane, int i) { return lane % 4 * 4 + i % 4 + (i < 8 ? 0 : 16); }
int b_row(int lane, int i) { return lane % 4 * 4 + i % 4 + (i < 4 ? 0 : 16); }

template <bool a_signed, bool b_signed>
void mma_kernel(const uint8_t* a, const uint8_t* b, int* d) {  // a [16][32], b [32][8], d [16][8]
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t ra[4] = {}, rb[2] = {};
  for (int i = 0; i < 16; i++) ra[i / 4] |= static_cast<uint32_t>(a[a_row(lane, i) * 32 + a_column(lane, i)]) << 8 * (i % 4);
  for (int i = 0; i < 8; i++) rb[i / 4] |= static_cast<uint32_t>(b[b_row(lane, i) * 8 + lane / 4]) << 8 * (i % 4);
  int rd[4];
  for (int i = 0; i < 4; i++) rd[i] = 1000 * i;
  if constexpr (a_signed && b_signed) mma_s8s8_k32(rd, ra, rb);
  else if constexpr (a_signed) mma_s8u8_k32(rd, ra, rb);
  else if constexpr (b_signed) mma_u8s8_k32(rd, ra, rb);
  else mma_u8u8_k32(rd, ra, rb);
  for (int i = 0; i < 4; i++) d[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = rd[i];
}

template <bool a_signed, bool b_signed>
std::string run_mma() {
  std::vector<uint8_t> a(512), b(256);
  for (size_t i = 0; i < a.size(); i++) a[i] = static_cast<uint8_t>(i * 151 + 7);
  for (size_t i = 0; i < b.size(); i++) b[i] = static_cast<uint8_t>(i * 89 + 200);
  const Guarded<uint8_t> da("a", a), db("b", b);
  const Guarded<int> d("d", 128);
  if (const char* fault = launch(mma_kernel<a_signed, b_signed>, 1, 32, 0, nullptr, da.data(), db.data(), d.data())) return fault;
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 8; c++) {
      int expected = 1000 * (r / 8 * 2 + c % 2);
      for (int k = 0; k < 32; k++) {
        const uint8_t x = a[static_cast<size_t>(r * 32 + k)], y = b[static_cast<size_t>(k * 8 + c)];
        expected += (a_signed ? static_cast<int8_t>(x) : x) * (b_signed ? static_cast<int8_t>(y) : y);
      }
      if (d.data()[r * 8 + c] != expected) return "row " + std::to_string(r) + " column " + std::to_string(c);
    }
  return "";
}

// Rows of shared memory to fragments by ldmatrix, then a product of halves or of bf16: A [16][16], B as its transpose [8][16], and B again [16][8] by .trans.
void half_mma_kernel(const uint16_t* a, const uint16_t* b, float* d, bool transposed, bool bf16) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) shared[i] = a[i];
  for (int i = lane; i < 128; i += 32) shared[256 + i] = transposed ? b[i] : b[i % 16 * 8 + i / 16];
  __syncthreads();
  uint32_t ra[4], rb[2];
  // Matrices of A: rows 0-7 and 8-15 of columns 0-7, then the same of columns 8-15.
  load_matrix<4>(ra, shared + (lane % 16) * 16 + lane / 16 * 8);
  if (transposed) load_matrix<2, true>(rb, shared + 256 + lane % 16 * 8);
  else load_matrix<2>(rb, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float rd[4] = {0, 0, 0, 0};
  if (bf16) mma_bf16_k16(rd, ra, rb);
  else mma_f16_k16(rd, ra, rb);
  for (int i = 0; i < 4; i++) d[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = rd[i];
}

std::string run_half_mma(bool transposed, bool bf16) {
  std::vector<uint16_t> a(256), b(128);
  const auto bits = [&](float value) { return bf16 ? float_to_bfloat(value) : float_to_half(value); };
  const auto value = [&](uint16_t h) { return bf16 ? bfloat_to_float(h) : half_to_float(h); };
  for (size_t i = 0; i < a.size(); i++) a[i] = bits(static_cast<float>(static_cast<int>(i * 7 % 23) - 11));
  for (size_t i = 0; i < b.size(); i++) b[i] = bits(static_cast<float>(static_cast<int>(i * 5 % 19) - 9) * 0.25f);
  const Guarded<uint16_t> da("a", a), db("b", b);
  const Guarded<float> d("d", 128);
  if (const char* fault = launch(half_mma_kernel, 1, 32, 768, nullptr, da.data(), db.data(), d.data(), transposed, bf16)) return fault;
  for (size_t r = 0; r < 16; r++)
    for (size_t c = 0; c < 8; c++) {
      float expected = 0;  // every sum is exact
      for (size_t k = 0; k < 16; k++) expected += value(a[r * 16 + k]) * value(b[k * 8 + c]);
      if (d.data()[r * 8 + c] != expected) return "row " + std::to_string(r) + " column " + std::to_string(c);
    }
  return "";
}

std::string run_numbers() {
  if (__dp4a(0x7f80ff01, 0x017f80fe, 5) != 127 * 1 + -128 * 127 + -1 * -128 + 1 * -2 + 5) return "__dp4a";
  if (dp4a_u8s8(0x7f80ff01, 0x017f80fe, 5) != 127 * 1 + 128 * 127 + 255 * -128 + 1 * -2 + 5) return "dp4a_u8s8";
  if (__byte_perm(0x33221100, 0x77665544, 0x7052) != 0x77005522) return "__byte_perm";
  if (__float2int_rn(2.5f) != 2 || __float2int_rn(-3.5f) != -4 || __float2int_rn(1e20f) != INT32_MAX || __float2int_rn(NAN) != 0) return "__float2int_rn";
  for (uint32_t h = 0; h < 0x7c00; h++)
    if (float_to_half(half_to_float(static_cast<uint16_t>(h))) != h) return "half " + std::to_string(h);
  if (float_to_half(65519.0f) != 0x7bff || float_to_half(65520.0f) != 0x7c00 || float_to_half(0x1p-25f) != 0 || float_to_half(0x1.8p-25f) != 1) return "rounding to half";
  if (float_to_bfloat(0x1.01p0f) != 0x3f80 || float_to_bfloat(0x1.03p0f) != 0x3f82 || float_to_bfloat(-0x1.010002p0f) != 0xbf81 || float_to_bfloat(0x1.fffffep127f) != 0x7f80)
    return "rounding to bf16";
  return "";
}

// A pipeline of asynchronous copies, two groups in flight.
void pipeline_kernel(const uint4* in, uint32_t* out, int rounds, bool waits) {
  uint4* stage = reinterpret_cast<uint4*>(dynamic_shared());
  const unsigned thread = threadIdx.x;
  for (int i = 0; i < 2; i++) {
    copy_async<16>(&stage[i * 32 + static_cast<int>(thread)], &in[i * 32 + static_cast<int>(thread)]);
    commit_copies();
  }
  uint32_t sum = 0;
  for (int i = 0; i < rounds; i++) {
    if (waits) wait_copies<1>();
    __syncthreads();
    sum += stage[i % 2 * 32 + static_cast<int>(thread ^ 1)].z;
    __syncthreads();
    if (i + 2 < rounds) copy_async<16>(&stage[i % 2 * 32 + static_cast<int>(thread)], &in[(i + 2) * 32 + static_cast<int>(thread)]);
    commit_copies();
  }
  wait_copies<0>();
  out[thread] = sum;
}

std::string run_pipeline(bool waits) {
  std::vector<uint4> values(7 * 32);
  for (size_t i = 0; i < values.size(); i++) values[i] = {0, 1, static_cast<uint32_t>(i * i), 3};
  const Guarded<uint4> in("in", values);
  const Guarded<uint32_t> out("out", 32);
  if (const char* fault = launch(pipeline_kernel, 1, 32, 1024, nullptr, in.data(), out.data(), 7, waits)) return fault;
  for (unsigned t = 0; t < 32; t++) {
    uint32_t expected = 0;
    for (size_t i = 0; i < 7; i++) expected += values[i * 32 + (t ^ 1)].z;
    if (out.data()[t] != expected) return "thread " + std::to_string(t) + " has a wrong sum";
  }
  return "";
}

void zero_fill_kernel(const uint8_t* in, uint8_t* out) {
  uint8_t* shared = dynamic_shared();
  copy_async<16>(shared, in, 5);
  commit_copies();
  wait_copies<0>();
  for (int i = 0; i < 16; i++) out[i] = shared[i];
}

// Blocks that hand a value on, from the last to the first: each waits for the one after it.
void relay_kernel(uint32_t* flags, uint32_t* values) {
  const unsigned b = blockIdx.x;
  if (b + 1 < gridDim.x) {
    while (load_acquire(&flags[b + 1]) == 0) __nanosleep(100);
    values[b] = values[b + 1] + 1;
  } else {
    values[b] = 10;
  }
  __threadfence();
  store_release(&flags[b], 1);
}

void deadline_kernel(uint32_t* flag, uint32_t* out) {
  const uint64_t deadline = global_timer() + 1'000'000;
  while (load_acquire(flag) == 0)
    if (global_timer() > deadline) {
      *out = 7;
      return;
    }
}

void count_kernel(uint32_t* count, uint32_t* order) { order[atomicAdd(count, 1u)] = blockIdx.x; }

// ---------------------------------------------------------------- wrong kernels

void half_warp_kernel(int* out) {  // the other half never comes
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
}
void half_at_barrier_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
  __syncthreads();
}
void two_sites_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) out[lane] = __shfl_xor_sync(kAll, lane, 1);
  else out[lane] = __shfl_xor_sync(kAll, lane, 1);
}
void two_operations_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) out[lane] = __shfl_xor_sync(kAll, lane, 1);
  else out[lane] = __reduce_add_sync(kAll, lane);
}
void two_masks_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_xor_sync(lane < 16 ? kAll : 0xffff0000u, lane, 1);
}
void without_self_kernel(int* out) { out[threadIdx.x] = __reduce_add_sync(0x7fffffffu, static_cast<int>(threadIdx.x)); }
void outside_mask_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 20);
}
void short_warp_kernel(int* out) { out[threadIdx.x] = __reduce_add_sync(kAll, 1); }
void two_barriers_kernel(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
  out[threadIdx.x] = 1;
}
void early_end_kernel(int* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
void missing_syncwarp_kernel(int* out, bool with_barrier) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_barrier) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 31];
}
void overrun_kernel(int* out, unsigned count) {
  if (threadIdx.x < count) out[threadIdx.x] = 1;
}
void shared_overrun_kernel(int* out) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = 1;
  out[threadIdx.x] = 1;
}
void underrun_kernel(int* out) { out[-1] = 1; }
void slack_kernel(int* out) { out[threadIdx.x] = 1; }
void misaligned_kernel(const uint8_t* in, uint4* out) { out[threadIdx.x] = *reinterpret_cast<const uint4*>(in + 4); }
void misaligned_matrix_kernel(uint32_t* out) {
  uint32_t r[1];
  load_matrix<1>(r, dynamic_shared() + threadIdx.x * 8);
  out[threadIdx.x] = r[0];
}
void misaligned_copy_kernel(const uint8_t* in) {
  copy_async<16>(dynamic_shared(), in + 8);
  commit_copies();
  wait_copies<0>();
}
void copy_to_global_kernel(const uint8_t* in, uint8_t* out) {
  copy_async<16>(out, in);
  commit_copies();
  wait_copies<0>();
}
void forgotten_copy_kernel(const uint8_t* in) {
  copy_async<16>(dynamic_shared(), in);
  commit_copies();
}
void send_kernel(uint64_t* message, bool with_release) {
  message[1] = 42;
  if (with_release) store_release_system(message, uint64_t{1});
  else store_relaxed_system(message, uint64_t{1});
}
void receive_kernel(const uint64_t* message, uint64_t* out) {
  while (load_acquire_system(message) == 0) __nanosleep(20);
  *out = message[1];
}
void spin_kernel(uint32_t* flag) {
  while (load_acquire(flag) == 0) __nanosleep(20);
}
void race_kernel(uint32_t* count) {  // all blocks read, then write: only a block that runs alone is right
  const uint32_t old = load_acquire(count);
  __nanosleep(10);
  *count = old + 1;
}

template <typename... P>
std::string always(const std::string& expected, void (*kernel)(int*, P...), unsigned threads, P... more) {
  return caught_always(expected, [&]() -> const char* {
    const Guarded<int> out("out", 64);
    return launch(kernel, 1, threads, 64 * 4, nullptr, out.data(), more...);
  });
}

}  // namespace

int main() {
  test_case("simt - sums over warps and blocks in every order", [] { return in_every_order([] { return run_sum(true); }); });
  test_case("simt - shuffles, votes and reductions read the lanes they name", [] { return in_every_order(run_shuffles); });
  test_case("simt - integer mma of signed and unsigned bytes equals the plain product", [] {
    for (const std::string& what : {in_every_order(run_mma<true, true>), in_every_order(run_mma<false, true>), in_every_order(run_mma<true, false>), in_every_order(run_mma<false, false>)})
      if (!what.empty()) return what;
    return std::string();
  });
  test_case("simt - ldmatrix, half and bf16 mma equal the plain product", [] {
    return in_every_order([] {
      const std::string what = run_half_mma(false, false);
      return what.empty() ? run_half_mma(false, true) : what;
    });
  });
  test_case("simt - ldmatrix transposes", [] { return in_every_order([] { return run_half_mma(true, false); }); });
  test_case("simt - dp4a, byte permutation, rounding, half and bf16 conversion", run_numbers);
  test_case("simt - asynchronous copies arrive when they are waited for", [] { return in_every_order([] { return run_pipeline(true); }); });
  test_case("simt - an asynchronous copy fills with zeros behind its source", [] {
    const Guarded<uint8_t> in("in", std::vector<uint8_t>{1, 2, 3, 4, 5}), out("out", 16);
    if (const char* fault = launch(zero_fill_kernel, 1, 1, 16, nullptr, in.data(), out.data())) return std::string(fault);
    for (int i = 0; i < 16; i++)
      if (out.data()[i] != (i < 5 ? i + 1 : 0)) return "byte " + std::to_string(i);
    return std::string();
  });
  test_case("simt - resident blocks may wait for each other", [] {
    for (const Order order : {Order::Forward, Order::Reverse, Order::Random}) {
      simt::set_schedule({order, 5, 6});
      const Guarded<uint32_t> flags("flags", std::vector<uint32_t>(6, 0)), values("values", 6);
      if (const char* fault = launch(relay_kernel, 6, 1, 0, nullptr, flags.data(), values.data())) return std::string(fault);
      if (values.data()[0] != 15) return std::string("the relay gives ") + std::to_string(values.data()[0]);
    }
    return std::string();
  });
  test_case("simt - a deadline ends a spin", [] {
    const Guarded<uint32_t> flag("flag", std::vector<uint32_t>{0}), out("out", 1);
    const char* fault = launch(deadline_kernel, 1, 1, 0, nullptr, flag.data(), out.data());
    return std::string(fault ? fault : out.data()[0] == 7 ? "" : "no result");
  });
  test_case("simt - blocks run in the order that is asked for", [] {
    std::vector<std::vector<uint32_t>> orders;
    for (const simt::Schedule& schedule : kSchedules) {
      simt::set_schedule(schedule);
      const Guarded<uint32_t> count("count", std::vector<uint32_t>{0}), order("order", 8);
      if (const char* fault = launch(count_kernel, 8, 1, 0, nullptr, count.data(), order.data())) return std::string(fault);
      orders.push_back(order.values());
    }
    if (orders[0] != std::vector<uint32_t>{0, 1, 2, 3, 4, 5, 6, 7} || orders[1] != std::vector<uint32_t>{7, 6, 5, 4, 3, 2, 1, 0}) return std::string("forward or reverse");
    return std::string(orders[2] == orders[3] || orders[2] == orders[0] ? "random orders do not differ" : "");
  });

  test_case("simt - finds a missing barrier between warps", [] { return caught_sometimes([] { return run_sum(false).empty(); }); });
  test_case("simt - finds a missing __syncwarp", [] {
    const auto right = [](bool with_barrier) {
      const Guarded<int> out("out", 32);
      if (launch(missing_syncwarp_kernel, 1, 32, 128, nullptr, out.data(), with_barrier)) return false;
      for (int i = 0; i < 32; i++)
        if (out.data()[i] != (i ^ 31)) return false;
      return true;
    };
    const std::string whole = in_every_order([&] { return std::string(right(true) ? "" : "the right kernel is wrong"); });
    return whole.empty() ? caught_sometimes([&] { return right(false); }) : whole;
  });
  test_case("simt - finds a read of an asynchronous copy that was not waited for", [] { return caught_sometimes([] { return run_pipeline(false).empty(); }); });
  test_case("simt - finds a full-mask shuffle by half a warp", [] { return always("has ended", half_warp_kernel, 32); });
  test_case("simt - finds a full-mask shuffle whose other half is at a barrier", [] { return always("waits in __syncthreads", half_at_barrier_kernel, 32); });
  test_case("simt - finds one shuffle at two sites", [] { return always("is in __shfl_xor_sync with mask ffffffff at simt_test.cpp", two_sites_kernel, 32); });
  test_case("simt - finds two operations in one warp", [] { return always("but lane", two_operations_kernel, 32); });
  test_case("simt - finds two masks in one operation", [] { return always("but lane", two_masks_kernel, 32); });
  test_case("simt - finds a mask without the own lane", [] { return always("lacks its own lane 31", without_self_kernel, 32); });
  test_case("simt - finds a shuffle from a lane outside the mask", [] { return always("reads from lane 20, which is not in mask", outside_mask_kernel, 32); });
  test_case("simt - finds a mask with lanes that the warp lacks", [] { return always("the warp has no lane 20", short_warp_kernel, 20); });
  test_case("simt - finds barriers at two sites", [] { return always("wait in the one at", two_barriers_kernel, 64); });
  test_case("simt - finds a barrier that a thread never reaches", [] { return always("has ended", early_end_kernel, 64); });
  test_case("simt - finds a write behind a buffer", [] { return always("0 bytes behind the end of out", overrun_kernel, 65, 65u); });
  test_case("simt - finds a write behind shared memory", [] { return always("behind the end of shared memory", shared_overrun_kernel, 65); });
  test_case("simt - finds writes in the page of a buffer and not in it", [] {
    const Guarded<int> before("before", 4), after("after", 3);
    if (launch(underrun_kernel, 1, 1, 0, nullptr, before.data()) || launch(slack_kernel, 1, 4, 0, nullptr, after.data())) return std::string("a fault");
    return std::string(before.intact() || after.intact() ? "not found" : "");
  });
  test_case("simt - finds a misaligned vector load", [] {
    const Guarded<uint8_t> in("in", 64);
    const Guarded<uint4> out("out", 1);
    return caught_always("misaligned", [&] { return launch(misaligned_kernel, 1, 1, 0, nullptr, in.data(), out.data()); });
  });
  test_case("simt - finds misaligned rows of ldmatrix", [] {
    const Guarded<uint32_t> out("out", 32);
    return caught_always("not aligned to 16 bytes", [&] { return launch(misaligned_matrix_kernel, 1, 32, 256, nullptr, out.data()); });
  });
  test_case("simt - finds wrong asynchronous copies", [] {
    const Guarded<uint8_t> in("in", 64), out("out", 16);
    for (const std::string& what : {caught_always("not aligned to 16", [&] { return launch(misaligned_copy_kernel, 1, 1, 16, nullptr, in.data()); }),
                                    caught_always("not in shared memory", [&] { return launch(copy_to_global_kernel, 1, 1, 16, nullptr, in.data(), out.data()); }),
                                    caught_always("never waited for", [&] { return launch(forgotten_copy_kernel, 1, 1, 16, nullptr, in.data()); })})
      if (!what.empty()) return what;
    return std::string();
  });
  test_case("simt - finds a spin without end", [] {
    const Guarded<uint32_t> flag("flag", std::vector<uint32_t>{0});
    simt::set_schedule({});
    const char* fault = launch(spin_kernel, 1, 1, 0, nullptr, flag.data());
    return std::string(fault && std::string(fault).find("every thread spins") != std::string::npos ? "" : "not found");
  });
  test_case("simt - the block that comes last sees what the others have written; finds one that comes a block too early", [] {
    const auto sum = [](unsigned waited_for) {
      const Guarded<uint32_t> values("values", 6), count("count", std::vector<uint32_t>{0}), out("out", std::vector<uint32_t>{0});
      return launch(last_block_kernel, 6, 32, 4, nullptr, values.data(), count.data(), out.data(), waited_for) ? 0u : out.data()[0];
    };
    const std::string whole = in_every_order([&] { return std::string(sum(6) == 15 ? "" : "a wrong sum"); });
    return whole.empty() ? caught_sometimes([&] { return sum(5) == 15; }) : whole;
  });
  test_case("simt - finds a race between blocks that live together", [] {
    const auto total = [](unsigned resident) {
      simt::set_schedule({Order::Random, 3, resident});
      const Guarded<uint32_t> count("count", std::vector<uint32_t>{0});
      return launch(race_kernel, 4, 1, 0, nullptr, count.data()) ? 0u : count.data()[0];
    };
    return std::string(total(1) == 4 && total(4) != 4 ? "" : "not found");
  });
  test_case("simt - a stream works in order, and not before it is waited for", [] {
    const OpenStream s;
    s.host.as<int>()[3] = 41;
    copy_to_card(s.card.as<void>(), s.host.as<void>(), 64, s.stream);
    launch(increment_kernel, 1, 16, 0, s.stream, s.card.as<int>());
    s.back.as<int>()[3] = 7;
    copy_to_host(s.back.as<void>(), s.card.as<void>(), 64, s.stream);
    if (s.back.as<int>()[3] != -1) return std::string("the target of a queued copy is not poisoned");
    if (synchronise(s.stream)) return std::string("a fault");
    return std::string(s.back.as<int>()[3] == 42 ? "" : "a wrong value");
  });
  test_case("simt - finds a host that changes what a queued copy reads", [] {
    const OpenStream s;
    copy_to_card(s.card.as<void>(), s.host.as<void>(), 64, s.stream);
    s.host.as<uint8_t>()[63] = 1;
    const char* fault = synchronise(s.stream);
    return std::string(fault && std::string(fault).find("has changed what a queued copy reads") != std::string::npos ? "" : "not found");
  });
  test_case("simt - a stream stops at a kernel's fault, and says it once", [] {
    const OpenStream s;
    fill(s.card.as<void>(), 0, 64, s.stream);
    launch(increment_kernel, 1, 17, 0, s.stream, s.card.as<int>());
    fill(s.card.as<void>(), 9, 64, s.stream);
    const char* fault = synchronise(s.stream);
    if (!fault || std::string(fault).find("behind the end of card (64 bytes)") == std::string::npos) return std::string("not found: ") + (fault ? fault : "no fault");
    return std::string(synchronise(s.stream) || s.card.as<uint8_t>()[0] == 9 ? "work behind the fault was done" : "");
  });
  test_case("simt - a graph does its nodes as often as it is launched, each behind those of its edges", [] {
    const OpenStream s;
    const OpenGraph g;
    fill(s.card.as<void>(), 0, 64, stream_of(g.graph));
    for (int i = 0; i < 3; i++) launch(increment_kernel, 1, 16, 0, stream_of(g.graph), s.card.as<int>());
    copy_to_host(s.back.as<void>(), s.card.as<void>(), 64, stream_of(g.graph));
    if (finish_graph(g.graph) || node_count(g.graph) != 5) return std::string("the graph is not made");
    for (int step = 0; step < 6; step++) {  // every order of nodes
      s.back.as<int>()[3] = 7;
      launch_graph(g.graph, s.stream);
      if (s.back.as<int>()[3] != -1) return std::string("the target of a queued copy is not poisoned");
      if (synchronise(s.stream)) return std::string("a fault");
      if (s.back.as<int>()[3] != 3) return std::string("a wrong value");
    }
    return std::string();
  });
  test_case("simt - a kernel behind a programmatic edge may do before its wait what touches no memory of the card", [] {
    const OpenStream s;
    Graph graph = nullptr;
    open_graph(&graph, Edges::Programmatic);
    fill(s.card.as<void>(), 0, 64, stream_of(graph));
    for (int i = 0; i < 3; i++) launch(early_kernel, 2, 16, 64, stream_of(graph), Early::Right, s.card.as<uint32_t>());
    copy_to_host(s.back.as<void>(), s.card.as<void>(), 64, stream_of(graph));
    launch(early_kernel, 1, 16, 64, stream_of(graph), Early::Right, s.card.as<uint32_t>());
    const uint64_t before = simt::counts().early;
    std::string wrong = finish_graph(graph) ? "the graph is not made" : programmatic_edge_count(graph) != 2 ? "edges of fill and copy are programmatic" : "";
    for (int step = 0; step < 6 && wrong.empty(); step++) {
      launch_graph(graph, s.stream);
      if (const char* fault = synchronise(s.stream)) wrong = fault;
      else if (s.back.as<uint32_t>()[4] != 6 * 15) wrong = "a wrong value";
    }
    if (wrong.empty() && simt::counts().early != before + 12) wrong = "not every early start was checked";
    close_graph(graph);
    return wrong;
  });
  const auto early = [](const std::string& expected, Early how) {
    return caught_always(expected, [&] {
      static OpenStream s;
      static std::string problem;
      problem.clear();
      for (const Edges edges : {Edges::Plain, Edges::Programmatic}) {
        Graph graph = nullptr;
        open_graph(&graph, edges);
        fill(s.card.as<void>(), 0, 64, stream_of(graph));
        launch(early_kernel, 1, 16, 64, stream_of(graph), Early::Right, s.card.as<uint32_t>());
        if (how != Early::Prefetches || edges == Edges::Programmatic) launch(early_kernel, 1, 16, 128, stream_of(graph), how, s.card.as<uint32_t>());
        finish_graph(graph);
        launch_graph(graph, s.stream);
        const char* fault = synchronise(s.stream);
        if (edges == Edges::Plain && fault) problem = std::string("with plain edges: ") + fault;
        if (edges == Edges::Programmatic && fault && problem.empty()) problem = fault;
        close_graph(graph);
      }
      return problem.empty() ? nullptr : problem.c_str();
    });
  };
  test_case("simt - finds a load before the wait for the grid before", [&] { return early("touches card (byte ", Early::Loads); });
  test_case("simt - finds a store before it", [&] { return early("touches card (byte ", Early::Stores); });
  test_case("simt - finds an atomic operation before it", [&] { return early("touches card (byte 0) before it has waited", Early::Adds); });
  test_case("simt - finds an asynchronous copy that is begun before it", [&] { return early("touches card (byte ", Early::Copies); });
  test_case("simt - finds a prefetch of memory that is not there", [&] { return early("access out of bounds", Early::Prefetches); });
  test_case("simt - finds a kernel without the wait", [&] { return early("touches card (byte ", Early::Forgets); });
  test_case("simt - finds a thread that ends without the wait", [&] { return early("thread (5, 0, 0): ends without having waited", Early::Ends); });
  test_case("simt - finds a thread that spins before it", [&] { return early("spins before it has waited", Early::Spins); });
  test_case("simt - finds a barrier between the waits of a block", [&] { return early("for threads that wait for the grid before", Early::Halts); });
  test_case("simt - nodes that no edge orders are done in any order", [] {
    const OpenStream s;
    const OpenGraph g;
    fill(s.card.as<void>(), 0, 64, stream_of(g.graph));
    launch(append_kernel, 1, 1, 0, stream_of(g.graph), s.card.as<int>(), 1);
    come_after(g.graph, {0});
    launch(append_kernel, 1, 1, 0, stream_of(g.graph), s.card.as<int>(), 2);
    come_after(g.graph, {1, 2});
    copy_to_host(s.back.as<void>(), s.card.as<void>(), 64, stream_of(g.graph));
    bool found[22] = {};
    for (int step = 0; step < 6; step++) {
      launch_graph(g.graph, s.stream);
      if (synchronise(s.stream)) return std::string("a fault");
      const int value = s.back.as<int>()[0];
      if (value != 12 && value != 21) return "the nodes give " + std::to_string(value);
      found[value] = true;
    }
    return std::string(found[12] && found[21] ? "" : "one order only");
  });
  test_case("simt - finds a missing edge of a graph", [] {
    const OpenStream s;
    const OpenGraph g;
    fill(s.card.as<void>(), 0, 64, stream_of(g.graph));
    come_after(g.graph, {});
    launch(increment_kernel, 1, 16, 0, stream_of(g.graph), s.card.as<int>());
    come_after(g.graph, {0, 1});
    copy_to_host(s.back.as<void>(), s.card.as<void>(), 64, stream_of(g.graph));
    for (int step = 0; step < 3; step++) {
      launch_graph(g.graph, s.stream);
      if (synchronise(s.stream) || s.back.as<int>()[0] != 1) return std::string();
    }
    return std::string("not found");
  });
  test_case("simt - cards that run together see what another one has released, and no more", [] {
    for (uint64_t seed = 1; seed <= 20; seed++) {
      const auto received = [&](bool with_release) {
        simt::SystemMemory memory("message", 16, 1, simt::Visibility::Late);
        std::memset(memory.own(), 0, 16);
        memory.publish_all();
        const Guarded<uint64_t> out("out", 1);
        simt::CardWork sender, receiver;
        launch(send_kernel, 1, 1, 0, static_cast<simt::WorkQueue*>(&sender), reinterpret_cast<uint64_t*>(memory.own()), with_release);
        launch(receive_kernel, 1, 1, 0, static_cast<simt::WorkQueue*>(&receiver), reinterpret_cast<const uint64_t*>(memory.view(0)), out.data());
        return simt::run_together({&receiver, &sender}, seed).empty() ? out.data()[0] : 1;
      };
      if (received(true) != 42) return std::string("a released word does not arrive");
      if (received(false) != 0) return std::string("a word that was not released arrives");
    }
    return std::string();
  });
  test_case("simt - of cards that run together, the one that faults is named", [] {
    const Guarded<int> large("large", std::vector<int>(5, 1)), small("small", std::vector<int>(4, 1));
    simt::CardWork right, wrong;
    launch(increment_kernel, 1, 5, 0, static_cast<simt::WorkQueue*>(&right), large.data());
    launch(increment_kernel, 1, 5, 0, static_cast<simt::WorkQueue*>(&wrong), small.data());
    const std::string problem = simt::run_together({&right, &wrong}, 3);
    return problem.starts_with("card 1: block (0, 0, 0)") ? "" : "it says: " + problem;
  });
  test_case("simt - refuses launches that no card takes", [] {
    const Guarded<int> out("out", 64);
    const auto refused = [&](dim3 grid, dim3 block, size_t shared) { return launch(slack_kernel, grid, block, shared, nullptr, out.data()) != nullptr; };
    return std::string(refused(1, 1025, 0) && refused(0, 1, 0) && refused(dim3(1, 70000), 1, 0) && refused(1, 1, 120 * 1024) ? "" : "one was taken");
  });
  return failures ? 1 : 0;
}
