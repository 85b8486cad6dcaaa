#include "device.h"

#include "cpu_device.h"
#include "cuda_part.h"

namespace shardmesh {

std::unique_ptr<Device> make_device(const Shard& shard, ThreadTeam& team) {
  if (shard.config().kind == "cuda") return make_cuda_device(shard);
  return std::make_unique<CpuDevice>(shard, team);
}

}  // namespace shardmesh
