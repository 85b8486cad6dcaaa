#include "tcp_endpoint.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <list>
#include <stdexcept>
#include <utility>

#include "segment.h"
#include "tcp_connection.h"
#include "wait.h"

namespace shardmesh {
namespace {

constexpr uint64_t kMagic = 0x7063746873656d73ull;  // "smeshtcp"
constexpr uint32_t kVersion = 1;
constexpr int kBacklog = 128;
constexpr size_t kCallersMax = 64;                  // that have not proved anything yet; the oldest one goes
constexpr int64_t kCallerNs = 2'000'000'000;        // a caller that says nothing for this long is no peer
constexpr int64_t kRedialNs = 50'000'000;

struct Hello {
  uint64_t magic;
  uint32_t version, epoch;
  uint16_t from_stage, from_rank, to_stage, to_rank;
  uint8_t nonce[32];
};
static_assert(sizeof(Hello) == 56);

std::string system_error(const std::string& call) { return call + ": " + std::strerror(errno); }

struct Addresses {
  addrinfo* first = nullptr;
  // Throws naming the address.
  Addresses(const std::string& host, const std::string& port, int flags) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = flags;
    const int error = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &first);
    if (error != 0) throw std::runtime_error(host + ":" + port + ": " + ::gai_strerror(error));
  }
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  ~Addresses() { ::freeaddrinfo(first); }
};

std::pair<std::string, std::string> split(const std::string& host_port) {
  const size_t colon = host_port.rfind(':');
  if (colon == std::string::npos) throw std::runtime_error("'" + host_port + "' is not host:port");
  std::string host = host_port.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return {host, host_port.substr(colon + 1)};
}

bool before(PeerAddress a, PeerAddress b) { return a.stage != b.stage ? a.stage < b.stage : a.rank < b.rank; }

// One socket on its way to becoming a connection.
class Handshake {
 public:
  enum class State { Connecting, AwaitHello, AwaitAnswer, AwaitProof, Done, Failed };

  // As the dialler of `peer`.
  Handshake(const TcpMeeting& meeting, PeerAddress peer, int fd) : meeting_(meeting), peer_(peer), fd_(fd), dialler_(true), state_(State::Connecting), began_(monotonic_ns()) {
    own_ = hello_to(peer);
  }
  // As the answerer of whoever calls.
  Handshake(const TcpMeeting& meeting, int fd) : meeting_(meeting), fd_(fd), dialler_(false), state_(State::AwaitHello), began_(monotonic_ns()) {}
  Handshake(const Handshake&) = delete;
  Handshake& operator=(const Handshake&) = delete;
  ~Handshake() {
    if (fd_ >= 0) ::close(fd_);
  }

  State state() const { return state_; }
  bool dialler() const { return dialler_; }
  PeerAddress peer() const { return peer_; }
  int fd() const { return fd_; }
  int64_t began() const { return began_; }
  const std::string& trouble() const { return trouble_; }
  // True when the other end was there and is not who it should be.
  bool refused() const { return refused_; }
  short events() const { return state_ == State::Connecting ? POLLOUT : POLLIN; }

