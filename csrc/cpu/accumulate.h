// Weighted sums of neuron rows into token rows, in tiles. One template for every instruction set; no intrinsics here.
#pragma once
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/unroll.h"
#include "cpu/widen.h"

namespace sadmoe::cpu {

// One tile: Rows tokens x Vecs vectors of columns, held in registers while j runs over the neurons. Columns beyond the
// last whole vector: Vecs = 1 and part > 0 columns.
template <class Vec, class W, int Rows, int Vecs>
void accumulate_tile(const Accumulate& p, int64_t i0, int64_t c0, int64_t part = 0) {
  const auto load = [&](auto* from) { return part ? Vec::load_part(from, part) : Vec::load(from); };
  float* y[Rows];
  for (int i = 0; i < Rows; ++i) y[i] = p.y + (p.rows ? p.rows[i0 + i] : i0 + i) * p.ld_y + c0;
  const auto each = [](auto body) { unroll<Rows>([&](auto i) { unroll<Vecs>([&](auto v) { body(i, v); }); }); };
  for (int64_t i = i0 + Rows; i < p.n && i < i0 + 2 * Rows; ++i) {  // rows come in no order that hardware foresees
    const float* next = p.y + (p.rows ? p.rows[i] : i) * p.ld_y + c0;
    for (int v = 0; v < Vecs; ++v) __builtin_prefetch(next + v * Vec::width, 1);
  }
  Vec sums[Rows][Vecs];
  each([&](auto i, auto v) { sums[i.value][v.value] = load(y[i.value] + v.value * Vec::width); });
  const float* h = static_cast<const float*>(p.h) + i0 * p.ld_h;
  const W* w = static_cast<const W*>(p.w) + c0;
  const int64_t turn = i0 / Rows;  // the first tiles fetch a vector each of these columns of what comes next
  const W* ahead = p.next && turn < Vecs ? static_cast<const W*>(p.next) + c0 + turn * Vec::width : nullptr;
  for (int64_t j = 0; j < p.m; ++j, w += p.ld_w) {
    if (ahead) __builtin_prefetch(ahead + j * p.ld_w);
    Vec ws[Vecs];
    unroll<Vecs>([&](auto v) { ws[v.value] = load(w + v.value * Vec::width); });
    unroll<Rows>([&](auto i) {
      const Vec hij = Vec::set(h[i.value * p.ld_h + j]);
      unroll<Vecs>([&](auto v) { sums[i.value][v.value] = fma(hij, ws[v.value], sums[i.value][v.value]); });
    });
  }
  each([&](auto i, auto v) {
    if (part)
      sums[i.value][v.value].store_part(y[i.value] + v.value * Vec::width, part);
    else
      sums[i.value][v.value].store(y[i.value] + v.value * Vec::width);
  });
}

// Rows i0 .. n of one strip of columns: tiles of Rows, then one tile of what is left.
template <class Vec, class W, int Rows, int Vecs>
void accumulate_rows(const Accumulate& p, int64_t i0, int64_t c0, int64_t part = 0) {
  for (; i0 + Rows <= p.n; i0 += Rows) accumulate_tile<Vec, W, Rows, Vecs>(p, i0, c0, part);
  if constexpr (Rows > 1)
    if (i0 < p.n) accumulate_rows<Vec, W, Rows - 1, Vecs>(p, i0, c0, part);
}

template <class Vec, class W>
void accumulate_all(const Accumulate& p) {
  constexpr int kRows = Vec::accumulate_rows, kVecs = Vec::accumulate_vecs;
  int64_t c = 0;
  for (; c + kVecs * Vec::width <= p.columns; c += kVecs * Vec::width) accumulate_rows<Vec, W, kRows, kVecs>(p, 0, c);
  for (; c + Vec::width <= p.columns; c += Vec::width) accumulate_rows<Vec, W, kRows, 1>(p, 0, c);
  if (c < p.columns) accumulate_rows<Vec, W, kRows, 1>(p, 0, c, p.columns - c);
}

// A few neurons at a time, over all columns. Sums are the same, for they pass through y.
template <class W, class Body>
void in_turns(const Accumulate& p, int64_t neurons, const Body& body) {
  for (int64_t j = 0; j < p.m; j += neurons) {
    Accumulate part = p;
    part.m = p.m - j < neurons ? p.m - j : neurons;
    part.h = static_cast<const float*>(p.h) + j;
    part.w = static_cast<const W*>(p.w) + j * p.ld_w;
    part.next = p.next ? static_cast<const W*>(p.next) + j * p.ld_w : nullptr;
    body(part);
  }
}

// The weights side by side, widened, in the place of p.w; those that come next are fetched meanwhile.
template <class Vec, class W>
void copy_weights(Accumulate& p, float* copy) {
  for (int64_t j = 0; j < p.m; ++j) {
    widen<Vec, W>(static_cast<const W*>(p.w) + j * p.ld_w, copy + j * p.columns, p.columns);
    if (!p.next) continue;
    constexpr int64_t kLine = 64 / sizeof(W);
    for (int64_t c = 0; c < p.columns; c += kLine) __builtin_prefetch(static_cast<const W*>(p.next) + j * p.ld_w + c);
  }
  p.w = copy, p.ld_w = p.columns, p.next = nullptr;
}

// Few rows wait for the weights, which memory gives fastest as 8 streams in order; so do rows of many columns, whose sums are
// far themselves. Other rows read the weights again and again: from a copy, widened once, without the distance from neuron to
// neuron, which a power of two would leave with a few sets of the near cache.
template <class Vec, class W>
void accumulate(const Accumulate& p) {
  constexpr int64_t kManyRows = 8, kManyColumns = 1024, kNeurons = 8;
  if (p.n < kManyRows || p.columns > kManyColumns)
    return in_turns<W>(p, kNeurons, [](Accumulate& part) {
      part.next = nullptr;
      accumulate_all<Vec, W>(part);
    });
  if constexpr (Vec::copied > 0) {
    static_assert(Vec::copied >= kManyColumns * kNeurons, "some neurons fit a copy");
    alignas(64) float copy[Vec::copied];
    return in_turns<W>(p, Vec::copied / p.columns, [&](Accumulate& part) {
      copy_weights<Vec, W>(part, copy);
      accumulate_all<Vec, float>(part);
    });
  }
  accumulate_all<Vec, W>(p);
}

// The weights of two neurons at once, pairs of one column beside each other: as they are, or from a copy of such pairs, group
// after group of Ints::width columns, for all neurons. Part: of a group, part columns.
template <class Ints, bool Part>
struct PairsInPlace {
  const Accumulate& p;
  int64_t part;

