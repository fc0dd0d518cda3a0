// Rows of floats as integers of 16 bits with a step each. One template for every instruction set; no intrinsics here.
#pragma once
#include "cpu/kernels.h"

namespace sadmoe::cpu {

// Sums of q w with |w| <= 128 stay in 32 bits while sum |q| < 2^24: kSum, and what rounding adds, at most d / 2 <= 2^16.
template <class Vec>
void quantize(const Quantize& p) {
  constexpr float kLargest = 32767, kSum = (1 << 24) - (1 << 17), kSmallest = 1e-30f;  // of steps: its inverse is finite
  constexpr float kScale = 1 << 24;                                                    // a sum of d floats over it is finite
  constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");
  for (int64_t i = 0; i < p.n; ++i) {
    const float* x = p.x + i * p.d;
    int16_t* q = p.q + i * p.ld;
    Vec most = Vec::zero(), total = Vec::zero();
    const Vec scale = Vec::set(1 / kScale);
    const auto see = [&](Vec v) { most = max(abs(v), most), total = fma(abs(v), scale, total); };
    int64_t k = 0;
    for (; k + Vec::width <= p.d; k += Vec::width) see(Vec::load(x + k));
    if (k < p.d) see(Vec::load_part(x + k, p.d - k));
    float largest[Vec::width], sums[Vec::width];
    most.store(largest), total.store(sums);
    float peak = 0, sum = 0;
    for (int lane = 0; lane < Vec::width; ++lane) peak = largest[lane] > peak ? largest[lane] : peak, sum += sums[lane];
    float step = sum / (kSum / kScale);  // NaN stays NaN
    for (const float least : {peak / kLargest, kSmallest}) step = least > step ? least : step;
    if (!(step < kInfinity)) {
      p.steps[i] = kNaN;
      for (int64_t j = 0; j < p.ld; ++j) q[j] = 0;
      continue;
    }
    p.steps[i] = step;
    const Vec inverse = Vec::set(1 / step);
    for (k = 0; k + Vec::width <= p.d; k += Vec::width) (Vec::load(x + k) * inverse).round_to(q + k);
    if (k < p.d) {
      int16_t full[Vec::width];
      (Vec::load_part(x + k, p.d - k) * inverse).round_to(full);
      for (; k < p.d; ++k) q[k] = full[k % Vec::width];
    }
    for (; k < p.ld; ++k) q[k] = 0;
  }
}

}  // namespace sadmoe::cpu
