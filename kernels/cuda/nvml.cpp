#include "nvml.h"

#include <dlfcn.h>

namespace shardmesh::cuda {
namespace {

// nvml.h of the driver, as far as it is used here. Every call gives 0 when it has succeeded.
using Device = void*;
constexpr unsigned kVersionBytes = 80;

class Library {
 public:
  Library() : handle_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {}
  ~Library() {
    if (handle_) dlclose(handle_);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  // Calls a function by its name; false when it is not there or does not succeed.
  template <typename... Arguments>
  bool call(const char* name, Arguments... arguments) const {
    void* symbol = handle_ ? dlsym(handle_, name) : nullptr;
    return symbol && reinterpret_cast<int (*)(Arguments...)>(symbol)(arguments...) == 0;
  }

 private:
  void* handle_;
};

}  // namespace

ManagementFacts management_facts(const std::string& bus_id) {
  ManagementFacts facts;
  const Library library;
  if (!library.call("nvmlInit_v2")) return facts;
  char version[kVersionBytes] = "";
  if (library.call("nvmlSystemGetDriverVersion", static_cast<char*>(version), kVersionBytes)) facts.driver = version;
  Device device = nullptr;
  unsigned milliwatts = 0;
  if (library.call("nvmlDeviceGetHandleByPciBusId_v2", bus_id.c_str(), &device) && library.call("nvmlDeviceGetPowerManagementLimit", device, &milliwatts)) facts.power_watts = milliwatts / 1000.0;
  library.call("nvmlShutdown");
  return facts;
}

}  // namespace shardmesh::cuda
