// The tables of the CPU kernel sets, and the one place that picks a set by name and by what the machine can run.
#include <cstring>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "cpu_features.h"
#include "operations.h"

namespace shardmesh {
namespace {

// Products by the type of their activations.
template <bool (*int8)(const Activations&, Part), bool (*int16)(const Activations&, Part)>
bool quantize_activations(const Activations& in, Part part) {
  return (in.type == ActivationType::Int8 ? int8 : int16)(in, part);
}
template <void (*int8)(const LinearArguments&, Part), void (*int16)(const LinearArguments&, Part)>
void linear(const LinearArguments& arguments, Part part) {
  const TensorType type = arguments.weight->type;
  const bool is_float = type == TensorType::F32 || type == TensorType::F16 || type == TensorType::BF16;
  (is_float || arguments.in.type == ActivationType::Int8 ? int8 : int16)(arguments, part);
}

#define SHARDMESH_KERNEL_SET(isa)                                                                                                             \
  {                                                                                                                                           \
    #isa, packed_bytes, pack, read_row, activation_bytes, quantize_activations<isa::quantize_int8, isa::quantize_int16>,                      \
        linear<isa::linear_int8, isa::linear_int16>, isa::rms_norm, isa::rope, isa::store_kv, isa::attention_scratch_bytes, isa::attention,   \
        isa::gated_activation, isa::finish_tree, isa::all_finite                                                                              \
  }

constexpr KernelSet kPortable = SHARDMESH_KERNEL_SET(portable);
#if defined(__x86_64__)
constexpr KernelSet kAvx2 = SHARDMESH_KERNEL_SET(avx2);
constexpr KernelSet kAvx512 = SHARDMESH_KERNEL_SET(avx512);
#if SHARDMESH_AMX
constexpr KernelSet kAmx = SHARDMESH_KERNEL_SET(amx);
#endif
#endif
#undef SHARDMESH_KERNEL_SET

const KernelSet* refuse(const char** why, const char* reason) {
  if (why) *why = reason;
  return nullptr;
}

}  // namespace

const KernelSet* portable_kernel_set() { return &kPortable; }

#if defined(__x86_64__)
const KernelSet* avx2_kernel_set() { return &kAvx2; }
const KernelSet* avx512_kernel_set() { return &kAvx512; }
#else
const KernelSet* avx2_kernel_set() { return nullptr; }
const KernelSet* avx512_kernel_set() { return nullptr; }
#endif
#if defined(__x86_64__) && SHARDMESH_AMX
const KernelSet* amx_kernel_set() { return &kAmx; }
#else
const KernelSet* amx_kernel_set() { return nullptr; }
#endif

// `name`: amx, avx512, avx2, portable, reference, reference-f32, or auto (null means auto) for the fastest CPU set of
// this machine. Never amx: it is faster only while nobody else works on the core (ARCHITECTURE.md).
const KernelSet* find_kernel_set(const char* name, const char** why) {
  const CpuFeatures& cpu = cpu_features();
  if (!name || std::strcmp(name, "auto") == 0) {
    if (cpu.avx512) return avx512_kernel_set();
    if (cpu.avx2) return avx2_kernel_set();
    return portable_kernel_set();
  }
  if (std::strcmp(name, "portable") == 0) return portable_kernel_set();
  if (std::strcmp(name, "reference") == 0) return reference_kernel_set();
  if (std::strcmp(name, "reference-f32") == 0) return reference_f32_kernel_set();
  if (std::strcmp(name, "avx2") == 0) {
    if (!avx2_kernel_set()) return refuse(why, "kernel set avx2 is for x86-64 only; take portable");
    if (!cpu.avx2) return refuse(why, "kernel set avx2 needs AVX2, FMA and F16C of processor and operating system, and this machine lacks one; take portable or auto");
    return avx2_kernel_set();
  }
  if (std::strcmp(name, "avx512") == 0) {
    if (!avx512_kernel_set()) return refuse(why, "kernel set avx512 is for x86-64 only; take portable");
    if (!cpu.avx512)
      return refuse(why, "kernel set avx512 needs AVX-512 F, BW, VL, DQ and VNNI of processor and operating system, and this machine lacks one; take avx2 or auto");
    return avx512_kernel_set();
  }
  if (std::strcmp(name, "amx") == 0) {
    if (!amx_kernel_set()) return refuse(why, "kernel set amx is for x86-64 only, and needs a compiler that knows AMX (gcc 11 or later); take avx512 or auto");
    if (!cpu.amx) return refuse(why, "kernel set amx needs AVX-512 with VNNI, AMX-TILE and AMX-INT8, and a system that lets this process use tiles; take avx512 or auto");
    return amx_kernel_set();
  }
  return refuse(why, "unknown kernel set; known are amx, avx512, avx2, portable, reference, reference-f32 and auto");
}

KvLayout make_kv_layout(KeyType key, ValueType value, int heads, int head_size, int block_tokens) {
  const size_t d = static_cast<size_t>(head_size);
  KvLayout layout{};
  layout.key = key;
  layout.value = value;
  layout.heads = heads;
  layout.head_size = head_size;
  layout.block_tokens = block_tokens;
  layout.key_bytes = 16 * d * (key == KeyType::Int8 ? 1 : key == KeyType::F16 ? 2 : 4);
  layout.value_bytes = 16 * d * (value == ValueType::Int8 ? 1 : value == ValueType::F16 ? 2 : 4);
  layout.scale_bytes = (key == KeyType::Int8 ? 64 : 0) + (value == ValueType::Int8 ? 64 : 0);
  layout.subblock_bytes = layout.key_bytes + layout.value_bytes + layout.scale_bytes;
  layout.head_bytes = layout.subblock_bytes * static_cast<size_t>(block_tokens / 16);
  layout.block_bytes = layout.head_bytes * static_cast<size_t>(heads);
  return layout;
}

void flush_denormals() {
#if defined(__SSE__)
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  _mm_setcsr(_mm_getcsr() | kFlushToZero | kDenormalsAreZero);
#elif defined(__aarch64__)
  uint64_t fpcr;
  __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
  fpcr |= uint64_t{1} << 24;  // FZ: operands and results
  __asm__ volatile("msr fpcr, %0" : : "r"(fpcr));
#else
#error "flush_denormals: say how this processor flushes denormals; without it the bits differ from other machines"
#endif
}

}  // namespace shardmesh
