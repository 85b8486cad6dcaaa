// NativeTcp of kernels/binding-types.ts over TcpEndpoint.
#include <napi.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <utility>

#include "../links/tcp_connection.h"
#include "../links/tcp_endpoint.h"
#include "values.h"

namespace shardmesh::binding {
namespace {

constexpr napi_type_tag kTcpTag = {0x5d2ab2f3c7f14f0eull, 0x9c1be6d70a84a911ull};

class TcpWrap : public Napi::ObjectWrap<TcpWrap> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "NativeTcp",
                       {
                           InstanceAccessor<&TcpWrap::port>("port"),
                           InstanceMethod<&TcpWrap::meet>("meet"),
                           InstanceMethod<&TcpWrap::counters>("counters"),
                           InstanceMethod<&TcpWrap::close>("close"),
                       });
  }

  explicit TcpWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<TcpWrap>(info) {
    guarded(info.Env(), [&] {
      const std::string host = text_of(info[0], "host");
      state_->endpoint = std::make_unique<TcpEndpoint>(host, static_cast<int>(integer_of(info[1], "port", 0, 65535)));
    });
    info.This().As<Napi::Object>().TypeTag(&kTcpTag);
  }

  ~TcpWrap() override {
    if (state_->endpoint) state_->endpoint->close();
  }

  std::shared_ptr<TcpConnection> take(PeerAddress peer) {
    std::vector<std::shared_ptr<TcpConnection>>& met = state_->connections;
    const auto found = std::find_if(met.begin(), met.end(), [&](const std::shared_ptr<TcpConnection>& one) { return one->peer() == peer; });
    if (found == met.end())
      throw std::runtime_error("there is no tcp connection with stage " + std::to_string(peer.stage) + " rank " + std::to_string(peer.rank) + "; meet it first");
    std::shared_ptr<TcpConnection> connection = std::move(*found);
    met.erase(found);
    return connection;
  }

 private:
  // A meeting on its way keeps it. `connections` belongs to the event loop.
  struct State {
    std::unique_ptr<TcpEndpoint> endpoint;
    std::vector<std::shared_ptr<TcpConnection>> connections;
  };

  Napi::Value port(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), state_->endpoint->port()); }

  Napi::Value meet(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Napi::Object o = object_of(info[0], "meeting");
      struct Work {
        std::shared_ptr<State> state;
        TcpMeeting meeting;
        std::vector<std::shared_ptr<TcpConnection>> connections;
      };
      auto work = std::make_shared<Work>();
      work->state = state_;
      TcpMeeting& meeting = work->meeting;
      meeting.self = address_of(o.Get("self"), "meeting.self");
      meeting.epoch = static_cast<uint32_t>(integer_of(o.Get("epoch"), "meeting.epoch", 0, 0xffffffffll));
      meeting.timeout_ms = integer_of(o.Get("timeoutMs"), "meeting.timeoutMs", 1, 3'600'000);
      const Napi::Uint8Array key = bytes_of(o.Get("key"), "meeting.key");
      if (key.ByteLength() != meeting.key.size()) throw std::runtime_error("meeting.key has " + std::to_string(key.ByteLength()) + " bytes, needed are 32");
      std::copy_n(key.Data(), meeting.key.size(), meeting.key.begin());
      const Napi::Array peers = array_of(o.Get("peers"), "meeting.peers");
      for (uint32_t i = 0; i < peers.Length(); i++) {
        const std::string name = "meeting.peers[" + std::to_string(i) + "]";
        const Napi::Object item = object_of(peers.Get(i), name);
        meeting.peers.push_back({address_of(item.Get("peer"), name + ".peer"), text_of(item.Get("address"), name + ".address")});
      }
      state_->connections.clear();
      return PromiseWork::start(
          info.Env(), [work] { work->connections = work->state->endpoint->meet(work->meeting); },
          [work](Napi::Env env) -> Napi::Value {
            work->state->connections = std::move(work->connections);
            return env.Undefined();
          });
    });
  }

  Napi::Value counters(const Napi::CallbackInfo& info) {
    const TcpCounters& counters = state_->endpoint->counters();
    Napi::Object object = Napi::Object::New(info.Env());
    const auto set = [&object](const char* name, const std::atomic<uint64_t>& value) { object.Set(name, static_cast<double>(value.load())); };
    set("framesOut", counters.frames_out);
    set("bytesOut", counters.bytes_out);
    set("framesIn", counters.frames_in);
    set("bytesIn", counters.bytes_in);
    set("corrupt", counters.corrupt);
    set("refused", counters.refused);
    return object;
  }

  void close(const Napi::CallbackInfo&) {
    state_->endpoint->close();
    state_->connections.clear();
  }

  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace

Napi::Function tcp_class(Napi::Env env) { return TcpWrap::define(env); }

std::shared_ptr<TcpConnection> take_tcp_connection(const Napi::Value& tcp, PeerAddress peer) {
  if (!tcp.IsObject() || !tcp.As<Napi::Object>().CheckTypeTag(&kTcpTag)) throw std::runtime_error("a peer of the tcp driver needs the NativeTcp that met it");
  return TcpWrap::Unwrap(tcp.As<Napi::Object>())->take(peer);
}

}  // namespace shardmesh::binding
