// What is computed, in shapes and plain pointers: the contract between bindings and kernels. No torch, no CUDA, no ISA.
//
//   T tokens   d input width   d_out output width   E experts   s neurons of an expert   r router width
//
//   scores[t, e] = | sum_i relu(x[t] . v1[i]) v2[e, i] |                        float32, whatever the dtype of x
//   mask[t, e]   = scores[t, e] >= tau * max_e scores[t, e]                     tau = 0: all, tau = 1: the top expert
//   h[t, e, j]   = act(x[t] . w_up[e, j] + b_up[e, j])                          plain
//   h[t, e, j]   = act(x[t] . w_gate[e, j] + b_gate[e, j]) * (x[t] . w_up[e, j] + b_up[e, j])       GLU
//   y[t]         = b_out + sum over e with mask[t, e], ascending, of (sum over j of h[t, e, j] w_down[e, j])
//
// Every matrix is row-major with one neuron a row, so up and down projection both stream whole neurons; but on the CPU w_up and
// w_gate may be packed, each expert's neurons side by side [E, d, s]. What results are, to the last bit:
//   - The result of a token is the same whatever its neighbours, their order, and the thread count; on sm_90a in 16 bits if both
//     kinds of tensor core instructions add alike (cuda/hopper_up.cuh).
//   - Sums are float32. Tensor cores cut them off instead of rounding; the router's are as exact as others (cuda/tile.cuh).
//   - With x and weights in float32 every 16 experts are summed by themselves, on the CPU of those of a token, on CUDA by their
//     number, and then those sums; so are, on CUDA without TF32, every 16 products of a depth.
//   - Packed weights are multiplied in another order than others, so the results of the two differ by rounding.
//   - With x in 16 bits tensor cores round h to its dtype, with x in bf16 AMX and AVX512-BF16, too; elsewhere, and with packed
//     weights of an odd d, h stays float32. AMX and AVX512-BF16 take denormals of bf16 for 0.
//   - An int8 row stands for itself times its neuron's scale, which multiplies sums and h instead. On the CPU a row of x, and of
//     h of one expert, is rounded to 16 bits with a step of its own, and multiplied with int8 in whole numbers; a sum is exact,
//     and rounded as it becomes float32; scale_out, if there is one, then multiplies the columns of y, before b_out is added.
#pragma once
#include <cstdint>

namespace sadmoe {

enum class DType { f32, bf16, f16, i8 };  // i8: weights of experts, beside scales
enum class Activation { relu, gelu, gelu_tanh, silu, quick_gelu, relu2, abs };

// A read-only matrix or vector of any dtype; data is null where the argument is absent, or empty.
struct View {
  const void* data = nullptr;
  DType dtype = DType::f32;
  explicit operator bool() const { return data != nullptr; }
};

// Always inlined: a file of one instruction set must leave no code that others are linked with.
[[gnu::always_inline]] inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }
[[gnu::always_inline]] inline View at(View view, int64_t elements) {
  return {view ? static_cast<const char*>(view.data) + elements * size_of(view.dtype) : nullptr, view.dtype};
}

struct RouterShape {
  int64_t T, d, r, E;
};

struct ExpertsShape {
  int64_t T, d, d_out, E, s;
};

struct Router {  // v1 [r, d], v2 [E, r]
  View v1, v2;
  int64_t r;
  float tau;
};

// w_up, w_gate [E, s, d], or packed [E, d, s], w_down [E, s, d_out]: of x's dtype, or not packed i8   b_up, b_gate [E, s], b_out
// [d_out]: of x's dtype
struct Experts {
  ExpertsShape shape;
  View x, w_up, b_up, w_gate, b_gate, w_down, b_out;
  Activation act;
  void* y;                                // [T, d_out], x's dtype
  View scale_up, scale_gate, scale_down;  // [E, s], where w_up, w_gate, w_down are int8
  View scale_out;                         // [d_out], or absent
  bool packed = false;
};

// Who chose whom: a mask, or, where it is null, who reaches tau.
struct Choice {
  const bool* mask = nullptr;     // [T, E]
  const float* scores = nullptr;  // [T, E]
  float tau = 0;
};

// Hidden activations of dense products, in place:  up = act(up),  or with a gate  act(gate) up,  and 0 of experts not chosen
struct MaskedActivation {
  int64_t T, E, s;
  DType dtype;
  void* up;          // [T, E s]
  const void* gate;  // [T, E s], or null
  Choice choice;
  Activation act;
};

}  // namespace sadmoe
