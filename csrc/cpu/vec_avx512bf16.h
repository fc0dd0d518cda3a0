// Pairs of AVX512-BF16, and their kernels. Included by the files of such instruction sets alone.
#pragma once
#include "cpu/table.h"
#include "cpu/vec_avx512.h"

namespace sadmoe::cpu {
namespace {

// Thirty-two bf16, whose products with others are summed two by two in sixteen floats.
struct Pairs {
  using Entry = bf16;
  using Weight = bf16;
  using Sum = Vec;
  static constexpr int width = 32, sums = 16;
  static constexpr int project_rows = 6, project_columns = 4;       // 24 sums, 6 rows, 1 weight
  static constexpr int accumulate_rows = 6, accumulate_groups = 2;  // 24 sums, 4 weights, 1 pair of activations
  static constexpr int copied = 8192, held = 24, held_neurons = 16;
  static constexpr int fetched = Vec::fetched;

  __m512i v;

  static __mmask32 first(int64_t n) { return (__mmask32{1} << n) - 1; }
  static void pairs(Pairs a, Pairs b, Pairs* out) {
    out[0].v = _mm512_unpacklo_epi16(a.v, b.v);  // columns 0 to 3, 8 to 11, 16 to 19, 24 to 27
    out[1].v = _mm512_unpackhi_epi16(a.v, b.v);
  }

  void store(bf16* p) const { _mm512_storeu_si512(p, v); }
  static Pairs load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static Pairs load_part(const bf16* p, int64_t n) { return {_mm512_maskz_loadu_epi16(first(n), p)}; }
  static void load_pairs(const bf16* a, const bf16* b, Pairs* out) { pairs(load(a), load(b), out); }
  static void load_pairs_part(const bf16* a, const bf16* b, int64_t n, Pairs* out) {
    pairs(load_part(a, n), load_part(b, n), out);
  }
  static Pairs set_pair(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm512_set1_epi32(pair)};
  }

  static Vec reduce(const Vec* a) { return Vec::reduce(a); }
  static void in_order(__m512i a, __m512i b, __m512i* out) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    out[0] = _mm512_permutex2var_epi32(a, low, b);
    out[1] = _mm512_permutex2var_epi32(a, high, b);
  }
  static void put_in_order(Pairs* pairs) {
    __m512i out[2];
    in_order(pairs[0].v, pairs[1].v, out);
    pairs[0].v = out[0], pairs[1].v = out[1];
  }
  static Vec to_floats(Vec sum) { return sum; }
  static void to_floats(const Vec* sums, Vec* out) {
    __m512i both[2];
    in_order(_mm512_castps_si512(sums[0].v), _mm512_castps_si512(sums[1].v), both);
    unroll<2>([&](auto i) { out[i.value].v = _mm512_castsi512_ps(both[i.value]); });
  }

  friend void hold(Pairs& a) { asm("" : "+v"(a.v)); }
  friend Vec fma(Pairs a, Pairs b, Vec sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
  }
};

static_assert(kPairStrip<Pairs> == kPairStrip<Ints>, "one for both");
constexpr Halves kHalves = {project<Pairs, bf16>, project_packed<Vec, PackedPairs<Pairs, Vec>>, accumulate_pairs<Pairs, Vec>};

}  // namespace
}  // namespace sadmoe::cpu
