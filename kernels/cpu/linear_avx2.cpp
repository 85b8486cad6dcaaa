#include "linear_avx2.h"
#include "operations.h"

namespace shardmesh::avx2 {

bool quantize_int8(const Activations& in, Part part) { return quantize_parts<1>(in, part); }
void linear_int8(const LinearArguments& arguments, Part part) { multiply<Avx2, 1>(arguments, part); }

}  // namespace shardmesh::avx2
