// Numbers of the dtypes without the kernels' own conversions: doubles rounded to a dtype, and their bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "contract.h"

namespace sadmoe::test {

// Significant bits, the exponent of the smallest number above zero.
struct Format {
  int digits, least;
};

inline Format format(DType t) {
  return t == DType::f32    ? Format{24, -149}
         : t == DType::bf16 ? Format{8, -133}
         : t == DType::f16  ? Format{11, -24}
                            : Format{7, 0};
}

inline double epsilon(DType t) { return std::ldexp(1.0, 1 - format(t).digits); }

// To nearest, ties to even; below the overflow of the dtype.
inline double rounded(double x, DType t) {
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - format(t).digits, format(t).least));
  return std::nearbyint(x / unit) * unit;
}

// The bits of a number that the dtype has.
inline uint32_t encode(double x, DType t) {
  if (t == DType::i8) return static_cast<uint8_t>(static_cast<int8_t>(x));
  if (t == DType::f16) {
    int exponent;
    const double fraction = std::frexp(std::fabs(x), &exponent);
    const double magnitude = exponent < -13 || x == 0 ? std::ldexp(std::fabs(x), 24) : (exponent + 13) * 1024 + fraction * 2048;
    return static_cast<uint32_t>(magnitude) | (std::signbit(x) ? 0x8000u : 0u);
  }
  const float narrow = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return t == DType::f32 ? bits : bits >> 16;
}

inline double decode(uint32_t bits, DType t) {
  if (t == DType::f16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31  ? (fraction ? std::nan("") : INFINITY)
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(fraction + 1024, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
  const uint32_t wide = t == DType::f32 ? bits : bits << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// n numbers of a dtype, as bits for a kernel and as doubles. The bits begin one number past an aligned address and end with their
// allocation: kernels may not assume alignment, and a sanitizer sees what they read past the end.
class Numbers {
 public:
  Numbers(int64_t n, DType dtype) : dtype_(dtype), bytes_((n + 1) * size_of(dtype)), values_(n) {}

  static Numbers normal(int64_t n, double scale, DType dtype, std::mt19937& random) {
    return drawn(n, dtype, [&, draw = std::normal_distribution<double>(0.0, scale)]() mutable { return draw(random); });
  }

  // As large as those of normal are with a scale of 1, once they are divided by 32.
  static Numbers int8(int64_t n, std::mt19937& random) {
    std::normal_distribution<double> draw(0.0, 32);
    return drawn(n, DType::i8, [&] { return std::clamp(draw(random), -127.0, 127.0); });
  }

  // Scales of int8 numbers, so that they are of size `scale`, each neuron's own.
  static Numbers scales(int64_t n, double scale, DType dtype, std::mt19937& random) {
    std::uniform_real_distribution<double> draw(0.5 * scale / 32, 1.5 * scale / 32);
    return drawn(n, dtype, [&] { return draw(random); });
  }

  // Matrices [n, m], one after the other, each turned into [m, n].
  Numbers turned(int64_t n, int64_t m) const {
    Numbers out(size(), dtype_);
    const int64_t bytes = size_of(dtype_);
    for (int64_t i = 0; i < size(); ++i) {
      const int64_t first = i / (n * m) * n * m, row = i % (n * m) / m, column = i % m, to = first + column * n + row;
      out.values_[to] = values_[i];
      std::memcpy(&out.bytes_[(to + 1) * bytes], &bytes_[(i + 1) * bytes], bytes);
    }
    return out;
  }

  int64_t size() const { return static_cast<int64_t>(values_.size()); }
  char* data() { return bytes_.data() + size_of(dtype_); }
  View view() const { return {values_.empty() ? nullptr : bytes_.data() + size_of(dtype_), dtype_}; }
  const std::vector<double>& values() const { return values_; }

  // What a kernel has written.
  std::vector<double> read() const {
    std::vector<double> out(values_.size());
    for (size_t i = 0; i < out.size(); ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, bytes_.data() + (i + 1) * size_of(dtype_), size_of(dtype_));
      out[i] = decode(bits, dtype_);
    }
    return out;
  }

 private:
  template <class Draw>
  static Numbers drawn(int64_t n, DType dtype, Draw draw) {
    Numbers out(n, dtype);
    for (int64_t i = 0; i < n; ++i) {
      out.values_[i] = rounded(draw(), dtype);
      const uint32_t bits = encode(out.values_[i], dtype);
      std::memcpy(out.data() + i * size_of(dtype), &bits, size_of(dtype));
    }
    return out;
  }

  DType dtype_;
  std::vector<char> bytes_;
  std::vector<double> values_;
};

}  // namespace sadmoe::test