  void load(int64_t j, int64_t c, Ints* out) const {
    const int8_t* even = static_cast<const int8_t*>(p.w) + j * p.ld_w + c;
    const int8_t* odd = j + 1 < p.m ? even + p.ld_w : even;  // past the last neuron h is zero
    Part ? Ints::load_pairs_part(even, odd, part, out) : Ints::load_pairs(even, odd, out);
  }
};

template <class Ints>
struct CopiedPairs {
  const int16_t* copy;
  int64_t columns;  // a whole number of groups

  void load(int64_t j, int64_t c, Ints* out) const {
    const int16_t* from = copy + j * columns + 2 * c;
    out[0] = Ints::load(from), out[1] = Ints::load(from + Ints::width);
  }
};

// The same of integers: Rows tokens x Groups of Ints::width columns, two neurons at once, whose products are summed exactly.
// Part: of one group, part columns.
template <class Ints, class Vec, int Rows, int Groups, bool Part, class Pairs>
void accumulate_int_tile(const Accumulate& p, const Pairs& pairs, int64_t i0, int64_t c0, int64_t part) {
  using Sum = typename Ints::Sum;
  Sum sums[Rows][Groups][2];
  const auto each = [](auto body) { unroll<Rows>([&](auto i) { unroll<Groups>([&](auto g) { body(i.value, g.value); }); }); };
  each([&](int i, int g) { sums[i][g][0] = sums[i][g][1] = Sum::zero(); });
  const int16_t* h = static_cast<const int16_t*>(p.h) + i0 * p.ld_h;
  const int8_t* ahead = p.next && i0 == 0 ? static_cast<const int8_t*>(p.next) + c0 : nullptr;
  for (int64_t j = 0; j < p.m; j += 2) {
    if (ahead) __builtin_prefetch(ahead + j * p.ld_w), __builtin_prefetch(ahead + (j + 1) * p.ld_w);
    Ints ws[Groups][2];
    unroll<Groups>([&](auto g) { pairs.load(j, c0 + g.value * Ints::width, ws[g.value]); });
    unroll<Rows>([&](auto i) {
      const Ints pair = Ints::set_pair(h + i.value * p.ld_h + j);
      unroll<Groups>([&](auto g) {
        for (int half = 0; half < 2; ++half) {
          Sum& sum = sums[i.value][g.value][half];
          sum = fma(pair, ws[g.value][half], sum);
        }
      });
    });
  }
  each([&](int i, int g) {
    const Vec step = Vec::set(p.steps[i0 + i]);
    float* y = p.y + (p.rows ? p.rows[i0 + i] : i0 + i) * p.ld_y + c0 + g * Ints::width;
    Vec columns[2];
    Ints::to_floats(sums[i][g], columns);
    for (int half = 0; half < 2; ++half, y += Vec::width) {
      const int64_t left = part - half * Vec::width;
      if (!Part || left >= Vec::width)
        fma(columns[half], step, Vec::load(y)).store(y);
      else if (left > 0)
        fma(columns[half], step, Vec::load_part(y, left)).store_part(y, left);
    }
  });
}

template <class Ints, class Vec, int Rows, int Groups, bool Part, class Pairs>
void accumulate_int_rows(const Accumulate& p, const Pairs& pairs, int64_t i0, int64_t c0, int64_t part) {
  for (; i0 + Rows <= p.n; i0 += Rows) accumulate_int_tile<Ints, Vec, Rows, Groups, Part>(p, pairs, i0, c0, part);
  if constexpr (Rows > 1)
    if (i0 < p.n) accumulate_int_rows<Ints, Vec, Rows - 1, Groups, Part>(p, pairs, i0, c0, part);
}

// pairs_of(Part, part): the weights where groups are whole, and where the last one is not.
template <class Ints, class Vec, class PairsOf>
void accumulate_int_columns(const Accumulate& p, const PairsOf& pairs_of) {
  constexpr int kRows = Ints::accumulate_rows, kGroups = Ints::accumulate_groups;
  const auto whole = pairs_of(std::false_type{}, 0);
  int64_t c = 0;
  for (; c + kGroups * Ints::width <= p.columns; c += kGroups * Ints::width)
    accumulate_int_rows<Ints, Vec, kRows, kGroups, false>(p, whole, 0, c, 0);
  for (; c + Ints::width <= p.columns; c += Ints::width) accumulate_int_rows<Ints, Vec, kRows, 1, false>(p, whole, 0, c, 0);
  if (const int64_t part = p.columns - c; part > 0)
    accumulate_int_rows<Ints, Vec, kRows, 1, true>(p, pairs_of(std::true_type{}, part), 0, c, part);
}

// Many rows read a copy, as above: of all neurons, for their sum is added as one.
template <class Ints, class Vec>
void accumulate_ints(const Accumulate& p) {
  constexpr int64_t kManyRows = 8, kWidth = Ints::width;
  if constexpr (Ints::copied > 0) {
    const int64_t columns = (p.columns + kWidth - 1) / kWidth * kWidth;
    if (p.n >= kManyRows && (p.m + 1) / 2 * 2 * columns <= Ints::copied) {
      alignas(64) int16_t copy[Ints::copied];
      const auto fill = [&](const auto& pairs, int64_t j, int64_t c) {
        Ints both[2];
        pairs.load(j, c, both);
        both[0].store(copy + j * columns + 2 * c), both[1].store(copy + j * columns + 2 * c + kWidth);
      };
      for (int64_t j = 0; j < p.m; j += 2) {
        int64_t c = 0;
        for (; c + kWidth <= p.columns; c += kWidth) fill(PairsInPlace<Ints, false>{p, 0}, j, c);
        if (c < p.columns) fill(PairsInPlace<Ints, true>{p, p.columns - c}, j, c);
      }
      return accumulate_int_columns<Ints, Vec>(p, [&](auto, int64_t) { return CopiedPairs<Ints>{copy, columns}; });
    }
  }
  accumulate_int_columns<Ints, Vec>(
      p, [&](auto part, int64_t columns) { return PairsInPlace<Ints, decltype(part)::value>{p, columns}; });
}

}  // namespace sadmoe::cpu
