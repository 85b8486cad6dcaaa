// NativeExecutor of kernels/binding-types.ts over the C++ Executor.
#include <napi.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <variant>

#include "../include/executor.h"
#include "values.h"

namespace shardmesh::binding {
namespace {

constexpr int64_t kIntMax = 2147483647;
constexpr const char* kFrameKinds[] = {"reduce", "rows", "logits", "hidden", "tokens"};

struct OutgoingFrame {
  PeerAddress destination;
  FrameKey key;
  int rows;
  size_t gap;                                   // bytes in front of the payload
  std::unique_ptr<std::vector<uint8_t>> bytes;
};
using Event = std::variant<std::vector<StepDone>, StepFailure, OutgoingFrame>;

// What the wrapper, its pending promises and its events share. Everything but `executor` belongs to the event loop.
struct State {
  std::shared_ptr<Executor> executor;
  PeerAddress self{};
  napi_threadsafe_function events = nullptr;
  Napi::FunctionReference on_step, on_frame, on_step_failed;
  bool disposed = false;
};

Napi::Object address_object(Napi::Env env, PeerAddress address) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("stage", address.stage);
  object.Set("rank", address.rank);
  return object;
}

// Outputs as numbers: slot, token, has a log-probability (0, 1), log-probability, count of candidates, then token and log-probability of each candidate.
Napi::Float64Array output_numbers(Napi::Env env, const std::vector<OutputResult>& outputs) {
  size_t count = 0;
  for (const OutputResult& r : outputs) count += 5 + 2 * r.top.size();
  Napi::Float64Array numbers = Napi::Float64Array::New(env, count);
  double* to = numbers.Data();
  for (const OutputResult& r : outputs) {
    *to++ = r.slot;
    *to++ = r.token;
    *to++ = r.has_logprob ? 1 : 0;
    *to++ = static_cast<double>(r.logprob);
    *to++ = static_cast<double>(r.top.size());
    for (const auto& [token, logprob] : r.top) {
      *to++ = token;
      *to++ = static_cast<double>(logprob);
    }
  }
  return numbers;
}

Napi::Object timings_object(Napi::Env env, const StepTimings& timings) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("totalUs", timings.total_us);
  object.Set("collectiveUs", timings.collective_us);
  object.Set("receiveUs", timings.receive_us);
  object.Set("sampleUs", timings.sample_us);
  object.Set("idleUs", timings.idle_us);
  return object;
}

// [name index, began, ended] of each span, microseconds.
Napi::Object spans_object(Napi::Env env, const std::vector<StepSpan>& spans) {
  Napi::Array names = Napi::Array::New(env);
  Napi::Float64Array values = Napi::Float64Array::New(env, spans.size() * 3);
  std::vector<const char*> known;
  for (size_t i = 0; i < spans.size(); i++) {
    const size_t index = static_cast<size_t>(std::find(known.begin(), known.end(), spans[i].name) - known.begin());
    if (index == known.size()) {
      known.push_back(spans[i].name);
      names.Set(static_cast<uint32_t>(index), spans[i].name);
    }
    values[i * 3] = static_cast<double>(index);
    values[i * 3 + 1] = static_cast<double>(spans[i].began_ns) / 1000.0;
    values[i * 3 + 2] = static_cast<double>(spans[i].ended_ns) / 1000.0;
  }
  Napi::Object object = Napi::Object::New(env);
  object.Set("names", names);
  object.Set("values", values);
  return object;
}

Napi::Object done_object(Napi::Env env, const StepDone& done) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("step", done.step);
  object.Set("outputs", output_numbers(env, done.outputs));
  object.Set("timings", timings_object(env, done.timings));
  object.Set("beganUs", static_cast<double>(done.began_ns) / 1000.0);
  object.Set("endedUs", static_cast<double>(done.ended_ns) / 1000.0);
  object.Set("spans", done.spans.empty() ? env.Null() : Napi::Value(spans_object(env, done.spans)));
  return object;
}

const char* failure_code(FailureCode code) {
  switch (code) {
    case FailureCode::WaitTimeout: return "wait_timeout";
    case FailureCode::LinkLost: return "link_lost";
    case FailureCode::NonFinite: return "non_finite";
    case FailureCode::Aborted: return "aborted";
    case FailureCode::DeviceLost: return "device_lost";
    case FailureCode::Internal: return "internal";
  }
  return "internal";
}

