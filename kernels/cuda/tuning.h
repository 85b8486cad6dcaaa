// Numbers of launches that change no bit, by card and shape: read once when an executor is made, from the file that `shardmesh tune` left, then from the table that is
// built in (tuning_table.h says what is in either).
#pragma once
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../include/program.h"
#include "../runner/json.h"
#include "product_plan.h"
#include "runtime.h"
#include "tuning_table.h"

namespace shardmesh::cuda {

struct ProductTuning {
  int decode_tokens_max;  // for more tokens the prefill product is taken in place of the decode product
  int decode_tiles;       // tiles of 8 tokens that a block of linear_decode walks at most: 1, 2 or 4
};
struct AttentionTuning {
  int split_rows_max;  // a sequence with at most this many rows in a step has its context split over the card
  int warps;           // of a multiprocessor, which share the work list
};

// What `shardmesh tune` chooses from, and what tests hold against the reference.
constexpr int kDecodeTokensMaxChoices[] = {8, 16, 32, 64, 128}, kDecodeTilesChoices[] = {1, 2, 4}, kSplitRowsChoices[] = {1, 4, 8, 16, 32}, kAttentionWarpsChoices[] = {4, 8, 16, 32};
constexpr int kFusedTokensChoices[] = {0, 1, 2, 4, kFusedTokensMax};
constexpr Edges kEdgesChoices[] = {Edges::Plain, Edges::Programmatic};
// What launches of few rows do beside products of one input: what follows them too (operations.h, Then), in the block that comes last, or only the sum of a residual.
enum class Fusion { Whole, Products };
constexpr Fusion kFusionChoices[] = {Fusion::Whole, Fusion::Products};
constexpr Products kProducts[] = {Products::Quantised, Products::Float, Products::Bf16};

inline const char* name_of(Edges edges) { return edges == Edges::Programmatic ? "programmatic" : "plain"; }
inline const char* name_of(Fusion fusion) { return fusion == Fusion::Whole ? "whole" : "products"; }
inline const char* name_of(Products products) { return products == Products::Quantised ? "quantised" : products == Products::Float ? "float" : "bf16"; }

struct TuningRows {
  struct ProductRow {
    std::optional<TensorType> type;
    std::optional<Products> arithmetic;
    std::optional<int64_t> bytes_max;
    ProductTuning tuning;
  };
  struct AttentionRow {
    std::optional<int> head_size;
    AttentionTuning tuning;
  };
  std::optional<int> sm;
  std::string card;      // "": any
  std::string measured;  // "": by nobody
  std::vector<ProductRow> products;
  std::vector<AttentionRow> attention;
  std::optional<int> fused_tokens_max;  // decode steps of at most so many rows take launches that do several operations; none: the next card's
  std::optional<Fusion> fusion;         // of those launches; none: the next card's
  std::optional<Edges> edges;  // of the graphs of steps, where the card knows others than plain ones; none: the next card's
};

// Throws std::runtime_error naming the field, its value and the limit.
inline std::vector<TuningRows> parse_tuning(const std::string& text) {
  const Json json = Json::parse(text, "tuning");
  json.at("version").integer(1, 1);
  const auto optional = [](const Json& value, int64_t max) { return value.is_null() ? std::optional<int64_t>() : value.integer(1, max); };
  std::vector<TuningRows> all;
  const Json& cards = json.at("cards");
  for (size_t i = 0; i < cards.size(); i++) {
    const Json& card = cards[i];
    TuningRows rows;
    if (const auto sm = optional(card.at("sm"), 1000)) rows.sm = static_cast<int>(*sm);
    if (!card.at("card").is_null()) rows.card = card.at("card").text();
    if (!card.at("measured").is_null()) rows.measured = card.at("measured").text();
    const Json& products = card.at("products");
    for (size_t p = 0; p < products.size(); p++) {
      const Json& row = products[p];
      TuningRows::ProductRow made{{}, {}, optional(row.at("bytesMax"), int64_t{1} << 50), {static_cast<int>(row.at("decodeTokensMax").integer(1, 1024)), static_cast<int>(row.at("decodeTiles").integer(1, 4))}};
      if (const int tiles = made.tuning.decode_tiles; tiles & (tiles - 1)) row.at("decodeTiles").fail(std::to_string(tiles) + " is not 1, 2 or 4");
      TensorType type;
      if (!row.at("type").is_null()) {
        if (!tensor_type_of(row.at("type").text(), &type)) row.at("type").fail("unknown type '" + row.at("type").text() + "'");
        made.type = type;
      }
      if (const Json* arithmetic = row.find("arithmetic"); arithmetic && !arithmetic->is_null()) {
        for (const Products products : kProducts)
          if (arithmetic->text() == name_of(products)) made.arithmetic = products;
        if (!made.arithmetic) arithmetic->fail("'" + arithmetic->text() + "' is not quantised, float or bf16");
      }
      rows.products.push_back(made);
    }
    const Json& attention = card.at("attention");
    for (size_t a = 0; a < attention.size(); a++) {
      const Json& row = attention[a];
      TuningRows::AttentionRow made{{}, {static_cast<int>(row.at("splitRowsMax").integer(0, 65535)), static_cast<int>(row.at("warps").integer(1, 64))}};
      if (const auto size = optional(row.at("headSize"), 1024)) made.head_size = static_cast<int>(*size);
      rows.attention.push_back(made);
    }
    if (const Json* fused = card.find("fusedTokensMax"); fused && !fused->is_null()) rows.fused_tokens_max = static_cast<int>(fused->integer(0, kFusedTokensMax));
    if (const Json* fusion = card.find("fusion"); fusion && !fusion->is_null()) {
      for (const Fusion choice : kFusionChoices)
        if (fusion->text() == name_of(choice)) rows.fusion = choice;
      if (!rows.fusion) fusion->fail("'" + fusion->text() + "' is neither whole nor products");
    }
    if (const Json* edges = card.find("graphEdges"); edges && !edges->is_null()) {
      for (const Edges choice : kEdgesChoices)
        if (edges->text() == name_of(choice)) rows.edges = choice;
      if (!rows.edges) edges->fail("'" + edges->text() + "' is neither plain nor programmatic");
    }
    all.push_back(std::move(rows));
  }
  return all;
}

class Tuning {
 public:
  // `file`: what `shardmesh tune` wrote, or "". Throws std::runtime_error when it cannot be read.
  Tuning(int sm, const std::string& card, const std::string& file) {
    for (const std::string& text : {file, std::string(kTuningTable)}) {
      if (text.empty()) continue;
      for (TuningRows& rows : parse_tuning(text))
        if ((!rows.sm || *rows.sm == sm) && (rows.card.empty() || rows.card == card)) fitting_.push_back(std::move(rows));
    }
  }

