// Dot products of token rows with neuron rows, in tiles. One template for every instruction set; no intrinsics here.
#pragma once
#include "cpu/kernels.h"

namespace sadmoe::cpu {

// One tile: Rows tokens x Columns neurons, Rows * Columns = Vec::width, so that one transposed reduction ends them all.
// Every product has its own accumulator over k, hence the same bits in any tile.
template <class Vec, class W, int Rows, int Columns>
void project_tile(const Project& p, int64_t i0, int64_t j0) {
  static_assert(Rows * Columns == Vec::width);
  const float* x[Rows];
  const W* w[Columns];
  for (int i = 0; i < Rows; ++i) x[i] = p.x + (p.rows ? p.rows[i0 + i] : i0 + i) * p.d;
  for (int j = 0; j < Columns; ++j)  // past the last neuron: repeat it, and drop the result
    w[j] = static_cast<const W*>(p.w) + (j0 + j < p.m ? j0 + j : p.m - 1) * p.d;

  Vec sums[Vec::width];
  for (Vec& sum : sums) sum = Vec::zero();
  const auto step = [&](auto load, int64_t k) {
    Vec xs[Rows];
    for (int i = 0; i < Rows; ++i) xs[i] = load(x[i] + k);
    for (int j = 0; j < Columns; ++j) {
      const Vec wj = load(w[j] + k);
      for (int i = 0; i < Rows; ++i) sums[i * Columns + j] = fma(xs[i], wj, sums[i * Columns + j]);
    }
  };
  int64_t k = 0;
  for (; k + Vec::width <= p.d; k += Vec::width) step([](auto* from) { return Vec::load(from); }, k);
  if (k < p.d) step([&](auto* from) { return Vec::load_part(from, p.d - k); }, k);

  float total[Vec::width];
  Vec::reduce(sums).store(total);
  const int64_t valid = p.m - j0 < Columns ? p.m - j0 : Columns;
  for (int i = 0; i < Rows; ++i)
    for (int64_t j = 0; j < valid; ++j) p.out[(i0 + i) * p.ld + j0 + j] = total[i * Columns + j];
}

// Rows i0 .. n in tiles of Rows, the rest in tiles of half as many, down to one.
template <class Vec, class W, int Rows>
void project_rows(const Project& p, int64_t i0) {
  constexpr int kColumns = Vec::width / Rows;
  const int64_t end = i0 + (p.n - i0) / Rows * Rows;
  for (int64_t j = 0; j < p.m && i0 < end; j += kColumns)  // the tile's neurons stay in L1 for all rows
    for (int64_t i = i0; i < end; i += Rows) project_tile<Vec, W, Rows, kColumns>(p, i, j);
  if constexpr (Rows > 1)
    if (end < p.n) project_rows<Vec, W, Rows / 2>(p, end);
}

template <class Vec, class W>
void project(const Project& p) {
  project_rows<Vec, W, Vec::project_rows>(p, 0);
}

}  // namespace sadmoe::cpu
