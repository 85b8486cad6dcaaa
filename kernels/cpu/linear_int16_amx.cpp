#include "linear_amx.h"
#include "operations.h"

namespace shardmesh::amx {

bool quantize_int16(const Activations& in, Part part) { return quantize_each<Tiles16, 2>(in, part, Tiles16::quantize_group<2>); }
void linear_int16(const LinearArguments& arguments, Part part) { multiply<Tiles16, 2>(arguments, part); }

}  // namespace shardmesh::amx
