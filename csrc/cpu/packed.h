// Products of token rows with neurons that stand side by side (Kernels::project_packed), in tiles. No lanes are added up at a
// tile's end, and an expert is one stream of memory. One template for every instruction set; no intrinsics here.
#pragma once
#include "cpu/accumulate.h"

namespace sadmoe::cpu {

// The entries of rows and neurons that are multiplied before the next ones, while those are fetched. Every span has sums of its
// own, the first in out, others added to them: in sums of a thousand, rounding errs more than in torch's.
constexpr int64_t kSpan = 128;
struct Span {
  int64_t k, count;
};

template <class Vec, bool Part>
[[gnu::always_inline]] inline void put(Vec sum, const Span& span, float* out, int64_t part) {
  store_columns<Part>(span.k > 0 ? load_columns<Part, Vec>(out, part) + sum : sum, out, part);
}

// The rows of a tile from entry k on, each a pointer in a register. Of a Vec, as all here, lest one instruction set's be linked
// into another.
template <class Vec, class Entry, int Rows>
struct RowsFrom {
  const Entry* x[Rows];

  [[gnu::always_inline]] RowsFrom(const Project& p, int64_t i0, int64_t k) {
    for (int i = 0; i < Rows; ++i) x[i] = static_cast<const Entry*>(p.x) + (p.rows ? p.rows[i0 + i] : i0 + i) * p.d + k;
  }
  [[gnu::always_inline]] const Entry* operator()(int i) const { return x[i]; }
};

// Tiles of float32 rows, and vectors of `width` neurons; Part: of one vector, part neurons. Flat, as tiles of project.
template <class Vec, class W>
struct PackedFloats {
  using Weight = W;
  static constexpr int width = Vec::width, tile_sums = Vec::accumulate_rows * Vec::accumulate_vecs;
  static constexpr int most = Vec::accumulate_vecs < 4 ? 2 : 4;  // vectors of a tile

  template <int Rows, int Vecs, bool Part>
  [[gnu::flatten]] static void tile(const Project& p, Span span, Ahead<Vec>& ahead, int64_t i0, int64_t j0, int64_t part) {
    const RowsFrom<Vec, float, Rows> row(p, i0, span.k);
    Vec sums[Rows][Vecs];
    unroll<Rows>([&](auto i) { unroll<Vecs>([&](auto v) { sums[i.value][v.value] = Vec::zero(); }); });
    add_products<Part>(sums, row, static_cast<const W*>(p.w) + span.k * p.ld_w + j0, p.ld_w, span.count, part, ahead);
    unroll<Rows>([&](auto i) {
      float* out = p.out + (i0 + i.value) * p.ld + j0;
      unroll<Vecs>([&](auto v) { put<Vec, Part>(sums[i.value][v.value], span, out + v.value * width, part); });
    });
  }
};

// Tiles of rows of 16 bits, two entries at once; else the same.
template <class Pair, class Vec>
struct PackedPairs {
  using Weight = typename Pair::Weight;
  static constexpr int width = Pair::width, tile_sums = Pair::accumulate_rows * Pair::accumulate_groups;
  static constexpr int most = Pair::accumulate_groups;

  template <int Rows, int Groups, bool Part>
  [[gnu::flatten]] static void tile(const Project& p, Span span, Ahead<Vec>& ahead, int64_t i0, int64_t j0, int64_t part) {
    const RowsFrom<Vec, typename Pair::Entry, Rows> row(p, i0, span.k);
    const PairsInPlace<Pair, Part> weights(static_cast<const Weight*>(p.w) + span.k * p.ld_w, p.ld_w, span.count, part);
    typename Pair::Sum sums[Rows][Groups][2];
    const auto each = [](auto body) { unroll<Rows>([&](auto i) { unroll<Groups>([&](auto g) { body(i, g); }); }); };
    each([&](auto i, auto g) { sums[i.value][g.value][0] = sums[i.value][g.value][1] = Pair::Sum::zero(); });
    add_products_of_pairs<Pair>(sums, row, weights, j0, span.count, ahead);
    each([&](auto i, auto g) {
      float* out = p.out + (i0 + i.value) * p.ld + j0 + g.value * width;
      Vec neurons[2];
      Pair::to_floats(sums[i.value][g.value], neurons);
      each_vector<2, Vec, Part>(part, [&](auto half, auto is_part, int64_t left) {
        put<Vec, decltype(is_part)::value>(neurons[half.value], span, out + half.value * Vec::width, left);
      });
    });
  }
};

// Rows of a tile with so many vectors of neurons: the fewer of these, the more.
template <class Tiles>
constexpr int rows_beside(int vecs) {
  constexpr int kMost = 8;
  return Tiles::tile_sums / vecs < kMost ? Tiles::tile_sums / vecs : kMost;
}

// The neurons from j on, so many vectors at once, then half as many.
template <class Vec, class Tiles, int Vecs>
void project_span(const Project& p, Span span, Ahead<Vec>& ahead, int64_t j) {
  constexpr int kRows = rows_beside<Tiles>(Vecs);
  const auto strip = [&](auto is_part, int64_t part) {
    rows_in_tiles<kRows>(
        0, p.n, [&](auto rows, int64_t i) { Tiles::template tile<rows.value, Vecs, is_part.value>(p, span, ahead, i, j, part); });
  };
  for (; j + Vecs * Tiles::width <= p.m; j += Vecs * Tiles::width) strip(std::false_type{}, 0);
  if constexpr (Vecs > 1)
    project_span<Vec, Tiles, Vecs / 2>(p, span, ahead, j);
  else if (j < p.m)
    strip(std::true_type{}, p.m - j);
}

// Few rows take more vectors at once, as memory gives longer pieces of an expert faster. Rows that just do not fit a tile take
// fewer, if they fit one of these: else the weights would be read again for the last of them.
template <class Vec, class Tiles>
void project_packed(const Project& p) {
  using W = typename Tiles::Weight;
  constexpr int kVecs = Tiles::most;
  const int64_t spans = (p.d + kSpan - 1) / kSpan, most = (p.d + 2 * spans - 1) / (2 * spans) * 2;  // even, for pairs
  some_at_once(p.d, most, [&](int64_t k, int64_t count, bool more, int64_t then) {
    const void* next = more ? static_cast<const W*>(p.w) + (k + count) * p.ld_w : p.next;
    if (p.m < p.ld_w) next = nullptr;  // of an expert that threads share: lines with gaps between them
    Ahead<Vec> ahead(next, then * p.m * int64_t(sizeof(W)), p.n * count * p.m);
    const Span span{k, count};
    if (p.n <= rows_beside<Tiles>(2 * kVecs))
      project_span<Vec, Tiles, 2 * kVecs>(p, span, ahead, 0);
    else if (p.n <= rows_beside<Tiles>(kVecs) || p.n > rows_beside<Tiles>(kVecs / 2))
      project_span<Vec, Tiles, kVecs>(p, span, ahead, 0);
    else
      project_span<Vec, Tiles, kVecs / 2>(p, span, ahead, 0);
  });
}

}  // namespace sadmoe::cpu
