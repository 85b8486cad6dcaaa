#include "sampler_passes.h"

namespace shardmesh {
const SamplerLoops& sampler_loops_baseline() { return kPasses; }
}  // namespace shardmesh