  // The socket is ready.
  void advance() {
    if (state_ == State::Connecting) {
      int error = 0;
      socklen_t size = sizeof error;
      ::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) return fail(std::strerror(error));
      state_ = State::AwaitAnswer;
      return send(&own_, sizeof own_);
    }
    while (state_ == State::AwaitHello || state_ == State::AwaitAnswer || state_ == State::AwaitProof) {
      const size_t wanted = state_ == State::AwaitHello ? sizeof(Hello) : state_ == State::AwaitAnswer ? sizeof(Hello) + sizeof(Key) : sizeof(Key);
      const ssize_t got = ::recv(fd_, received_ + have_, wanted - have_, MSG_DONTWAIT);
      if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return;
      if (got < 0) return fail(std::strerror(errno));
      if (got == 0) return fail("it closed the connection (it is in another epoch, or does not know this epoch's key)");
      have_ += static_cast<size_t>(got);
      if (have_ < wanted) continue;
      have_ = 0;
      if (state_ == State::AwaitHello) answer();
      else if (state_ == State::AwaitAnswer) check_answer();
      else check_proof();
    }
  }

  std::shared_ptr<TcpConnection> connection(const std::shared_ptr<TcpCounters>& counters) {
    const Hello& dialler = dialler_ ? own_ : other_;
    uint32_t number;
    std::memcpy(&number, dialler.nonce, sizeof number);
    const Key from_dialler = derive("shardmesh tcp key, from dialler"), from_answerer = derive("shardmesh tcp key, from answerer");
    auto out = std::make_unique<Seal>(dialler_ ? from_dialler : from_answerer, dialler_ ? Seal::Direction::FromDialler : Seal::Direction::FromAnswerer, number, true);
    auto in = std::make_unique<Seal>(dialler_ ? from_answerer : from_dialler, dialler_ ? Seal::Direction::FromAnswerer : Seal::Direction::FromDialler, number, false);
    return std::make_shared<TcpConnection>(std::exchange(fd_, -1), peer_, std::move(out), std::move(in), counters);
  }

 private:
  Hello hello_to(PeerAddress to) const {
    const PeerAddress self = meeting_.self;
    Hello hello{kMagic,
                kVersion,
                meeting_.epoch,
                static_cast<uint16_t>(self.stage),
                static_cast<uint16_t>(self.rank),
                static_cast<uint16_t>(to.stage),
                static_cast<uint16_t>(to.rank),
                {}};
    random_bytes(hello.nonce, sizeof hello.nonce);
    return hello;
  }

  Key derive(const char* purpose) const {
    const Hello& dialler = dialler_ ? own_ : other_;
    const Hello& answerer = dialler_ ? other_ : own_;
    return authenticate(meeting_.key, {{purpose, std::strlen(purpose)}, {&dialler, sizeof dialler}, {&answerer, sizeof answerer}});
  }

  // What the other end says it is, against this epoch and this rank.
  bool fits() const {
    const PeerAddress from{other_.from_stage, other_.from_rank}, to{other_.to_stage, other_.to_rank};
    if (other_.magic != kMagic || other_.version != kVersion || other_.epoch != meeting_.epoch || !(to == meeting_.self)) return false;
    return std::any_of(meeting_.peers.begin(), meeting_.peers.end(), [&](const TcpMeeting::Peer& peer) { return peer.address == from; });
  }

  void answer() {
    std::memcpy(&other_, received_, sizeof other_);
    peer_ = {other_.from_stage, other_.from_rank};
    if (!fits() || !before(peer_, meeting_.self)) return refuse("a caller is in another epoch, or no peer");
    own_ = hello_to(peer_);
    const Key proof = derive("shardmesh tcp answerer");
    uint8_t bytes[sizeof(Hello) + sizeof(Key)];
    std::memcpy(bytes, &own_, sizeof own_);
    std::memcpy(bytes + sizeof own_, proof.data(), proof.size());
    state_ = State::AwaitProof;
    send(bytes, sizeof bytes);
  }

  void check_answer() {
    std::memcpy(&other_, received_, sizeof other_);
    const PeerAddress from{other_.from_stage, other_.from_rank};
    if (!fits() || !(from == peer_)) return refuse("another rank or another epoch answers there");
    if (!equal_keys(received_ + sizeof(Hello), derive("shardmesh tcp answerer"))) return refuse("it does not know the key of this epoch");
    const Key proof = derive("shardmesh tcp dialler");
    state_ = State::Done;
    send(proof.data(), proof.size());
  }

  void check_proof() {
    if (!equal_keys(received_, derive("shardmesh tcp dialler"))) return refuse("it does not know the key of this epoch");
    state_ = State::Done;
  }

  // A handshake is smaller than any socket buffer.
  void send(const void* data, size_t size) {
    if (::send(fd_, data, size, MSG_NOSIGNAL | MSG_DONTWAIT) != static_cast<ssize_t>(size)) fail("it does not take the handshake");
  }

  void refuse(const std::string& why) {
    refused_ = true;
    fail(why);
  }
  void fail(const std::string& why) {
    state_ = State::Failed;
    trouble_ = why;
  }

  const TcpMeeting& meeting_;
  PeerAddress peer_{-1, -1};
  int fd_;
  const bool dialler_;
  State state_;
  const int64_t began_;
  Hello own_{}, other_{};
  uint8_t received_[sizeof(Hello) + sizeof(Key)];
  size_t have_ = 0;
  bool refused_ = false;
  std::string trouble_;
};

