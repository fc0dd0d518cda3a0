// What the threads of a block know of each other beside its barriers: a clock each, and how far each has seen the others'.
//
// A thread's clock ticks when it tells of what it did (an arrival, a warp's meeting, a fence): accesses of one tick are told
// together. The copy engine counts as one more thread, the last.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace sadmoe::emulator {

// When a thread did something.
struct Mark {
  uint32_t phase = 0;  // of barriers, counted by Memory; 0: never
  int32_t thread = 0;
  uint32_t clock = 0;
};

class Clocks {
 public:
  using Seen = std::vector<uint32_t>;  // of every thread, up to which tick

  void begin_block(int threads) {
    now_.assign(threads + 1, 1), fenced_.assign(threads + 1, 0);
    seen_.assign(threads + 1, {});
    landed_ = 0;
  }
  int engine() const { return static_cast<int>(now_.size()) - 1; }
  uint32_t now(int thread) const { return now_[thread]; }
  void tick(int thread) { ++now_[thread]; }

  // `to` also knows all that the thread knows and did.
  void tell(int thread, Seen& to) {
    learn(to, seen_[thread]);
    to.resize(now_.size());
    to[thread] = std::max(to[thread], now_[thread]);
    tick(thread);
  }
  void hear(int thread, const Seen& from) { learn(seen_[thread], from); }
  bool has_seen(int thread, const Mark& mark) const {
    if (mark.thread == engine() && mark.clock <= landed_) return true;
    return !seen_[thread].empty() && mark.clock <= seen_[thread][mark.thread];
  }
  // A barrier of the block: what one has seen of the copy engine, all have. The engine itself does not come.
  void meet() {
    for (const Seen& seen : seen_)
      if (!seen.empty()) landed_ = std::max(landed_, seen[engine()]);
  }

  // What the thread wrote until now is there for copy engine and products.
  void fence(int thread) { fenced_[thread] = now_[thread], tick(thread); }
  bool is_fenced(const Mark& mark) const { return mark.thread == engine() || mark.clock <= fenced_[mark.thread]; }

 private:
  static void learn(Seen& to, const Seen& from) {
    to.resize(std::max(to.size(), from.size()));
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  }

  Seen now_, fenced_;
  std::vector<Seen> seen_;
  uint32_t landed_ = 0;  // ticks of the copy engine that all have seen
};

}  // namespace sadmoe::emulator
