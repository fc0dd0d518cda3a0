// AMX-BF16, over AVX-512: Intel since Sapphire Rapids. Only bf16 differs from AVX-512.
#include "cpu/table.h"
#include "cpu/vec_avx512.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kRows = 16, kDepth = 32;  // of a tile: 16 rows of 64 bytes

// The tile registers of this thread, all 16 rows x 64 bytes, for as long as it lives. Given back, a thread switch saves less.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

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
  const int64_t depth = (k + kDepth - 1) / kDepth;
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

// The product of Rows x Columns tiles, 1 or 2 each, summed over the depth, to out.
template <int Rows, int Columns>
void product(const bf16* left, const bf16* right, int64_t depth, float* out, int64_t ld) {
  _tile_zero(0);
  if (Columns > 1) _tile_zero(1);
  if (Rows > 1) _tile_zero(2);
  if (Rows > 1 && Columns > 1) _tile_zero(3);
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(6, right + k * kTile, 64);
    if (Columns > 1) _tile_loadd(7, right + (depth + k) * kTile, 64);
    _tile_loadd(4, left + k * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (Columns > 1) _tile_dpbf16ps(1, 4, 7);
    if (Rows > 1) {
      _tile_loadd(5, left + (depth + k) * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (Columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  const int64_t stride = ld * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, out, stride);
  if (Columns > 1) _tile_stored(1, out + 16, stride);
  if (Rows > 1) _tile_stored(2, out + 16 * ld, stride);
  if (Rows > 1 && Columns > 1) _tile_stored(3, out + 16 * ld + 16, stride);
}

template <int Columns>
void product_of(int64_t rows, const bf16* left, const bf16* right, int64_t depth, float* out, int64_t ld) {
  rows > 1 ? product<2, Columns>(left, right, depth, out, ld) : product<1, Columns>(left, right, depth, out, ld);
}

void multiply(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, float* out, int64_t ld) {
  const TileRegisters registers;
  const int64_t depth = (k + kDepth - 1) / kDepth, row_tiles = (n + 15) / 16, column_tiles = (m + 15) / 16;
  for (int64_t j = 0; j < column_tiles; j += 2)
    for (int64_t i = 0; i < row_tiles; i += 2) {
      const bf16 *rows = left + i * depth * kTile, *columns = right + j * depth * kTile;
      const auto by = column_tiles - j > 1 ? product_of<2> : product_of<1>;
      by(row_tiles - i, rows, columns, depth, out + 16 * (i * ld + j), ld);
    }
}

// y[rows[i], 0 .. 16 Columns) += sums[i, :]
template <int Columns>
void add_rows(const float* sums, int64_t n, const int32_t* rows, float* y, int64_t ld) {
  for (int64_t i = 0; i < n; ++i, sums += 32)
    unroll<Columns>([&, to = y + rows[i] * ld](auto j) {
      (Vec::load(to + 16 * j.value) + Vec::load(sums + 16 * j.value)).store(to + 16 * j.value);
    });
}

void multiply_add(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, const int32_t* rows, float* y,
                  int64_t ld) {
  const TileRegisters registers;
  const int64_t depth = (k + kDepth - 1) / kDepth, row_tiles = (n + 15) / 16, column_tiles = (m + 15) / 16;
  alignas(64) float sums[32 * 32];
  for (int64_t j = 0; j < column_tiles; j += 2)
    for (int64_t i = 0; i < row_tiles; i += 2) {
      const bf16 *these = left + i * depth * kTile, *columns = right + j * depth * kTile;
      const int64_t count = n - 16 * i < 32 ? n - 16 * i : 32;
      const bool two = column_tiles - j > 1;
      (two ? product_of<2> : product_of<1>)(row_tiles - i, these, columns, depth, sums, 32);
      (two ? add_rows<2> : add_rows<1>)(sums, count, rows + 16 * i, y + 16 * j, ld);
    }
}

constexpr Tiles kTiles = {left_of_rows, left_of_floats, right_of_rows, right_of_columns, multiply, multiply_add};

}  // namespace

const Kernels& kernels_amx() {
  static constexpr Kernels kTable = table<Vec>("amx", &kTiles);
  return kTable;
}

}  // namespace sadmoe::cpu
