// How tensor cores add, which is not as float32 does. They take the sum so far and kTogether products, cut all of them off
// kFraction bits below the largest, add what is left without error, and cut the result off to float32: nothing is rounded to the
// nearest, and a long chain loses a little at every link. After the bit-exact models of MMA-Sim (Xie et al., 2025, arXiv
// 2511.10909). Of an A100, the coarsest of those: an H100 keeps 25 bits, of twice as many products.
// Subnormal halves, which count as of their least normal exponent, are not told apart here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sadmoe::emulator {

constexpr int kFraction = 24;

inline int exponent_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255);
  return exponent ? exponent - 127 : -126;
}

inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}

inline float cut_off(double v) {
  if (std::abs(v) > std::numeric_limits<float>::max()) return static_cast<float>(std::copysign(INFINITY, v));
  const float nearest = static_cast<float>(v);
  return std::abs(static_cast<double>(nearest)) > std::abs(v) ? std::nextafter(nearest, 0.0f) : nearest;
}

// sum + a b of kDepth entries, kTogether at a time: 8 of 16 bits, 4 of tf32.
template <int kDepth, int kTogether>
float add_products(float sum, const float* a, const float* b) {
  static_assert(kDepth % kTogether == 0);
  for (int k0 = 0; k0 < kDepth; k0 += kTogether) {
    double products[kTogether];
    int most = exponent_of(sum);
    bool finite = std::isfinite(sum);
    for (int k = 0; k < kTogether; ++k) {
      const float x = a[k0 + k], y = b[k0 + k];
      products[k] = static_cast<double>(x) * y;
      finite = finite && std::isfinite(products[k]);
      const int exponent = products[k] == 0 ? -126 : exponent_of(x) + exponent_of(y);
      most = exponent > most ? exponent : most;
    }
    if (!finite) {
      for (int k = 0; k < kTogether; ++k) sum += static_cast<float>(products[k]);
      continue;
    }
    const double scale = power_of_two(kFraction - most);
    int64_t all = static_cast<int64_t>(sum * scale);
    for (const double product : products) all += static_cast<int64_t>(product * scale);
    sum = cut_off(static_cast<double>(all) * power_of_two(most - kFraction));
  }
  return sum;
}

}  // namespace sadmoe::emulator
