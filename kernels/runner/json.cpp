#include "json.h"

#include <charconv>
#include <cmath>
#include <stdexcept>

namespace shardmesh {

namespace {
constexpr int kDepthMax = 64;

std::string shortest(double value) {
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  return std::string(buffer, end);
}
}  // namespace

class JsonParser {
 public:
  JsonParser(std::string_view text, std::string name) : text_(text), name_(std::move(name)) {}

  Json document() {
    Json value = parse_value(name_, 0);
    skip_space();
    if (at_ != text_.size()) fail("text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& problem) const { throw std::runtime_error(name_ + ": not JSON at byte " + std::to_string(at_) + ": " + problem); }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) at_++;
  }

  bool take(char c) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    at_++;
    return true;
  }

  void word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) fail("unknown word");
    at_ += expected.size();
  }

  Json parse_value(std::string path, int depth) {
    if (depth > kDepthMax) fail("deeper than " + std::to_string(kDepthMax));
    skip_space();
    if (at_ >= text_.size()) fail("unexpected end");
    Json value;
    value.path_ = std::move(path);
    switch (text_[at_]) {
      case '{': parse_object(&value, depth); break;
      case '[': parse_array(&value, depth); break;
      case '"': value.type_ = Json::Type::String; value.text_ = parse_string(); break;
      case 't': word("true"); value.type_ = Json::Type::Boolean; value.boolean_ = true; break;
      case 'f': word("false"); value.type_ = Json::Type::Boolean; break;
      case 'n': word("null"); break;
      default: value.type_ = Json::Type::Number; value.number_ = parse_number();
    }
    return value;
  }

  void parse_object(Json* value, int depth) {
    value->type_ = Json::Type::Object;
    at_++;
    if (take('}')) return;
    do {
      skip_space();
      if (at_ >= text_.size() || text_[at_] != '"') fail("expected a key");
      std::string key = parse_string();
      for (const std::string& known : value->keys_)
        if (known == key) fail("duplicate key '" + key + "'");
      if (!take(':')) fail("expected ':'");
      value->items_.push_back(parse_value(value->path_ + "." + key, depth + 1));
      value->keys_.push_back(std::move(key));
    } while (take(','));
    if (!take('}')) fail("expected ',' or '}'");
  }

  void parse_array(Json* value, int depth) {
    value->type_ = Json::Type::Array;
    at_++;
    if (take(']')) return;
    do value->items_.push_back(parse_value(value->path_ + "[" + std::to_string(value->items_.size()) + "]", depth + 1));
    while (take(','));
    if (!take(']')) fail("expected ',' or ']'");
  }

  double parse_number() {
    const size_t begin = at_;
    while (at_ < text_.size() && (std::string_view("+-.eE0123456789").find(text_[at_]) != std::string_view::npos)) at_++;
    double number = 0;
    const char* first = text_.data() + begin;
    const char* last = text_.data() + at_;
    const auto result = std::from_chars(first, last, number);
    const size_t digit = *first == '-' ? begin + 1 : begin;
    const bool leading_zero = digit + 1 < at_ && text_[digit] == '0' && text_[digit + 1] >= '0' && text_[digit + 1] <= '9';
    if (first == last || result.ec != std::errc() || result.ptr != last || leading_zero || digit >= at_ || text_[digit] < '0' || text_[digit] > '9') {
      at_ = begin;
      fail("not a number");
    }
    return number;
  }

  unsigned parse_hex4() {
    if (at_ + 4 > text_.size()) fail("short \\u escape");
    unsigned code = 0;
    const auto result = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, code, 16);
    if (result.ptr != text_.data() + at_ + 4) fail("bad \\u escape");
    at_ += 4;
    return code;
  }

  static void append_utf8(std::string* out, unsigned c) {
    if (c < 0x80) {
      out->push_back(static_cast<char>(c));
    } else if (c < 0x800) {
      out->push_back(static_cast<char>(0xc0 | (c >> 6)));
      out->push_back(static_cast<char>(0x80 | (c & 63)));
    } else if (c < 0x10000) {
      out->push_back(static_cast<char>(0xe0 | (c >> 12)));
      out->push_back(static_cast<char>(0x80 | ((c >> 6) & 63)));
      out->push_back(static_cast<char>(0x80 | (c & 63)));
    } else {
      out->push_back(static_cast<char>(0xf0 | (c >> 18)));
      out->push_back(static_cast<char>(0x80 | ((c >> 12) & 63)));
      out->push_back(static_cast<char>(0x80 | ((c >> 6) & 63)));
      out->push_back(static_cast<char>(0x80 | (c & 63)));
    }
  }

  std::string parse_string() {
    std::string out;
    at_++;
    for (;;) {
      if (at_ >= text_.size()) fail("unterminated string");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
      if (c != '\\') {
        out.push_back(c);
        continue;
      }
      if (at_ >= text_.size()) fail("unterminated escape");
      switch (text_[at_++]) {
        case '"': out.push_back('"'); break;
        case '\\': out.push_back('\\'); break;
        case '/': out.push_back('/'); break;
        case 'b': out.push_back('\b'); break;
        case 'f': out.push_back('\f'); break;
        case 'n': out.push_back('\n'); break;
        case 'r': out.push_back('\r'); break;
        case 't': out.push_back('\t'); break;
        case 'u': {
          unsigned code = parse_hex4();
          if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
            at_ += 2;
            const unsigned low = parse_hex4();
            if (low < 0xdc00 || low > 0xdfff) fail("lone surrogate");
            code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
          } else if (code >= 0xd800 && code <= 0xdfff) {
            fail("lone surrogate");
          }
          append_utf8(&out, code);
          break;
        }
        default: fail("unknown escape");
      }
    }
  }

  std::string_view text_;
  std::string name_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text, std::string name) { return JsonParser(text, std::move(name)).document(); }

void Json::fail(const std::string& problem) const { throw std::runtime_error(path_ + ": " + problem); }

const Json* Json::find(const char* key) const {
  if (type_ != Type::Object) fail("expected an object");
  for (size_t i = 0; i < keys_.size(); i++)
    if (keys_[i] == key) return &items_[i];
  return nullptr;
}

const Json& Json::at(const char* key) const {
  const Json* value = find(key);
  if (!value) fail(std::string("'") + key + "' is missing");
  return *value;
}

size_t Json::size() const {
  if (type_ != Type::Array) fail("expected an array");
  return items_.size();
}

const Json& Json::operator[](size_t i) const {
  if (type_ != Type::Array || i >= items_.size()) fail("no element " + std::to_string(i));
  return items_[i];
}

const std::string& Json::text() const {
  if (type_ != Type::String) fail("expected a string");
  return text_;
}

double Json::number() const {
  if (type_ != Type::Number) fail("expected a number");
  return number_;
}

int64_t Json::integer(int64_t min, int64_t max) const {
  const double value = number();
  if (std::nearbyint(value) != value || value < static_cast<double>(min) || value > static_cast<double>(max))
    fail(shortest(value) + " is not an integer in " + std::to_string(min) + ".." + std::to_string(max));
  return static_cast<int64_t>(value);
}

}  // namespace shardmesh