int open_socket(int family) {
  const int fd = ::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) throw std::runtime_error(system_error("socket"));
  return fd;
}

void send_at_once(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// One peer of a meeting.
struct Seat {
  TcpMeeting::Peer peer;
  bool dials;
  int64_t dial_at = 0;
  bool dialling = false;
  std::shared_ptr<TcpConnection> connection;
  std::string trouble;
};

}  // namespace

TcpEndpoint::TcpEndpoint(const std::string& host, int port) {
  if (missing_crypto_function() != nullptr)
    throw std::runtime_error(std::string("tcp links: this Node carries no OpenSSL with ") + missing_crypto_function() + "; --link grpc does without");
  try {
    const Addresses addresses(host, std::to_string(port), AI_PASSIVE);
    listener_ = open_socket(addresses.first->ai_family);
    const int on = 1;
    ::setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (::bind(listener_, addresses.first->ai_addr, addresses.first->ai_addrlen) != 0) throw std::runtime_error(system_error("bind"));
    if (::listen(listener_, kBacklog) != 0) throw std::runtime_error(system_error("listen"));
    sockaddr_storage bound{};
    socklen_t size = sizeof bound;
    if (::getsockname(listener_, reinterpret_cast<sockaddr*>(&bound), &size) != 0) throw std::runtime_error(system_error("getsockname"));
    port_ = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
    wake_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake_fd_ < 0) throw std::runtime_error(system_error("eventfd"));
  } catch (const std::runtime_error& error) {
    if (listener_ >= 0) ::close(listener_);
    throw std::runtime_error("tcp links cannot listen on " + host + " port " + std::to_string(port) + ": " + error.what());
  }
}

TcpEndpoint::~TcpEndpoint() {
  close();
  const std::lock_guard<std::mutex> lock(meeting_);
  ::close(listener_);
  ::close(wake_fd_);
}

void TcpEndpoint::close() {
  closed_ = true;
  ::eventfd_write(wake_fd_, 1);
}