void emit(Napi::Env env, State* state, Event& event) {
  if (auto* steps = std::get_if<std::vector<StepDone>>(&event)) {
    for (const StepDone& done : *steps) state->on_step.Call({done_object(env, done)});
  } else if (auto* failure = std::get_if<StepFailure>(&event)) {
    state->on_step_failed.Call({Napi::Number::New(env, failure->step), Napi::String::New(env, failure_code(failure->code)), Napi::String::New(env, failure->message),
                                failure->has_peer ? Napi::Value(address_object(env, failure->peer)) : Napi::Value(env.Null())});
  } else {
    OutgoingFrame& frame = std::get<OutgoingFrame>(event);
    Napi::Object object = Napi::Object::New(env);
    object.Set("kind", kFrameKinds[static_cast<int>(frame.key.kind)]);
    object.Set("step", frame.key.step);
    object.Set("operation", frame.key.operation);
    object.Set("subtree", frame.key.subtree);
    object.Set("source", address_object(env, state->self));
    object.Set("rows", frame.rows);
    std::vector<uint8_t>* bytes = frame.bytes.release();
    const size_t gap = frame.gap, length = bytes->size() - gap;
    Napi::Buffer<uint8_t> whole = Napi::Buffer<uint8_t>::New(env, bytes->data(), bytes->size(), [](Napi::Env, uint8_t*, std::vector<uint8_t>* owned) { delete owned; }, bytes);
    object.Set("payload", Napi::Uint8Array::New(env, length, whole.ArrayBuffer(), whole.ByteOffset() + gap));
    state->on_frame.Call({address_object(env, frame.destination), object});
  }
}

// On the event loop; `env` is null when the environment is going away.
void call_js(napi_env raw_env, napi_value, void* context, void* data) {
  const std::unique_ptr<Event> event(static_cast<Event*>(data));
  State* state = static_cast<std::shared_ptr<State>*>(context)->get();
  if (raw_env == nullptr || state->disposed) return;
  const Napi::Env env(raw_env);
  const Napi::HandleScope scope(env);
  try {
    emit(env, state, *event);
  } catch (const Napi::Error& error) {
    napi_fatal_exception(raw_env, error.Value());
  }
}

