#include "layer.h"

namespace sadmoe::test {
namespace {

constexpr double kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588;

template <class Real>
Real activate(Real x, Activation act) {
  switch (act) {
    case Activation::abs:
      return std::fabs(x);
    case Activation::relu:
      return x > 0 ? x : Real(0);
    case Activation::gelu:
      return Real(0.5) * x * std::erfc(-x * Real(kSqrtHalf));
    case Activation::gelu_tanh:
      return Real(0.5) * x * (1 + std::tanh(Real(kSqrtTwoOverPi) * (x + Real(0.044715) * x * x * x)));
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::quick_gelu:
      return x / (1 + std::exp(Real(-1.702) * x));
    case Activation::relu2:
      return x > 0 ? x * x : Real(0);
  }
  return x;
}

template <class Real>
Real dot(const double* a, const double* b, int64_t n) {
  Real sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += Real(a[i]) * Real(b[i]);
  return sum;
}

// A float is rounded to the dtype where a plain library would store it; a double is kept.
template <class Real>
Real stored(Real x, DType dtype) {
  return sizeof(Real) == sizeof(float) ? static_cast<Real>(rounded(x, dtype)) : x;
}

}  // namespace

Layer::Layer(const Shape& p, const Kind& k, unsigned seed)
    : shape(p),
      kind(k),
      random_(seed),
      x_(Numbers::normal(p.T * p.d, 1, k.dtype, random_)),
      v1_(Numbers::normal(p.r * p.d, 1 / std::sqrt(p.d), k.dtype, random_)),
      v2_(Numbers::normal(p.E * p.r, 1 / std::sqrt(p.r), k.dtype, random_)),
      w_up_(weights(p.E * p.s, p.d, 1 / std::sqrt(p.d))),
      w_gate_(weights(k.gated ? p.E * p.s : 0, p.d, 1 / std::sqrt(p.d))),
      w_down_(weights(p.E * p.s, p.d_out, 1 / std::sqrt(p.E * p.s))),
      b_up_(Numbers::normal(k.bias ? p.E * p.s : 0, 1, k.dtype, random_)),
      b_gate_(Numbers::normal(k.bias && k.gated ? p.E * p.s : 0, 1, k.dtype, random_)),
      b_out_(Numbers::normal(k.bias ? p.d_out : 0, 1, k.dtype, random_)),
      scale_up_(scales(p.E * p.s, 1 / std::sqrt(p.d))),
      scale_gate_(scales(k.gated ? p.E * p.s : 0, 1 / std::sqrt(p.d))),
      scale_down_(scales(p.E * p.s, 1 / std::sqrt(p.E * p.s))),
      scale_out_(scales(seed % 11 < 8 ? p.d_out : 0, 32)),  // about 1; no kind has a period of 11
      packed_up_(w_up_.turned(p.s, p.d)),
      packed_gate_(w_gate_.turned(p.s, p.d)) {}

Numbers Layer::weights(int64_t n, int64_t m, double scale) {
  return kind.int8 ? Numbers::int8(n * m, random_) : Numbers::normal(n * m, scale, kind.dtype, random_);
}

Numbers Layer::scales(int64_t n, double scale) { return Numbers::scales(kind.int8 ? n : 0, scale, kind.dtype, random_); }

Experts Layer::experts(Numbers& y, bool packed) const {
  return {{shape.T, shape.d, shape.d_out, shape.E, shape.s},
          x_.view(),
          (packed ? packed_up_ : w_up_).view(),
          b_up_.view(),
          (packed ? packed_gate_ : w_gate_).view(),
          b_gate_.view(),
          w_down_.view(),
          b_out_.view(),
          kind.act,
          y.data(),
          scale_up_.view(),
          scale_gate_.view(),
          scale_down_.view(),
          scale_out_.view(),
          packed};
}

Router Layer::router(float tau) const { return {v1_.view(), v2_.view(), shape.r, tau}; }

template <class Real>
Sums Layer::output(const bool* mask) const {
  const auto& [T, d, E, s, d_out, r] = shape;
  const auto scaled = [](auto x, const Numbers& scale, int64_t i) -> decltype(x) {
    return scale.size() ? x * static_cast<decltype(x)>(scale.values()[i]) : x;
  };
  const auto linear = [&](const Numbers& w, const Numbers& scale, const Numbers& b, int64_t t, int64_t neuron) {
    const Real sum = scaled(dot<Real>(&x_.values()[t * shape.d], &w.values()[neuron * shape.d], shape.d), scale, neuron);
    return stored(b.size() ? sum + Real(b.values()[neuron]) : sum, kind.dtype);
  };
  Sums y{std::vector<double>(T * d_out)};
  for (int64_t t = 0; t < T; ++t) {
    std::vector<Real> sums(d_out);
    std::vector<double> terms(d_out);
    for (int64_t e = 0; e < E; ++e) {
      if (!mask[t * E + e]) continue;
      std::vector<Real> own(d_out);
      for (int64_t n = e * s; n < (e + 1) * s; ++n) {
        Real h = linear(w_up_, scale_up_, b_up_, t, n);
        if (kind.gated)
          h = stored(stored(activate(linear(w_gate_, scale_gate_, b_gate_, t, n), kind.act), kind.dtype) * h, kind.dtype);
        else
          h = stored(activate(h, kind.act), kind.dtype);
        for (int64_t c = 0; c < d_out; ++c) {
          const Real term = scaled(h, scale_down_, n) * Real(w_down_.values()[n * d_out + c]);
          own[c] += term;
          terms[c] += std::fabs(term);
        }
      }
      for (int64_t c = 0; c < d_out; ++c) sums[c] += own[c];
    }
    for (int64_t c = 0; c < d_out; ++c) {
      const double bias = b_out_.size() ? b_out_.values()[c] : 0;
      y.values[t * d_out + c] = stored(scaled(sums[c], scale_out_, c) + Real(bias), kind.dtype);
      y.terms = std::max(y.terms, scaled(terms[c], scale_out_, c) + std::fabs(bias));
    }
  }
  return y;
}

template <class Real>
Sums Layer::scores() const {
  Sums out{std::vector<double>(shape.T * shape.E)};
  for (int64_t t = 0; t < shape.T; ++t) {
    std::vector<double> hidden(shape.r);
    for (int64_t i = 0; i < shape.r; ++i)
      hidden[i] = std::max(Real(0), dot<Real>(&x_.values()[t * shape.d], &v1_.values()[i * shape.d], shape.d));
    for (int64_t e = 0; e < shape.E; ++e) {
      const double* row = &v2_.values()[e * shape.r];
      out.values[t * shape.E + e] = std::fabs(dot<Real>(hidden.data(), row, shape.r));
      double terms = 0;
      for (int64_t i = 0; i < shape.r; ++i) terms += std::fabs(hidden[i] * row[i]);
      out.terms = std::max(out.terms, terms);
    }
  }
  return out;
}

template <class Real>
Sums masked_activation(const Layer& layer, const Numbers& up, const Numbers& gate, const bool* mask) {
  const DType dtype = layer.kind.dtype;
  Sums out{std::vector<double>(up.size())};
  for (int64_t i = 0; i < up.size(); ++i) {
    if (!mask[i / layer.shape.s]) continue;
    const Real v = up.values()[i];
    const Real of_gate = gate.size() ? stored(activate(Real(gate.values()[i]), layer.kind.act), dtype) : 0;
    out.values[i] = stored(gate.size() ? of_gate * v : activate(v, layer.kind.act), dtype);
    out.terms = std::max({out.terms, std::fabs(up.values()[i]), std::fabs(out.values[i])});
  }
  return out;
}

template Sums Layer::output<float>(const bool*) const;
template Sums Layer::output<double>(const bool*) const;
template Sums Layer::scores<float>() const;
template Sums Layer::scores<double>() const;
template Sums masked_activation<float>(const Layer&, const Numbers&, const Numbers&, const bool*);
template Sums masked_activation<double>(const Layer&, const Numbers&, const Numbers&, const bool*);

std::unique_ptr<bool[]> random_mask(const Shape& shape, double share, unsigned seed) {
  std::mt19937 random(seed);
  std::bernoulli_distribution draw(share);
  std::unique_ptr<bool[]> mask(new bool[shape.T * shape.E]);
  for (int64_t i = 0; i < shape.T * shape.E; ++i) mask[i] = draw(random) && (shape.T == 1 || i >= shape.E);
  return mask;
}

std::unique_ptr<bool[]> mask_of_one_hot_expert(const Shape& shape, unsigned seed) {
  auto mask = random_mask(shape, 0.02, seed);
  for (int64_t t = 0; t < shape.T; ++t) mask[t * shape.E + seed % shape.E] = true;
  return mask;
}

double error_of_allowed(const std::vector<double>& ours, const Sums& plain, const Sums& truth, DType dtype, double rounding) {
  double error = 0, plain_error = 0, size = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    if (!std::isfinite(ours[i])) return INFINITY;
    error = std::max(error, std::fabs(ours[i] - truth.values[i]));
    plain_error = std::max(plain_error, std::fabs(plain.values[i] - truth.values[i]));
    size = std::max(size, std::fabs(truth.values[i]));
  }
  const double granted = (4 * epsilon(DType::f32) + rounding) * truth.terms + 0.51 * epsilon(dtype) * size;
  const double allowed = std::max(2 * plain_error, granted);
  return allowed > 0 ? error / allowed : error > 0 ? INFINITY : 0;
}

}  // namespace sadmoe::test
