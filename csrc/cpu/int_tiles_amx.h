// Products with weights in int8 by tiles of bytes. Included by the files of such instruction sets alone.
//
// Rows are integers of 16 bits: 256 times an upper byte, with the sign, and a lower one. The sum of both products is exact, for
// it fits 32 bits, though either may not: the same bits as by AVX512-VNNI, where small products go.
//   left    [i / 16][k / 64][upper, lower][i % 16][k % 64]
//   right   [j / 16][k / 64][k % 64 / 4][j % 16][k % 4]
#pragma once
#include "cpu/tiles_amx.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kByteDepth = kDepthOf<int8_t>;
constexpr int64_t kRowsAtOnce = 64, kColumnsAtOnce = 128, kDepthAtOnce = 512;  // 116 KiB of stack
constexpr int64_t kPair = 2 * kRows;                                           // columns of a product

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether tiles pay, by arithmetic: the border was never timed. Few rows leave a tile empty, and the weights are laid out for
// them alone; few columns likewise; and sums over few neurons take longer to leave the unit than it to make them.
bool pays(int64_t n, int64_t m, int64_t k) { return n >= kRows && m >= kRows && k >= 2 * kByteDepth; }

// The entries k0 .. k0 + k of rows(i), i < n.
template <class Rows>
void bytes_of_rows(const Rows& rows, int64_t n, int64_t k0, int64_t k, int8_t* left) {
  const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), lower = _mm512_set1_epi16(255);
  for (int64_t i0 = 0; i0 < n; i0 += kRows)
    for (int64_t at = 0; at < k; at += kByteDepth, left += 2 * kTileBytes) {
      const __mmask32 masks[2] = {first<__mmask32>(k - at), first<__mmask32>(k - at - kByteDepth / 2)};
      for (int64_t i = 0; i < kRows && i0 + i < n; ++i) {
        const int16_t* from = rows(i0 + i) + k0 + at;
        const __m512i a = _mm512_maskz_loadu_epi16(masks[0], from), b = _mm512_maskz_loadu_epi16(masks[1], from + kByteDepth / 2);
        const __m512i high = _mm512_packs_epi16(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8));
        const __m512i low = _mm512_packus_epi16(_mm512_and_si512(a, lower), _mm512_and_si512(b, lower));
        int8_t* to = left + i * kByteDepth;
        _mm512_storeu_si512(to, _mm512_permutexvar_epi64(in_order, high));
        _mm512_storeu_si512(to + kTileBytes, _mm512_permutexvar_epi64(in_order, low));
      }
    }
}

// right of w [k, m], its rows ld apart: four of them make a line.
void right_of_columns(const int8_t* w, int64_t ld, int64_t k, int64_t m, int8_t* right) {
  constexpr int64_t kTogether = 4;
  const int64_t depth = tiles_of(k, kByteDepth);
  for (int64_t k0 = 0; k0 < k; k0 += kByteDepth)
    for (int64_t j0 = 0; j0 < m; j0 += kRows) {
      int8_t* tile = right + (j0 / kRows * depth + k0 / kByteDepth) * kTileBytes;
      const __mmask16 columns = first<__mmask16>(m - j0);
      for (int64_t i = 0; i < kRows; ++i) {
        __m512i line = _mm512_setzero_si512();
        unroll<kTogether>([&, at = k0 + kTogether * i](auto e) {
          if (at + e.value >= k) return;
          const __m512i words = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(columns, w + (at + e.value) * ld + j0));
          line = _mm512_or_si512(line, _mm512_slli_epi32(words, 8 * e.value));
        });
        _mm512_storeu_si512(tile + i * kByteDepth, line);
      }
    }
}

// sums [16, .] += what 16 rows of left and 1 or 2 tiles of columns make; they begin with it.
template <int Columns>
void add_products(const int8_t* left, const int8_t* right, int64_t depth, bool begins, int32_t* sums) {
  alignas(64) int32_t high[kRows * kPair], low[kRows * kPair];
  byte_products<Columns>(left, right, depth, high, low, kPair);
  for (int64_t i = 0; i < kRows; ++i)
    unroll<Columns>([&, at = i * kPair, to = sums + i * kColumnsAtOnce](auto c) {
      const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(high + at + 16 * c.value), 8);
      const __m512i sum = _mm512_add_epi32(upper, _mm512_load_si512(low + at + 16 * c.value));
      const __m512i before = begins ? _mm512_setzero_si512() : _mm512_load_si512(to + 16 * c.value);
      _mm512_store_si512(to + 16 * c.value, _mm512_add_epi32(before, sum));
    });
}

