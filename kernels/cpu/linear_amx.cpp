#include "linear_amx.h"
#include "operations.h"

namespace shardmesh::amx {

bool quantize_int8(const Activations& in, Part part) { return quantize_each<Tiles16, 1>(in, part, Tiles16::quantize_group<1>); }
void linear_int8(const LinearArguments& arguments, Part part) { multiply<Tiles16, 1>(arguments, part); }

}  // namespace shardmesh::amx
