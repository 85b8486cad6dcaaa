// A libnvidia-ml.so.1 with one card, at bus 0000:65:00.0, for the test of kernels/cuda/nvml.cpp.
#include <cstring>

namespace {
int open_count = 0;
int the_card;
}  // namespace

extern "C" {
int nvmlInit_v2() { return open_count++ == 0 ? 0 : 1; }
int nvmlShutdown() { return open_count-- == 1 ? 0 : 1; }
int nvmlSystemGetDriverVersion(char* version, unsigned length) {
  if (length < 11) return 7;
  std::memcpy(version, "580.95.05", 10);
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus_id, void** device) {
  if (std::strcmp(bus_id, "0000:65:00.0") != 0) return 6;
  *device = &the_card;
  return 0;
}
int nvmlDeviceGetPowerManagementLimit(void* device, unsigned* milliwatts) {
  if (device != &the_card) return 2;
  *milliwatts = 700'000;
  return 0;
}
}
