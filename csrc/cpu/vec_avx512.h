// Sixteen floats in an AVX-512 register (F, BW, DQ, VL). Included by the files of such instruction sets alone.
#pragma once
#include <immintrin.h>

#include "cpu/ahead.h"
#include "cpu/half.h"
#include "cpu/unroll.h"

namespace sadmoe::cpu {
namespace {

struct Vec {
  using Entry = float;
  using Sum = Vec;
  static constexpr int width = 16, sums = 16;
  static constexpr int project_rows = 6, project_columns = 4;     // 24 sums, 10 loads a step
  static constexpr int accumulate_rows = 6, accumulate_vecs = 4;  // 24 sums, 4 weights, 1 activation: 29 of 32 registers
  static constexpr int copied = 0;                                // 8192 are 5 % slower on a Zen 5
#ifdef SADMOE_ZEN5
  static constexpr int held = 16, held_neurons = 8;  // of 16, a load for every product takes it 1.04 to 1.15 times as long
  static constexpr int fetched = kFirstLevel;
#else
  static constexpr int held = 16, held_neurons = 16;
  static constexpr int fetched = kSecondLevel;
#endif
  static constexpr int64_t foreseen = kNever;

  __m512 v;

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static __m512 widen(__m256i bits, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  static __m512 widen(__m256i bits, f16) { return _mm512_cvtph_ps(bits); }
  static __m256i narrow(__m512 v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static __m256i narrow(__m512 v, bf16) {  // add half of the last kept bit, and one less where that is even; NaN stays NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
  }

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_part(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_part(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  template <class H>
  static Vec load(const H* p) {
    return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), H{})};
  }
  template <class H>
  static Vec load_part(const H* p, int64_t n) {
    return {widen(_mm256_maskz_loadu_epi16(first(n), p), H{})};
  }
  template <class H>
  void store(H* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, H{}));
  }
  template <class H>
  void store_part(H* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, first(n), narrow(v, H{}));
  }
  void round_to(int16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
  }

  static Vec reduce(const Vec* a) {
    const auto add_pairs = [](__m512 x, __m512 y) { return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); };
    const auto add_quads = [](__m512 x, __m512 y) {
      const __m512d even = _mm512_castps_pd(x), odd = _mm512_castps_pd(y);
      return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    };
    const auto halve = [](__m512 x, __m512 y) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    };
    __m512 quads[4];
    unroll<4>([&](auto i) {
      constexpr int n = 4 * decltype(i)::value;
      quads[i.value] = add_quads(add_pairs(a[n].v, a[n + 1].v), add_pairs(a[n + 2].v, a[n + 3].v));
    });
    return {halve(halve(quads[0], quads[1]), halve(quads[2], quads[3]))};
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend void hold(Vec& a) { asm("" : "+v"(a.v)); }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  friend Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  friend Vec where_less(Vec a, Vec b, Vec x, Vec y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
  }
};

// Thirty-two integers of 16 bits, or sixteen of 32.
struct Ints {
  using Entry = int16_t;
  using Weight = int8_t;
  using Sum = Ints;
#ifdef __AVX512VNNI__
  static constexpr int rows = 6;  // 24 sums, 4 weights or 1, 6 rows or 1 pair of activations
#else
  static constexpr int rows = 4;  // with products beside them, 24 do not stay in registers
#endif
  static constexpr int width = 32, sums = 16;
  static constexpr int project_rows = rows, project_columns = 4;
  static constexpr int accumulate_rows = rows, accumulate_groups = 2;
  static constexpr int copied = 8192, held = 24, held_neurons = 16;
  static constexpr int fetched = Vec::fetched;

  __m512i v;

  static __mmask32 first(int64_t n) { return (__mmask32{1} << n) - 1; }
  static __m256i bytes(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i bytes(const int8_t* p, int64_t n) { return _mm256_maskz_loadu_epi8(first(n), p); }
  static void pairs(__m256i a, __m256i b, Ints* out) {
    out[0].v = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b));  // columns 0 to 7, and 16 to 23
    out[1].v = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b));
  }

  static Ints zero() { return {_mm512_setzero_si512()}; }
  void store(int16_t* p) const { _mm512_storeu_si512(p, v); }
  static Ints load(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
  static Ints load_part(const int16_t* p, int64_t n) { return {_mm512_maskz_loadu_epi16(first(n), p)}; }
  static Ints load(const int8_t* p) { return {_mm512_cvtepi8_epi16(bytes(p))}; }
  static Ints load_part(const int8_t* p, int64_t n) { return {_mm512_cvtepi8_epi16(bytes(p, n))}; }
  static void load_pairs(const int8_t* a, const int8_t* b, Ints* out) { pairs(bytes(a), bytes(b), out); }
  static void load_pairs_part(const int8_t* a, const int8_t* b, int64_t n, Ints* out) { pairs(bytes(a, n), bytes(b, n), out); }
  static Ints set_pair(const int16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm512_set1_epi32(pair)};
  }

  static Vec reduce(const Ints* a) {
    const auto add_pairs = [](__m512i x, __m512i y) {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    };
    const auto add_quads = [](__m512i x, __m512i y) {
      return _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
    };
    const auto halve = [](__m512i x, __m512i y) {
      return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
    };
    __m512i quads[4];
    unroll<4>([&](auto i) {
      constexpr int n = 4 * decltype(i)::value;
      quads[i.value] = add_quads(add_pairs(a[n].v, a[n + 1].v), add_pairs(a[n + 2].v, a[n + 3].v));
    });
    return {_mm512_cvtepi32_ps(halve(halve(quads[0], quads[1]), halve(quads[2], quads[3])))};
  }
  static void put_in_order(Ints* both) {
    const __m512i first = both[0].v, second = both[1].v;
    both[0].v = _mm512_shuffle_i32x4(first, second, 0x44);
    both[1].v = _mm512_shuffle_i32x4(first, second, 0xee);
  }
  static Vec to_floats(Ints sum) { return {_mm512_cvtepi32_ps(sum.v)}; }
  static void to_floats(const Ints* sums, Vec* out) {
    Ints both[2] = {sums[0], sums[1]};
    put_in_order(both);
    out[0] = to_floats(both[0]), out[1] = to_floats(both[1]);
  }

  friend Ints fma(Ints a, Ints b, Ints sum) {
#ifdef __AVX512VNNI__
    asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));  // of the intrinsic, GCC keeps half of the sums in memory
    return sum;
#else
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
  }
};

}  // namespace
}  // namespace sadmoe::cpu
