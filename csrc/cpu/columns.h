// Vectors of columns of y and of weights, whole or a part. One template for every instruction set; no intrinsics here.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/unroll.h"

namespace sadmoe::cpu {

// A vector of columns; Part: the first part columns, and zeros.
template <bool Part, class Vec, class F>
[[gnu::always_inline]] inline Vec load_columns(const F* from, int64_t part) {
  if constexpr (Part)
    return Vec::load_part(from, part);
  else
    return Vec::load(from);
}
template <bool Part, class Vec, class F>
[[gnu::always_inline]] inline void store_columns(Vec columns, F* to, int64_t part) {
  if constexpr (Part)
    columns.store_part(to, part);
  else
    columns.store(to);
}

// body(v, Part, part) for each of so many vectors of columns, of which, if Part, there are the first part.
template <int Vecs, class Vec, bool Part, class Body>
[[gnu::always_inline]] inline void each_vector(int64_t part, const Body& body) {
  unroll<Vecs>([&](auto v) {
    const int64_t left = part - v.value * Vec::width;
    if (!Part || left >= Vec::width)
      body(v, std::false_type{}, 0);
    else if (left > 0)
      body(v, std::true_type{}, left);
  });
}

// y = before + the sum of row i, which quantized rows have in steps.
template <class Entry, class Vec>
[[gnu::always_inline]] inline Vec added(const Accumulate& p, int64_t i, Vec sum, Vec before) {
  if constexpr (std::is_same_v<Entry, int16_t>)
    return fma(sum, Vec::set(p.steps[i]), before);
  else
    return sum + before;
}

// The weights of two neurons at once, pairs of one column beside each other. Part: of a group of Pair::width columns, part.
template <class Pair, bool Part>
struct PairsInPlace {
  using Weight = typename Pair::Weight;
  const Weight* w;
  int64_t ld, m, part;

  PairsInPlace(const void* w, int64_t ld, int64_t m, int64_t part) : w(static_cast<const Weight*>(w)), ld(ld), m(m), part(part) {}
  PairsInPlace(const Accumulate& p, int64_t part) : PairsInPlace(p.w, p.ld_w, p.m, part) {}

  void load(int64_t j, int64_t c, Pair* out) const {
    static constexpr Weight kNone[Pair::width] = {};  // past the last neuron
    const Weight* even = w + j * ld + c;
    const Weight* odd = j + 1 < m ? even + ld : kNone;
    Part ? Pair::load_pairs_part(even, odd, part, out) : Pair::load_pairs(even, odd, out);
  }
};

}  // namespace sadmoe::cpu
