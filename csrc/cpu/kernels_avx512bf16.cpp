// AVX512-BF16, over AVX-512: AMD since Zen 4, Intel since Cooper Lake. Only bf16 differs from AVX-512.
#include <cstring>

#include "cpu/tiles_avx512.h"

namespace sadmoe::cpu {
namespace {

// Dot products of two pairs a lane: a pair of a row, in all lanes, with the pairs of 16 columns.
struct DotUnit {
  struct Registers {
    Registers() {}  // those of AVX-512: nothing to hold
  };

  template <int Rows, int Columns>
  static void product(const bf16* left, const bf16* right, int64_t n, int64_t k, float* out, int64_t ld) {
    const int64_t depth = tiles_of(k, kDepth);
    for (int64_t i = 0; i < n; i += kRows)
      rows<8, Columns>(left + i * depth * kDepth, right, n - i < kRows ? n - i : kRows, k, out + i * ld, ld);
  }

 private:
  // n rows of one row of tiles: by Count while there are as many, the rest by half of that.
  template <int Count, int Columns>
  static void rows(const bf16* left, const bf16* right, int64_t n, int64_t k, float* out, int64_t ld) {
    for (; n >= Count; n -= Count, left += Count * kDepth, out += Count * ld) block<Count, Columns>(left, right, k, out, ld);
    if constexpr (Count > 1)
      if (n > 0) rows<Count / 2, Columns>(left, right, n, k, out, ld);
  }

  template <int Count, int Columns>
  static void block(const bf16* left, const bf16* right, int64_t k, float* out, int64_t ld) {
    const int64_t apart = tiles_of(k, kDepth) * kTile;  // two tiles of columns
    __m512 sums[Count][Columns];
    const auto each = [](auto body) { unroll<Count>([&](auto i) { unroll<Columns>([&](auto j) { body(i, j); }); }); };
    each([&](auto i, auto j) { sums[i.value][j.value] = _mm512_setzero_ps(); });
    for (; k > 0; k -= kDepth, left += kTile, right += kTile)
      for (int64_t p = 0; p < kDepth && p < k; p += 2) {
        __m512bh columns[Columns];
        unroll<Columns>([&](auto j) {
          columns[j.value] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right + j.value * apart + p / 2 * kDepth));
        });
        unroll<Count>([&](auto i) {
          int32_t pair;
          std::memcpy(&pair, left + i.value * kDepth + p, sizeof pair);
          const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
          unroll<Columns>(
              [&](auto j) { sums[i.value][j.value] = _mm512_dpbf16_ps(sums[i.value][j.value], row, columns[j.value]); });
        });
      }
    each([&](auto i, auto j) { _mm512_storeu_ps(out + i.value * ld + 16 * j.value, sums[i.value][j.value]); });
  }
};

}  // namespace

const Kernels& kernels_avx512bf16() {
  static const Kernels kTable = with_tiles(kernels_avx512vnni(), "avx512bf16", &kTilesOf<DotUnit>);
  return kTable;
}

}  // namespace sadmoe::cpu
