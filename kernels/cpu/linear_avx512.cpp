#include "weight_lanes_avx512.h"

#include "linear_lanes16.h"
#include "operations.h"

namespace shardmesh::avx512 {

void quantize_activations(const Activations& in, Part part) { quantize_each(in, part, Lanes16::quantize_group); }
void linear(const LinearArguments& arguments, Part part) { multiply<Lanes16>(arguments, part); }

}  // namespace shardmesh::avx512
