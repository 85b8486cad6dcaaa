// Asking for memory in good time.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shardmesh {
namespace {

// Memory that is soon read: pieces of some lines, asked for a few lines at a time between instructions that compute, in the order in which they lie. Hardware prefetch
// does not cross from one block of a cache to the next, and a core has few requests under way at a time: asked for all at once they would hold up what computes. Into
// the second-level cache, which has more of them under way than the first.
class LinesAhead {
 public:
  __attribute__((always_inline)) inline void add(const uint8_t* p, size_t bytes) {
    if (count_ > 0 && pieces_[count_ - 1].end == p) {
      pieces_[count_ - 1].end = p + bytes;
    } else if (count_ < kPieces) {
      pieces_[count_++] = {p, p + bytes};
    }
    if (count_ == 1) {
      at_ = pieces_[0].begin;
      end_ = pieces_[0].end;
    }
  }
  __attribute__((always_inline)) inline void take_four() {
    if (at_ >= end_ && !next_piece()) return;
    __builtin_prefetch(at_, 0, 2);
    __builtin_prefetch(at_ + 64, 0, 2);
    __builtin_prefetch(at_ + 128, 0, 2);
    __builtin_prefetch(at_ + 192, 0, 2);
    at_ += 256;
  }
  __attribute__((always_inline)) inline void take_all() {
    while (at_ < end_ || taken_ + 1 < count_) take_four();
  }

 private:
  static constexpr int kPieces = 64;
  struct Piece {
    const uint8_t *begin, *end;
  };
  __attribute__((always_inline)) inline bool next_piece() {
    if (taken_ + 1 >= count_) return false;
    at_ = pieces_[++taken_].begin;
    end_ = pieces_[taken_].end;
    return true;
  }

  const uint8_t *at_ = nullptr, *end_ = nullptr;
  int taken_ = 0, count_ = 0;  // pieces
  Piece pieces_[kPieces];
};

}  // namespace
}  // namespace shardmesh
