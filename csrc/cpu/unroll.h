// Loops that are unrolled for certain, so that an array indexed by them lives in registers.
#pragma once
#include <utility>

namespace sadmoe::cpu {

template <int I>
struct Index {
  static constexpr int value = I;
};

template <class Body, int... I>
[[gnu::always_inline]] inline void unroll(Body body, std::integer_sequence<int, I...>) {
  (body(Index<I>{}), ...);
}

// body(Index<0>{}), ..., body(Index<N - 1>{})
template <int N, class Body>
[[gnu::always_inline]] inline void unroll(Body body) {
  unroll(body, std::make_integer_sequence<int, N>{});
}

}  // namespace sadmoe::cpu
