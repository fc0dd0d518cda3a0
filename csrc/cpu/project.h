// Dot products of token rows with neuron rows, in tiles. One template for every instruction set; no intrinsics here.
#pragma once
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/unroll.h"
#include "cpu/widen.h"

namespace sadmoe::cpu {

// One tile: Rows tokens x Columns neurons. A transposed reduction ends Vec::sums of its sums at a time. Every product has its
// own accumulator over k, hence the same bits in any tile. Flat: a function that was called would keep the sums in memory.
template <class Vec, class W, int Rows, int Columns>
[[gnu::flatten]] void project_tile(const Project& p, int64_t i0, int64_t j0) {
  using X = typename Vec::Entry;
  using Sum = typename Vec::Sum;
  constexpr int kSums = (Rows * Columns + Vec::sums - 1) / Vec::sums * Vec::sums;
  const auto row = [&](int64_t i) { return p.rows ? p.rows[i0 + i] : i0 + i; };
  const X* x[Rows];
  const W* w[Columns];
  for (int i = 0; i < Rows; ++i) x[i] = static_cast<const X*>(p.x) + row(i) * p.d;
  for (int j = 0; j < Columns; ++j)  // past the last neuron: repeat it, and drop the result
    w[j] = static_cast<const W*>(p.w) + (j0 + j < p.m ? j0 + j : p.m - 1) * p.d;

  // The first tiles fetch a neuron each of those that come next, the last of them what is left. A row alone is memory's anyway.
  const int64_t turn = (i0 + Vec::project_rows - 1) / Vec::project_rows;
  const int64_t end = p.n == 1 ? 0 : i0 + Rows < p.n && turn < Columns ? turn + 1 : Columns;
  const W* ahead[Columns];
  int fetched = 0;
  for (int64_t j = j0 + Columns + turn; j < j0 + Columns + end; ++j)
    if (j < p.m)
      ahead[fetched++] = static_cast<const W*>(p.w) + j * p.d;
    else if (p.next)
      ahead[fetched++] = static_cast<const W*>(p.next) + (j - p.m) * p.d;
  Sum sums[kSums];
  unroll<kSums>([&](auto n) { sums[n.value] = Sum::zero(); });
  const auto step = [&](auto load, int64_t k) {
    Vec xs[Rows];
    unroll<Rows>([&](auto i) { xs[i.value] = load(x[i.value] + k); });
    unroll<Columns>([&](auto j) {
      Vec wj = load(w[j.value] + k);
      if constexpr (std::is_same_v<W, X>) hold(wj);
      unroll<Rows>([&](auto i) {
        Sum& sum = sums[i.value * Columns + j.value];
        sum = fma(xs[i.value], wj, sum);
      });
    });
  };
  int64_t k = 0;
  const auto whole = [](auto* from) { return Vec::load(from); };
  const auto fetch = [&](int64_t k) {
    for (int i = 0; i < fetched; ++i) __builtin_prefetch(ahead[i] + k);
  };
  if (fetched)
    for (; k + Vec::width <= p.d; k += Vec::width) fetch(k), step(whole, k);
  else
    for (; k + Vec::width <= p.d; k += Vec::width) step(whole, k);
  if (k < p.d) step([&](auto* from) { return Vec::load_part(from, p.d - k); }, k);

  float total[kSums];
  unroll<kSums / Vec::sums>([&](auto n) { Vec::reduce(sums + n.value * Vec::sums).store(total + n.value * Vec::sums); });
  if constexpr (std::is_same_v<X, int16_t>)
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Columns; ++j) total[i * Columns + j] *= p.steps[row(i)];
  const int64_t valid = p.m - j0 < Columns ? p.m - j0 : Columns;
  float* out = p.out + i0 * p.ld + j0;
  if (valid == Columns) {
    unroll<Rows>([&](auto i) { std::memcpy(out + i.value * p.ld, total + i.value * Columns, Columns * sizeof(float)); });
  } else {
    for (int i = 0; i < Rows; ++i) std::memcpy(out + i * p.ld, total + i * Columns, valid * sizeof(float));
  }
}

// The neurons j0 .. j1 of rows i0 .. n, in tiles of Rows rows, the rest in smaller ones: of 4 after 6, then half, rounded up.
template <class Vec, class W, int Rows>
void project_rows(const Project& p, int64_t i0, int64_t j0, int64_t j1) {
  constexpr int kColumns = Vec::project_columns;
  const auto pairs_are_left = [&] { return Rows == 3 && p.n - i0 == 4; };  // a row alone takes as long as two
  for (; i0 + Rows <= p.n && !pairs_are_left(); i0 += Rows)
    for (int64_t j = j0; j < j1; j += kColumns) project_tile<Vec, W, Rows, kColumns>(p, i0, j);
  if constexpr (Rows > 1)
    if (i0 < p.n) project_rows<Vec, W, (Rows > 4 ? 4 : (Rows + 1) / 2)>(p, i0, j0, j1);
}

// Calls body(part, first, end) for rows that stay in the second-level cache together, the last of them part.n, and for as many
// neurons at once as stay in the first-level one, as entries of W, while those rows stream by.
template <class Vec, class W, class Body>
void in_blocks(const Project& p, const Body& body) {
  constexpr int64_t kRows = Vec::project_rows, kColumns = Vec::project_columns;
  constexpr int64_t kNear = 12 * 1024 / sizeof(W), kNext = 192 * 1024 / sizeof(typename Vec::Entry);
  const auto whole = [&](int64_t entries, int64_t tile) { return entries / p.d < tile ? tile : entries / p.d / tile * tile; };
  const int64_t rows = whole(kNext, kRows), columns = whole(kNear, kColumns);
  Project part = p;
  for (int64_t i = 0; i < p.n; i += rows) {
    part.n = i + rows < p.n ? i + rows : p.n;
    for (int64_t j = 0; j < p.m; j += columns) body(part, i, j, j + columns < p.m ? j + columns : p.m);
  }
}

// Many rows: 16-bit weights are widened once, and not again in every tile.
template <class Vec, class W>
void project_widened(const Project& p) {
  alignas(64) float copy[Vec::copied];
  in_blocks<Vec, float>(p, [&](Project part, int64_t i, int64_t j0, int64_t j1) {
    part.m = j1 - j0, part.w = copy, part.next = nullptr, part.out = p.out + j0;
    widen<Vec, W>(static_cast<const W*>(p.w) + j0 * p.d, copy, part.m * p.d);
    project_rows<Vec, float, Vec::project_rows>(part, i, 0, part.m);
  });
}

template <class Vec, class W>
void project(const Project& p) {
  constexpr int64_t kManyRows = 8;
  if (p.n == 1) {  // more neurons at once: memory gives several streams faster
    constexpr int kColumns = 2 * Vec::project_columns;
    for (int64_t j = 0; j < p.m; j += kColumns) project_tile<Vec, W, 1, kColumns>(p, 0, j);
    return;
  }
  if constexpr (sizeof(W) == 2 && !std::is_same_v<W, typename Vec::Entry>)  // where they are widened
    if constexpr (Vec::copied > 0)
      if (p.n >= kManyRows && p.d * Vec::project_columns <= Vec::copied) return project_widened<Vec, W>(p);
  in_blocks<Vec, W>(p, [](const Project& part, int64_t i, int64_t j0, int64_t j1) {
    project_rows<Vec, W, Vec::project_rows>(part, i, j0, j1);
  });
}

}  // namespace sadmoe::cpu
