// A small strict JSON reader (RFC 8259): no comments, no trailing commas, no duplicate keys, depth at most 64. Every access says in its error where in the
// document it happened.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace shardmesh {

class Json {
 public:
  // Throws std::runtime_error with the offset of what is wrong.
  static Json parse(std::string_view text, std::string name);

  bool is_null() const { return type_ == Type::Null; }
  const std::string& path() const { return path_; }

  // Objects. `at` throws when the key is missing, `find` returns null.
  const Json& at(const char* key) const;
  const Json* find(const char* key) const;
  // Arrays.
  size_t size() const;
  const Json& operator[](size_t i) const;

  const std::string& text() const;
  double number() const;
  // Throws unless the value is an integer in [min, max].
  int64_t integer(int64_t min, int64_t max) const;

  // Throws std::runtime_error("<path>: <problem>").
  [[noreturn]] void fail(const std::string& problem) const;

 private:
  enum class Type { Null, Boolean, Number, String, Array, Object };
  friend class JsonParser;

  Type type_ = Type::Null;
  bool boolean_ = false;
  double number_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::vector<std::string> keys_;  // of items_, objects only
  std::string path_;
};

}  // namespace shardmesh
