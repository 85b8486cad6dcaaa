#include "links.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <utility>

#include "channel.h"
#include "mailbox.h"
#include "segment.h"
#include "stage_exchange.h"
#include "tcp_group.h"

namespace shardmesh {
namespace {

// What one source may have waiting. A rank can be one exchange ahead, and its subtrees may outnumber ours; hidden frames
// (pieces of a step) wait at most as deep as the pipeline.
constexpr size_t kExchangesWaitingMax = 16;
constexpr size_t kHiddenWaitingMax = 128;
constexpr size_t kTokensWaitingMax = 4096;
constexpr size_t kWaitingBytesMin = size_t{1} << 20;
constexpr size_t kFramesWaitingMax = 65536;

size_t waiting_bytes(size_t frame_bytes, size_t frames) { return std::max(kWaitingBytesMin, frame_bytes * frames); }

struct Peer {
  PeerAddress address{};
  SegmentView segment;                       // shm
  TcpPeer* tcp = nullptr;                    // tcp
  std::unique_ptr<Mailbox> exchange_frames;  // tcp and host, ranks of the own stage
  std::unique_ptr<Mailbox> channel_frames;   // ranks that send hidden states or sampled ids here
  std::unique_ptr<TensorLink> to, from;
};

class WorkerLinks final : public Links {
 public:
  WorkerLinks(const LinksOptions& options, FrameOut frame_out) : options_(options), frame_out_(std::move(frame_out)) {
    segment_layout(options_, options_.self, options_.exchange_bytes);
    if (peer_index(options_, options_.self) < 0) throw std::runtime_error("links: " + peer_name(options_.self) + " is outside the mesh");
  }

  Segment open_segment() override {
    if (!own_) own_ = SegmentView::create(options_);
    return Segment{own_.header().pid, own_.fd(), own_.layout().bytes};
  }

  void connect(const std::vector<PeerLink>& links) override {
    if (connected_) throw std::runtime_error("links: connected already; a new epoch needs new links");
    open_segment();
    std::vector<Peer> peers(static_cast<size_t>(peer_count(options_)));
    for (size_t index = 0; index < peers.size(); index++) peers[index].address = peer_at(options_, static_cast<int>(index));

    std::vector<const PeerLink*> given(peers.size(), nullptr);
    for (const PeerLink& link : links) {
      const int index = peer_index(options_, link.peer);
      if (index < 0) throw std::runtime_error("links: " + peer_name(link.peer) + " is outside the mesh");
      if (given[static_cast<size_t>(index)] != nullptr) throw std::runtime_error("links: " + peer_name(link.peer) + " is given twice");
      given[static_cast<size_t>(index)] = &link;
    }
    for (size_t index = 0; index < peers.size(); index++) attach(&peers[index], static_cast<int>(index), given[index]);
    peers_ = std::move(peers);
    for (size_t index = 0; index < peers_.size(); index++) make_channels(&peers_[index], static_cast<int>(index));
    make_exchange();
    connected_ = true;
  }

  Exchange* exchange() override { return exchange_.get(); }
  TensorLink* to(PeerAddress peer) override { return find(peer) == nullptr ? nullptr : find(peer)->to.get(); }
  TensorLink* from(PeerAddress peer) override { return find(peer) == nullptr ? nullptr : find(peer)->from.get(); }

  bool deliver(PeerAddress source, const FrameKey& key, int rows, const void* data, size_t bytes) override {
    Mailbox* mailbox = mailbox_for(source, key.kind);
    const PutResult result = mailbox == nullptr ? PutResult::Full : mailbox->put(key, rows, data, bytes);
    switch (result) {
      case PutResult::Kept: return true;
      case PutResult::Late: late_.fetch_add(1, std::memory_order_relaxed); return false;
      case PutResult::Duplicate: duplicate_.fetch_add(1, std::memory_order_relaxed); return false;
      case PutResult::Full: refused_.fetch_add(1, std::memory_order_relaxed); return false;
    }
    return false;
  }

  void abort() override {
    aborted_.store(true);
    if (tcp_) tcp_->wake();
    for (Peer& peer : peers_) {
      if (peer.exchange_frames) peer.exchange_frames->wake();
      if (peer.channel_frames) peer.channel_frames->wake();
    }
  }

  LinkCounters counters() const override { return LinkCounters{refused_.load(), late_.load(), duplicate_.load()}; }
  std::string problem() const override { return problem_; }

 private:
  Peer* find(PeerAddress address) {
    const int index = peer_index(options_, address);
    return index < 0 || peers_.empty() ? nullptr : &peers_[static_cast<size_t>(index)];
  }

  bool same_stage(PeerAddress peer) const { return peer.stage == options_.self.stage && !(peer == options_.self); }

  size_t channel_bytes(ChannelKind kind) const { return kind == ChannelKind::Hidden ? options_.hidden_bytes : options_.tokens_bytes; }

