// The addon: NativeAddon of kernels/binding-types.ts.
#include <napi.h>
#include <sched.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "../cpu/cpu_features.h"
#include "../include/arithmetic.h"
#include "../include/executor.h"
#include "../runner/cuda_part.h"
#include "../runner/rope_table.h"
#include "../runner/sampler_math.h"
#include "values.h"

#ifndef SHARDMESH_VERSION
#define SHARDMESH_VERSION "unknown"
#endif

namespace shardmesh::binding {
namespace {

struct AddonData {
  Napi::FunctionReference executor, tcp;
};

// Version of the arithmetic and a hash of what its elementary functions give in this build: a compiler flag that changed a bit changes the digest.
std::string arithmetic_digest() {
  uint64_t hash = 14695981039346656037ull;
  const auto add = [&](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    hash = (hash ^ bits) * 1099511628211ull;
  };
  for (int i = 0; i < 512; i++) {
    add(exp_fixed(-static_cast<float>(i) * 0.16992188f));
    add(log_fixed(0.01f + static_cast<float>(i) * 0.37109375f));
    add(gumbel_noise(noise_bits({0x12345678u, 0x9abcdef0u}, static_cast<uint32_t>(i))));
    add(half_to_float(float_to_half(static_cast<float>(i) * 0.3330078f)));
    double s, c;
    sine_cosine(static_cast<double>(i) * 1.37, &s, &c);
    add(static_cast<float>(s));
    add(static_cast<float>(power(10000.0, -static_cast<double>(i) / 512.0)));
  }
  char text[64];
  snprintf(text, sizeof text, "%s-%016llx", arithmetic_version(), static_cast<unsigned long long>(hash));
  return text;
}

Napi::Value build_info(const Napi::CallbackInfo& info) {
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("version", SHARDMESH_VERSION);
#if defined(__clang__)
  object.Set("compiler", "clang " __clang_version__);
#else
  object.Set("compiler", "gcc " __VERSION__);
#endif
  object.Set("arithmetic", arithmetic_digest());
  return object;
}

const char* huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  std::getline(file, line);
  for (const char* mode : {"always", "madvise", "never"})
    if (line.find(std::string("[") + mode + "]") != std::string::npos) return mode;
  return "unknown";
}

Napi::Value cpu_features_object(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Array isas = Napi::Array::New(env);
  for (const char* name : {"amx", "avx512", "avx2", "portable"}) {
    const char* why = nullptr;
    if (find_kernel_set(name, &why)) isas.Set(isas.Length(), name);
  }
  Napi::Array cores = Napi::Array::New(env);
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int core = 0; core < CPU_SETSIZE; core++)
      if (CPU_ISSET(core, &set)) cores.Set(cores.Length(), core);
  Napi::Object object = Napi::Object::New(env);
  const CpuFeatures& cpu = cpu_features();
  object.Set("model", cpu.model[0] ? cpu.model : cpu.vendor);
  object.Set("isas", isas);
  object.Set("cores", cores);
  object.Set("hugePages", huge_pages());
  return object;
}

Napi::Value cuda_facts_object(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const CudaFacts facts = cuda_facts();
  Napi::Object object = Napi::Object::New(env);
  object.Set("absent", facts.absent.empty() ? env.Null() : Napi::Value(Napi::String::New(env, facts.absent)));
  object.Set("card", env.Null());
  if (!facts.absent.empty()) return object;
  Napi::Object card = Napi::Object::New(env);
  card.Set("name", facts.name);
  card.Set("sm", facts.sm);
  card.Set("memoryBytes", static_cast<double>(facts.memory_bytes));
  card.Set("multiprocessors", facts.multiprocessors);
  card.Set("bandwidthBytes", facts.bandwidth_bytes);
  card.Set("powerWatts", facts.power_watts);
  card.Set("driver", facts.driver);
  object.Set("card", card);
  return object;
}

Napi::Value kv_bytes(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Program program = parse_program(program_json_of(info[0]));
    return Napi::Number::New(info.Env(), static_cast<double>(kv_bytes_per_block(program, static_cast<int>(integer_of(info[1], "blockTokens", 16, 4096)))));
  });
}

Napi::Value create_executor(const Napi::CallbackInfo& info) { return info.Env().GetInstanceData<AddonData>()->executor.New({info[0], info[1]}); }

Napi::Value open_tcp(const Napi::CallbackInfo& info) { return info.Env().GetInstanceData<AddonData>()->tcp.New({info[0], info[1]}); }

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData;
  data->executor = Napi::Persistent(executor_class(env));
  data->tcp = Napi::Persistent(tcp_class(env));
  env.SetInstanceData(data);
  exports.Set("buildInfo", Napi::Function::New(env, build_info, "buildInfo"));
  exports.Set("cpuFeatures", Napi::Function::New(env, cpu_features_object, "cpuFeatures"));
  exports.Set("cudaFacts", Napi::Function::New(env, cuda_facts_object, "cudaFacts"));
  exports.Set("kvBytesPerBlock", Napi::Function::New(env, kv_bytes, "kvBytesPerBlock"));
  exports.Set("createExecutor", Napi::Function::New(env, create_executor, "createExecutor"));
  exports.Set("openTcp", Napi::Function::New(env, open_tcp, "openTcp"));
  exports.Set("kernelTest", kernel_test_object(env));
  return exports;
}

}  // namespace

static Napi::Object register_addon(Napi::Env env, Napi::Object exports) { return init(env, exports); }
NODE_API_MODULE(shardmesh, register_addon)

}  // namespace shardmesh::binding
