#include "exported_model.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "../../kernels/reference/blocks.h"
#include "../../kernels/runner/json.h"
#include "../kernels/test_matrix.h"

namespace shardmesh {
namespace {

uint64_t hash_of(const std::string& text) {  // FNV-1a
  uint64_t hash = 14695981039346656037ull;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 1099511628211ull;
  return hash;
}

// Scale and minimum of a block of random integers whose values are to lie within +-a, and where in the block they stand; -1: there is none.
struct BlockScales {
  float scale, minimum;
  int scale_at, minimum_at;
};
BlockScales scales_of(TensorType type, float a) {
  switch (type) {
    case TensorType::Q4_0: return {a / 8, 0, 0, -1};
    case TensorType::Q4_1: return {a / 7.5f, -a, 0, 2};
    case TensorType::Q5_0: return {a / 16, 0, 0, -1};
    case TensorType::Q5_1: return {a / 15.5f, -a, 0, 2};
    case TensorType::Q8_0: return {a / 128, 0, 0, -1};
    // Sub-block scales and minima of 6 bits, 32 in the middle; the minimum is subtracted.
    case TensorType::Q4_K: return {2 * a / (15 * 32), a / 32, 0, 2};
    case TensorType::Q5_K: return {2 * a / (31 * 32), a / 32, 0, 2};
    // Sub-block scales of 8 bits, signed, 64 in the middle.
    case TensorType::Q6_K: return {a / (32 * 64), 0, 208, -1};
    default: return {0, 0, -1, -1};
  }
}

void fill_block(TensorType type, float a, float mean, Random random, uint8_t* block) {
  const BlockSize size = block_size(type);
  const auto value = [&] { return mean + a * random.uniform(); };
  const auto put_half = [&](int at, float x) {
    const uint16_t h = float_to_half(x * (1 + 0.25f * random.uniform()));
    if (at >= 0) std::memcpy(block + at, &h, 2);
  };
  if (type == TensorType::F32) {
    const float x = value();
    std::memcpy(block, &x, 4);
  } else if (type == TensorType::F16) {
    const uint16_t h = float_to_half(value());
    std::memcpy(block, &h, 2);
  } else if (type == TensorType::BF16) {
    const float x = value();
    std::memcpy(block, reinterpret_cast<const uint8_t*>(&x) + 2, 2);
  } else {
    const BlockScales scales = scales_of(type, a);
    for (int i = 0; i < size.bytes; i += 8) {
      const uint64_t bits = random.next();
      std::memcpy(block + i, &bits, static_cast<size_t>(size.bytes - i < 8 ? size.bytes - i : 8));
    }
    put_half(scales.scale_at, scales.scale);
    put_half(scales.minimum_at, scales.minimum);
  }
}

ExportedModel read_header(const Json& header) {
  header.at("version").integer(1, 1);
  ExportedModel model;
  model.name = header.at("name").text();
  model.seed = static_cast<uint64_t>(header.at("seed").integer(0, int64_t{1} << 53));
  model.prompt_tokens = static_cast<int>(header.at("promptTokens").integer(1, 65536));
  const Json& tensors = header.at("tensors");
  for (size_t i = 0; i < tensors.size(); i++) {
    ExportedTensor tensor{TensorType::F32, tensors[i].at("rows").integer(1, int64_t{1} << 32), tensors[i].at("columns").integer(1, 1 << 24)};
    if (!tensor_type_of(tensors[i].at("type").text(), &tensor.type)) tensors[i].at("type").fail("unknown type");
    model.tensors.emplace(tensors[i].at("name").text(), tensor);
  }
  return model;
}

void check_slice(const ExportedModel& model, const WeightSlice& slice) {
  const auto found = model.tensors.find(slice.tensor);
  const bool fits = found != model.tensors.end() && found->second.type == slice.type && slice.rows.to <= found->second.rows && slice.columns.to <= found->second.columns;
  if (!fits) throw std::runtime_error("'" + slice.tensor + "' is not a tensor of this model, or a slice of it is larger");
}

}  // namespace

const ExportedCut* ExportedModel::cut_named(const std::string& wanted) const {
  for (const ExportedCut& cut : cuts)
    if (cut.name == wanted) return &cut;
  return nullptr;
}

std::vector<uint8_t> ExportedModel::blocks_of(const WeightSlice& slice) const {
  const ExportedTensor& tensor = tensors.at(slice.tensor);
  const SliceShape shape = slice_shape(slice);
  const BlockSize size = block_size(slice.type);
  const int64_t tensor_blocks = tensor.columns / size.values, first = slice.columns.from / size.values, blocks = shape.row_bytes / size.bytes;
  const bool norm = slice.tensor.size() >= 11 && slice.tensor.compare(slice.tensor.size() - 11, 11, "norm.weight") == 0;
  const float a = slice.use == WeightUse::Vector ? 0.2f : 1.3f / std::sqrt(static_cast<float>(tensor.columns));
  const uint64_t start = hash_of(slice.tensor) ^ seed;
  std::vector<uint8_t> bytes(static_cast<size_t>(shape.rows * shape.row_bytes));
  uint8_t* at = bytes.data();
  for (int64_t row = slice.rows.from; row < slice.rows.to; row++)
    for (int64_t block = first; block < first + blocks; block++, at += size.bytes)
      fill_block(slice.type, a, norm ? 1.0f : 0.0f, Random(start + static_cast<uint64_t>(row * tensor_blocks + block) * 0x632be59bd9b4e019u), at);
  return bytes;
}

ExportedModel read_exported_model(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  std::string line;
  const auto next_line = [&] {
    if (!std::getline(file, line)) throw std::runtime_error(path + ": ends before its programs do");
    return std::string_view(line);
  };
  const Json header = Json::parse(next_line(), path);
  ExportedModel model = read_header(header);
  const Json& cuts = header.at("cuts");
  for (size_t i = 0; i < cuts.size(); i++) {
    ExportedCut cut{cuts[i].at("name").text(), {}};
    const int64_t programs = cuts[i].at("programs").integer(1, kRanksMax);
    for (int64_t p = 0; p < programs; p++) cut.programs.push_back(parse_program(next_line()));
    for (const Program& program : cut.programs)
      for (const WeightSlice& slice : program.weights) check_slice(model, slice);
    model.cuts.push_back(std::move(cut));
  }
  return model;
}

}  // namespace shardmesh
