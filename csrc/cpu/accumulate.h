// Weighted sums of neuron rows into token rows, in tiles. One template for every instruction set; no intrinsics here.
#pragma once
#include <type_traits>

#include "cpu/ahead.h"
#include "cpu/columns.h"
#include "cpu/held.h"
#include "cpu/kernels.h"
#include "cpu/unroll.h"
#include "cpu/widen.h"

namespace sadmoe::cpu {

constexpr int64_t kStrip = 72;  // columns of y, of 512 tokens 144 KiB, that stay near while many rows are added; more are wide

// Of the neurons of a sum: whether they are the first, and the last. Between turns it waits in Accumulate::partial.
struct Turn {
  bool first = true, last = true;
};

// sums[i][v] += sum over j < m of row(i)[j] w[j, v], with w [m, .] of leading dimension ld: what tiles spend their time on.
template <bool Part, class Vec, class W, int Rows, int Vecs, class RowOf, class Walk>
[[gnu::always_inline]] inline void add_products(Vec (&sums)[Rows][Vecs], const RowOf& row, const W* w, int64_t ld, int64_t m,
                                                int64_t part, Walk& ahead) {
  constexpr int64_t kBytes = Vecs * Vec::width * sizeof(W);
  const int64_t pace = ahead.take(m, Rows * Vecs * Vec::width, kBytes);
  with_lines<(kBytes + kLine - 1) / kLine>(pace, [&](auto lines) {
    Walk walk = ahead;  // in registers
    for (int64_t j = 0; j < m; ++j, w += ld) {
      walk.step(pace, lines);
      Vec ws[Vecs];
      unroll<Vecs>([&](auto v) { ws[v.value] = load_columns<Part, Vec>(w + v.value * Vec::width, part); });
      unroll<Rows>([&](auto i) {
        const Vec hij = Vec::set(row(i.value)[j]);
        unroll<Vecs>([&](auto v) { sums[i.value][v.value] = fma(hij, ws[v.value], sums[i.value][v.value]); });
      });
    }
    ahead = walk;
  });
}

// Tiles of Rows rows for those from i on, then one of what is left: tile(Index<rows>, i).
template <int Rows, class Tile>
[[gnu::always_inline]] inline void rows_in_tiles(int64_t i, int64_t n, const Tile& tile) {
  for (; i + Rows <= n; i += Rows) tile(Index<Rows>{}, i);
  if constexpr (Rows > 1)
    if (i < n) rows_in_tiles<Rows - 1>(i, n, tile);
}

// One tile: Rows tokens x Vecs vectors of columns, held in registers while j runs over the neurons. Part: of one vector, part
// columns. Flat, as tiles of project.
template <class Vec, class W, int Rows, int Vecs, bool Part>
[[gnu::flatten]] void accumulate_tile(const Accumulate& p, Turn turn, AheadInRows<Vec>& ahead, int64_t i0, int64_t c0,
                                      int64_t part) {
  const auto load = [&](const float* from) { return load_columns<Part, Vec>(from, part); };
  const auto store = [&](Vec sum, float* to) { store_columns<Part>(sum, to, part); };
  float* y[Rows];
  for (int i = 0; i < Rows; ++i) y[i] = p.y + (p.rows ? p.rows[i0 + i] : i0 + i) * p.ld_y + c0;
  float* partial = p.partial ? p.partial + i0 * p.columns + c0 : nullptr;
  const auto each = [](auto body) { unroll<Rows>([&](auto i) { unroll<Vecs>([&](auto v) { body(i, v); }); }); };
  for (int64_t i = i0 + Rows; i < p.n && i < i0 + 2 * Rows; ++i) {  // rows come in no order that hardware foresees
    const float* next = p.y + (p.rows ? p.rows[i] : i) * p.ld_y + c0;
    for (int v = 0; v < Vecs; ++v) __builtin_prefetch(next + v * Vec::width, 1);
  }
  Vec sums[Rows][Vecs];
  each([&](auto i, auto v) { sums[i.value][v.value] = Vec::zero(); });
  if (!turn.first)
    each([&](auto i, auto v) { sums[i.value][v.value] = load(partial + i.value * p.columns + v.value * Vec::width); });
  const float* h = static_cast<const float*>(p.h) + i0 * p.ld_h;
  const auto row = [&](int i) { return h + i * p.ld_h; };
  add_products<Part>(sums, row, static_cast<const W*>(p.w) + c0, p.ld_w, p.m, part, ahead);
  each([&](auto i, auto v) {
    const Vec sum = sums[i.value][v.value];
    float* to = y[i.value] + v.value * Vec::width;
    turn.last ? store(load(to) + sum, to) : store(sum, partial + i.value * p.columns + v.value * Vec::width);
  });
}

template <class Vec, class W>
void accumulate_all(const Accumulate& p, Turn turn, AheadInRows<Vec> ahead) {
  constexpr int kRows = Vec::accumulate_rows, kVecs = Vec::accumulate_vecs;
  constexpr int kLong = 64 / Vec::width, kMost = kRows * kVecs * 2 / 3, kAlone = kLong < kMost ? kLong : kMost;
  const auto strip = [&](auto vecs, auto is_part, int64_t c, int64_t part) {
    rows_in_tiles<kRows>(0, p.n, [&](auto rows, int64_t i) {
      accumulate_tile<Vec, W, rows.value, vecs.value, is_part.value>(p, turn, ahead, i, c, part);
    });
  };
  int64_t c = 0;
  if constexpr (kAlone > kVecs)  // for a row alone, as memory gives long pieces of a neuron faster
    for (; p.n == 1 && c + kAlone * Vec::width <= p.columns; c += kAlone * Vec::width)
      accumulate_tile<Vec, W, 1, kAlone, false>(p, turn, ahead, 0, c, 0);
  for (; c + kVecs * Vec::width <= p.columns; c += kVecs * Vec::width) strip(Index<kVecs>{}, std::false_type{}, c, 0);
  for (; c + Vec::width <= p.columns; c += Vec::width) strip(Index<1>{}, std::false_type{}, c, 0);
  if (c < p.columns) strip(Index<1>{}, std::true_type{}, c, p.columns - c);
}

// So many columns of so many neurons that come next, while p is computed.
template <class Vec, class W>
AheadInRows<Vec> ahead_of(const Accumulate& p, const void* next, int64_t neurons, int64_t columns) {
  const W* end = static_cast<const W*>(p.w) + p.m * p.ld_w;
  return {next, neurons, columns * int64_t(sizeof(W)), p.ld_w * int64_t(sizeof(W)), p.n * p.m * p.columns, end};
}

// A few neurons at a time, over all columns, while those that come next are fetched.
template <class Vec, class W>
void accumulate_in_turns(const Accumulate& p, int64_t neurons) {
  some_at_once(p.m, neurons, [&](int64_t j, int64_t count, bool more, int64_t then) {
    Accumulate part = p;
    const W* w = static_cast<const W*>(p.w) + j * p.ld_w;
    part.m = count, part.w = w, part.h = static_cast<const float*>(p.h) + j;
    const void* next = more ? w + count * p.ld_w : p.next;
    accumulate_all<Vec, W>(part, {j == 0, !more}, ahead_of<Vec, W>(part, next, then, p.columns));
  });
}

// Many rows read the weights again and again: from a copy, widened once, without the distance from neuron to neuron, which a
// power of two would leave with a few sets of the near cache; so many columns at once that all neurons fit. (With AVX2, where
// nothing is widened, copying a wide strip or few neurons takes longer than it saves.) Else from where they
// are: in a narrow strip all neurons at once, in a wide one as many as stay near until the next tile of rows reads them. The
// fewer rows, the cheaper it is to put their sums away, and the fewer neurons a turn. Where experts have few rows on average,
// what is fetched into the first-level cache stays there until its turn: after one with few, one of more rows would begin with
// more neurons than were fetched.
template <class Vec, class W>
void accumulate(const Accumulate& p) {
  if (few_neurons<Vec::held_neurons>(p, [&](auto m) { accumulate_held<Vec, HeldFloats<Vec, W, m.value>>(p, p.next); })) return;
  if constexpr (Vec::copied > 0) {
    constexpr int64_t kManyRows = 8, kManyColumns = 1024, kFewNeurons = 16, kColumns = Vec::accumulate_vecs * Vec::width;
    const int64_t most = p.m > 0 ? Vec::copied / p.m / kColumns * kColumns : 0;
    const bool gains = Vec::always_copied || sizeof(W) < sizeof(float) || (p.columns <= kStrip && p.m > kFewNeurons);
    if (p.n >= kManyRows && p.columns <= kManyColumns && most > 0 && gains) {
      alignas(64) float copy[Vec::copied];
      return some_at_once(p.columns, most, [&](int64_t c, int64_t count, bool more, int64_t then) {
        Accumulate part = p;
        const W* w = static_cast<const W*>(p.w) + c;
        part.columns = count, part.y = p.y + c;
        const AheadInRows<Vec> ahead = ahead_of<Vec, W>(part, more ? w + count : p.next, p.m, then);
        for (int64_t j = 0; j < p.m; ++j) widen<Vec, W>(w + j * p.ld_w, copy + j * count, count);
        part.w = copy, part.ld_w = count;
        accumulate_all<Vec, float>(part, {}, ahead);
      });
    }
  }
  // Bytes of the neurons of a turn; columns; rows on average, and at most.
  constexpr int64_t kNear = 16 * 1024, kPiece = 1024, kFewRows = 4, kMostRows = 16;
  const bool few = Vec::fetched == kFirstLevel && p.mean_rows <= kFewRows && p.n <= kMostRows && p.columns > kStrip;
  const int64_t piece = few && p.n > 1 && p.columns > kPiece ? kPiece : p.columns;
  const int64_t fours = kNear / (piece * int64_t(sizeof(W))) / 4 * 4;
  const int64_t turn = p.columns <= kStrip ? p.m : few ? (fours ? fours : 2) : p.n > 2 ? p.turn : p.n > 1 ? 8 : fours ? 4 : 2;
  some_at_once(p.columns, piece, [&](int64_t c, int64_t count, bool more, int64_t) {
    Accumulate part = p;
    const W* w = static_cast<const W*>(p.w) + c;
    part.columns = count, part.w = w, part.y = p.y + c, part.next = more ? w + count : p.next;
    accumulate_in_turns<Vec, W>(part, turn);
  });
}

// What follows multiplies entries of 16 bits, and sums the products of two neighbours: Pair is Ints or Pairs (see table.h).
//
// The weights of two neurons from a copy of their pairs, group after group of Pair::width columns, for all neurons; see
// PairsInPlace.
template <class Pair>
struct CopiedPairs {
  const typename Pair::Entry* copy;
  int64_t columns;  // a whole number of groups

