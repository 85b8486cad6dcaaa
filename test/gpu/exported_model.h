// A model as test/gpu/exported-models.ts writes it: shapes, a seed, and the programs of every rank of some cuts. Weights are generated from the seed, block by block by
// its place in the whole tensor, so that every cut has the same model, and nobody needs the memory of a tensor to have a slice of it.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../../kernels/include/program.h"

namespace shardmesh {

struct ExportedTensor {
  TensorType type;
  int64_t rows, columns;  // of the whole tensor; one row: a vector
};

struct ExportedCut {
  std::string name;
  std::vector<Program> programs;  // of all ranks of all stages
};

struct ExportedModel {
  std::string name;
  uint64_t seed;
  int prompt_tokens;  // of the longest prompt that tests give it
  std::map<std::string, ExportedTensor> tensors;
  std::vector<ExportedCut> cuts;

  // Null when the file has no such cut.
  const ExportedCut* cut_named(const std::string& wanted) const;
  // The raw blocks of a slice, as a model file would have them. Values are about 1.3 / sqrt(columns) at most, so that activations keep their size from layer to layer;
  // norms are about 1.
  std::vector<uint8_t> blocks_of(const WeightSlice& slice) const;
};

// Throws std::runtime_error naming the file and what is wrong in it.
ExportedModel read_exported_model(const std::string& path);

}  // namespace shardmesh
