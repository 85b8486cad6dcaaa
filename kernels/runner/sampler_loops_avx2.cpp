#include "sampler_passes.h"

namespace shardmesh {
const SamplerLoops& sampler_loops_avx2() { return kPasses; }
}  // namespace shardmesh
