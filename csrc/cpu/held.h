// Weighted sums of few neuron rows into token rows (Kernels::accumulate), row by row, while the weights stay in registers: in a
// tile of rows, the products of eight neurons take no longer than what begins and ends it. Here the sums of a row are loaded and
// stored while a processor is about the next rows' products. One template for every instruction set; no intrinsics here.
#pragma once
#include "cpu/ahead.h"
#include "cpu/columns.h"
#include "cpu/kernels.h"
#include "cpu/unroll.h"

namespace sadmoe::cpu {

// Tile<Vecs, Part>: the weights of M neurons, and of so many vectors of columns, at most `most`; Part: the first part columns.
// sum(h, sums): of a row, as a tile of rows sums them, so that bits are the same.
template <class Vec, class W, int M>
struct HeldFloats {
  using Entry = float;
  using Weight = W;
  static constexpr int width = Vec::width, most = Vec::held / M;  // vectors at once
  static_assert(most > 0);

  template <int Vecs, bool Part>
  struct Tile {
    static constexpr int vecs = Vecs;
    Vec ws[M][Vecs];

    [[gnu::always_inline]] Tile(const Accumulate& p, int64_t c0, int64_t part) {
      const W* w = static_cast<const W*>(p.w) + c0;
      unroll<M>([&](auto j) {
        unroll<Vecs>(
            [&](auto v) { ws[j.value][v.value] = load_columns<Part, Vec>(w + j.value * p.ld_w + v.value * width, part); });
      });
    }
    [[gnu::always_inline]] void sum(const float* h, Vec* sums) const {
      unroll<Vecs>([&](auto v) { sums[v.value] = Vec::zero(); });
      unroll<M>([&](auto j) {
        const Vec hj = Vec::set(h[j.value]);
        unroll<Vecs>([&](auto v) { sums[v.value] = fma(hj, ws[j.value][v.value], sums[v.value]); });
      });
    }
  };
};

// The same for entries of 16 bits, of groups of two vectors.
template <class Vec, class Pair, int M>
struct HeldPairs {
  using Entry = typename Pair::Entry;
  using Weight = typename Pair::Weight;
  static constexpr int width = Pair::width, groups = Pair::held / M;
  static constexpr int most = groups < Pair::accumulate_groups ? groups : Pair::accumulate_groups;
  static_assert(most > 0);

  template <int Groups, bool Part>
  struct Tile {
    static constexpr int vecs = 2 * Groups;
    Pair ws[M / 2][Groups][2];

    [[gnu::always_inline]] Tile(const Accumulate& p, int64_t c0, int64_t part) {
      const PairsInPlace<Pair, Part> from(p, part);
      unroll<M / 2>([&](auto j) {
        unroll<Groups>([&](auto g) {
          from.load(2 * j.value, c0 + g.value * width, ws[j.value][g.value]);
          Pair::put_in_order(ws[j.value][g.value]);
        });
      });
    }
    [[gnu::always_inline]] void sum(const Entry* h, Vec* out) const {
      typename Pair::Sum sums[Groups][2];
      unroll<Groups>([&](auto g) { sums[g.value][0] = sums[g.value][1] = Pair::Sum::zero(); });
      unroll<M / 2>([&](auto j) {
        const Pair pair = Pair::set_pair(h + 2 * j.value);
        unroll<Groups>([&](auto g) {
          unroll<2>([&](auto half) {
            auto& sum = sums[g.value][half.value];
            sum = fma(pair, ws[j.value][g.value][half.value], sum);
          });
        });
      });
      unroll<vecs>([&](auto v) { out[v.value] = Pair::to_floats(sums[v.value / 2][v.value % 2]); });
    }
  };
};

template <class Vec, class Held, int Vecs, bool Part>
[[gnu::flatten]] void accumulate_rows(const Accumulate& p, int64_t c0, int64_t part) {
  using Entry = typename Held::Entry;
  using Tile = typename Held::template Tile<Vecs, Part>;
  const Tile weights(p, c0, part);
  const Entry* h = static_cast<const Entry*>(p.h);
  for (int64_t i = 0; i < p.n; ++i, h += p.ld_h) {
    Vec sums[Tile::vecs];
    weights.sum(h, sums);
    float* y = p.y + (p.rows ? p.rows[i] : i) * p.ld_y + c0;
    each_vector<Tile::vecs, Vec, Part>(part, [&](auto v, auto is_part, int64_t left) {
      constexpr bool kPart = decltype(is_part)::value;
      float* to = y + v.value * Vec::width;
      store_columns<kPart>(added<Entry>(p, i, sums[v.value], load_columns<kPart, Vec>(to, left)), to, left);
    });
  }
}

// All columns, while the same columns of what comes next are fetched: the first of them into the first-level cache, see Ahead.
template <class Vec, class Held>
void accumulate_held(const Accumulate& p, const void* next) {
  constexpr int kMost = Held::most, kColumns = kMost * Held::width;
  constexpr int64_t kBytes = sizeof(typename Held::Weight);
  const auto fetch = [&](int64_t c, int64_t columns) {
    for (int64_t j = 0; next && j < p.m; ++j) {
      const char* from = static_cast<const char*>(next) + (j * p.ld_w + c) * kBytes;
      for (int64_t at = 0; at < columns * kBytes; at += kLine)
        c == 0 ? __builtin_prefetch(from + at, 0, kFirstLevel) : __builtin_prefetch(from + at, 0, Vec::fetched);
    }
  };
  int64_t c = 0;
  for (; c + kColumns <= p.columns; c += kColumns) {
    fetch(c, kColumns);
    accumulate_rows<Vec, Held, kMost, false>(p, c, 0);
  }
  fetch(c, p.columns - c);
  if constexpr (kMost > 1)
    for (; c + Held::width <= p.columns; c += Held::width) accumulate_rows<Vec, Held, 1, false>(p, c, 0);
  if (c < p.columns) accumulate_rows<Vec, Held, 1, true>(p, c, p.columns - c);
}

// Whether it was done by body(Index<m>), for m of four, eight .. Most neurons. With few rows an expert the time is spent fetching
// weights, whose pieces are shorter here.
template <int Most, class Body>
bool few_neurons(const Accumulate& p, const Body& body) {
  constexpr int64_t kRows = 8;
  if constexpr (Most > 0) {
    if (p.m != Most) return few_neurons<Most - 4>(p, body);
    if (p.mean_rows < kRows) return false;
    body(Index<Most>{});
    return true;
  }
  return false;
}

}  // namespace sadmoe::cpu
