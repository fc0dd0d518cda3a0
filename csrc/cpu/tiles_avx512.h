// Tiles by AVX-512 and its conversion to bf16, for a unit that multiplies them. Included by the files of such units alone.
//
// Unit multiplies Rows x Columns tiles, 1 or 2 each, summed over the depth:
//   Unit::Registers                                              what a thread must hold for it meanwhile
//   Unit::product<Rows, Columns>(left, right, n, k, out, ld)     out = left right of n rows, may write 16 Rows of them
#pragma once
#include "cpu/kernels.h"
#include "cpu/vec_avx512.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kRows = 16, kDepth = 32;  // of a tile: 16 rows of 64 bytes

constexpr int64_t tiles_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

__mmask32 first(int64_t n) { return n >= kDepth ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

void left_of_rows(const bf16* x, const int32_t* rows, int64_t n, int64_t k, bf16* left) {
  for (int64_t i0 = 0; i0 < n; i0 += kRows)
    for (int64_t k0 = 0; k0 < k; k0 += kDepth, left += kTile)
      for (int64_t i = 0; i < kRows && i0 + i < n; ++i)
        _mm512_storeu_si512(left + i * kDepth, _mm512_maskz_loadu_epi16(first(k - k0), x + rows[i0 + i] * k + k0));
}

void left_of_floats(const float* h, int64_t ld, int64_t n, int64_t k, bf16* left) {
  const auto part = [](int64_t left_over) { return left_over >= 16 ? 16 : left_over > 0 ? left_over : 0; };
  for (int64_t i0 = 0; i0 < n; i0 += kRows)
    for (int64_t k0 = 0; k0 < k; k0 += kDepth, left += kTile)
      for (int64_t i = 0; i < kRows && i0 + i < n; ++i) {
        const float* from = h + (i0 + i) * ld + k0;
        const __m512 low = _mm512_maskz_loadu_ps(Vec::first(part(k - k0)), from);
        const __m512 high = _mm512_maskz_loadu_ps(Vec::first(part(k - k0 - 16)), from + 16);
        _mm512_storeu_si512(left + i * kDepth, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
      }
}

// 16 x 16 words of 32 bits, transposed in place.
void transpose(__m512i (&a)[16]) {
  __m512i b[16];
  unroll<8>([&](auto i) {
    constexpr int n = 2 * decltype(i)::value;
    b[n] = _mm512_unpacklo_epi32(a[n], a[n + 1]);
    b[n + 1] = _mm512_unpackhi_epi32(a[n], a[n + 1]);
  });
  unroll<4>([&](auto i) {
    constexpr int n = 4 * decltype(i)::value;
    a[n] = _mm512_unpacklo_epi64(b[n], b[n + 2]);
    a[n + 1] = _mm512_unpackhi_epi64(b[n], b[n + 2]);
    a[n + 2] = _mm512_unpacklo_epi64(b[n + 1], b[n + 3]);
    a[n + 3] = _mm512_unpackhi_epi64(b[n + 1], b[n + 3]);
  });
  unroll<4>([&](auto i) {
    constexpr int n = decltype(i)::value;
    b[n] = _mm512_shuffle_i32x4(a[n], a[n + 4], 0x88);
    b[n + 4] = _mm512_shuffle_i32x4(a[n], a[n + 4], 0xdd);
    b[n + 8] = _mm512_shuffle_i32x4(a[n + 8], a[n + 12], 0x88);
    b[n + 12] = _mm512_shuffle_i32x4(a[n + 8], a[n + 12], 0xdd);
  });
  unroll<4>([&](auto i) {
    constexpr int n = decltype(i)::value;
    a[n] = _mm512_shuffle_i32x4(b[n], b[n + 8], 0x88);
    a[n + 8] = _mm512_shuffle_i32x4(b[n], b[n + 8], 0xdd);
    a[n + 4] = _mm512_shuffle_i32x4(b[n + 4], b[n + 12], 0x88);
    a[n + 12] = _mm512_shuffle_i32x4(b[n + 4], b[n + 12], 0xdd);
  });
}

void right_of_rows(const bf16* w, int64_t m, int64_t k, bf16* right) {
  for (int64_t j0 = 0; j0 < m; j0 += kRows)
    for (int64_t k0 = 0; k0 < k; k0 += kDepth, right += kTile) {
      __m512i pairs[16];
      unroll<16>([&](auto j) {  // past the last row: repeat it, the result is used for nothing
        const int64_t row = j0 + j.value < m ? j0 + j.value : m - 1;
        pairs[j.value] = _mm512_maskz_loadu_epi16(first(k - k0), w + row * k + k0);
      });
      transpose(pairs);
      unroll<16>([&](auto i) { _mm512_storeu_si512(right + i.value * kDepth, pairs[i.value]); });
    }
}

void right_of_columns(const bf16* w, int64_t ld, int64_t k, int64_t m, bf16* right) {
  const int64_t depth = tiles_of(k, kDepth);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth)
    for (int64_t j0 = 0; j0 < m; j0 += kRows) {
      bf16* tile = right + (j0 / kRows * depth + k0 / kDepth) * kTile;
      const __mmask16 columns = m - j0 >= 16 ? 0xffff : Vec::first(m - j0);
      for (int64_t i = 0; i < kRows; ++i) {
        const auto row = [&](int64_t at) {
          return at < k ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, w + at * ld + j0)) : _mm512_setzero_si512();
        };
        const int64_t even = k0 + 2 * i;
        _mm512_storeu_si512(tile + i * kDepth, _mm512_or_si512(row(even), _mm512_slli_epi32(row(even + 1), 16)));
      }
    }
}

