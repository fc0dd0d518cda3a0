// Bias, activation and gating of hidden rows. One template for every instruction set; no intrinsics here.
#pragma once
#include <initializer_list>

#include "cpu/kernels.h"

namespace sadmoe::cpu {

// e^x to about 1 ulp for x in [-87, 88], clamped outside; NaN stays NaN.
// x = n ln2 + r with |r| <= ln2 / 2, ln2 in two parts; e^r by its Taylor polynomial of degree 7 (error 6e-9).
template <class Vec>
Vec exp(Vec x) {
  x = max(Vec::set(-87.3f), min(Vec::set(88.37f), x));
  const Vec n = round(x * Vec::set(1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693359375f), x);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec e = Vec::set(1.9841270e-4f);
  for (const float c : {1.3888889e-3f, 8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f}) e = fma(e, r, Vec::set(c));
  return scale2(e, n);
}

template <class Vec>
Vec relu(Vec x) {
  return max(Vec::zero(), x);
}

template <class Vec>
Vec relu2(Vec x) {
  return relu(x) * relu(x);
}

// Below -88, where exp ends, it stays above -1e-36.
template <class Vec>
Vec silu(Vec x) {
  x = max(Vec::set(-88.0f), x);
  return x / (Vec::set(1.0f) + exp(Vec::zero() - x));
}

// x sigmoid(1.702 x), an early approximation of gelu; below -51 it stays above -1e-36.
template <class Vec>
Vec quick_gelu(Vec x) {
  x = max(Vec::set(-51.0f), x);
  return x / (Vec::set(1.0f) + exp(x * Vec::set(-1.702f)));
}

// x Phi(x), with the tail Phi(-|x|) = erfc(|x| / sqrt 2) / 2 to a few ulp times a²: erfc(a) = e^(-a²) t P(t), t = 1 / (1 + p a),
// P a minimax fit of degree 9 over a in [0, 10].
template <class Vec>
Vec gelu(Vec x) {
  const Vec near = max(Vec::set(-20.0f), min(Vec::set(20.0f), x));  // beyond, the tail is 0, and inf * 0 would be NaN
  const Vec a = abs(near) * Vec::set(0.70710678118654752f);
  const Vec t = Vec::set(1.0f) / fma(a, Vec::set(0.3275911f), Vec::set(1.0f));
  Vec p = Vec::set(0.05667648424f);
  for (const float c : {-0.3171283551f, 0.6273526553f, -0.5600513777f, 0.5013726413f, -0.05038366989f, 0.2059526437f,
                        0.1656354902f, 0.1857944525f, 0.1847790314f})
    p = fma(p, t, Vec::set(c));
  const Vec tail = near * (Vec::set(0.5f) * exp(Vec::zero() - a * a) * t * p);
  return where_less(x, Vec::zero(), tail, x - tail);
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)),  u = sqrt(2 / pi) (x + 0.044715 x³); below -20 it stays above -1e-36.
template <class Vec>
Vec gelu_tanh(Vec x) {
  x = max(Vec::set(-20.0f), x);
  const Vec u = x * fma(x * x, Vec::set(0.044715f), Vec::set(1.0f));
  return x / (Vec::set(1.0f) + exp(u * Vec::set(-1.5957691216057308f)));
}

// Rows shorter than a vector that stand one after the other: whole vectors of several rows, the bias as often.
template <class Vec, class Act>
void activate_short_rows(const Activate& p, Act act) {
  const auto repeated = [&](const float* from, float otherwise) {
    float lanes[Vec::width];
    for (int64_t i = 0; i < Vec::width; ++i) lanes[i] = from ? from[i % p.m] : otherwise;
    return Vec::load(lanes);
  };
  const Vec bias = repeated(p.bias, 0), scale = repeated(p.scale, 1), out_scale = repeated(p.out_scale, 1);
  const auto value = [&](Vec h) { return p.scale ? act(fma(h, scale, bias)) * out_scale : act(h + bias); };
  const int64_t all = p.n * p.m;
  int64_t i = 0;
  for (; i + Vec::width <= all; i += Vec::width) value(Vec::load(p.h + i)).store(p.h + i);
  if (i < all) value(Vec::load_part(p.h + i, all - i)).store_part(p.h + i, all - i);
}

template <class Vec, class Act>
void activate_with(const Activate& p, Act act) {
  if (!p.gate && p.ld == p.m && p.m > 0 && p.m < Vec::width && Vec::width % p.m == 0) return activate_short_rows<Vec>(p, act);
  for (int64_t i = 0; i < p.n; ++i) {
    float* h = p.h + i * p.ld;
    const float* gate = p.gate ? p.gate + i * p.ld : nullptr;
    const auto step = [&](int64_t j, auto load, auto store) {
      const auto linear = [&](const float* sums, const float* scale, const float* bias) {
        const Vec v = load(sums + j), b = bias ? load(bias + j) : Vec::zero();
        return scale ? fma(v, load(scale + j), b) : v + b;
      };
      const Vec up = linear(h, p.scale, p.bias);
      const Vec out = gate ? act(linear(gate, p.gate_scale, p.gate_bias)) * up : act(up);
      store(p.out_scale ? out * load(p.out_scale + j) : out, h + j);
    };
    int64_t j = 0;
    for (; j + Vec::width <= p.m; j += Vec::width)
      step(j, [](const float* from) { return Vec::load(from); }, [](Vec v, float* to) { v.store(to); });
    if (const int64_t part = p.m - j)
      step(j, [&](const float* from) { return Vec::load_part(from, part); }, [&](Vec v, float* to) { v.store_part(to, part); });
  }
}

template <class Vec>
void activate(const Activate& p) {
  switch (p.act) {
    case Activation::abs:
      return activate_with<Vec>(p, [](Vec x) { return abs(x); });
    case Activation::relu:
      return activate_with<Vec>(p, [](Vec x) { return relu(x); });
    case Activation::gelu:
      return activate_with<Vec>(p, [](Vec x) { return gelu(x); });
    case Activation::gelu_tanh:
      return activate_with<Vec>(p, [](Vec x) { return gelu_tanh(x); });
    case Activation::silu:
      return activate_with<Vec>(p, [](Vec x) { return silu(x); });
    case Activation::quick_gelu:
      return activate_with<Vec>(p, [](Vec x) { return quick_gelu(x); });
    case Activation::relu2:
      return activate_with<Vec>(p, [](Vec x) { return relu2(x); });
  }
}

}  // namespace sadmoe::cpu