class ExecutorWrap : public Napi::ObjectWrap<ExecutorWrap> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "NativeExecutor",
                       {
                           InstanceAccessor<&ExecutorWrap::isa>("isa"),
                           InstanceAccessor<&ExecutorWrap::bytes>("bytes"),
                           InstanceAccessor<&ExecutorWrap::note>("note"),
                           InstanceMethod<&ExecutorWrap::load_weight>("loadWeight"),
                           InstanceMethod<&ExecutorWrap::tables_checksum>("tablesChecksum"),
                           InstanceMethod<&ExecutorWrap::open_segment>("openSegment"),
                           InstanceMethod<&ExecutorWrap::peer_memory>("peerMemory"),
                           InstanceMethod<&ExecutorWrap::connect>("connect"),
                           InstanceMethod<&ExecutorWrap::open_slots>("openSlots"),
                           InstanceMethod<&ExecutorWrap::close_slots>("closeSlots"),
                           InstanceMethod<&ExecutorWrap::submit>("submit"),
                           InstanceMethod<&ExecutorWrap::deliver>("deliver"),
                           InstanceMethod<&ExecutorWrap::totals>("totals"),
                           InstanceMethod<&ExecutorWrap::graphs>("graphs"),
                           InstanceMethod<&ExecutorWrap::trace>("trace"),
                           InstanceMethod<&ExecutorWrap::abort>("abort"),
                           InstanceMethod<&ExecutorWrap::dispose>("dispose"),
                       });
  }

  explicit ExecutorWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ExecutorWrap>(info), state_(std::make_shared<State>()) {
    guarded(info.Env(), [&] { create(info); });
  }

  void Finalize(Napi::Env env) override {
    if (!state_->disposed && state_->executor) release(env);
  }

 private:
  void create(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    const Napi::Object options = object_of(info[0], "options");
    const Napi::Object callbacks = object_of(info[1], "callbacks");
    ExecutorConfig config;
    config.kind = text_of(options.Get("kind"), "options.kind");
    if (!options.Get("isa").IsNull()) config.isa = text_of(options.Get("isa"), "options.isa");
    config.program = parse_program(program_json_of(options.Get("program")));
    config.cores = integers_of(options.Get("cores"), "options.cores", 0, 1023);
    config.threads = config.cores.empty() ? static_cast<int>(integer_of(options.Get("threads"), "options.threads", 1, 256)) : static_cast<int>(config.cores.size());
    config.spin = boolean_of(options.Get("spin"), "options.spin");
    config.block_tokens = static_cast<int>(integer_of(options.Get("blockTokens"), "options.blockTokens", 16, 4096));
    config.kv_blocks = integer_of(options.Get("kvBlocks"), "options.kvBlocks", 1, 1 << 24);
    config.step_tokens_max = static_cast<int>(integer_of(options.Get("stepTokensMax"), "options.stepTokensMax", 1, 65536));
    config.sequences_max = static_cast<int>(integer_of(options.Get("sequencesMax"), "options.sequencesMax", 1, 65536));
    const Napi::Value quiet = options.Get("quietSteps");
    if (!quiet.IsUndefined()) config.quiet_steps = boolean_of(quiet, "options.quietSteps");
    const Napi::Value gap = options.Get("frameGap");
    const size_t frame_gap = gap.IsUndefined() ? 0 : static_cast<size_t>(integer_of(gap, "options.frameGap", 0, 4096));
    const Napi::Value ranks = options.Get("ranksPerStage");
    if (!ranks.IsUndefined()) config.ranks_per_stage = integers_of(ranks, "options.ranksPerStage", 1, kRanksMax);
    const Napi::Value wire = options.Get("wire");
    if (!wire.IsUndefined()) config.wire = wire_type_of(wire, "options.wire");
    const Napi::Value tuning = options.Get("cudaTuning");
    if (!tuning.IsUndefined()) config.cuda_tuning = text_of(tuning, "options.cudaTuning");
    state_->self = {config.program.stage, config.program.rank};
    state_->on_step = Napi::Persistent(function_of(callbacks.Get("onStep"), "callbacks.onStep"));
    state_->on_frame = Napi::Persistent(function_of(callbacks.Get("onFrame"), "callbacks.onFrame"));
    state_->on_step_failed = Napi::Persistent(function_of(callbacks.Get("onStepFailed"), "callbacks.onStepFailed"));

    // The function's context holds the state, so that an event on its way outlives the wrapper.
    auto* context = new std::shared_ptr<State>(state_);
    const auto finalize = [](napi_env, void* data, void*) { delete static_cast<std::shared_ptr<State>*>(data); };
    if (napi_create_threadsafe_function(env, nullptr, nullptr, Napi::String::New(env, "shardmesh executor"), 0, 1, context, finalize, context, call_js, &state_->events) != napi_ok) {
      delete context;
      throw std::runtime_error("the addon could not make a thread-safe function");
    }
    try {
      state_->executor = Executor::make(std::move(config), events_of(state_->events, frame_gap));
    } catch (...) {
      napi_release_threadsafe_function(state_->events, napi_tsfn_abort);
      throw;
    }
    napi_add_env_cleanup_hook(env, &ExecutorWrap::on_teardown, state_.get());
  }

  static ExecutorEvents events_of(napi_threadsafe_function events, size_t frame_gap) {
    // Never blocks: the queue is unbounded. When the environment is closing the call fails and the event is dropped here.
    const auto post = [events](Event&& event) {
      auto* owned = new Event(std::move(event));
      if (napi_call_threadsafe_function(events, owned, napi_tsfn_nonblocking) != napi_ok) delete owned;
    };
    ExecutorEvents result;
    result.done = [post](std::vector<StepDone>&& steps) { post(Event(std::move(steps))); };
    result.failed = [post](StepFailure&& failure) { post(Event(std::move(failure))); };
    result.frame = [post, frame_gap](PeerAddress destination, const FrameKey& key, int rows, const void* data, size_t bytes) {
      const uint8_t* from = static_cast<const uint8_t*>(data);
      auto owned = std::make_unique<std::vector<uint8_t>>();
      owned->reserve(frame_gap + bytes);
      owned->resize(frame_gap);
      owned->insert(owned->end(), from, from + bytes);
      post(Event(OutgoingFrame{destination, key, rows, frame_gap, std::move(owned)}));
    };
    return result;
  }

  // The environment goes away with the executor still alive: end its threads, so that nothing calls into the environment any more.
  static void on_teardown(void* data) {
    State* state = static_cast<State*>(data);
    state->disposed = true;
    state->executor->stop();
  }

  // Event loop; after the threads have ended.
  static void release_handles(const std::shared_ptr<State>& state) {
    state->on_step.Reset();
    state->on_frame.Reset();
    state->on_step_failed.Reset();
    napi_release_threadsafe_function(state->events, napi_tsfn_release);
  }

  // Collected as garbage without dispose().
  void release(Napi::Env env) {
    state_->disposed = true;
    napi_remove_env_cleanup_hook(env, &ExecutorWrap::on_teardown, state_.get());
    state_->executor->stop();
    state_->executor.reset();
    release_handles(state_);
  }

  Executor& executor(Napi::Env env) const {
    if (state_->disposed) throw Napi::Error::New(env, "the executor was disposed of");
    return *state_->executor;
  }

  Napi::Value isa(const Napi::CallbackInfo& info) { return Napi::String::New(info.Env(), executor(info.Env()).isa()); }
  Napi::Value note(const Napi::CallbackInfo& info) { return Napi::String::New(info.Env(), executor(info.Env()).note()); }
  Napi::Value bytes(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), static_cast<double>(executor(info.Env()).bytes())); }

  Napi::Value load_weight(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    executor(env);
    const int index = static_cast<int>(integer_of(info[0], "index", 0, kIntMax));
    const Napi::Uint8Array data = bytes_of(info[1], "data");
    struct Load {
      std::shared_ptr<Executor> executor;
      Napi::Reference<Napi::Uint8Array> keep;  // the bytes are read where they lie
      const uint8_t* bytes;
      size_t length;
      WeightReport report{};
    };
    auto load = std::make_shared<Load>(Load{state_->executor, Napi::Persistent(data), data.Data(), data.ByteLength()});
    return PromiseWork::start(
        env, [load, index] { load->report = load->executor->load_weight(index, load->bytes, load->length); },
        [load](Napi::Env e) -> Napi::Value {
          Napi::Object report = Napi::Object::New(e);
          report.Set("repackError", load->report.repack_error);
          report.Set("bytes", static_cast<double>(load->report.bytes));
          return report;
        });
  }

  Napi::Value tables_checksum(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      char text[17];
      snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(executor(info.Env()).tables_checksum()));
      return Napi::String::New(info.Env(), text);
    });
  }

  Napi::Value open_segment(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Links::Segment segment = executor(info.Env()).open_segment();
      Napi::Object object = Napi::Object::New(info.Env());
      object.Set("pid", segment.pid);
      object.Set("fd", segment.fd);
      object.Set("bytes", static_cast<double>(segment.bytes));
      return object;
    });
  }

  Napi::Value peer_memory(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const std::vector<PeerMemory> memories = executor(info.Env()).peer_memory();
      if (memories.empty()) return info.Env().Null();
      Napi::Object object = Napi::Object::New(info.Env());
      object.Set("fd", info.Env().Null());
      object.Set("handle", info.Env().Null());
      for (const PeerMemory& memory : memories) {
        object.Set("pid", memory.pid);
        object.Set("bytes", static_cast<double>(memory.bytes));
        object.Set("card", hexadecimal(memory.card));
        if (memory.place == PeerMemory::Place::Host) object.Set("fd", memory.fd);
        else object.Set("handle", hexadecimal(memory.handle));
      }
      return object;
    });
  }

  template <size_t count>
  static std::string hexadecimal(const std::array<uint8_t, count>& bytes) {
    std::string text;
    for (const uint8_t byte : bytes)
      for (const int digit : {byte >> 4, byte & 15}) text += "0123456789abcdef"[digit];
    return text;
  }

  static std::array<uint8_t, 64> handle_of(const Napi::Value& value, const std::string& name) {
    const std::string text = text_of(value, name);
    std::array<uint8_t, 64> bytes;
    if (text.size() != 2 * bytes.size() || text.find_first_not_of("0123456789abcdef") != std::string::npos) throw std::runtime_error(name + " is not 64 bytes in hexadecimal");
    for (size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
    return bytes;
  }

  static std::shared_ptr<const PeerMemory> memory_of(const Napi::Object& o, const std::string& name) {
    PeerMemory memory;
    memory.pid = static_cast<int>(integer_of(o.Get("pid"), name + ".pid", 1, kIntMax));
    memory.bytes = static_cast<size_t>(integer_of(o.Get("bytes"), name + ".bytes", 1, int64_t{1} << 48));
    const std::string place = text_of(o.Get("place"), name + ".place");
    if (place == "card") {
      memory.place = PeerMemory::Place::Card;
      memory.handle = handle_of(o.Get("handle"), name + ".handle");
    } else if (place == "host") {
      memory.place = PeerMemory::Place::Host;
      memory.fd = static_cast<int>(integer_of(o.Get("fd"), name + ".fd", 0, kIntMax));
    } else {
      throw std::runtime_error(name + ".place must be 'card' or 'host', got '" + place + "'");
    }
    return std::make_shared<const PeerMemory>(memory);
  }

  void connect(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      const Napi::Array list = array_of(info[0], "peers");
      std::vector<PeerLink> peers;
      for (uint32_t i = 0; i < list.Length(); i++) {
        const std::string name = "peers[" + std::to_string(i) + "]";
        const Napi::Object item = object_of(list.Get(i), name);
        PeerLink link{address_of(item.Get("peer"), name + ".peer"), false, 0, -1, 0, nullptr};
        const std::string driver = text_of(item.Get("driver"), name + ".driver");
        if (driver == "shm" || driver == "peer" || driver == "card") {
          link.shm = true;
          link.pid = static_cast<int>(integer_of(item.Get("pid"), name + ".pid", 1, kIntMax));
          link.fd = static_cast<int>(integer_of(item.Get("fd"), name + ".fd", 0, kIntMax));
          link.bytes = static_cast<size_t>(integer_of(item.Get("bytes"), name + ".bytes", 1, int64_t{1} << 48));
          if (driver == "peer") link.memory = memory_of(object_of(item.Get("memory"), name + ".memory"), name + ".memory");
          link.same_card = driver == "card";
          if (driver != "shm") link.epoch = static_cast<uint32_t>(integer_of(item.Get("epoch"), name + ".epoch", 0, 0xffffffff));
        } else if (driver == "tcp") {
          link.tcp = take_tcp_connection(info[1], link.peer);
        } else if (driver != "host") {
          throw std::runtime_error(name + ".driver must be 'shm', 'peer', 'card', 'tcp' or 'host', got '" + driver + "'");
        }
        peers.push_back(link);
      }
      executor(info.Env()).connect(peers);
    });
  }

  static SlotOpen slot_of(const Napi::Object& o, const std::string& name) {
    SlotOpen open;
    open.slot = static_cast<int>(integer_of(o.Get("slot"), name + ".slot", 0, kIntMax));
    const Napi::Object s = object_of(o.Get("sampling"), name + ".sampling");
    const std::string sampling = name + ".sampling.";
    open.sampling.temperature = number_of(s.Get("temperature"), sampling + "temperature");
    open.sampling.top_p = number_of(s.Get("topP"), sampling + "topP");
    open.sampling.top_k = static_cast<int32_t>(integer_of(s.Get("topK"), sampling + "topK", 0, kIntMax));
    open.sampling.min_p = number_of(s.Get("minP"), sampling + "minP");
    open.sampling.seed = unsigned64_of(s.Get("seed"), sampling + "seed");
    open.sampling.choice = static_cast<uint32_t>(integer_of(s.Get("choice"), sampling + "choice", 0, kIntMax));
    open.sampling.repetition_penalty = number_of(s.Get("repetitionPenalty"), sampling + "repetitionPenalty");
    open.sampling.presence_penalty = number_of(s.Get("presencePenalty"), sampling + "presencePenalty");
    open.sampling.frequency_penalty = number_of(s.Get("frequencyPenalty"), sampling + "frequencyPenalty");
    open.sampling.logprobs = s.Get("logprobs").IsNull() ? -1 : static_cast<int>(integer_of(s.Get("logprobs"), sampling + "logprobs", 0, 20));
    const Napi::Array bias = array_of(s.Get("logitBias"), sampling + "logitBias");
    for (uint32_t i = 0; i < bias.Length(); i++) {
      const std::string entry = sampling + "logitBias[" + std::to_string(i) + "]";
      const Napi::Array pair = array_of(bias.Get(i), entry);
      open.sampling.logit_bias.emplace_back(static_cast<int32_t>(integer_of(pair.Get(0u), entry + "[0]", 0, kIntMax)),
                                            static_cast<float>(number_of(pair.Get(1u), entry + "[1]")));
    }
    open.prompt_tokens = int32_array_of(o.Get("promptTokens"), name + ".promptTokens");
    open.output_tokens = int32_array_of(o.Get("outputTokens"), name + ".outputTokens");
    return open;
  }

  void open_slots(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      const Napi::Array list = array_of(info[0], "slots");
      std::vector<SlotOpen> slots;
      for (uint32_t i = 0; i < list.Length(); i++) {
        const std::string name = "slots[" + std::to_string(i) + "]";
        slots.push_back(slot_of(object_of(list.Get(i), name), name));
      }
      executor(info.Env()).open_slots(std::move(slots));
    });
  }

  void close_slots(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] { executor(info.Env()).close_slots(integers_of(info[0], "slots", 0, kIntMax)); });
  }

  // Row, token to score or -1, count of banned ids, then those, of each output. The slot is that of the row's sequence; what is out of range is found by submit().
  static std::vector<OutputRow> output_rows_of(const Napi::Value& value, const StepInput& step) {
    const std::vector<int32_t> numbers = int32_array_of(value, "step.outputs");
    std::vector<OutputRow> rows;
    for (size_t at = 0; at < numbers.size();) {
      if (numbers.size() - at < 3 || numbers[at + 2] < 0 || static_cast<size_t>(numbers[at + 2]) > numbers.size() - at - 3)
        throw std::runtime_error("step.outputs ends inside output " + std::to_string(rows.size()));
      OutputRow row{numbers[at], -1, numbers[at + 1], {}};
      const size_t index = static_cast<size_t>(row.row);
      if (row.row >= 0 && index < step.row_sequence.size()) {
        const size_t sequence = static_cast<size_t>(step.row_sequence[index]);
        if (step.row_sequence[index] >= 0 && sequence < step.slots.size()) row.slot = step.slots[sequence];
      }
      row.banned.assign(numbers.begin() + static_cast<std::ptrdiff_t>(at) + 3, numbers.begin() + static_cast<std::ptrdiff_t>(at) + 3 + numbers[at + 2]);
      at += 3 + row.banned.size();
      rows.push_back(std::move(row));
    }
    return rows;
  }

  void submit(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      const Napi::Object o = object_of(info[0], "step");
      StepInput step;
      step.step = static_cast<uint32_t>(integer_of(o.Get("step"), "step.step", 1, kIntMax));
      step.token_ids = int32_array_of(o.Get("tokenIds"), "step.tokenIds");
      step.token_steps = int32_array_of(o.Get("tokenSteps"), "step.tokenSteps");
      step.positions = int32_array_of(o.Get("positions"), "step.positions");
      step.row_sequence = int32_array_of(o.Get("rowSequence"), "step.rowSequence");
      step.slots = int32_array_of(o.Get("slots"), "step.slots");
      step.block_table_offsets = int32_array_of(o.Get("blockTableOffsets"), "step.blockTableOffsets");
      step.block_tables = int32_array_of(o.Get("blockTables"), "step.blockTables");
      step.wait_timeout_ms = integer_of(o.Get("waitTimeoutMs"), "step.waitTimeoutMs", 1, 3'600'000);
      const Napi::Value waits = o.Get("resultWaits");
      if (!waits.IsUndefined()) step.result_waits = boolean_of(waits, "step.resultWaits");
      step.outputs = output_rows_of(o.Get("outputs"), step);
      executor(info.Env()).submit(std::move(step));
    });
  }

  Napi::Value deliver(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Napi::Object o = object_of(info[0], "frame");
      const std::string kind = text_of(o.Get("kind"), "frame.kind");
      int code = -1;
      for (int i = 0; i < 5; i++)
        if (kind == kFrameKinds[i]) code = i;
      if (code < 0) throw std::runtime_error("frame.kind '" + kind + "' is not reduce, rows, logits, hidden or tokens");
      const FrameKey key{static_cast<FrameKind>(code), static_cast<uint32_t>(integer_of(o.Get("step"), "frame.step", 0, 0xffffffffll)),
                         static_cast<uint16_t>(integer_of(o.Get("operation"), "frame.operation", 0, 65535)),
                         static_cast<uint16_t>(integer_of(o.Get("subtree"), "frame.subtree", 0, 65535))};
      const Napi::Uint8Array payload = bytes_of(o.Get("payload"), "frame.payload");
      const int rows = static_cast<int>(integer_of(o.Get("rows"), "frame.rows", 0, kIntMax));
      const bool kept = executor(info.Env()).deliver(address_of(o.Get("source"), "frame.source"), key, rows, payload.Data(), payload.ByteLength());
      return Napi::Boolean::New(info.Env(), kept);
    });
  }

  Napi::Value totals(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const StepTotals totals = executor(info.Env()).totals();
      Napi::Object object = Napi::Object::New(info.Env());
      object.Set("steps", static_cast<double>(totals.steps));
      object.Set("lastStep", totals.last_step);
      object.Set("timings", timings_object(info.Env(), totals.timings));
      return object;
    });
  }

  Napi::Value graphs(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      Napi::Array all = Napi::Array::New(info.Env());
      for (const GraphFacts& facts : executor(info.Env()).graphs()) {
        Napi::Array nodes = Napi::Array::New(info.Env());
        for (const int count : facts.nodes) nodes.Set(nodes.Length(), count);
        Napi::Array programmatic = Napi::Array::New(info.Env());
        for (const int count : facts.programmatic_edges) programmatic.Set(programmatic.Length(), count);
        Napi::Object object = Napi::Object::New(info.Env());
        object.Set("rows", facts.rows);
        object.Set("nodes", nodes);
        object.Set("programmaticEdges", programmatic);
        object.Set("steps", static_cast<double>(facts.steps));
        object.Set("stepsBehind", static_cast<double>(facts.steps_behind));
        all.Set(all.Length(), object);
      }
      return all;
    });
  }

  void trace(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] { executor(info.Env()).trace(boolean_of(info[0], "on")); });
  }

  Napi::Value abort(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      executor(info.Env()).abort(text_of(info[0], "reason"));
      const std::shared_ptr<Executor> held = state_->executor;
      return PromiseWork::start(info.Env(), [held] { held->wait_idle(); }, [](Napi::Env env) { return env.Undefined(); });
    });
  }

  // Idempotent: a second call resolves as well.
  Napi::Value dispose(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (state_->disposed) {
      const Napi::Promise::Deferred done = Napi::Promise::Deferred::New(env);
      done.Resolve(env.Undefined());
      return done.Promise();
    }
    state_->disposed = true;
    napi_remove_env_cleanup_hook(env, &ExecutorWrap::on_teardown, state_.get());
    const std::shared_ptr<State> state = state_;
    state->executor->abort("the executor was disposed of");
    return PromiseWork::start(
        env,
        [state] {
          state->executor->stop();
          state->executor.reset();
        },
        [state](Napi::Env e) -> Napi::Value {
          release_handles(state);
          return e.Undefined();
        });
  }

  std::shared_ptr<State> state_;
};

}  // namespace

Napi::Function executor_class(Napi::Env env) { return ExecutorWrap::define(env); }

std::string program_json_of(const Napi::Value& value) {
  const Napi::Env env = value.Env();
  const Napi::Object program = object_of(value, "program");
  const Napi::Function stringify = env.Global().Get("JSON").As<Napi::Object>().Get("stringify").As<Napi::Function>();
  return stringify.Call({program}).As<Napi::String>().Utf8Value();
}

}  // namespace shardmesh::binding
