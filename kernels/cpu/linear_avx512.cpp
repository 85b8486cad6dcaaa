#include "weight_lanes_avx512.h"

#include "linear_lanes16.h"
#include "operations.h"

namespace shardmesh::avx512 {

bool quantize_int8(const Activations& in, Part part) { return quantize_each<Lanes16, 1>(in, part, Lanes16::quantize_group<1>); }
void linear_int8(const LinearArguments& arguments, Part part) { multiply<Lanes16, 1>(arguments, part); }

}  // namespace shardmesh::avx512