  // `bytes`: of the packed matrix.
  ProductTuning product(TensorType type, Products arithmetic, int64_t bytes) const {
    for (const TuningRows& rows : fitting_)
      for (const TuningRows::ProductRow& row : rows.products)
        if ((!row.type || *row.type == type) && (!row.arithmetic || *row.arithmetic == arithmetic) && (!row.bytes_max || bytes <= *row.bytes_max)) return row.tuning;
    throw std::runtime_error("tuning: no row fits every product");
  }
  AttentionTuning attention(int head_size) const {
    for (const TuningRows& rows : fitting_)
      for (const TuningRows::AttentionRow& row : rows.attention)
        if (!row.head_size || *row.head_size == head_size) return row.tuning;
    throw std::runtime_error("tuning: no row fits every head size");
  }
  int fused_tokens_max() const {
    for (const TuningRows& rows : fitting_)
      if (rows.fused_tokens_max) return *rows.fused_tokens_max;
    return kFusedTokensMax;
  }
  Fusion fusion() const {
    for (const TuningRows& rows : fitting_)
      if (rows.fusion) return *rows.fusion;
    return Fusion::Whole;
  }
  Edges edges() const {
    for (const TuningRows& rows : fitting_)
      if (rows.edges) return *rows.edges;
    return Edges::Plain;
  }

 private:
  std::vector<TuningRows> fitting_;
};

}  // namespace shardmesh::cuda
