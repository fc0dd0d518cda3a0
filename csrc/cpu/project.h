// Dot products of token rows with neuron rows, in tiles. One template for every instruction set; no intrinsics here.
#pragma once
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/unroll.h"

namespace sadmoe::cpu {

// One tile: Rows tokens x Columns neurons. A transposed reduction ends Vec::sums of its sums at a time. Every product has its
// own accumulator over k, hence the same bits in any tile.
template <class Vec, class W, int Rows, int Columns>
void project_tile(const Project& p, int64_t i0, int64_t j0) {
  using X = typename Vec::Entry;
  using Sum = typename Vec::Sum;
  constexpr int kSums = (Rows * Columns + Vec::sums - 1) / Vec::sums * Vec::sums;
  const auto row = [&](int64_t i) { return p.rows ? p.rows[i0 + i] : i0 + i; };
  const X* x[Rows];
  const W* w[Columns];
  for (int i = 0; i < Rows; ++i) x[i] = static_cast<const X*>(p.x) + row(i) * p.d;
  for (int j = 0; j < Columns; ++j)  // past the last neuron: repeat it, and drop the result
    w[j] = static_cast<const W*>(p.w) + (j0 + j < p.m ? j0 + j : p.m - 1) * p.d;

  const int64_t turn = i0 / Rows, next = j0 + Columns + turn;  // the first tiles fetch a neuron each of those that come next
  const W* ahead = turn < Columns && next < p.m ? static_cast<const W*>(p.w) + next * p.d : nullptr;
  Sum sums[kSums];
  unroll<kSums>([&](auto n) { sums[n.value] = Sum::zero(); });
  const auto step = [&](auto load, int64_t k) {
    Vec xs[Rows];
    unroll<Rows>([&](auto i) { xs[i.value] = load(x[i.value] + k); });
    unroll<Columns>([&](auto j) {
      const Vec wj = load(w[j.value] + k);
      unroll<Rows>([&](auto i) {
        Sum& sum = sums[i.value * Columns + j.value];
        sum = fma(xs[i.value], wj, sum);
      });
    });
  };
  int64_t k = 0;
  const auto whole = [](auto* from) { return Vec::load(from); };
  if (ahead)
    for (; k + Vec::width <= p.d; k += Vec::width) __builtin_prefetch(ahead + k), step(whole, k);
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

// The neurons j0 .. j1 of rows i0 .. n, in tiles of Rows rows, the rest in smaller ones: of 4 after 6, then half.
template <class Vec, class W, int Rows>
void project_rows(const Project& p, int64_t i0, int64_t j0, int64_t j1) {
  constexpr int kColumns = Vec::project_columns;
  for (; i0 + Rows <= p.n; i0 += Rows)
    for (int64_t j = j0; j < j1; j += kColumns) project_tile<Vec, W, Rows, kColumns>(p, i0, j);
  if constexpr (Rows > 1)
    if (i0 < p.n) project_rows<Vec, W, (Rows > 4 ? 4 : Rows / 2)>(p, i0, j0, j1);
}

template <class Vec, class W>
void project(const Project& p) {
  // As many neurons at once as stay in the first-level cache while the rows stream by from the second.
  constexpr int64_t kColumns = Vec::project_columns, kResident = 12 * 1024 / sizeof(W);
  const int64_t columns = kResident / p.d / kColumns * kColumns, strip = columns > kColumns ? columns : kColumns;
  for (int64_t j = 0; j < p.m; j += strip) project_rows<Vec, W, Vec::project_rows>(p, 0, j, j + strip < p.m ? j + strip : p.m);
}

}  // namespace sadmoe::cpu
