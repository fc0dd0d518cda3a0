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

int64_t row_of(const int32_t* rows, int64_t i) { return rows ? rows[i] : i; }

// The first n entries of a vector, which may be none, or all.
template <class Mask>
Mask first(int64_t n) {
  constexpr int64_t kAll = 8 * sizeof(Mask);
  return n >= kAll ? static_cast<Mask>(~Mask{0}) : n <= 0 ? Mask{0} : static_cast<Mask>((Mask{1} << n) - 1);
}

void left_of_rows(const bf16* x, const int32_t* rows, int64_t n, int64_t k, bf16* left) {
  for (int64_t i0 = 0; i0 < n; i0 += kRows)
    for (int64_t k0 = 0; k0 < k; k0 += kDepth, left += kTile)
      for (int64_t i = 0; i < kRows && i0 + i < n; ++i)
        _mm512_storeu_si512(left + i * kDepth,
                            _mm512_maskz_loadu_epi16(first<__mmask32>(k - k0), x + row_of(rows, i0 + i) * k + k0));
}

void left_of_floats(const float* h, int64_t ld, int64_t n, int64_t k, bf16* left) {
  for (int64_t i0 = 0; i0 < n; i0 += kRows)
    for (int64_t k0 = 0; k0 < k; k0 += kDepth, left += kTile)
      for (int64_t i = 0; i < kRows && i0 + i < n; ++i) {
        const float* from = h + (i0 + i) * ld + k0;
        const __m512 low = _mm512_maskz_loadu_ps(first<__mmask16>(k - k0), from);
        const __m512 high = _mm512_maskz_loadu_ps(first<__mmask16>(k - k0 - 16), from + 16);
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

// row(j): the k entries of column j, of m; W bf16 or int8_t.
template <class W, class Row>
void right_of(const Row& row, int64_t m, int64_t k, W* right) {
  constexpr int64_t kEntries = kDepthOf<W>;
  for (int64_t j0 = 0; j0 < m; j0 += kRows) {
    const W* from[16];  // past the last: it again, the result is used for nothing
    for (int64_t j = 0; j < kRows; ++j) from[j] = row(j0 + j < m ? j0 + j : m - 1);
    for (int64_t k0 = 0; k0 < k; k0 += kEntries, right += kRows * kEntries) {
      const auto within = first<__mmask64>((k - k0) * int64_t(sizeof(W)));
      __m512i lines[16];
      unroll<16>([&](auto j) { lines[j.value] = _mm512_maskz_loadu_epi8(within, from[j.value] + k0); });
      transpose(lines);
      unroll<16>([&](auto i) { _mm512_storeu_si512(right + i.value * kEntries, lines[i.value]); });
    }
  }
}

void right_of_rows(const bf16* w, const int32_t* rows, int64_t m, int64_t k, bf16* right) {
  right_of([=](int64_t j) { return w + row_of(rows, j) * k; }, m, k, right);
}

struct Halfwords {
  uint16_t at[32];
};

// The entries of two vectors by turns, 16 of each, from `from` on.
constexpr Halfwords paired(int from) {
  Halfwords order = {};
  for (int i = 0; i < 32; ++i) order.at[i] = static_cast<uint16_t>(from + i / 2 + i % 2 * 32);
  return order;
}

// Two rows of w make a line of two tiles of columns.
void right_of_columns(const bf16* w, int64_t ld, int64_t k, int64_t m, bf16* right) {
  alignas(64) static constexpr Halfwords kFirst = paired(0), kSecond = paired(16);
  const __m512i in_first = _mm512_load_si512(kFirst.at), in_second = _mm512_load_si512(kSecond.at);
  const int64_t depth = tiles_of(k, kDepth);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth)
    for (int64_t j0 = 0; j0 < m; j0 += 2 * kRows) {
      bf16* tile = right + (j0 / kRows * depth + k0 / kDepth) * kTile;
      const auto row = [&, columns = first<__mmask32>(m - j0)](int64_t at) {
        return at < k ? _mm512_maskz_loadu_epi16(columns, w + at * ld + j0) : _mm512_setzero_si512();
      };
      for (int64_t i = 0; i < kRows; ++i) {
        const __m512i even = row(k0 + 2 * i), odd = row(k0 + 2 * i + 1);
        _mm512_storeu_si512(tile + i * kDepth, _mm512_permutex2var_epi16(even, in_first, odd));
        if (m - j0 > kRows)
          _mm512_storeu_si512(tile + depth * kTile + i * kDepth, _mm512_permutex2var_epi16(even, in_second, odd));
      }
    }
}

template <int Columns>
void product_of(const LeftTiles& left, const bf16* right, int64_t n, int64_t k, float* out, int64_t ld, Fetches& fetches) {
  const int64_t depth = tiles_of(k, kDepth);
  n > kRows ? bf16_products<2, Columns>(left, right, depth, out, ld, fetches)
            : bf16_products<1, Columns>(left, right, depth, out, ld, fetches);
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

LeftTiles laid_out(const bf16* left, int64_t k) { return {left, kTile, tiles_of(k, kDepth) * kTile, kDepth * sizeof(bf16)}; }

void multiply(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, float* out, int64_t ld, Soon soon) {
  const TileRegisters registers;
  const int64_t depth = tiles_of(k, kDepth) * kDepth;
  Fetches fetches(soon, tiles_of(n, 2 * kRows) * tiles_of(m, 2 * kRows) * tiles_of(k, kDepth));
  for_products(n, m, [&](int64_t i, int64_t j, int64_t rows, auto columns) {
    product_of<columns.value>(laid_out(left, k).from(i), right + j * depth, rows, k, out + i * ld + j, ld, fetches);
  });
}

// Where tiles of w would reach past the ends of its rows, or past the last of them, they are copied.
LeftTiles as_it_lies(const bf16* w, int64_t m, int64_t k, bf16* scratch) {
  if (m % kRows == 0 && k % kDepth == 0) return {w, kDepth, kRows * k, k * int64_t(sizeof(bf16))};
  left_of_rows(w, nullptr, m, k, scratch);
  return laid_out(scratch, k);
}

// to [16, 16] = from [16, 16] transposed, rows 32 apart.
void turn(const float* from, float* to) {
  __m512i lines[16];
  unroll<16>([&](auto i) { lines[i.value] = _mm512_loadu_si512(from + 32 * i.value); });
  transpose(lines);
  unroll<16>([&](auto i) { _mm512_storeu_si512(to + 32 * i.value, lines[i.value]); });
}

void multiply_turned(const bf16* w, const bf16* right, const int32_t* columns, int64_t n, int64_t m, int64_t k, bf16* scratch,
                     float* out, int64_t ld) {
  const TileRegisters registers;
  Fetches none({}, 1);
  const LeftTiles left = as_it_lies(w, m, k, scratch);
  const int64_t depth = tiles_of(k, kDepth) * kDepth;
  for_products(m, columns ? columns[n - 1] + 1 : n, [&](int64_t j, int64_t c, int64_t neurons, auto tiles) {
    alignas(64) float product[32 * 32], turned[32 * 32];
    product_of<tiles.value>(left.from(j), right + c * depth, neurons, k, product, 32, none);
    const int64_t parts = tiles_of(neurons, kRows);
    unroll<tiles.value>([&](auto b) {
      for (int64_t a = 0; a < parts; ++a) turn(product + (32 * a + b.value) * kRows, turned + (32 * b.value + a) * kRows);
    });
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = row_of(columns, i) - c;
      if (row < 0 || row >= tiles.value * kRows) continue;
      for (int64_t a = 0; a < parts; ++a) Vec::load(turned + 32 * row + a * kRows).store(out + i * ld + j + a * kRows);
    }
  });
}

void multiply_add(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, const int32_t* rows, float* y,
                  int64_t ld) {
  const TileRegisters registers;
  const int64_t depth = tiles_of(k, kDepth) * kDepth;
  Fetches none({}, 1);
  alignas(64) float sums[32 * 32];
  for_products(n, m, [&](int64_t i0, int64_t j, int64_t count, auto columns) {
    product_of<columns.value>(laid_out(left, k).from(i0), right + j * depth, count, k, sums, 32, none);
    for (int64_t i = 0; i < count; ++i)
      unroll<columns.value>([&, from = sums + 32 * i, to = y + rows[i0 + i] * ld + j](auto c) {
        (Vec::load(to + 16 * c.value) + Vec::load(from + 16 * c.value)).store(to + 16 * c.value);
      });
  });
}

constexpr Tiles kTiles = {left_of_rows, right_of_rows, left_of_floats, right_of_columns, multiply, multiply_turned, multiply_add};

}  // namespace
}  // namespace sadmoe::cpu
