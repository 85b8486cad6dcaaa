// Rows of the benchmark and the floors that they are held against; printed as a table, and written as JSON for MEASURED.md (test/bench/gpu.mjs).
#pragma once
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "bench_card.h"

namespace shardmesh::bench {

// What limits a kernel, and what its share is of.
enum class Limit { Copy, Int8, None };

struct Row {
  std::string part, what;  // "decode product", "Q4_1 4096 x 16384, 1 token"
  double us = 0;
  double bytes = 0, operations = 0;  // moved and computed by one repetition; 0: not told
  Limit limit = Limit::None;
  std::string skipped;     // why it was not measured
};

struct Ceilings {
  double copy = 0, read = 0, int8 = 0, bf16 = 0;  // bytes and operations a second
};

// A floor of the aims: `value` is null where nothing that it needs was measured.
struct Floor {
  std::string name, unit;
  bool at_least;
  double floor;
  std::optional<double> aim, value;
};

// YYYY-MM-DD
std::string today();

struct Report {
  CardFacts card;
  Ceilings ceilings;
  std::vector<Row> rows;
  std::vector<Floor> floors;

  void add(Row row);  // and prints it
  double share(const Row& row) const;  // of its limit; 0 without one
  const Row* find(const std::string& part, const std::string& what) const;
  void print_floors() const;
  // Throws std::runtime_error when the file cannot be written.
  void write_json(const std::string& path) const;
};

}  // namespace shardmesh::bench
