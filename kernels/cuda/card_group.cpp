#include "card_group.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <stdexcept>

namespace shardmesh::cuda {
namespace {

constexpr int64_t kSliceNs = 5'000'000;  // an abort is noticed at most this late

int64_t now_ns() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Groups {
  std::mutex mutex;
  std::map<std::string, std::weak_ptr<CardGroup>> by_name;
};
Groups& groups() {
  static Groups all;
  return all;
}

std::string text_of(const CardGroup::Part& part) {
  return "step " + std::to_string(part.step) + " from action " + std::to_string(part.action) + " on with " + std::to_string(part.rows) + " rows, " + std::to_string(part.output_rows) +
         " output rows and tokens of digest " + std::to_string(part.tokens);
}

}  // namespace

CardGroup::CardGroup(int ranks) : ranks_(static_cast<size_t>(ranks), nullptr), parts_(static_cast<size_t>(ranks)), gave_up_(static_cast<size_t>(ranks), false) {
  if (const Problem problem = open_stream(&stream_)) throw std::runtime_error(std::string("no stream for the ranks of this card: ") + problem);
}

// Of an abandoned card nothing is given back (runtime.h).
CardGroup::~CardGroup() {
  if (!is_abandoned()) close_stream(stream_);
}

std::shared_ptr<CardGroup> CardGroup::named(const std::string& name, int ranks) {
  if (ranks < 2 || ranks > kRanksMax) throw std::runtime_error(std::to_string(ranks) + " ranks on one card; 2 to " + std::to_string(kRanksMax) + " are possible");
  Groups& known = groups();
  const std::lock_guard lock(known.mutex);
  std::erase_if(known.by_name, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<CardGroup>& place = known.by_name[name];
  std::shared_ptr<CardGroup> group = place.lock();
  if (!group) place = group = std::make_shared<CardGroup>(ranks);
  if (group->ranks_.size() != static_cast<size_t>(ranks)) throw std::runtime_error("the group on this card has " + std::to_string(group->ranks_.size()) + " ranks, this one knows of " + std::to_string(ranks));
  return group;
}

void CardGroup::join(int rank, CudaDevice* device, const Together& complete) {
  const std::lock_guard lock(mutex_);
  CudaDevice*& place = ranks_[static_cast<size_t>(rank)];
  if (place || left_ >= 0) throw std::runtime_error("rank " + std::to_string(rank) + " of this card has joined already");
  place = device;
  if (std::find(ranks_.begin(), ranks_.end(), nullptr) != ranks_.end()) return;
  if (const std::string problem = complete(ranks_); !problem.empty()) {
    place = nullptr;
    throw std::runtime_error(problem);
  }
  complete_ = true;
  changed_.notify_all();
}

void CardGroup::leave(int rank) {
  const std::lock_guard lock(mutex_);
  left_ = rank;
  ranks_[static_cast<size_t>(rank)] = nullptr;
  complete_ = false;
  changed_.notify_all();
}

void CardGroup::abort(int rank) {
  aborted_[static_cast<size_t>(rank)] = true;
  changed_.notify_all();
}

template <typename Done>
CardGroup::Outcome CardGroup::wait(std::unique_lock<std::mutex>& lock, int rank, int64_t deadline_ns, const Done& done, const std::function<int()>& missing) {
  using Kind = Outcome::Kind;
  for (;;) {
    if (done()) return {};
    if (aborted_[static_cast<size_t>(rank)]) return {Kind::Aborted, left_ >= 0 ? left_ : missing()};
    if (left_ >= 0) return {Kind::Left, left_};
    const int64_t left_ns = deadline_ns - now_ns();
    if (left_ns <= 0) return {Kind::Deadline, missing()};
    changed_.wait_for(lock, std::chrono::nanoseconds(std::min(left_ns, kSliceNs)));
  }
}

CardGroup::Outcome CardGroup::await_ranks(int rank, int64_t deadline_ns) {
  std::unique_lock lock(mutex_);
  const auto absent = [&] { return static_cast<int>(std::find(ranks_.begin(), ranks_.end(), nullptr) - ranks_.begin()); };
  return wait(lock, rank, deadline_ns, [&] { return complete_; }, absent);
}

CardGroup::Outcome CardGroup::meet(int rank, const Part& part, int64_t deadline_ns, const Together& together) {
  using Kind = Outcome::Kind;
  std::unique_lock lock(mutex_);
  const auto missing = [&] {
    size_t r = 0;
    while (r < parts_.size() && (parts_[r] || gave_up_[r])) r++;
    return static_cast<int>(r);
  };
  std::optional<Part>& own = parts_[static_cast<size_t>(rank)];
  own = part;
  if (complete_ && std::find(parts_.begin(), parts_.end(), std::nullopt) == parts_.end()) {
    outcome_ = {};
    const auto other = std::find_if(parts_.begin(), parts_.end(), [&](const std::optional<Part>& p) { return *p != part; });
    if (other != parts_.end())
      outcome_ = {Kind::Fault, -1, "ranks do not run the same step: rank " + std::to_string(rank) + " has " + text_of(part) + ", rank " + std::to_string(other - parts_.begin()) + " " + text_of(**other)};
    else if (std::string problem = together(ranks_); !problem.empty()) outcome_ = {Kind::Fault, -1, std::move(problem)};
    std::fill(parts_.begin(), parts_.end(), std::nullopt);
    meetings_++;
    changed_.notify_all();
    return outcome_;
  }
  const uint64_t before = meetings_;
  const Outcome waited = wait(lock, rank, deadline_ns, [&] { return meetings_ != before; }, missing);
  if (waited.kind == Kind::Done) return outcome_;
  own.reset();
  gave_up_[static_cast<size_t>(rank)] = true;
  return waited;
}

}  // namespace shardmesh::cuda