  void attach(Peer* peer, int index, const PeerLink* link) {
    if (peer->address == options_.self) return;
    const ChannelKind inbound = channel_kind(options_, peer->address, options_.self);
    const ChannelKind outbound = channel_kind(options_, options_.self, peer->address);
    if (!same_stage(peer->address) && inbound == ChannelKind::None && outbound == ChannelKind::None) return;
    if (link == nullptr) throw std::runtime_error("links: no link to " + peer_name(peer->address) + " is given, but frames travel there (peer " + std::to_string(index) + ")");
    if (link->shm) peer->segment = SegmentView::attach(options_, *link);
    if (!link->shm && same_stage(peer->address))
      peer->exchange_frames = std::make_unique<Mailbox>(waiting_bytes(options_.exchange_bytes, kExchangesWaitingMax), kFramesWaitingMax);
    if (inbound != ChannelKind::None)
      peer->channel_frames =
          std::make_unique<Mailbox>(waiting_bytes(channel_bytes(inbound), inbound == ChannelKind::Hidden ? kHiddenWaitingMax : kTokensWaitingMax), kFramesWaitingMax);
    if (!link->tcp) return;
    if (!(link->tcp->peer() == peer->address)) throw std::runtime_error("links: the connection to " + peer_name(peer->address) + " leads to " + peer_name(link->tcp->peer()));
    link->tcp->limit_payload(std::max({exchange_bytes_max(), options_.hidden_bytes, options_.tokens_bytes}));
    if (!tcp_) tcp_ = std::make_unique<TcpGroup>(aborted_, &problem_);
    peer->tcp = tcp_->add({link->tcp, peer->exchange_frames.get(), peer->channel_frames.get(), inbound == ChannelKind::Hidden ? FrameKind::Hidden : FrameKind::Tokens});
  }

  // Ranks may differ in what they publish; pieces keep the largest near the own one (kExchangePieceBytes of the runner).
  size_t exchange_bytes_max() const { return std::max(options_.exchange_bytes * 16, kWaitingBytesMin); }

  void make_channels(Peer* peer, int index) {
    const auto context = [&](ChannelKind kind) {
      return ChannelContext{peer->address, peer_index(options_, options_.self), index, kind == ChannelKind::Hidden ? FrameKind::Hidden : FrameKind::Tokens, own_, aborted_, &problem_};
    };
    const ChannelKind inbound = channel_kind(options_, peer->address, options_.self);
    const ChannelKind outbound = channel_kind(options_, options_.self, peer->address);
    if (inbound != ChannelKind::None) {
      if (peer->tcp != nullptr)
        peer->from = std::make_unique<TcpReceiver>(tcp_.get(), peer->tcp, &problem_);
      else if (peer->segment)
        peer->from = std::make_unique<ShmReceiver>(context(inbound), peer->segment, peer->channel_frames.get());
      else
        peer->from = std::make_unique<HostReceiver>(context(inbound), peer->channel_frames.get());
    }
    if (outbound != ChannelKind::None) {
      if (peer->tcp != nullptr)
        peer->to = std::make_unique<TcpSender>(tcp_.get(), peer->tcp, outbound == ChannelKind::Hidden ? FrameKind::Hidden : FrameKind::Tokens, channel_bytes(outbound), &problem_);
      else if (peer->segment)
        peer->to = std::make_unique<ShmSender>(context(outbound), peer->segment);
      else
        peer->to = std::make_unique<HostSender>(context(outbound), frame_out_, channel_bytes(outbound));
    }
  }

  void make_exchange() {
    const int ranks = options_.ranks_per_stage[static_cast<size_t>(options_.self.stage)];
    if (ranks < 2) return;
    std::vector<ExchangePeer> group;
    for (int rank = 0; rank < ranks; rank++) {
      const Peer* peer = find(PeerAddress{options_.self.stage, rank});
      group.push_back(ExchangePeer{peer->address, peer->segment ? &peer->segment : nullptr, peer->exchange_frames.get(), peer->tcp});
    }
    exchange_ = std::make_unique<StageExchange>(options_.self, own_, std::move(group), frame_out_, tcp_.get(), aborted_, &problem_);
  }

  // Null: this source may not send frames of this kind through the host.
  Mailbox* mailbox_for(PeerAddress source, FrameKind kind) {
    Peer* peer = find(source);
    if (peer == nullptr || peer->segment || peer->tcp != nullptr) return nullptr;
    switch (kind) {
      case FrameKind::Reduce:
      case FrameKind::Rows:
      case FrameKind::Logits: return peer->exchange_frames.get();
      case FrameKind::Hidden:
      case FrameKind::Tokens: {
        const ChannelKind inbound = channel_kind(options_, source, options_.self);
        return inbound == (kind == FrameKind::Hidden ? ChannelKind::Hidden : ChannelKind::Tokens) ? peer->channel_frames.get() : nullptr;
      }
    }
    return nullptr;
  }

  const LinksOptions options_;
  const FrameOut frame_out_;
  SegmentView own_;
  std::unique_ptr<TcpGroup> tcp_;
  std::vector<Peer> peers_;
  std::unique_ptr<StageExchange> exchange_;
  bool connected_ = false;
  std::atomic<bool> aborted_{false};
  std::atomic<uint64_t> refused_{0}, late_{0}, duplicate_{0};
  std::string problem_;
};

}  // namespace

std::unique_ptr<Links> make_links(const LinksOptions& options, FrameOut frame_out) { return std::make_unique<WorkerLinks>(options, std::move(frame_out)); }

}  // namespace shardmesh
