// What the tests of the emulated CUDA kernels share: named cases, schedules, and buffers compared byte for byte.
#pragma once
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "guarded.h"
#include "machine.h"

namespace simt {

inline int failures = 0;

inline void test_case(const std::string& name, const std::function<std::string()>& body) {
  const std::string what = body();
  if (!what.empty()) failures++;
  std::printf("%s %s%s%s\n", what.empty() ? "ok" : "FAIL", name.c_str(), what.empty() ? "" : ": ", what.c_str());
  std::fflush(stdout);
}

constexpr Schedule kSchedules[] = {{Order::Forward, 1, 1}, {Order::Reverse, 1, 1}, {Order::Random, 11, 1}, {Order::Random, 12, 2}, {Order::Random, 13, 3}};
constexpr size_t kScheduleCount = sizeof kSchedules / sizeof kSchedules[0];
inline const char* name_of(const Schedule& s) { return s.order == Order::Forward ? "forward" : s.order == Order::Reverse ? "reverse" : "random"; }

// "" when a buffer holds exactly the expected bytes, those between its rows included, and nothing beside it has changed.
template <typename T>
std::string difference(const std::vector<T>& expected, const Guarded<T>& found) {
  if (const std::string problem = finish(); !problem.empty()) return problem + "; ";
  if (!found.intact()) return "bytes beside a buffer have changed; ";
  for (size_t i = 0; i < expected.size(); i++)
    if (std::memcmp(&expected[i], found.data() + i, sizeof(T)) != 0) {
      char text[120];
      std::snprintf(text, sizeof text, "value %zu of %zu is %.9g, the reference has %.9g; ", i, expected.size(), static_cast<double>(found.data()[i]), static_cast<double>(expected[i]));
      return text;
    }
  return "";
}

// `count` values as a poisoned buffer has them.
template <typename T>
std::vector<T> poisoned(size_t count) {
  std::vector<T> values(count);
  std::memset(static_cast<void*>(values.data()), kPoison, count * sizeof(T));
  return values;
}

// False, with the reason on the output, where no test can run.
inline bool can_run() {
  const std::string why = absent_machine();
  if (!why.empty()) std::printf("skip %s\n", why.c_str());
  return why.empty();
}

inline int end_of_tests() {
  std::printf("emulated %llu launches, %llu threads, %llu warp operations; %llu launches checked for an early start\n", static_cast<unsigned long long>(counts().launches), static_cast<unsigned long long>(counts().threads),
              static_cast<unsigned long long>(counts().collectives), static_cast<unsigned long long>(counts().early));
  return failures ? 1 : 0;
}

}  // namespace simt
