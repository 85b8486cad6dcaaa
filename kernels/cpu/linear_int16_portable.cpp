#include "weight_lanes_portable.h"

#include "linear_lanes16.h"
#include "operations.h"

namespace shardmesh::portable {

bool quantize_int16(const Activations& in, Part part) { return quantize_each<Lanes16, 2>(in, part, Lanes16::quantize_group<2>); }
void linear_int16(const LinearArguments& arguments, Part part) { multiply<Lanes16, 2>(arguments, part); }

}  // namespace shardmesh::portable