  void load(int64_t j, int64_t c, Pair* out) const {
    const auto* from = copy + j * columns + 2 * c;
    out[0] = Pair::load(from), out[1] = Pair::load(from + Pair::width);
  }
};

// add_products of groups of Pair::width columns, sums [Rows][Groups][2], two neurons at once.
template <class Pair, int Rows, int Groups, class RowOf, class Weights, class Walk>
[[gnu::always_inline]] inline void add_products_of_pairs(typename Pair::Sum (&sums)[Rows][Groups][2], const RowOf& row,
                                                         const Weights& weights, int64_t c0, int64_t m, Walk& ahead) {
  const Weights from = weights;  // in registers
  constexpr int64_t kBytes = 2 * Groups * Pair::width * sizeof(typename Pair::Weight);
  const int64_t pace = ahead.take((m + 1) / 2, 2 * Rows * Groups * Pair::width, kBytes);
  with_lines<(kBytes + kLine - 1) / kLine>(pace, [&](auto lines) {
    Walk walk = ahead;  // in registers
    for (int64_t j = 0; j < m; j += 2) {
      walk.step(pace, lines);
      Pair ws[Groups][2];
      unroll<Groups>([&](auto g) { from.load(j, c0 + g.value * Pair::width, ws[g.value]); });
      unroll<Rows>([&](auto i) {
        const Pair pair = Pair::set_pair(row(i.value) + j);
        unroll<Groups>([&](auto g) {
          unroll<2>([&](auto half) {
            auto& sum = sums[i.value][g.value][half.value];
            sum = fma(pair, ws[g.value][half.value], sum);
          });
        });
      });
    }
    ahead = walk;
  });
}

// Rows tokens x Groups of Pair::width columns. Part: of one group, part columns. Flat.
template <class Pair, class Vec, int Rows, int Groups, bool Part, class Weights>
[[gnu::flatten]] void accumulate_pair_tile(const Accumulate& p, const Weights& weights, AheadInRows<Vec>& ahead, int64_t i0,
                                           int64_t c0, int64_t part) {
  using Entry = typename Pair::Entry;
  using Sum = typename Pair::Sum;
  Sum sums[Rows][Groups][2];
  const auto each = [](auto body) { unroll<Rows>([&](auto i) { unroll<Groups>([&](auto g) { body(i, g); }); }); };
  each([&](auto i, auto g) { sums[i.value][g.value][0] = sums[i.value][g.value][1] = Sum::zero(); });
  const Entry* h = static_cast<const Entry*>(p.h) + i0 * p.ld_h;
  const auto row = [&](int i) { return h + i * p.ld_h; };
  add_products_of_pairs<Pair>(sums, row, weights, c0, p.m, ahead);
  each([&](auto i, auto g) {
    float* y = p.y + (p.rows ? p.rows[i0 + i.value] : i0 + i.value) * p.ld_y + c0 + g.value * Pair::width;
    Vec columns[2];
    Pair::to_floats(sums[i.value][g.value], columns);
    each_vector<2, Vec, Part>(part, [&](auto half, auto is_part, int64_t left) {
      constexpr bool kPart = decltype(is_part)::value;
      float* to = y + half.value * Vec::width;
      const Vec before = load_columns<kPart, Vec>(to, left);
      store_columns<kPart>(added<Entry>(p, i0 + i.value, columns[half.value], before), to, left);
    });
  });
}

// weights_of(Part, part): the weights where groups are whole, and where the last one is not.
template <class Pair, class Vec, class WeightsOf>
void accumulate_pair_columns(const Accumulate& p, AheadInRows<Vec> ahead, const WeightsOf& weights_of) {
  constexpr int kRows = Pair::accumulate_rows, kGroups = Pair::accumulate_groups;
  const auto whole = weights_of(std::false_type{}, 0);
  const auto strip = [&](auto groups, auto is_part, const auto& weights, int64_t c, int64_t part) {
    rows_in_tiles<kRows>(0, p.n, [&](auto rows, int64_t i) {
      accumulate_pair_tile<Pair, Vec, rows.value, groups.value, is_part.value>(p, weights, ahead, i, c, part);
    });
  };
  int64_t c = 0;
  const auto few = [&](auto rows, auto groups) {  // take more groups at once, as memory gives long pieces of a neuron faster
    if constexpr (groups.value > kGroups)
      for (; p.n == rows.value && c + groups.value * Pair::width <= p.columns; c += groups.value * Pair::width)
        accumulate_pair_tile<Pair, Vec, rows.value, groups.value, false>(p, whole, ahead, 0, c, 0);
  };
  constexpr int kSums = kRows * kGroups;
  few(Index<1>{}, Index<kSums>{}), few(Index<1>{}, Index<kSums / 2>{});
  few(Index<2>{}, Index<kSums / 2>{}), few(Index<3>{}, Index<kSums / 3>{});
  for (; c + kGroups * Pair::width <= p.columns; c += kGroups * Pair::width)
    strip(Index<kGroups>{}, std::false_type{}, whole, c, 0);
  for (; c + Pair::width <= p.columns; c += Pair::width) strip(Index<1>{}, std::false_type{}, whole, c, 0);
  if (const int64_t part = p.columns - c; part > 0)
    strip(Index<1>{}, std::true_type{}, weights_of(std::true_type{}, part), c, part);
}

// Many rows, three tiles or more, read a copy, as above: of all neurons, for their sum is added as one.
template <class Pair, class Vec>
void accumulate_pairs(const Accumulate& p) {
  using Weight = typename Pair::Weight;
  constexpr int64_t kWidth = Pair::width, kFar = 512 * 1024;  // bytes that would leave the caches before their turn
  const void* next = p.m * p.columns * int64_t(sizeof(Weight)) <= kFar ? p.next : nullptr;
  if (few_neurons<Pair::held_neurons>(p, [&](auto m) { accumulate_held<Vec, HeldPairs<Vec, Pair, m.value>>(p, next); })) return;
  if constexpr (Pair::copied > 0) {
    constexpr int64_t kGroups = Pair::accumulate_groups * kWidth;
    const int64_t most = p.m > 0 ? Pair::copied / ((p.m + 1) / 2 * 2) / kGroups * kGroups : 0;
    if (p.n >= 3 * Pair::accumulate_rows && most > 0 && p.columns <= (most > kStrip ? most : kStrip)) {
      alignas(64) typename Pair::Entry copy[Pair::copied];
      return some_at_once(p.columns, most, [&](int64_t c0, int64_t count, bool more, int64_t then) {
        Accumulate part = p;
        const Weight* w = static_cast<const Weight*>(p.w) + c0;
        part.columns = count, part.w = w, part.y = p.y + c0;
        const int64_t columns = (count + kWidth - 1) / kWidth * kWidth;
        const auto fill = [&](const auto& weights, int64_t j, int64_t c) {
          Pair both[2];
          weights.load(j, c, both);
          both[0].store(copy + j * columns + 2 * c), both[1].store(copy + j * columns + 2 * c + kWidth);
        };
        for (int64_t j = 0; j < p.m; j += 2) {
          int64_t c = 0;
          for (; c + kWidth <= count; c += kWidth) fill(PairsInPlace<Pair, false>(part, 0), j, c);
          if (c < count) fill(PairsInPlace<Pair, true>(part, count - c), j, c);
        }
        accumulate_pair_columns<Pair, Vec>(part, ahead_of<Vec, Weight>(part, more ? w + count : next, p.m, then),
                                           [&](auto, int64_t) { return CopiedPairs<Pair>{copy, columns}; });
      });
    }
  }
  accumulate_pair_columns<Pair, Vec>(p, ahead_of<Vec, Weight>(p, next, p.m, p.columns), [&](auto part, int64_t columns) {
    return PairsInPlace<Pair, decltype(part)::value>(p, columns);
  });
}

}  // namespace sadmoe::cpu
