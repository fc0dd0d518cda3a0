// Any processor: four floats in the compiler's own vector type (SSE2 on x86-64, NEON on Arm), 16-bit floats by integers.
#include <cstring>

#include "cpu/table.h"

namespace sadmoe::cpu {
namespace {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

float widen(bf16 h) { return bit_cast<float>(uint32_t{h.bits} << 16); }

float widen(f16 h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31, fraction = h.bits & 0x3ffu;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;  // zero and subnormals
  const uint32_t rebased = exponent == 31 ? 255 : exponent + 112;                             // infinity and NaN
  return bit_cast<float>(sign | rebased << 23 | fraction << 13);
}

uint16_t narrow(float f, bf16) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  if (f != f) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t narrow(float f, f16) {
  const uint32_t bits = bit_cast<uint32_t>(f), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000u) {                       // subnormal: the addition rounds to multiples of 2^-24
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(0.5f));
  }
  return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Words __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(8)));

struct Vec {
  using Entry = float;
  using Sum = Vec;
  static constexpr int width = 4, sums = 4;
  static constexpr int project_rows = 2, project_columns = 2;
  static constexpr int accumulate_rows = 2, accumulate_vecs = 4;  // 8 sums, 4 weights, 1 activation: 13 of 16 registers
  static constexpr int copied = 8192, held = 8, held_neurons = 4;
  static constexpr bool always_copied = true;
  static constexpr int fetched = kSecondLevel;
  static constexpr int64_t foreseen = kNever;

  Floats v;

  static Vec zero() { return {Floats{}}; }
  static Vec set(float a) { return {Floats{a, a, a, a}}; }
  static Vec load(const float* p) {
    Vec out;
    std::memcpy(&out.v, p, sizeof out.v);
    return out;
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  template <class H>
  static Vec load(const H* p) {
    return {Floats{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
  }
  template <class H>
  void store(H* p) const {
    for (int i = 0; i < width; ++i) p[i].bits = narrow(v[i], H{});
  }
  template <class F>
  static Vec load_part(const F* p, int64_t n) {
    F full[width] = {};
    for (int64_t i = 0; i < n; ++i) full[i] = p[i];
    return load(full);
  }
  template <class F>
  void store_part(F* p, int64_t n) const {
    F full[width];
    store(full);
    for (int64_t i = 0; i < n; ++i) p[i] = full[i];
  }

  void round_to(int16_t* p) const {
    const Floats whole = round(*this).v;
    for (int i = 0; i < width; ++i) p[i] = static_cast<int16_t>(whole[i] == whole[i] ? whole[i] : 0);
  }

  static Vec reduce(const Vec* a) {
    const auto sum = [](Floats f) { return (f[0] + f[2]) + (f[1] + f[3]); };
    return {Floats{sum(a[0].v), sum(a[1].v), sum(a[2].v), sum(a[3].v)}};
  }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  friend void hold(Vec&) {}
  friend Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  friend Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  friend Vec abs(Vec a) { return {bit_cast<Floats>(bit_cast<Words>(a.v) & 0x7fffffff)}; }
  friend Vec round(Vec a) {  // to nearest even, for |a| < 2^22: the sum has no bits left below 1
    const Vec big = set(0x1.8p23f);
    return (a + big) - big;
  }
  friend Vec scale2(Vec a, Vec n) { return {a.v * bit_cast<Floats>((__builtin_convertvector(n.v, Words) + 127) << 23)}; }
  friend Vec where_less(Vec a, Vec b, Vec x, Vec y) { return {a.v < b.v ? x.v : y.v}; }
};

// Eight integers of 16 bits; their products are summed in four of 32.
struct Ints {
  struct Sum {
    Words v;
    static Sum zero() { return {Words{}}; }
  };
  using Entry = int16_t;
  using Weight = int8_t;
  static constexpr int width = 8, sums = 4;
  static constexpr int project_rows = 2, project_columns = 2;
  static constexpr int accumulate_rows = 2, accumulate_groups = 2;  // 8 sums, 4 weights, 1 pair of activations
  static constexpr int copied = 8192, held_neurons = 0;
  static constexpr int fetched = Vec::fetched;

  Shorts v;

  template <class I>
  static Ints load_part(const I* p, int64_t n) {
    Ints out{};
    for (int64_t i = 0; i < n; ++i) out.v[i] = p[i];
    return out;
  }
  static Ints load(const int16_t* p) {
    Ints out;
    std::memcpy(&out.v, p, sizeof out.v);
    return out;
  }
  void store(int16_t* p) const { std::memcpy(p, &v, sizeof v); }
  static Ints load(const int8_t* p) {
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return {__builtin_convertvector(bytes, Shorts)};
  }
  static void load_pairs_part(const int8_t* a, const int8_t* b, int64_t n, Ints* out) {
    out[0].v = out[1].v = Shorts{};
    for (int64_t i = 0; i < n; ++i) out[i / 4].v[i % 4 * 2] = a[i], out[i / 4].v[i % 4 * 2 + 1] = b[i];
  }
  static void load_pairs(const int8_t* a, const int8_t* b, Ints* out) {
    const Shorts x = load(a).v, y = load(b).v;
    out[0].v = Shorts{x[0], y[0], x[1], y[1], x[2], y[2], x[3], y[3]};
    out[1].v = Shorts{x[4], y[4], x[5], y[5], x[6], y[6], x[7], y[7]};
  }
  static Ints set_pair(const int16_t* p) { return {Shorts{p[0], p[1], p[0], p[1], p[0], p[1], p[0], p[1]}}; }

  static Vec reduce(const Sum* a) {
    const auto sum = [](Words w) { return static_cast<float>(w[0] + w[1] + w[2] + w[3]); };
    return {Floats{sum(a[0].v), sum(a[1].v), sum(a[2].v), sum(a[3].v)}};
  }
  static void to_floats(const Sum* sums, Vec* out) {
    for (int half = 0; half < 2; ++half) out[half].v = __builtin_convertvector(sums[half].v, Floats);
  }

  friend Sum fma(Ints a, Ints b, Sum sum) {
#ifdef __SSE2__
    return {sum.v + __builtin_ia32_pmaddwd128(a.v, b.v)};
#else
    const auto even = [](Ints i) { return bit_cast<Words>(i.v) << 16 >> 16; };
    const auto odd = [](Ints i) { return bit_cast<Words>(i.v) >> 16; };
    return {sum.v + even(a) * even(b) + odd(a) * odd(b)};
#endif
  }
};

}  // namespace

const Kernels& kernels_portable() {
  static constexpr Kernels kTable = table<Vec, Ints>("portable");
  return kTable;
}

}  // namespace sadmoe::cpu
