#include "bench_report.h"

#include <ctime>
#include <stdexcept>

namespace shardmesh::bench {
namespace {

const char* name_of(Limit limit) { return limit == Limit::Copy ? "copy bandwidth" : limit == Limit::Int8 ? "int8 peak" : ""; }

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + "\"";
}

bool met(const Floor& f) { return f.value && (f.at_least ? *f.value >= f.floor : *f.value <= f.floor); }

}  // namespace

std::string today() {
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  return date;
}

double Report::share(const Row& row) const {
  if (row.us <= 0) return 0;
  if (row.limit == Limit::Copy && ceilings.copy > 0) return row.bytes / (row.us * 1e-6) / ceilings.copy;
  if (row.limit == Limit::Int8 && ceilings.int8 > 0) return row.operations / (row.us * 1e-6) / ceilings.int8;
  return 0;
}

void Report::add(Row row) {
  std::printf("%-18s %-52s ", row.part.c_str(), row.what.c_str());
  if (!row.skipped.empty()) std::printf("skip %s", row.skipped.c_str());
  else {
    std::printf("%9.2f us", row.us);
    if (row.bytes > 0) std::printf(" %8.1f GB/s", row.bytes / row.us / 1e3);
    if (row.operations > 0) std::printf(" %8.2f T/s", row.operations / row.us / 1e6);
    if (row.limit != Limit::None) std::printf(" %5.1f %% of %s", 100 * share(row), name_of(row.limit));
  }
  std::printf("\n");
  std::fflush(stdout);
  rows.push_back(std::move(row));
}

const Row* Report::find(const std::string& part, const std::string& what) const {
  for (const Row& row : rows)
    if (row.part == part && row.what == what && row.skipped.empty()) return &row;
  return nullptr;
}

void Report::print_floors() const {
  std::printf("\n%-64s %10s %10s %10s\n", "floor", "wanted", "measured", "");
  for (const Floor& f : floors) {
    std::printf("%-64s %s%8.4g %10s %10s %s\n", f.name.c_str(), f.at_least ? ">=" : "<=", f.floor, f.value ? std::to_string(*f.value).substr(0, 8).c_str() : "-",
                !f.value ? "unmeasured" : card.emulated ? "emulated" : met(f) ? "pass" : "FAIL", f.unit.c_str());
  }
}

void Report::write_json(const std::string& path) const {
  FILE* file = std::fopen(path.c_str(), "w");
  if (!file) throw std::runtime_error(path + ": cannot be written");
  std::fprintf(file, "{\n\"card\": {\"name\": %s, \"sm\": %d, \"multiprocessors\": %d, \"driver\": %s, \"memoryBytes\": %zu, \"l2Bytes\": %zu, \"bandwidthBytes\": %.6g, \"powerWatts\": %.6g, \"emulated\": %s},\n", quoted(card.name).c_str(),
               card.sm, card.multiprocessors, quoted(card.driver).c_str(), card.memory_bytes, card.l2_bytes, card.bandwidth_bytes, card.power_watts, card.emulated ? "true" : "false");
  std::fprintf(file, "\"date\": \"%s\",\n\"ceilings\": {\"copyBytes\": %.6g, \"readBytes\": %.6g, \"int8Operations\": %.6g, \"bf16Operations\": %.6g},\n\"rows\": [\n", today().c_str(), ceilings.copy,
               ceilings.read, ceilings.int8, ceilings.bf16);
  for (size_t i = 0; i < rows.size(); i++) {
    const Row& r = rows[i];
    std::fprintf(file, "{\"part\": %s, \"what\": %s, ", quoted(r.part).c_str(), quoted(r.what).c_str());
    if (r.skipped.empty())
      std::fprintf(file, "\"us\": %.6g, \"bytes\": %.6g, \"operations\": %.6g, \"limit\": %s, \"share\": %.4g", r.us, r.bytes, r.operations, quoted(name_of(r.limit)).c_str(), share(r));
    else std::fprintf(file, "\"skipped\": %s", quoted(r.skipped).c_str());
    std::fprintf(file, "}%s\n", i + 1 < rows.size() ? "," : "");
  }
  std::fprintf(file, "],\n\"floors\": [\n");
  for (size_t i = 0; i < floors.size(); i++) {
    const Floor& f = floors[i];
    const auto optional = [](const std::optional<double>& v) { return v ? std::to_string(*v) : std::string("null"); };
    std::fprintf(file, "{\"name\": %s, \"unit\": %s, \"atLeast\": %s, \"floor\": %.6g, \"aim\": %s, \"value\": %s, \"met\": %s}%s\n", quoted(f.name).c_str(), quoted(f.unit).c_str(),
                 f.at_least ? "true" : "false", f.floor, optional(f.aim).c_str(), optional(f.value).c_str(), !f.value || card.emulated ? "null" : met(f) ? "true" : "false",
                 i + 1 < floors.size() ? "," : "");
  }
  std::fprintf(file, "]\n}\n");
  if (std::fclose(file) != 0) throw std::runtime_error(path + ": cannot be written");
}

}  // namespace shardmesh::bench
