// One layer with random weights, and what it must compute by loops that a reader can check against contract.h.
#pragma once
#include <memory>

#include "numbers.h"

namespace sadmoe::test {

constexpr DType kDtypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16"};
constexpr Activation kActivations[] = {Activation::relu, Activation::gelu,       Activation::gelu_tanh,
                                       Activation::silu, Activation::quick_gelu, Activation::relu2};
constexpr const char* kActivationNames[] = {"relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2", "abs"};

struct Shape {
  int64_t T, d, E, s, d_out, r;
};

struct Kind {
  DType dtype;
  Activation act;
  bool gated, bias, int8 = false;  // int8: the experts' weights, with scales
};

// Results, and the largest sum of the absolute terms of one of them: what its rounding errors are in proportion to.
struct Sums {
  std::vector<double> values;
  double terms = 0;
};

class Layer {
 public:
  Layer(const Shape& shape, const Kind& kind, unsigned seed);

  Experts experts(Numbers& y, bool packed = false) const;
  Router router(float tau) const;
  RouterShape router_shape() const { return {shape.T, shape.d, shape.r, shape.E}; }

  // Real = double: the truth. Real = float: what a plain library makes of it, each step rounded to the dtype.
  template <class Real>
  Sums output(const bool* mask) const;
  template <class Real>
  Sums scores() const;

  const Shape shape;
  const Kind kind;

 private:
  // n neurons of m weights.
  Numbers weights(int64_t n, int64_t m, double scale);
  Numbers scales(int64_t n, double scale);

  std::mt19937 random_;
  Numbers x_, v1_, v2_, w_up_, w_gate_, w_down_, b_up_, b_gate_, b_out_, scale_up_, scale_gate_, scale_down_, scale_out_;
  Numbers packed_up_, packed_gate_;
};

// up [T, E s] becomes the hidden activations, of a GLU with gate of the same shape, else that is empty: truth and plain as above.
template <class Real>
Sums masked_activation(const Layer& layer, const Numbers& up, const Numbers& gate, const bool* mask);

// A mask in which experts, and the first token, may have nothing.
std::unique_ptr<bool[]> random_mask(const Shape& shape, double share, unsigned seed);
std::unique_ptr<bool[]> mask_of_one_hot_expert(const Shape& shape, unsigned seed);  // every token's, others of a few tokens

// The largest error as a share of what is allowed: twice that of plain floats, or four float roundings of the largest sum of
// terms and the last one of the largest result to the dtype, where plain floats are better by luck; and where the contract rounds
// on the way, so much of the terms. The rule of tests/problems.py.
double error_of_allowed(const std::vector<double>& ours, const Sums& plain, const Sums& truth, DType dtype, double rounding = 0);

}  // namespace sadmoe::test
