#include "linear_avx2.h"
#include "operations.h"

namespace shardmesh::avx2 {

void quantize_int16(const Activations& in, Part part) { quantize_each<2>(in, part, Avx2::quantize_group<2>); }
void linear_int16(const LinearArguments& arguments, Part part) { multiply<Avx2, 2>(arguments, part); }

}  // namespace shardmesh::avx2