std::vector<std::shared_ptr<TcpConnection>> TcpEndpoint::meet(const TcpMeeting& meeting) {
  const std::lock_guard<std::mutex> lock(meeting_);
  const int64_t deadline = monotonic_ns() + meeting.timeout_ms * 1'000'000;
  std::vector<Seat> seats;
  for (const TcpMeeting::Peer& peer : meeting.peers) {
    const bool dials = before(meeting.self, peer.address);
    seats.push_back({peer, dials, 0, false, nullptr, dials ? "it has not answered" : "it has not called"});
  }
  std::list<Handshake> handshakes;
  const auto seat_of = [&](PeerAddress address) {
    return std::find_if(seats.begin(), seats.end(), [&](const Seat& seat) { return seat.peer.address == address; });
  };

  const auto dial = [&](Seat& seat, int64_t now) {
    try {
      const auto [host, port] = split(seat.peer.host_port);
      const Addresses addresses(host, port, AI_NUMERICSERV);
      handshakes.emplace_back(meeting, seat.peer.address, open_socket(addresses.first->ai_family));
      send_at_once(handshakes.back().fd());
      if (::connect(handshakes.back().fd(), addresses.first->ai_addr, addresses.first->ai_addrlen) != 0 && errno != EINPROGRESS) {
        const std::string why = std::strerror(errno);
        handshakes.pop_back();
        throw std::runtime_error(why);
      }
      seat.dialling = true;
    } catch (const std::runtime_error& error) {
      seat.trouble = error.what();
      seat.dial_at = now + kRedialNs;
    }
  };

  const auto settle = [&](Handshake& handshake) {  // Done or Failed
    const auto seat = seat_of(handshake.peer());
    if (handshake.state() == Handshake::State::Done) {
      // Who calls again knows better that its last connection is dead.
      seat->connection = handshake.connection(counters_);
    } else {
      if (handshake.refused()) counters_->refused.fetch_add(1, std::memory_order_relaxed);
      if (seat != seats.end() && !handshake.trouble().empty() && (handshake.dialler() || handshake.refused())) seat->trouble = handshake.trouble();
    }
    if (handshake.dialler()) {
      seat->dialling = false;
      seat->dial_at = monotonic_ns() + kRedialNs;
    }
  };

  for (;;) {
    const int64_t now = monotonic_ns();
    const bool complete = std::all_of(seats.begin(), seats.end(), [](const Seat& seat) { return seat.connection != nullptr; });
    if (complete) break;
    if (closed_) throw std::runtime_error("tcp links: closed");
    if (now >= deadline) {
      std::string names;
      for (const Seat& seat : seats)
        if (!seat.connection)
          names += (names.empty() ? "" : ", ") + peer_name(seat.peer.address) + (seat.dials ? " at " + seat.peer.host_port : "") + " (" + seat.trouble + ")";
      throw std::runtime_error("no tcp connection within " + std::to_string(meeting.timeout_ms) + " ms with " + names);
    }
    int64_t next = std::min(deadline, now + 100'000'000);
    for (Seat& seat : seats) {
      if (!seat.dials || seat.dialling || seat.connection) continue;
      if (now >= seat.dial_at) dial(seat, now);
      if (!seat.dialling) next = std::min(next, seat.dial_at);
    }

    std::vector<pollfd> waits{{wake_fd_, POLLIN, 0}, {listener_, POLLIN, 0}};
    for (const Handshake& handshake : handshakes) waits.push_back({handshake.fd(), handshake.events(), 0});
    const timespec limit{static_cast<time_t>(std::max<int64_t>(0, next - now) / 1'000'000'000), static_cast<long>(std::max<int64_t>(0, next - now) % 1'000'000'000)};
    ::ppoll(waits.data(), waits.size(), &limit, nullptr);

    size_t wait = 2;
    for (auto handshake = handshakes.begin(); handshake != handshakes.end(); wait++) {
      if (waits[wait].revents != 0) handshake->advance();
      const bool over = handshake->state() == Handshake::State::Done || handshake->state() == Handshake::State::Failed;
      const bool silent = !handshake->dialler() && monotonic_ns() - handshake->began() > kCallerNs;
      if (over) settle(*handshake);
      else if (silent) counters_->refused.fetch_add(1, std::memory_order_relaxed);
      handshake = over || silent ? handshakes.erase(handshake) : std::next(handshake);
    }
    if (waits[1].revents == 0) continue;
    for (int fd; (fd = ::accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
      send_at_once(fd);
      handshakes.emplace_back(meeting, fd);
      const auto callers = std::count_if(handshakes.begin(), handshakes.end(), [](const Handshake& one) { return !one.dialler(); });
      if (static_cast<size_t>(callers) <= kCallersMax) continue;
      counters_->refused.fetch_add(1, std::memory_order_relaxed);
      handshakes.erase(std::find_if(handshakes.begin(), handshakes.end(), [](const Handshake& one) { return !one.dialler(); }));
    }
  }
  std::vector<std::shared_ptr<TcpConnection>> connections;
  for (Seat& seat : seats) connections.push_back(std::move(seat.connection));
  return connections;
}

}  // namespace shardmesh
