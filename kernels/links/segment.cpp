#include "segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace shardmesh {
namespace {

constexpr size_t kSegmentBytesMax = size_t{1} << 40;
constexpr size_t kRanksMax = 4096;
constexpr char kMemfdName[] = "shardmesh-links";
constexpr char kMemfdLink[] = "/memfd:shardmesh-links";
constexpr unsigned kNoExecSeal = 0x0008u;  // MFD_NOEXEC_SEAL, Linux 6.3

// Hidden frames are large and consumed in step order: few slots. Sampled ids are small, and a stage may leave many unread while it prefills.
constexpr size_t kHiddenRingBudget = size_t{16} << 20;
constexpr uint32_t kHiddenSlotsMin = 4, kHiddenSlotsMax = 32;
constexpr uint32_t kTokensSlots = 256;

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

std::string system_error(const char* call) { return std::string(call) + ": " + std::strerror(errno); }

uint64_t topology_digest(const LinksOptions& options) {
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a over the rank counts
  const auto mix = [&hash](uint64_t value) {
    for (int i = 0; i < 8; i++) {
      hash ^= (value >> (8 * i)) & 0xff;
      hash *= 0x100000001b3ull;
    }
  };
  mix(static_cast<uint64_t>(options.stages));
  for (const int ranks : options.ranks_per_stage) mix(static_cast<uint64_t>(ranks));
  return hash;
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

[[noreturn]] void refuse(const PeerLink& link, const std::string& why) {
  throw std::runtime_error("shared memory of " + peer_name(link.peer) + " (process " + std::to_string(link.pid) + ", descriptor " + std::to_string(link.fd) +
                           ") cannot be attached: " + why);
}

std::string differs(const char* what, uint64_t found, uint64_t expected) {
  return std::string(what) + " is " + std::to_string(found) + ", expected " + std::to_string(expected);
}

}  // namespace

int peer_count(const LinksOptions& options) {
  int count = 0;
  for (const int ranks : options.ranks_per_stage) count += ranks;
  return count;
}

int peer_index(const LinksOptions& options, PeerAddress address) {
  if (address.stage < 0 || address.stage >= options.stages || address.rank < 0) return -1;
  if (address.rank >= options.ranks_per_stage[static_cast<size_t>(address.stage)]) return -1;
  int index = address.rank;
  for (int stage = 0; stage < address.stage; stage++) index += options.ranks_per_stage[static_cast<size_t>(stage)];
  return index;
}

PeerAddress peer_at(const LinksOptions& options, int index) {
  int stage = 0;
  while (index >= options.ranks_per_stage[static_cast<size_t>(stage)]) index -= options.ranks_per_stage[static_cast<size_t>(stage++)];
  return PeerAddress{stage, index};
}

std::string peer_name(PeerAddress address) { return "stage " + std::to_string(address.stage) + " rank " + std::to_string(address.rank); }

ChannelKind channel_kind(const LinksOptions& options, PeerAddress from, PeerAddress to) {
  if (from == to) return ChannelKind::None;
  const int last = options.stages - 1;
  if (from.stage == last && from.rank == 0 && to.stage == 0) return ChannelKind::Tokens;
  if (to.stage == from.stage + 1 && to.rank % options.ranks_per_stage[static_cast<size_t>(from.stage)] == from.rank) return ChannelKind::Hidden;
  return ChannelKind::None;
}

SegmentLayout segment_layout(const LinksOptions& options, PeerAddress owner, size_t exchange_bytes) {
  const int peers = peer_count(options);
  if (options.stages < 1 || options.ranks_per_stage.size() != static_cast<size_t>(options.stages) || peers < 1 || static_cast<size_t>(peers) > kRanksMax)
    throw std::runtime_error("links: " + std::to_string(options.stages) + " stages with " + std::to_string(peers) + " ranks; 1 to " + std::to_string(kRanksMax) +
                             " ranks and one rank count a stage are possible");
  for (const size_t bytes : {exchange_bytes, options.hidden_bytes, options.tokens_bytes})
    if (bytes > kSegmentBytesMax / (4 * kRanksMax))
      throw std::runtime_error("links: a frame of " + std::to_string(bytes) + " bytes is beyond the limit of " + std::to_string(kSegmentBytesMax / (4 * kRanksMax)) +
                               "; lower --step-tokens-max");

  SegmentLayout layout{};
  layout.exchange_line = kPage;
  layout.sleep_line = layout.exchange_line + sizeof(ExchangeLine);
  layout.channels = layout.sleep_line + sizeof(SleepLine);
  size_t end = round_up(layout.channels + static_cast<size_t>(peers) * sizeof(ChannelLines), kPage);
  for (size_t& block : layout.exchange_block) {
    block = end;
    end += round_up(exchange_bytes, kPage);
  }
  layout.rings.resize(static_cast<size_t>(peers));
  for (int reader = 0; reader < peers; reader++) {
    RingLayout& ring = layout.rings[static_cast<size_t>(reader)];
    ring.kind = channel_kind(options, owner, peer_at(options, reader));
    if (ring.kind == ChannelKind::None) continue;
    ring.payload_bytes = ring.kind == ChannelKind::Hidden ? options.hidden_bytes : options.tokens_bytes;
    ring.slot_bytes = round_up(sizeof(RingSlot) + ring.payload_bytes, kLine);
    ring.slots = kTokensSlots;
    if (ring.kind == ChannelKind::Hidden) {
      ring.slots = kHiddenSlotsMin;
      while (ring.slots < kHiddenSlotsMax && 2 * ring.slots * ring.slot_bytes <= kHiddenRingBudget) ring.slots *= 2;
    }
    ring.offset = end;
    end = round_up(end + ring.slots * ring.slot_bytes, kPage);
  }
  layout.bytes = end;
  return layout;
}

SegmentView::SegmentView(SegmentView&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)), fd_(std::exchange(other.fd_, -1)), exchange_bytes_(other.exchange_bytes_), layout_(std::move(other.layout_)) {}

