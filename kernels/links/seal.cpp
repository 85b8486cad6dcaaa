#include "seal.h"

#include <dlfcn.h>
#include <sys/random.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace shardmesh {
namespace {

// Values of OpenSSL's public interface, unchanged since 1.1.
constexpr int kGetTag = 0x10, kSetTag = 0x11;

struct Crypto {
  using Opaque = void*;
  Opaque (*aes_256_gcm)();
  Opaque (*sha256)();
  Opaque (*context_new)();
  void (*context_free)(Opaque);
  int (*control)(Opaque, int, int, void*);
  int (*encrypt_init)(Opaque, Opaque, Opaque, const uint8_t*, const uint8_t*);
  int (*encrypt_update)(Opaque, uint8_t*, int*, const uint8_t*, int);
  int (*encrypt_final)(Opaque, uint8_t*, int*);
  int (*decrypt_init)(Opaque, Opaque, Opaque, const uint8_t*, const uint8_t*);
  int (*decrypt_update)(Opaque, uint8_t*, int*, const uint8_t*, int);
  int (*decrypt_final)(Opaque, uint8_t*, int*);
  uint8_t* (*hmac)(Opaque, const void*, int, const uint8_t*, size_t, uint8_t*, unsigned*);
  const char* missing = nullptr;

  Crypto() {
    find(&aes_256_gcm, "EVP_aes_256_gcm");
    find(&sha256, "EVP_sha256");
    find(&context_new, "EVP_CIPHER_CTX_new");
    find(&context_free, "EVP_CIPHER_CTX_free");
    find(&control, "EVP_CIPHER_CTX_ctrl");
    find(&encrypt_init, "EVP_EncryptInit_ex");
    find(&encrypt_update, "EVP_EncryptUpdate");
    find(&encrypt_final, "EVP_EncryptFinal_ex");
    find(&decrypt_init, "EVP_DecryptInit_ex");
    find(&decrypt_update, "EVP_DecryptUpdate");
    find(&decrypt_final, "EVP_DecryptFinal_ex");
    find(&hmac, "HMAC");
  }

 private:
  template <typename Function>
  void find(Function* function, const char* name) {
    void* symbol = ::dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr && missing == nullptr) missing = name;
    std::memcpy(function, &symbol, sizeof symbol);
  }
};

const Crypto& crypto() {
  static const Crypto found;
  return found;
}

}  // namespace

const char* missing_crypto_function() { return crypto().missing; }

Key authenticate(const Key& key, std::initializer_list<Bytes> parts) {
  std::vector<uint8_t> text;
  for (const Bytes& part : parts) text.insert(text.end(), static_cast<const uint8_t*>(part.data), static_cast<const uint8_t*>(part.data) + part.size);
  Key digest{};
  unsigned size = 0;
  if (crypto().hmac(crypto().sha256(), key.data(), static_cast<int>(key.size()), text.data(), text.size(), digest.data(), &size) == nullptr || size != digest.size())
    throw std::runtime_error("tcp links: HMAC-SHA-256 failed");
  return digest;
}

bool equal_keys(const uint8_t* a, const Key& b) {
  unsigned different = 0;
  for (size_t i = 0; i < b.size(); i++) different |= static_cast<unsigned>(a[i] ^ b[i]);
  return different == 0;
}

void random_bytes(uint8_t* out, size_t size) {
  while (size > 0) {
    const ssize_t got = ::getrandom(out, size, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) throw std::runtime_error(std::string("tcp links: getrandom: ") + std::strerror(errno));
    out += got;
    size -= static_cast<size_t>(got);
  }
}

Seal::Seal(const Key& key, Direction direction, uint32_t connection, bool seals) : context_(crypto().context_new()) {
  nonce_[0] = static_cast<uint8_t>(direction);
  for (int i = 0; i < 3; i++) nonce_[static_cast<size_t>(1 + i)] = static_cast<uint8_t>(connection >> (8 * i));
  const auto init = seals ? crypto().encrypt_init : crypto().decrypt_init;
  if (context_ != nullptr && init(context_, crypto().aes_256_gcm(), nullptr, key.data(), nullptr) == 1) return;
  if (context_ != nullptr) crypto().context_free(context_);
  throw std::runtime_error("tcp links: AES-256-GCM cannot be set up");
}

Seal::~Seal() { crypto().context_free(context_); }

void Seal::next_nonce() {
  for (int i = 0; i < 8; i++) nonce_[static_cast<size_t>(4 + i)] = static_cast<uint8_t>(counter_ >> (8 * i));
  counter_++;
}

bool Seal::seal(Bytes prefix, Bytes header, Bytes payload, uint8_t* out) {
  const Crypto& c = crypto();
  if (payload.size > INT_MAX) return false;
  next_nonce();
  int length = 0;
  uint8_t* tag = out + header.size + payload.size;
  return c.encrypt_init(context_, nullptr, nullptr, nullptr, nonce_.data()) == 1 &&
         c.encrypt_update(context_, nullptr, &length, static_cast<const uint8_t*>(prefix.data), static_cast<int>(prefix.size)) == 1 &&
         c.encrypt_update(context_, out, &length, static_cast<const uint8_t*>(header.data), static_cast<int>(header.size)) == 1 &&
         (payload.size == 0 ||
          c.encrypt_update(context_, out + header.size, &length, static_cast<const uint8_t*>(payload.data), static_cast<int>(payload.size)) == 1) &&
         c.encrypt_final(context_, tag, &length) == 1 && c.control(context_, kGetTag, kTagBytes, tag) == 1;
}

bool Seal::open(Bytes prefix, const uint8_t* sealed, size_t size, uint8_t* out) {
  const Crypto& c = crypto();
  if (size > INT_MAX) return false;
  next_nonce();
  int length = 0;
  std::array<uint8_t, kTagBytes> tag, rest;
  std::memcpy(tag.data(), sealed + size, kTagBytes);
  return c.decrypt_init(context_, nullptr, nullptr, nullptr, nonce_.data()) == 1 &&
         c.decrypt_update(context_, nullptr, &length, static_cast<const uint8_t*>(prefix.data), static_cast<int>(prefix.size)) == 1 &&
         c.decrypt_update(context_, out, &length, sealed, static_cast<int>(size)) == 1 && c.control(context_, kSetTag, kTagBytes, tag.data()) == 1 &&
         c.decrypt_final(context_, rest.data(), &length) == 1;
}

}  // namespace shardmesh
