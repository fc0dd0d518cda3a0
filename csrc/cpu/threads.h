// The caller's threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

namespace sadmoe::cpu {

// Runs body(begin, end) over parts of [0, n), of about `grain` or more, on the caller's thread pool.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

struct Threads {
  int count;
  ParallelFor parallel_for;
};

// The caller's thread alone.
inline const Threads& one_thread() {
  static const Threads one{1, [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
                             if (n > 0) body(0, n);
                           }};
  return one;
}

// body(begin, end) over parts of [0, n) of about `grain` sixteens or more, which begin at multiples of 16: whole vectors.
template <class Body>
void in_sixteens(int64_t n, int64_t grain, const Threads& threads, const Body& body) {
  threads.parallel_for((n + 15) / 16, grain, [&](int64_t i, int64_t j) { body(16 * i, std::min(16 * j, n)); });
}

}  // namespace sadmoe::cpu
