// Authenticated encryption for the tcp driver, by the OpenSSL that Node already carries: its functions are looked up in the running process, so the addon links
// nothing and ships no cryptography of its own. Where they are missing (a Node built without OpenSSL) the driver is unavailable and says so.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace shardmesh {

using Key = std::array<uint8_t, 32>;

struct Bytes {
  const void* data;
  size_t size;
};

// Null when the functions are there, else which one is missing.
const char* missing_crypto_function();

// HMAC-SHA-256 of the parts, one after the other.
Key authenticate(const Key& key, std::initializer_list<Bytes> parts);
// In a time that does not depend on where they differ.
bool equal_keys(const uint8_t* a, const Key& b);
// From the kernel. Throws std::runtime_error.
void random_bytes(uint8_t* out, size_t size);

constexpr size_t kTagBytes = 16;

// One direction of one connection: AES-256-GCM under a key of its own, nonces counted, so none comes twice and a frame that is repeated, left out, reordered or
// changed does not open.
//
//   nonce   byte 0: direction   1..3: connection   4..11: counter
class Seal {
 public:
  enum class Direction : uint8_t { FromDialler = 1, FromAnswerer = 2 };

  // Throws std::runtime_error when the cipher cannot be had.
  Seal(const Key& key, Direction direction, uint32_t connection, bool seals);
  Seal(const Seal&) = delete;
  Seal& operator=(const Seal&) = delete;
  ~Seal();

  // Writes header, payload (sealed) and tag to `out`; `prefix` is authenticated but not encrypted. False: the cipher failed.
  bool seal(Bytes prefix, Bytes header, Bytes payload, uint8_t* out);
  // Opens `size` sealed bytes that are followed by their tag. False: not what the other end sealed next; `out` then holds nothing to use.
  bool open(Bytes prefix, const uint8_t* sealed, size_t size, uint8_t* out);

 private:
  void next_nonce();

  void* context_;
  std::array<uint8_t, 12> nonce_{};
  uint64_t counter_ = 0;
};

}  // namespace shardmesh
