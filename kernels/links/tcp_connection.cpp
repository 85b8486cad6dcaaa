#include "tcp_connection.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "stage_exchange.h"

namespace shardmesh {
namespace {

constexpr size_t kReadBytes = size_t{64} << 10;

void put16(uint8_t* out, uint16_t value) { std::memcpy(out, &value, 2); }
void put32(uint8_t* out, uint32_t value) { std::memcpy(out, &value, 4); }
uint16_t get16(const uint8_t* in) {
  uint16_t value;
  std::memcpy(&value, in, 2);
  return value;
}
uint32_t get32(const uint8_t* in) {
  uint32_t value;
  std::memcpy(&value, in, 4);
  return value;
}
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are little-endian");

}  // namespace

TcpConnection::TcpConnection(int fd, PeerAddress peer, std::unique_ptr<Seal> out, std::unique_ptr<Seal> in, std::shared_ptr<TcpCounters> counters)
    : fd_(fd), peer_(peer), out_(std::move(out)), in_(std::move(in)), counters_(std::move(counters)), inbox_(kReadBytes) {}

TcpConnection::~TcpConnection() { ::close(fd_); }

void TcpConnection::fail(const std::string& why) {
  if (trouble_.empty()) trouble_ = why;
}

void TcpConnection::fail_corrupt(const std::string& why) {
  counters_->corrupt.fetch_add(1, std::memory_order_relaxed);
  fail(why);
  from_ = until_ = 0;
}

void TcpConnection::queue(const FrameKey& key, int rows, const void* data, size_t bytes) {
  if (!trouble_.empty()) return;
  if (!has_unsent()) {
    outbox_.clear();
    sent_ = 0;
  }
  uint8_t header[kTcpHeaderBytes] = {};
  put16(header, static_cast<uint16_t>(key.kind));
  put16(header + 2, key.operation);
  put16(header + 4, key.subtree);
  put32(header + 8, key.step);
  put32(header + 12, static_cast<uint32_t>(rows));
  const size_t at = outbox_.size(), length = kTcpHeaderBytes + bytes + kTagBytes;
  outbox_.resize(at + kTcpPrefixBytes + length);
  uint8_t* prefix = outbox_.data() + at;
  put32(prefix, static_cast<uint32_t>(length));
  if (!out_->seal({prefix, kTcpPrefixBytes}, {header, kTcpHeaderBytes}, {data, bytes}, prefix + kTcpPrefixBytes)) return fail("a frame could not be sealed");
  counters_->frames_out.fetch_add(1, std::memory_order_relaxed);
  counters_->bytes_out.fetch_add(kTcpPrefixBytes + length, std::memory_order_relaxed);
}

void TcpConnection::flush() {
  while (has_unsent() && trouble_.empty()) {
    const ssize_t wrote = ::send(fd_, outbox_.data() + sent_, outbox_.size() - sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (wrote >= 0) {
      sent_ += static_cast<size_t>(wrote);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return;
    } else if (errno != EINTR) {
      fail(std::string("its connection broke: ") + std::strerror(errno));
    }
  }
}

void TcpConnection::read() {
  if (!trouble_.empty()) return;
  if (from_ == until_) from_ = until_ = 0;
  // Room for the whole of the frame that has begun; its length is checked where it is read.
  size_t wanted = kReadBytes;
  if (until_ - from_ >= kTcpPrefixBytes) {
    const size_t whole = kTcpPrefixBytes + get32(inbox_.data() + from_);
    if (whole > payload_bytes_max_ + kTcpFrameOverhead) return;  // take() refuses it
    if (whole > until_ - from_) wanted = std::max(wanted, whole - (until_ - from_));
  }
  if (inbox_.size() - until_ < wanted) {
    std::memmove(inbox_.data(), inbox_.data() + from_, until_ - from_);
    until_ -= from_;
    from_ = 0;
    if (inbox_.size() - until_ < wanted) inbox_.resize(until_ + wanted);
  }
  const ssize_t got = ::recv(fd_, inbox_.data() + until_, inbox_.size() - until_, MSG_DONTWAIT);
  if (got > 0) {
    until_ += static_cast<size_t>(got);
    counters_->bytes_in.fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
  } else if (got == 0) {
    fail(until_ > from_ ? "it closed its connection in the middle of a frame" : "it closed its connection");
  } else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
    fail(std::string("its connection broke: ") + std::strerror(errno));
  }
}

bool TcpConnection::take(TcpFrame* frame) {
  if (until_ - from_ < kTcpPrefixBytes) return false;
  const uint8_t* bytes = inbox_.data() + from_;
  const size_t length = get32(bytes), least = kTcpHeaderBytes + kTagBytes, most = payload_bytes_max_ + least;
  if (length < least || length > most) {
    fail_corrupt("it announced a frame of " + std::to_string(length) + " bytes, possible are " + std::to_string(least) + " to " + std::to_string(most));
    return false;
  }
  if (until_ - from_ < kTcpPrefixBytes + length) return false;
  const size_t sealed = length - kTagBytes;
  if (opened_.size() < sealed) opened_.resize(sealed);
  from_ += kTcpPrefixBytes + length;
  const bool opens = in_->open({bytes, kTcpPrefixBytes}, bytes + kTcpPrefixBytes, sealed, opened_.data());
  const uint16_t kind = opens ? get16(opened_.data()) : 0;
  if (!opens || kind > static_cast<uint16_t>(FrameKind::Tokens)) {
    fail_corrupt("a frame of it does not open: it was changed, repeated or left out on the way");
    return false;
  }
  counters_->frames_in.fetch_add(1, std::memory_order_relaxed);
  const FrameKey key{static_cast<FrameKind>(kind), get32(opened_.data() + 8), get16(opened_.data() + 2), get16(opened_.data() + 4)};
  *frame = {key, static_cast<int>(get32(opened_.data() + 12)), opened_.data() + kTcpHeaderBytes, sealed - kTcpHeaderBytes};
  return true;
}

}  // namespace shardmesh
