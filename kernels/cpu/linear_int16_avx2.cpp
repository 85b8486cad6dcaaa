#include "linear_avx2.h"
#include "operations.h"

namespace shardmesh::avx2 {

bool quantize_int16(const Activations& in, Part part) { return quantize_parts<2>(in, part); }
void linear_int16(const LinearArguments& arguments, Part part) { multiply<Avx2, 2>(arguments, part); }

}  // namespace shardmesh::avx2
