// Loops that are unrolled for certain, so that an array indexed by them lives in registers.
#pragma once

namespace sadmoe::cpu {

template <int I>
struct Index {
  static constexpr int value = I;
};

// body(Index<I>{}), ..., body(Index<N - 1>{})
template <int N, int I = 0, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
  if constexpr (I < N) {
    body(Index<I>{});
    unroll<N, I + 1>(body);
  }
}

}  // namespace sadmoe::cpu
