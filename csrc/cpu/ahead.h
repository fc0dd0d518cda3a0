// What comes next is fetched into a near cache while sums are computed. No intrinsics here.
#pragma once
#include <cstdint>

#include "cpu/unroll.h"

namespace sadmoe::cpu {

constexpr int64_t kLine = 64, kPage = 4096;       // bytes
constexpr int kFirstLevel = 3, kSecondLevel = 2;  // caches, as __builtin_prefetch numbers them
constexpr int64_t kNever = int64_t{1} << 62;

// Prefetches a range of memory at an even pace, so that it ends with the last product: bursts would have to wait, and memory
// gives lines fastest in their order. Vec::fetched says into which cache. Into the second-level one, where a core may wait for
// more lines than in the first-level one: fetching into that took a Zen 4 1.2 to 1.9 times as long where weights came from
// memory, but a Zen 5 0.8 to 1. A prefetch into the second level stalls a Zen 4 for about 50 ns where the page must be looked up,
// and one into the first level does not: so one line of every page is first prefetched into the first level. A template of Vec: a
// function of one instruction set must not be linked into another.
template <class Vec>
class Ahead {
 public:
  Ahead() : Ahead(nullptr, 0, 0) {}  // nothing
  // So many bytes while so many products are summed. from may be null: nothing.
  Ahead(const void* from, int64_t bytes, int64_t products) : Ahead(from, bytes, products, 1) {}

  // The bytes that each of the next steps, of so many products, is to fetch, at most so many. They count as fetched.
  int64_t take(int64_t steps, int64_t products, int64_t most) {
    if (left_ <= 0) return 0;
    const int64_t even = (rate_ * products + (int64_t{1} << kShift) - 1) >> kShift;
    const int64_t pace = even < least_ ? least_ : even > most ? most : even;
    left_ -= steps * pace;
    for (const char* end = at_ + steps * pace + kPagesAhead; pages_ < end; pages_ += kPage) find_page(pages_);
    return pace;
  }

  // Each line is asked for at least twice, the second time kAgain bytes later: a processor drops what it is asked for while
  // too many lines are on their way.
  template <int Lines>
  void step(int64_t pace, Index<Lines> lines) {
    ask(lines, kAgain);
    at_ += pace;
  }

 protected:
  static constexpr int64_t kAgain = 1024, kPagesAhead = 2 * kPage;
  static constexpr int kReading = 0;

  Ahead(const void* from, int64_t bytes, int64_t products, int64_t least)
      : at_(static_cast<const char*>(from)),
        pages_(at_),
        left_(from ? bytes : 0),
        rate_(products > 0 ? (bytes << kShift) / products : 0),
        least_(least) {}

  template <int Lines>
  void ask(Index<Lines>, int64_t again) const {
    unroll<Lines>([&](auto line) {
      __builtin_prefetch(at_ + line.value * kLine, kReading, Vec::fetched);
      __builtin_prefetch(at_ + line.value * kLine - again, kReading, Vec::fetched);
    });
  }

  static void find_page(const char* p) { __builtin_prefetch(p, kReading, kFirstLevel); }

  const char* at_;

 private:
  static constexpr int kShift = 20;

  const char* pages_;  // up to here they have been found
  int64_t left_, rate_, least_;
};

// The same through rows of so many bytes, ld bytes apart, while those are multiplied that end at `end`. With a gap between rows,
// each step takes a line at least, lines are asked for again as many whole rows later as hold kLater bytes, and the next row's
// page is found as a row begins, beside those of the gaps: either alone gained less. None is asked for again that lies before the
// first and after `end`: of an expert that nobody chose, it would come for nothing.
template <class Vec>
class AheadInRows : public Ahead<Vec> {
 public:
  AheadInRows(const void* from, int64_t rows, int64_t row, int64_t ld, int64_t products, const void* end)
      : Ahead<Vec>(from, rows * row, products, row == ld ? 1 : kLine),
        row_left_(row),
        row_(row),
        jump_(ld - row),
        later_(row == ld ? kLater : (kLater / row + 1) * ld),
        asked_(from == end ? at_ - later_ : at_) {}

  int64_t take(int64_t steps, int64_t products, int64_t most) {
    again_ = at_ - asked_ < later_ ? 0 : later_;
    return Ahead<Vec>::take(steps, products, most);
  }

  template <int Lines>
  void step(int64_t pace, Index<Lines> lines) {
    if constexpr (Lines > 0) {
      ask(lines, again_);
      at_ += pace, row_left_ -= pace;
      while (row_left_ <= 0) {
        at_ += jump_, row_left_ += row_;
        if (jump_) find_page(at_ + row_ + jump_);
      }
    }
  }

 private:
  using Ahead<Vec>::ask, Ahead<Vec>::at_, Ahead<Vec>::find_page;
  static constexpr int64_t kLater = 3072;

  int64_t row_left_, row_, jump_, later_, again_ = 0;
  const char* asked_;  // from here on lines were asked for
};

// body(Index of 0, 1 or Most): the lines that each step of this pace asks for.
template <int Most, class Body>
void with_lines(int64_t pace, const Body& body) {
  if (pace == 0) return body(Index<0>{});
  if (Most > 1 && pace <= kLine) return body(Index<1>{});
  body(Index<Most>{});
}

// Takes m neurons, or columns, `most` at once: body(j, count, more, then) for those from j on, where then are taken after them:
// from j + count on where there are more, else from those that come next.
template <class Body>
void some_at_once(int64_t m, int64_t most, const Body& body) {
  for (int64_t j = 0; j < m; j += most) {
    const int64_t left = m - j, count = left < most ? left : most, then = left > most ? left - most : m;
    body(j, count, left > most, then < most ? then : most);
  }
}

}  // namespace sadmoe::cpu
