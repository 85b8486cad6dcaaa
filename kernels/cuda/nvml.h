// What only NVIDIA's management library tells of a card. It comes with the driver and is opened at run time; where it is missing or refuses, the facts are empty.
#pragma once
#include <string>

namespace shardmesh::cuda {

struct ManagementFacts {
  std::string driver;      // "580.95.05"; empty: unknown
  double power_watts = 0;  // most that the card may take; 0: unknown
};

// `bus_id`: "0000:65:00.0", as the CUDA runtime tells it.
ManagementFacts management_facts(const std::string& bus_id);

}  // namespace shardmesh::cuda
