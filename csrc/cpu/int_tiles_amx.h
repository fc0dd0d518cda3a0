// Products with weights in int8 by tiles of bytes. Included by the files of such instruction sets alone.
//
// Rows are integers of 16 bits: 256 times an upper byte, with the sign, and a lower one. The sums of both are exact, and so is
// theirs: the same bits as by AVX512-VNNI, where experts with few rows go. Of a product of 16 rows, over parts of k:
//   left    high[k / 64][i][k % 64], and low after each kilobyte of it
//   right   tiles of 64 k, in fours, x 16 columns:   right[j / 16][k / 64][k % 64 / 4][j % 16][k % 4]
#pragma once
#include "cpu/tiles_amx.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kIntDepth = kDepthOf<int8_t>;
constexpr int64_t kFewest = kRows;  // rows of an expert: fewer leave a tile empty, and weights are laid out for few
constexpr int64_t kPart = 512, kSome = 64, kColumns = 2 * kRows;  // of k, rows and columns at once: 90 KiB of stack

// Of rows(i) at its k0, i < n and k entries.
template <class Rows>
void int_left(const Rows& rows, int64_t n, int64_t k, int8_t* left) {
  constexpr int64_t kHalf = kIntDepth / 2;
  for (int64_t i0 = 0; i0 < n; i0 += kRows)
    for (int64_t k0 = 0; k0 < k; k0 += kIntDepth, left += 2 * kTileBytes)
      for (int64_t i = 0; i < kRows && i0 + i < n; ++i)
        for (int64_t half = 0; half < kIntDepth; half += kHalf) {
          const int64_t more = k - k0 - half;
          const __m512i q = _mm512_maskz_loadu_epi16(more > 0 ? first(more) : 0, rows(i0 + i) + k0 + half);
          int8_t* to = left + i * kIntDepth + half;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(_mm512_srai_epi16(q, 8)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kTileBytes), _mm512_cvtepi16_epi8(q));
        }
}

// use(i, j, columns, sums): sums [columns] of row i and the columns from j on, of the n x m in all; right(j, columns, k0, k, to)
// lays out weights.
template <class Rows, class Right, class Use>
void int_products(int64_t n, int64_t m, int64_t k, const Rows& rows, const Right& right, const Use& use) {
  const TileRegisters registers;
  alignas(64) int8_t left_tiles[kSome * kPart * 2], right_tiles[kColumns * kPart];
  alignas(64) int32_t sums[kSome * kColumns], high[kRows * kColumns], low[kRows * kColumns];
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto product = [&](int64_t i, int64_t depth, auto columns, bool starts) {
    tile_product<columns.value>(left_tiles + i * depth * 2 * kIntDepth, right_tiles, depth, high, low, kColumns);
    for (int64_t at = 0; at < kRows * kColumns; at += 16) {
      const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(high + at), 8), lower = _mm512_load_si512(low + at);
      const __m512i before = starts ? _mm512_setzero_si512() : _mm512_load_si512(sums + i * kColumns + at);
      _mm512_store_si512(sums + i * kColumns + at, _mm512_add_epi32(before, _mm512_add_epi32(upper, lower)));
    }
  };
  for (int64_t i0 = 0; i0 < n; i0 += kSome) {
    const int64_t some = least(n - i0, kSome);
    for (int64_t j0 = 0; j0 < m; j0 += kColumns) {
      const int64_t columns = least(m - j0, kColumns);
      for (int64_t k0 = 0; k0 < k; k0 += kPart) {
        const int64_t part = least(k - k0, kPart), depth = tiles_of(part, kIntDepth);
        if (j0 == 0 || k > kPart) int_left([&](int64_t i) { return rows(i0 + i) + k0; }, some, part, left_tiles);
        right(j0, columns, k0, part, right_tiles);
        for (int64_t i = 0; i < some; i += kRows)
          columns > kRows ? product(i, depth, Index<2>{}, k0 == 0) : product(i, depth, Index<1>{}, k0 == 0);
      }
      for (int64_t i = 0; i < some; ++i) use(i0 + i, j0, columns, sums + i * kColumns);
    }
  }
}

// to[0 .. columns) = of(sums as floats, what is there).
template <class Of>
void for_vectors(const int32_t* sums, float* to, int64_t columns, const Of& of) {
  for (int64_t c = 0; c < columns; c += 16) {
    const Vec sum{_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + c))};
    if (const int64_t left = columns - c; left < 16)
      of(sum, Vec::load_part(to + c, left)).store_part(to + c, left);
    else
      of(sum, Vec::load(to + c)).store(to + c);
  }
}

void int_project(const Project& p) {
  if (p.n < kFewest) return kernels_avx512vnni().project[int(DType::i8)](p);
  const auto row = [&](int64_t i) { return p.rows ? p.rows[i] : i; };
  int_products(
      p.n, p.m, p.d, [&](int64_t i) { return static_cast<const int16_t*>(p.x) + row(i) * p.d; },
      [&](int64_t j, int64_t columns, int64_t k0, int64_t k, int8_t* right) {
        right_of_rows(static_cast<const int8_t*>(p.w) + j * p.d + k0, p.d, columns, k, right);
      },
      [&](int64_t i, int64_t j, int64_t columns, const int32_t* sums) {
        const Vec step = Vec::set(p.steps[row(i)]);
        for_vectors(sums, p.out + i * p.ld + j, columns, [&](Vec sum, Vec) { return sum * step; });
      });
}

void int_accumulate(const Accumulate& p) {
  if (p.n < kFewest) return kernels_avx512vnni().accumulate[int(DType::i8)](p);
  int_products(
      p.n, p.columns, p.m, [&](int64_t i) { return static_cast<const int16_t*>(p.h) + i * p.ld_h; },
      [&](int64_t c, int64_t columns, int64_t j, int64_t m, int8_t* right) {
        right_of_columns(static_cast<const int8_t*>(p.w) + j * p.ld_w + c, p.ld_w, m, columns, right);
      },
      [&](int64_t i, int64_t c, int64_t columns, const int32_t* sums) {
        const Vec step = Vec::set(p.steps[i]);
        float* y = p.y + (p.rows ? p.rows[i] : i) * p.ld_y + c;
        for_vectors(sums, y, columns, [&](Vec sum, Vec before) { return fma(sum, step, before); });
      });
}

}  // namespace
}  // namespace sadmoe::cpu
