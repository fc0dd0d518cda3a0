// bf16 in tiles (see Tiles), laid out by AVX-512 and its conversion to bf16. Included by the files of such instruction sets
// alone.
#pragma once
#include "cpu/kernels.h"
#include "cpu/tile_unit.h"
#include "cpu/vec_avx512.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kRows = 16;  // of a tile, of 64 bytes
template <class W>
constexpr int64_t kDepthOf = 64 / sizeof(W);  // k of a tile of weights, neighbours that fill 32 bits beside each other
constexpr int64_t kDepth = kDepthOf<bf16>;

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

// Of w [m, k], its rows ld apart, or below of w [k, m]; m columns of tiles, W bf16 or int8_t.
template <class W>
void right_of_rows(const W* w, int64_t ld, int64_t m, int64_t k, W* right) {
  constexpr int64_t kEntries = kDepthOf<W>;
  for (int64_t j0 = 0; j0 < m; j0 += kRows)
    for (int64_t k0 = 0; k0 < k; k0 += kEntries, right += kRows * kEntries) {
      const int64_t bytes = (k - k0) * int64_t(sizeof(W));
      const __mmask64 within = bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
      __m512i lines[16];
      unroll<16>([&](auto j) {  // past the last row: repeat it, the result is used for nothing
        const int64_t row = j0 + j.value < m ? j0 + j.value : m - 1;
        lines[j.value] = _mm512_maskz_loadu_epi8(within, w + row * ld + k0);
      });
      transpose(lines);
      unroll<16>([&](auto i) { _mm512_storeu_si512(right + i.value * kEntries, lines[i.value]); });
    }
}

__m512i words(const bf16* from, __mmask16 columns) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, from)); }
__m512i words(const int8_t* from, __mmask16 columns) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(columns, from)); }

template <class W>
void right_of_columns(const W* w, int64_t ld, int64_t k, int64_t m, W* right) {
  constexpr int64_t kEntries = kDepthOf<W>, kTogether = 4 / sizeof(W);
  const int64_t depth = tiles_of(k, kEntries);
  for (int64_t k0 = 0; k0 < k; k0 += kEntries)
    for (int64_t j0 = 0; j0 < m; j0 += kRows) {
      W* tile = right + (j0 / kRows * depth + k0 / kEntries) * kRows * kEntries;
      const __mmask16 columns = m - j0 >= 16 ? 0xffff : Vec::first(m - j0);
      for (int64_t i = 0; i < kRows; ++i) {
        __m512i line = _mm512_setzero_si512();
        unroll<kTogether>([&, at = k0 + kTogether * i](auto e) {
          if (at + e.value < k)
            line =
                _mm512_or_si512(line, _mm512_slli_epi32(words(w + (at + e.value) * ld + j0, columns), 8 * sizeof(W) * e.value));
        });
        _mm512_storeu_si512(tile + i * kEntries, line);
      }
    }
}

template <int Columns>
void product_of(const bf16* left, const bf16* right, int64_t n, int64_t k, float* out, int64_t ld) {
  const int64_t depth = tiles_of(k, kDepth);
  n > kRows ? bf16_products<2, Columns>(left, right, depth, out, ld) : bf16_products<1, Columns>(left, right, depth, out, ld);
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

void multiply(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, float* out, int64_t ld) {
  const TileRegisters registers;
  const int64_t depth = tiles_of(k, kDepth) * kDepth;
  for_products(n, m, [&](int64_t i, int64_t j, int64_t rows, auto columns) {
    product_of<columns.value>(left + i * depth, right + j * depth, rows, k, out + i * ld + j, ld);
  });
}

void multiply_add(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, const int32_t* rows, float* y,
                  int64_t ld) {
  const TileRegisters registers;
  const int64_t depth = tiles_of(k, kDepth) * kDepth;
  alignas(64) float sums[32 * 32];
  for_products(n, m, [&](int64_t i0, int64_t j, int64_t count, auto columns) {
    product_of<columns.value>(left + i0 * depth, right + j * depth, count, k, sums, 32);
    for (int64_t i = 0; i < count; ++i)
      unroll<columns.value>([&, from = sums + 32 * i, to = y + rows[i0 + i] * ld + j](auto c) {
        (Vec::load(to + 16 * c.value) + Vec::load(from + 16 * c.value)).store(to + 16 * c.value);
      });
  });
}

constexpr Tiles kTiles = {left_of_rows, left_of_floats, right_of_rows<bf16>, right_of_columns<bf16>, multiply, multiply_add};

}  // namespace
}  // namespace sadmoe::cpu