template <class Unit, int Columns>
void product_of(const bf16* left, const bf16* right, int64_t n, int64_t k, float* out, int64_t ld) {
  n > kRows ? Unit::template product<2, Columns>(left, right, n, k, out, ld)
            : Unit::template product<1, Columns>(left, right, n, k, out, ld);
}

// body(i, j, n, Index<Columns>): up to 32 rows from i and one or two tiles of columns from j, of n x m in all.
template <class Body>
void for_products(int64_t n, int64_t m, const Body& body) {
  for (int64_t j = 0; j < m; j += 32)
    for (int64_t i = 0; i < n; i += 32) {
      const int64_t rows = n - i < 32 ? n - i : 32;
      m - j > 16 ? body(i, j, rows, Index<2>{}) : body(i, j, rows, Index<1>{});
    }
}

template <class Unit>
void multiply(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, float* out, int64_t ld) {
  const typename Unit::Registers registers;
  const int64_t depth = tiles_of(k, kDepth) * kDepth;
  for_products(n, m, [&](int64_t i, int64_t j, int64_t rows, auto columns) {
    product_of<Unit, columns.value>(left + i * depth, right + j * depth, rows, k, out + i * ld + j, ld);
  });
}

template <class Unit>
void multiply_add(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, const int32_t* rows, float* y,
                  int64_t ld) {
  const typename Unit::Registers registers;
  const int64_t depth = tiles_of(k, kDepth) * kDepth;
  alignas(64) float sums[32 * 32];
  for_products(n, m, [&](int64_t i0, int64_t j, int64_t count, auto columns) {
    product_of<Unit, columns.value>(left + i0 * depth, right + j * depth, count, k, sums, 32);
    for (int64_t i = 0; i < count; ++i)
      unroll<columns.value>([&, from = sums + 32 * i, to = y + rows[i0 + i] * ld + j](auto c) {
        (Vec::load(to + 16 * c.value) + Vec::load(from + 16 * c.value)).store(to + 16 * c.value);
      });
  });
}

template <class Unit>
constexpr Tiles kTilesOf = {left_of_rows, left_of_floats, right_of_rows, right_of_columns, multiply<Unit>, multiply_add<Unit>};

// The kernels of an instruction set that adds such a unit to `kernels`, and nothing else.
Kernels with_tiles(Kernels kernels, const char* isa, const Tiles* tiles) {
  kernels.isa = isa, kernels.tiles = tiles;
  return kernels;
}

}  // namespace
}  // namespace sadmoe::cpu
