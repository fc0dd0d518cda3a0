// AVX2, FMA and F16C: any x86 since Haswell and Zen.
#include <immintrin.h>

#include "cpu/table.h"

namespace sadmoe::cpu {
namespace {

// The first n of 8 bytes, and of 16, and zeros: by pieces that overlap, for a load waits for bytes that were stored one by one.
uint64_t load_8(const char* p, int64_t n) {
  const auto piece = [p](auto kind, int64_t at) {
    __builtin_memcpy(&kind, p + at, sizeof kind);
    return static_cast<uint64_t>(kind) << 8 * at;
  };
  if (n == 8) return piece(uint64_t{}, 0);
  if (n >= 4) return piece(uint32_t{}, 0) | piece(uint32_t{}, n - 4);
  if (n >= 2) return piece(uint16_t{}, 0) | piece(uint16_t{}, n - 2);
  return n > 0 ? piece(uint8_t{}, 0) : 0;
}
__m128i load_16(const void* from, int64_t n) {
  const char* p = static_cast<const char*>(from);
  if (n >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const uint64_t low = load_8(p, n < 8 ? n : 8), high = n > 8 ? load_8(p + 8, n - 8) : 0;
  return _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low));
}

struct Vec {
  using Entry = float;
  using Sum = Vec;
  static constexpr int width = 8, sums = 8;
  static constexpr int project_rows = 3, project_columns = 4;     // 12 sums, 3 rows, 1 weight: all 16 registers
  static constexpr int accumulate_rows = 4, accumulate_vecs = 3;  // 12 sums, 3 weights, 1 activation: all 16 registers
  static constexpr int copied = 8192, held = 8, held_neurons = 4;
  static constexpr bool always_copied = false;
  static constexpr int fetched = kSecondLevel;
  static constexpr int64_t foreseen = 2048;  // on a Zen 3; in 512 columns and fewer they are fetched faster

  __m256 v;

  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256 widen(__m128i bits, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
  static __m256 widen(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }
  static __m128i narrow(__m256 v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static __m128i narrow(__m256 v, bf16) {  // add half of the last kept bit, and one less where that is even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_part(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_part(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  template <class H>
  static Vec load(const H* p) {
    return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), H{})};
  }
  template <class H>
  static Vec load_part(const H* p, int64_t n) {
    return {widen(load_16(p, n * int64_t(sizeof(H))), H{})};
  }
  template <class H>
  void store(H* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, H{}));
  }
  template <class H>
  void store_part(H* p, int64_t n) const {
    H full[width];
    store(full);
    for (int64_t i = 0; i < n; ++i) p[i] = full[i];
  }
  void round_to(int16_t* p) const {
    const __m256i ints = _mm256_cvtps_epi32(v);
    const __m128i low = _mm256_castsi256_si128(ints), high = _mm256_extracti128_si256(ints, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, high));
  }

  static Vec reduce(const Vec* a) {
    __m256 quads[2];
    for (int i = 0; i < 2; ++i) {
      const auto pair = [&](int j) {
        return _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a[j].v, a[j + 1].v), _mm256_unpackhi_ps(a[j].v, a[j + 1].v)));
      };
      const __m256d even = pair(4 * i), odd = pair(4 * i + 2);
      quads[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(even, odd)), _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd)));
    }
    return {_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31))};
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend void hold(Vec& a) { asm("" : "+x"(a.v)); }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  friend Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Vec scale2(Vec a, Vec n) {
    return {_mm256_mul_ps(
        a.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23)))};
  }
  friend Vec where_less(Vec a, Vec b, Vec x, Vec y) { return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))}; }
};

// Sixteen integers of 16 bits, or eight of 32.
struct Ints {
  using Entry = int16_t;
  using Weight = int8_t;
  using Sum = Ints;
  static constexpr int width = 16, sums = 8;
  static constexpr int project_rows = 2, project_columns = 4;
  static constexpr int accumulate_rows = 4, accumulate_groups = 1;  // 8 sums, 2 weights, 1 pair of activations, 1 product
  static constexpr int copied = 8192, held = 8, held_neurons = 8;
  static constexpr int fetched = Vec::fetched;

  __m256i v;

  static __m128i bytes(const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void pairs(__m128i a, __m128i b, Ints* out) {
    out[0].v = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
    out[1].v = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
  }

  static Ints zero() { return {_mm256_setzero_si256()}; }
  static Ints load(const int16_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static Ints load(const int8_t* p) { return {_mm256_cvtepi8_epi16(bytes(p))}; }
  void store(int16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Ints load_part(const int16_t* p, int64_t n) {
    return {_mm256_set_m128i(n > 8 ? load_16(p + 8, 2 * n - 16) : _mm_setzero_si128(), load_16(p, 2 * n))};
  }
  static Ints load_part(const int8_t* p, int64_t n) { return {_mm256_cvtepi8_epi16(load_16(p, n))}; }
  static void load_pairs(const int8_t* a, const int8_t* b, Ints* out) { pairs(bytes(a), bytes(b), out); }
  static void load_pairs_part(const int8_t* a, const int8_t* b, int64_t n, Ints* out) {
    pairs(load_16(a, n), load_16(b, n), out);
  }
  static Ints set_pair(const int16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm256_set1_epi32(pair)};
  }

  static Vec reduce(const Ints* a) {
    const auto sum_of_four = [](const Ints* b) {
      return _mm256_hadd_epi32(_mm256_hadd_epi32(b[0].v, b[1].v), _mm256_hadd_epi32(b[2].v, b[3].v));
    };
    const __m256i low = sum_of_four(a), high = sum_of_four(a + 4);
    return {_mm256_cvtepi32_ps(
        _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)))};
  }
  static void put_in_order(Ints*) {}  // as they are
  static Vec to_floats(Ints sum) { return {_mm256_cvtepi32_ps(sum.v)}; }
  static void to_floats(const Ints* sums, Vec* out) { out[0] = to_floats(sums[0]), out[1] = to_floats(sums[1]); }

  friend Ints fma(Ints a, Ints b, Ints sum) {
    asm("vpaddd %1, %0, %0" : "+x"(sum.v) : "x"(_mm256_madd_epi16(a.v, b.v)));  // of the intrinsic, GCC copies every sum
    return sum;
  }
};

}  // namespace

const Kernels& kernels_avx2() {
  static constexpr Kernels kTable = table<Vec, Ints>("avx2");
  return kTable;
}

}  // namespace sadmoe::cpu
