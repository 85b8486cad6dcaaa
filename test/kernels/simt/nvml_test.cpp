// nvml_test BUS_ID...    what kernels/cuda/nvml.cpp finds out of each card, a line each: "DRIVER, POWER W"
#include <cstdio>

#include "../../../kernels/cuda/nvml.h"

int main(int argc, char** argv) {
  for (int i = 1; i < argc; i++) {
    const shardmesh::cuda::ManagementFacts facts = shardmesh::cuda::management_facts(argv[i]);
    std::printf("%s, %g W\n", facts.driver.empty() ? "unknown" : facts.driver.c_str(), facts.power_watts);
  }
}
