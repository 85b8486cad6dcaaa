#include "cpu_features.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shardmesh {
namespace {

#if defined(__x86_64__)
// XCR0: bit 1 SSE, 2 AVX, 5 mask registers, 6 upper halves of zmm0-15, 7 zmm16-31, 17 and 18 tiles.         Source: Intel SDM volume 1, section 13.3
constexpr uint64_t kYmmState = 0x06, kZmmState = 0xe6, kTileState = 0x60000;

// Linux saves tiles only for processes that asked. Refused where a thread's signal stack is too small.         Source: Linux, Documentation/arch/x86/xstate.rst
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int i) { return (word >> i) & 1u; }

CpuFeatures detect() {
  CpuFeatures f{};
  uint32_t a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return f;
  std::memcpy(f.vendor, &b, 4);
  std::memcpy(f.vendor + 4, &d, 4);
  std::memcpy(f.vendor + 8, &c, 4);
  uint32_t extended = 0;
  if (__get_cpuid(0x80000000u, &extended, &b, &c, &d) && extended >= 0x80000004u) {
    for (uint32_t leaf = 0; leaf < 3; leaf++) {
      uint32_t words[4];
      __get_cpuid(0x80000002u + leaf, &words[0], &words[1], &words[2], &words[3]);
      std::memcpy(f.model + 16 * leaf, words, 16);
    }
  }
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool os_saves = bit(c, 27);
  const bool avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!os_saves || !avx || !fma || !f16c) return f;
  const uint64_t state = saved_state();
  if ((state & kYmmState) != kYmmState || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = bit(b, 5);
  const bool foundation = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31), vnni = bit(c, 11);
  f.avx512 = f.avx2 && foundation && dq && bw && vl && vnni && (state & kZmmState) == kZmmState;
  const bool tiles = bit(d, 24), int8_tiles = bit(d, 25);
  f.amx = f.avx512 && tiles && int8_tiles && (state & kTileState) == kTileState && may_use_tiles();
  return f;
}
#else
CpuFeatures detect() { return CpuFeatures{}; }
#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace shardmesh
