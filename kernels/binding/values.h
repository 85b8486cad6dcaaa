// Checked reading of JavaScript values. Every function throws a JavaScript TypeError or RangeError that names the argument, what it was and what it may be.
#pragma once
#include <napi.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../include/links.h"
#include "../include/wire.h"

namespace shardmesh::binding {

inline std::string type_of(const Napi::Value& value) {
  switch (value.Type()) {
    case napi_undefined: return "undefined";
    case napi_null: return "null";
    case napi_boolean: return "a boolean";
    case napi_number: return "a number";
    case napi_string: return "a string";
    case napi_symbol: return "a symbol";
    case napi_function: return "a function";
    case napi_bigint: return "a bigint";
    case napi_object: return value.IsArray() ? "an array" : value.IsTypedArray() ? "another typed array" : "an object";
    default: return "something else";
  }
}

[[noreturn]] inline void wrong_type(const Napi::Value& value, const std::string& name, const char* expected) {
  throw Napi::TypeError::New(value.Env(), name + " must be " + expected + ", got " + type_of(value));
}

inline Napi::Object object_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsObject() || value.IsArray() || value.IsFunction()) wrong_type(value, name, "an object");
  return value.As<Napi::Object>();
}

inline Napi::Function function_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsFunction()) wrong_type(value, name, "a function");
  return value.As<Napi::Function>();
}

inline std::string text_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsString()) wrong_type(value, name, "a string");
  return value.As<Napi::String>().Utf8Value();
}

inline bool boolean_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsBoolean()) wrong_type(value, name, "a boolean");
  return value.As<Napi::Boolean>().Value();
}

inline double number_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsNumber()) wrong_type(value, name, "a number");
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!std::isfinite(number)) throw Napi::RangeError::New(value.Env(), name + " must be finite");
  return number;
}

inline int64_t integer_of(const Napi::Value& value, const std::string& name, int64_t min, int64_t max) {
  const double number = number_of(value, name);
  if (std::nearbyint(number) != number || number < static_cast<double>(min) || number > static_cast<double>(max))
    throw Napi::RangeError::New(value.Env(), name + " must be an integer in " + std::to_string(min) + ".." + std::to_string(max) + ", got " +
                                                 value.As<Napi::Number>().ToString().Utf8Value());
  return static_cast<int64_t>(number);
}

// A bigint taken modulo 2^64.
inline uint64_t unsigned64_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsBigInt()) wrong_type(value, name, "a bigint");
  bool lossless;
  return value.As<Napi::BigInt>().Uint64Value(&lossless);
}

inline Napi::Array array_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsArray()) wrong_type(value, name, "an array");
  return value.As<Napi::Array>();
}

inline std::vector<int32_t> integers_of(const Napi::Value& value, const std::string& name, int64_t min, int64_t max) {
  const Napi::Array array = array_of(value, name);
  std::vector<int32_t> result;
  for (uint32_t i = 0; i < array.Length(); i++) result.push_back(static_cast<int32_t>(integer_of(array.Get(i), name + "[" + std::to_string(i) + "]", min, max)));
  return result;
}

inline std::vector<int32_t> int32_array_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array) wrong_type(value, name, "an Int32Array");
  const Napi::Int32Array array = value.As<Napi::Int32Array>();
  return std::vector<int32_t>(array.Data(), array.Data() + array.ElementLength());
}

inline std::vector<float> float32_array_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array) wrong_type(value, name, "a Float32Array");
  const Napi::Float32Array array = value.As<Napi::Float32Array>();
  return std::vector<float>(array.Data(), array.Data() + array.ElementLength());
}

inline Napi::Uint8Array bytes_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) wrong_type(value, name, "a Uint8Array");
  return value.As<Napi::Uint8Array>();
}

// Runs `body`, turning C++ exceptions into JavaScript ones.
template <typename Body>
auto guarded(Napi::Env env, const Body& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw Napi::Error::New(env, "out of memory in the native addon");
  } catch (const std::exception& error) {
    throw Napi::Error::New(env, error.what());
  }
}

// A promise whose work runs on a thread of the pool. `work` returns what the promise resolves to, made on the event loop by `finish`.
class PromiseWork : public Napi::AsyncWorker {
 public:
  using Finish = std::function<Napi::Value(Napi::Env)>;
  static Napi::Promise start(Napi::Env env, std::function<void()> work, Finish finish) {
    auto* worker = new PromiseWork(env, std::move(work), std::move(finish));  // deletes itself when done
    const Napi::Promise promise = worker->deferred_.Promise();
    worker->Queue();
    return promise;
  }

 private:
  PromiseWork(Napi::Env env, std::function<void()> work, Finish finish)
      : Napi::AsyncWorker(env, "shardmesh"), deferred_(Napi::Promise::Deferred::New(env)), work_(std::move(work)), finish_(std::move(finish)) {}
  void Execute() override {
    try {
      work_();
    } catch (const std::exception& error) {
      SetError(error.what());
    }
  }
  void OnOK() override { deferred_.Resolve(finish_(Env())); }
  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

  Napi::Promise::Deferred deferred_;
  std::function<void()> work_;
  Finish finish_;
};

inline PeerAddress address_of(const Napi::Value& value, const std::string& name) {
  const Napi::Object object = object_of(value, name);
  return {static_cast<int>(integer_of(object.Get("stage"), name + ".stage", 0, 65535)), static_cast<int>(integer_of(object.Get("rank"), name + ".rank", 0, 65535))};
}

inline WireType wire_type_of(const Napi::Value& value, const std::string& name) {
  const std::string type = text_of(value, name);
  if (type == "f32") return WireType::F32;
  if (type == "bf16") return WireType::Bf16;
  if (type == "q8") return WireType::Q8;
  throw Napi::RangeError::New(value.Env(), name + " must be 'f32', 'bf16' or 'q8', got '" + type + "'");
}

// Defined by the other files of this folder.
Napi::Function executor_class(Napi::Env env);
Napi::Function tcp_class(Napi::Env env);
// The connection with this peer that the endpoint's last meeting made; it is handed over once. Throws std::runtime_error when there is none.
std::shared_ptr<TcpConnection> take_tcp_connection(const Napi::Value& tcp, PeerAddress peer);
std::string program_json_of(const Napi::Value& value);
Napi::Object kernel_test_object(Napi::Env env);

}  // namespace shardmesh::binding
