// Dot products of token rows with neuron rows, in tiles. One template for every instruction set; no intrinsics here.
#pragma once
#include <cstring>
#include <type_traits>

#include "cpu/ahead.h"
#include "cpu/kernels.h"
#include "cpu/unroll.h"
#include "cpu/widen.h"

namespace sadmoe::cpu {

constexpr int64_t kKeptTiles = 8;  // of a block of neurons whose rows are multiplied in parts

// Sums of a tile, in whole groups.
template <class Vec>
constexpr int sums_of(int products) {
  return (products + Vec::sums - 1) / Vec::sums * Vec::sums;
}

// One tile: Rows tokens x Columns neurons. A transposed reduction ends Vec::sums of its sums at a time. Every product has its
// own accumulator over k, hence the same bits in any tile. One call multiplies the entries k0 .. k1 of the rows; up to the last
// of them, sums wait in `kept`. Flat: a function that was called would keep the sums in memory.
template <class Vec, class W, int Rows, int Columns>
[[gnu::flatten]] void project_tile(const Project& p, int64_t i0, int64_t j0, int64_t k0, int64_t k1, typename Vec::Sum* kept,
                                   Ahead<Vec>& ahead) {
  using X = typename Vec::Entry;
  using Sum = typename Vec::Sum;
  constexpr int kSums = sums_of<Vec>(Rows * Columns);
  const auto row = [&](int64_t i) { return p.rows ? p.rows[i0 + i] : i0 + i; };
  const X* x[Rows];
  const W* w[Columns];
  for (int i = 0; i < Rows; ++i) x[i] = static_cast<const X*>(p.x) + row(i) * p.d;
  for (int j = 0; j < Columns; ++j)  // past the last neuron: repeat it, and drop the result
    w[j] = static_cast<const W*>(p.w) + (j0 + j < p.m ? j0 + j : p.m - 1) * p.d;

  Sum sums[kSums];
  unroll<kSums>([&](auto n) { sums[n.value] = Sum::zero(); });
  if (k0 > 0) unroll<kSums>([&](auto n) { sums[n.value] = kept[n.value]; });
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
  int64_t k = k0;
  const auto whole = [](auto* from) { return Vec::load(from); };
  constexpr int64_t kBytes = Columns * Vec::width * sizeof(W);
  const int64_t pace = ahead.take((k1 - k0) / Vec::width, Rows * Columns * Vec::width, kBytes);
  with_lines<(kBytes + kLine - 1) / kLine>(pace, [&](auto lines) {
    Ahead<Vec> walk = ahead;  // in registers
    for (; k + Vec::width <= k1; k += Vec::width) walk.step(pace, lines), step(whole, k);
    ahead = walk;
  });
  if (k < k1) step([&](auto* from) { return Vec::load_part(from, k1 - k); }, k);
  if (k1 < p.d) return unroll<kSums>([&](auto n) { kept[n.value] = sums[n.value]; });

  // What the last vector of sums lacks are repeats of others, so that the compiler drops half of their reduction.
  constexpr int kWhole = Rows * Columns / Vec::sums * Vec::sums, kLast = Rows * Columns - kWhole;
  unroll<kSums - Rows * Columns>([&](auto n) { sums[kWhole + kLast + n.value] = sums[kWhole + n.value % kLast]; });
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

// The neurons of rows i0 .. n: tiles of Rows rows, then of what is left; the last neurons, where they fill no more than half of
// a tile, in one of half as many. Of each tile's rows, span entries after span.
template <class Vec, class W, int Rows>
void project_rows(const Project& p, int64_t i0, int64_t span, typename Vec::Sum* kept, Ahead<Vec>& ahead) {
  constexpr int kColumns = Vec::project_columns, kHalf = kColumns / 2, kSums = sums_of<Vec>(Rows * kColumns);
  const auto pairs_are_left = [&] { return Rows == 3 && p.n - i0 == 4; };  // a row alone takes as long as two
  for (; i0 + Rows <= p.n && !pairs_are_left(); i0 += Rows)
    for (int64_t k = 0; k < p.d; k += span) {
      const int64_t end = k + span < p.d ? k + span : p.d;
      const auto kept_of = [&](int64_t j) { return span < p.d ? kept + j / kColumns * kSums : kept; };
      int64_t j = 0;
      for (; j + kHalf < p.m; j += kColumns) project_tile<Vec, W, Rows, kColumns>(p, i0, j, k, end, kept_of(j), ahead);
      if (j < p.m) project_tile<Vec, W, Rows, kHalf>(p, i0, j, k, end, kept_of(j), ahead);
    }
  if constexpr (Rows > 1)
    if (i0 < p.n) project_rows<Vec, W, Rows - 1>(p, i0, span, kept, ahead);
}

// What is multiplied before the next rows, the next neurons, and the next entries of a tile's rows. Either neurons stay in the
// first-level cache, and rows in the second-level one stream by; or, where that would bring more lines, a tile's rows stay
// there, and neurons in the second-level one stream by.
struct Blocks {
  int64_t rows, neurons, span;
};

template <class Vec, class W>
Blocks blocks_of(const Project& p) {
  constexpr int64_t kRows = Vec::project_rows, kColumns = Vec::project_columns;
  // Bytes: of neurons, rows, and rows of a tile in the first-level cache; of neurons and rows in the second-level one.
  constexpr int64_t kNear = 12 * 1024, kNearRows = 32 * 1024, kTileRows = 24 * 1024, kFar = 128 * 1024, kFarRows = 192 * 1024;
  const int64_t row = p.d * int64_t(sizeof(typename Vec::Entry)), neuron = p.d * int64_t(sizeof(W));
  const auto whole = [](int64_t count, int64_t tile) { return count < tile ? tile : count / tile * tile; };
  if (p.n <= kRows || p.n * row <= kNearRows || kNear / neuron >= kRows)
    return {whole(kFarRows / row, kRows), whole(kNear / neuron, kColumns), p.d};
  int64_t neurons = whole(kFar / neuron, kColumns);
  const int64_t spans = (kRows * row + kTileRows - 1) / kTileRows;
  if (spans == 1) return {p.n, neurons, p.d};
  constexpr int64_t kLeast = 4 * kColumns, kMost = kKeptTiles * kColumns;
  if (neurons < kLeast) neurons = kLeast;
  if (neurons > kMost) neurons = kMost;
  return {p.n, neurons, (p.d + spans * Vec::width - 1) / (spans * Vec::width) * Vec::width};
}

// body(part, ahead): so many neurons after the other, with so many rows, while those are fetched that come next, or `skipped`
// entries further on.
template <class Vec, class W, class Body>
void in_blocks(const Project& p, int64_t rows, int64_t neurons, const Body& body, int64_t skipped = 0) {
  some_at_once(p.m, neurons, [&](int64_t j, int64_t count, bool, int64_t then) {
    Project part = p;
    const W* w = static_cast<const W*>(p.w) + j * p.d;
    part.m = count, part.w = w, part.out = p.out + j;
    const int64_t at = (j + count) * p.d + skipped, past = at - p.m * p.d;
    const void* next = past < 0 ? static_cast<const W*>(p.w) + at : p.next ? static_cast<const W*>(p.next) + past : nullptr;
    body(part, Ahead<Vec>(next, then * p.d * int64_t(sizeof(W)), rows * count * p.d));
  });
}

// Whether the processor foresees the neurons of a row alone, several side by side, and is best left to fetch them itself.
template <class Vec, class W>
bool are_foreseen(const Project& p) {
  if constexpr (std::is_same_v<W, float>) return p.d * int64_t(sizeof(W)) > Vec::foreseen;
  return false;
}

// A row alone with so many neurons at once. Of int8 these may be less than memory has on its way: those after them are fetched.
template <class Vec, class W, int Columns>
void project_row(const Project& p) {
  constexpr int64_t kOnItsWay = 8 * 1024;
  const bool few = sizeof(W) == 1 && Columns > 2 && Columns * p.d < kOnItsWay;
  const int64_t skipped =
      few && p.m % Columns == 0 && p.m > Columns ? Columns * p.d : 0;  // else blocks of p.next would be missed
  const bool foreseen = are_foreseen<Vec, W>(p);
  const auto body = [&](const Project& part, Ahead<Vec> ahead) {
    if (foreseen) ahead = {};
    project_tile<Vec, W, 1, Columns>(part, 0, 0, 0, p.d, nullptr, ahead);
  };
  in_blocks<Vec, W>(p, 1, Columns, body, skipped);
}

template <class Vec, class W>
void project(const Project& p) {
  constexpr int kColumns = Vec::project_columns;
  // Memory gives several streams faster, as long as they stay near.
  constexpr int64_t kNear = 24 * 1024, kMany = 2 * kColumns;
  const bool many = kMany * p.d * int64_t(sizeof(W)) <= kNear || are_foreseen<Vec, W>(p);
  if (p.n == 1 && many) return project_row<Vec, W, kMany>(p);
  if (p.n == 1) return project_row<Vec, W, 2>(p);
  typename Vec::Sum kept[kKeptTiles * sums_of<Vec>(Vec::project_rows * kColumns)];
  if constexpr (sizeof(W) == 2 && !std::is_same_v<W, typename Vec::Entry> && Vec::copied > 0) {
    constexpr int64_t kManyRows = 8, kCopied = 3 * 1024;
    static_assert(kCopied <= Vec::copied, "or a tile of neurons, as below");
    if (p.n >= kManyRows && p.d * kColumns <= Vec::copied) {  // 16-bit weights are widened once, and not again in every tile
      alignas(64) float copy[Vec::copied];
      const int64_t tiles = kCopied / p.d / kColumns;
      return in_blocks<Vec, W>(p, p.n, (tiles > 0 ? tiles : 1) * kColumns, [&](Project part, Ahead<Vec> ahead) {
        widen<Vec, W>(static_cast<const W*>(part.w), copy, part.m * p.d);
        part.w = copy;
        project_rows<Vec, float, Vec::project_rows>(part, 0, p.d, kept, ahead);
      });
    }
  }
  const Blocks by = blocks_of<Vec, W>(p);
  Project part = p;
  for (int64_t i = 0; i < p.n; i += by.rows) {
    const bool last = i + by.rows >= p.n;
    part.n = last ? p.n : i + by.rows, part.next = last ? p.next : p.w;
    in_blocks<Vec, W>(part, part.n - i, by.neurons, [&](const Project& block, Ahead<Vec> ahead) {
      project_rows<Vec, W, Vec::project_rows>(block, i, by.span, kept, ahead);
    });
  }
}

}  // namespace sadmoe::cpu