SegmentView& SegmentView::operator=(SegmentView&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(fd_, other.fd_);
  std::swap(exchange_bytes_, other.exchange_bytes_);
  std::swap(layout_, other.layout_);
  return *this;
}

SegmentView::~SegmentView() {
  if (base_ != nullptr) ::munmap(base_, layout_.bytes);
  if (fd_ >= 0) ::close(fd_);
}

SegmentView SegmentView::create(const LinksOptions& options) {
  SegmentView view;
  view.layout_ = segment_layout(options, options.self, options.exchange_bytes);
  view.exchange_bytes_ = options.exchange_bytes;
  int raw = ::memfd_create(kMemfdName, MFD_CLOEXEC | MFD_ALLOW_SEALING | kNoExecSeal);
  if (raw < 0 && errno == EINVAL) raw = ::memfd_create(kMemfdName, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (raw < 0) throw std::runtime_error("links: " + system_error("memfd_create"));
  FileDescriptor fd(raw);
  if (::ftruncate(fd.get(), static_cast<off_t>(view.layout_.bytes)) != 0)
    throw std::runtime_error("links: a segment of " + std::to_string(view.layout_.bytes) + " bytes: " + system_error("ftruncate"));
  // A peer that reads the mapping can then never meet a page that was cut away.
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) throw std::runtime_error("links: " + system_error("F_ADD_SEALS"));
  void* base = ::mmap(nullptr, view.layout_.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (base == MAP_FAILED) throw std::runtime_error("links: a segment of " + std::to_string(view.layout_.bytes) + " bytes: " + system_error("mmap"));
  ::madvise(base, view.layout_.bytes, MADV_DONTDUMP);
  view.base_ = static_cast<uint8_t*>(base);
  view.fd_ = fd.release();

  SegmentHeader header{};
  header.magic = kSegmentMagic;
  header.version = kSegmentVersion;
  header.header_bytes = sizeof(SegmentHeader);
  header.bytes = view.layout_.bytes;
  header.topology = topology_digest(options);
  header.exchange_bytes = options.exchange_bytes;
  header.hidden_bytes = options.hidden_bytes;
  header.tokens_bytes = options.tokens_bytes;
  header.stage = options.self.stage;
  header.rank = options.self.rank;
  header.pid = ::getpid();
  std::memcpy(view.base_, &header, sizeof header);
  return view;
}

SegmentView SegmentView::attach(const LinksOptions& options, const PeerLink& link) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", link.pid, link.fd);
  char target[128];
  const ssize_t length = ::readlink(path, target, sizeof target - 1);
  if (length < 0)
    refuse(link, system_error("readlink") + (errno == EACCES || errno == EPERM ? " (the workers must run as one user on one host; else use --link grpc)"
                                                                                : " (has the worker ended? it will join again under a new epoch)"));
  target[length] = 0;
  if (std::strncmp(target, kMemfdLink, sizeof kMemfdLink - 1) != 0) refuse(link, std::string("it is ") + target + ", not a links segment");

  FileDescriptor fd(::open(path, O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) refuse(link, system_error("open"));
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) refuse(link, system_error("fstat"));
  const size_t size = static_cast<size_t>(status.st_size);
  if (size != link.bytes) refuse(link, differs("its size in bytes", size, link.bytes));
  if (size < kPage) refuse(link, differs("its size in bytes", size, kPage) + " or more");
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) refuse(link, "it is not sealed against shrinking");

  void* base = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (base == MAP_FAILED) refuse(link, system_error("mmap"));
  SegmentView view;
  view.base_ = static_cast<uint8_t*>(base);
  view.layout_.bytes = size;  // so that a throw below unmaps all of it
  ::madvise(base, size, MADV_DONTDUMP);

  SegmentHeader header;
  std::memcpy(&header, view.base_, sizeof header);
  if (header.magic != kSegmentMagic) refuse(link, differs("its magic", header.magic, kSegmentMagic));
  if (header.version != kSegmentVersion) refuse(link, differs("its layout version", header.version, kSegmentVersion) + "; run one version of shardmesh");
  if (header.header_bytes != sizeof(SegmentHeader)) refuse(link, differs("its header size", header.header_bytes, sizeof(SegmentHeader)));
  if (header.bytes != size) refuse(link, differs("the size in its header", header.bytes, size));
  if (!(PeerAddress{header.stage, header.rank} == link.peer)) refuse(link, "it belongs to " + peer_name({header.stage, header.rank}));
  if (header.pid != link.pid) refuse(link, differs("its owner's process", static_cast<uint64_t>(header.pid), static_cast<uint64_t>(link.pid)));
  if (header.topology != topology_digest(options)) refuse(link, "it was made for another number of stages or ranks");
  if (header.hidden_bytes != options.hidden_bytes) refuse(link, differs("its largest hidden frame", header.hidden_bytes, options.hidden_bytes));
  if (header.tokens_bytes != options.tokens_bytes) refuse(link, differs("its largest tokens frame", header.tokens_bytes, options.tokens_bytes));
  if (header.exchange_bytes > size) refuse(link, differs("its exchange block", header.exchange_bytes, size) + " or less");
  SegmentLayout layout = segment_layout(options, link.peer, header.exchange_bytes);
  if (layout.bytes != size) refuse(link, differs("its size in bytes", size, layout.bytes));
  view.layout_ = std::move(layout);
  view.exchange_bytes_ = header.exchange_bytes;
  return view;
}

}  // namespace shardmesh
