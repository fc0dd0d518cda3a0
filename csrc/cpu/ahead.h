// What comes next is fetched into the near caches while sums are computed. No intrinsics here.
#pragma once
#include <cstdint>

#include "cpu/unroll.h"

namespace sadmoe::cpu {

// A walk through memory at an even pace: as far with each product as ends with the last of them. Bursts would have to wait,
// and memory gives lines fastest in their order.
class Ahead {
 public:
  static constexpr int64_t kLine = 64, kAgain = 3072;

  Ahead() = default;  // nothing

  // So many bytes while so many products are summed, but `least` a step at least. from may be null: nothing.
  Ahead(const void* from, int64_t bytes, int64_t products, int64_t least = 1)
      : at_(static_cast<const char*>(from)), left_(from ? bytes : 0), rate_((bytes << kShift) / products + 1), least_(least) {}

  // Bytes a step, of so many steps of so many products.
  int64_t pace(int64_t steps, int64_t products) {
    if (left_ <= 0) return 0;
    const int64_t even = (rate_ * products) >> kShift, pace = even < least_ ? least_ : even;
    left_ -= steps * pace;
    return pace;
  }

  // Each line is asked for twice, the second time kAgain bytes later: a processor drops what it is asked for while too many
  // lines are on their way.
  template <int Lines>
  void step(int64_t pace, Index<Lines> lines) {
    ask(lines, kAgain);
    at_ += pace;
  }

 protected:
  template <int Lines>
  void ask(Index<Lines>, int64_t again) const {
    unroll<Lines>([&](auto line) {
      __builtin_prefetch(at_ + line.value * kLine);
      __builtin_prefetch(at_ + line.value * kLine - again);
    });
  }

  const char* at_ = nullptr;

 private:
  static constexpr int kShift = 20;

  int64_t left_ = 0, rate_ = 0, least_ = 1;
};

// The same through rows of so many bytes, ld bytes apart.
class AheadInRows : public Ahead {
 public:
  AheadInRows(const void* from, int64_t rows, int64_t row, int64_t ld, int64_t products)
      : Ahead(from, rows * row, products, row == ld ? 1 : kLine),
        row_left_(row),
        row_(row),
        jump_(ld - row),
        again_(row == ld ? kAgain : (kAgain / row + 1) * ld) {}

  template <int Lines>
  void step(int64_t pace, Index<Lines> lines) {
    if constexpr (Lines > 0) {
      ask(lines, again_);
      at_ += pace, row_left_ -= pace;
      if (row_left_ <= 0) at_ += jump_, row_left_ += row_;
    }
  }

 private:
  int64_t row_left_, row_, jump_, again_;
};

// body(Index of 0, 1, 2 or Most): the lines that steps of this pace ask for each.
template <int Most, class Body>
void with_lines(int64_t pace, const Body& body) {
  if (pace == 0) return body(Index<0>{});
  if (Most > 1 && pace <= Ahead::kLine) return body(Index<1>{});
  if (Most > 2 && pace <= 2 * Ahead::kLine) return body(Index<2>{});
  body(Index<Most>{});
}

}  // namespace sadmoe::cpu