// use(i, j, columns, sums): sums [columns] of row i and the columns from j on, of n x m in all. right(j, columns, k0, k, to)
// lays out weights.
template <class Rows, class Right, class Use>
void int_products(int64_t n, int64_t m, int64_t k, const Rows& rows, const Right& right, const Use& use) {
  const TileRegisters registers;
  alignas(64) int8_t left_tiles[kRowsAtOnce * kDepthAtOnce * 2], right_tiles[kPair * kDepthAtOnce];
  alignas(64) int32_t sums[kRowsAtOnce * kColumnsAtOnce];
  for (int64_t i0 = 0; i0 < n; i0 += kRowsAtOnce)
    for (int64_t j0 = 0; j0 < m; j0 += kColumnsAtOnce) {
      const int64_t count = least(n - i0, kRowsAtOnce), columns = least(m - j0, kColumnsAtOnce);
      for (int64_t k0 = 0; k0 < k; k0 += kDepthAtOnce) {
        const int64_t part = least(k - k0, kDepthAtOnce), depth = tiles_of(part, kByteDepth);
        if (j0 == 0 || k > kDepthAtOnce) bytes_of_rows([&](int64_t i) { return rows(i0 + i); }, count, k0, part, left_tiles);
        for (int64_t j = 0; j < columns; j += kPair) {
          right(j0 + j, least(columns - j, kPair), k0, part, right_tiles);
          for (int64_t i = 0; i < count; i += kRows) {
            const int8_t* left = left_tiles + i * depth * 2 * kByteDepth;
            int32_t* to = sums + i * kColumnsAtOnce + j;
            columns - j > kRows ? add_products<2>(left, right_tiles, depth, k0 == 0, to)
                                : add_products<1>(left, right_tiles, depth, k0 == 0, to);
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) use(i0 + i, j0, columns, sums + i * kColumnsAtOnce);
    }
}

// body(c, left, the sums from c on): 16 columns at a time, or what is left.
template <class Body>
void for_vectors(const int32_t* sums, int64_t columns, const Body& body) {
  for (int64_t c = 0; c < columns; c += 16) body(c, columns - c, Vec{_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + c))});
}

void int_project(const Project& p) {
  if (!pays(p.n, p.m, p.d)) return kernels_avx512vnni().project[int(DType::i8)](p);
  int_products(
      p.n, p.m, p.d, [&](int64_t i) { return static_cast<const int16_t*>(p.x) + row_of(p.rows, i) * p.d; },
      [&](int64_t j, int64_t columns, int64_t k0, int64_t k, int8_t* right) {
        const auto* w = static_cast<const int8_t*>(p.w) + j * p.d + k0;
        right_of([=](int64_t i) { return w + i * p.d; }, columns, k, right);
      },
      [&](int64_t i, int64_t j, int64_t columns, const int32_t* sums) {
        const Vec step = Vec::set(p.steps[row_of(p.rows, i)]);
        for_vectors(sums, columns, [&, out = p.out + i * p.ld + j](int64_t c, int64_t left, Vec sum) {
          left < 16 ? (sum * step).store_part(out + c, left) : (sum * step).store(out + c);
        });
      });
}

void int_accumulate(const Accumulate& p) {
  if (!pays(p.n, p.columns, p.m)) return kernels_avx512vnni().accumulate[int(DType::i8)](p);
  int_products(
      p.n, p.columns, p.m, [&](int64_t i) { return static_cast<const int16_t*>(p.h) + i * p.ld_h; },
      [&](int64_t c, int64_t columns, int64_t j, int64_t m, int8_t* right) {
        right_of_columns(static_cast<const int8_t*>(p.w) + j * p.ld_w + c, p.ld_w, m, columns, right);
      },
      [&](int64_t i, int64_t c0, int64_t columns, const int32_t* sums) {
        const Vec step = Vec::set(p.steps[i]);
        for_vectors(sums, columns, [&, y = p.y + row_of(p.rows, i) * p.ld_y + c0](int64_t c, int64_t left, Vec sum) {
          if (left < 16)
            fma(sum, step, Vec::load_part(y + c, left)).store_part(y + c, left);
          else
            fma(sum, step, Vec::load(y + c)).store(y + c);
        });
      });
}

}  // namespace
}  // namespace sadmoe::cpu
