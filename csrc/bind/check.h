// Tensors to plain pointers: every check of an argument and every message, once, for all devices.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "contract.h"

namespace sadmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Throws with the op's name first. The stable ABI turns it into a RuntimeError with this text.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "sadmoe::" << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// What is said of a failure is not between the checks: of one token, reading their instructions takes as long as its products.
template <class... Parts>
void check(bool holds, const char* op, const Parts&... parts) {
  if (!holds) fail(op, parts...);
}

template <class Numbers>
std::ostream& put_list(std::ostream& to, const Numbers& numbers) {
  const char* between = "[";
  for (const int64_t n : numbers) to << std::exchange(between, ", ") << n;
  return to << (numbers.size() ? "]" : "[]");
}

// Print as [2, 3]; only where a check fails is there text to make.
struct ShapeOf {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& to, ShapeOf shape) { return put_list(to, shape.tensor.sizes()); }
};
struct StridesOf {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& to, StridesOf strides) { return put_list(to, strides.tensor.strides()); }
};

// Nothing for a dtype that torch's stable ABI has no name for.
inline std::optional<ScalarType> scalar_type_of(const Tensor& t) {
  try {
    return t.scalar_type();
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

// Prints as BFloat16.
struct DtypeOf {
  const Tensor& tensor;

  friend std::ostream& operator<<(std::ostream& to, DtypeOf dtype) {
    const std::optional<ScalarType> type = scalar_type_of(dtype.tensor);
    return to << (type ? torch::headeronly::toString(*type) : "a dtype that is not known here");
  }
};

inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> want,
                        const char* letters) {
  bool same = t.dim() == static_cast<int64_t>(want.size());
  int64_t i = 0;
  for (const int64_t n : want) same = same && t.size(i++) == n;
  if (same) return;
  std::ostringstream expected;
  put_list(expected, want);
  fail(op, name, " must be ", letters, " = ", expected.str(), ", got ", ShapeOf{t});
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  const std::optional<ScalarType> type = scalar_type_of(t);
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::BFloat16) return DType::bf16;
  check(type == ScalarType::Half, op, name, " must be float32, bfloat16 or float16, got ", DtypeOf{t});
  return DType::f16;
}

inline Activation activation_of(const char* op, const std::string& act) {
  if (act == "relu") return Activation::relu;
  if (act == "gelu") return Activation::gelu;
  if (act == "gelu_tanh") return Activation::gelu_tanh;
  if (act == "silu") return Activation::silu;
  if (act == "quick_gelu") return Activation::quick_gelu;
  if (act == "relu2") return Activation::relu2;
  fail(op, "act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got '", act, "'");
}

// A string argument, which is ours to free, first thing of all: what torch before 2.14 makes of one itself is never freed.
inline std::string taken(StringHandle handle) {
  struct Freed {
    StringHandle handle;
    ~Freed() { torch_delete_string(handle); }
  } freed{handle};
  size_t length;
  const char* data;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  return {data, length};
}

inline int32_t device_type_of(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

// Of a tensor of those sizes, in the words that callers who look for it know.
[[noreturn]] inline void no_memory(int32_t device_type, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  if (device_type == aoti_torch_device_type_cpu()) throw std::bad_alloc();  // as scratch does: MemoryError
  std::ostringstream shape;
  put_list(shape, sizes);
  // "CUDA out of memory.", with the stop, is what finders of batch sizes look for.
  throw std::runtime_error("sadmoe: CUDA out of memory. A tensor " + shape.str() +
                           " could not be allocated, or an earlier kernel failed (CUDA_LAUNCH_BLOCKING=1 tells)");
}

// torch::stable::contiguous without its way through torch's dispatcher where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {  // of a copy nothing else can fail
    no_memory(device_type_of(t), t.sizes());
  }
}

// Whether weights [E, s, d] lie as [E, d, s], each expert's neurons side by side, and not just as well in their own order.
inline bool is_packed(const Tensor& w) {
  const int64_t E = w.size(0), s = w.size(1), d = w.size(2);
  return !w.is_contiguous() && w.stride(1) == 1 && w.stride(2) == s && (E == 1 || w.stride(0) == s * d);
}

// Uninitialised, on x's device, of x's dtype or the one that a function such as aoti_torch_dtype_bool names: as
// torch::stable::new_empty, but not through the dispatcher.
inline Tensor empty_beside(const Tensor& x, const std::vector<int64_t>& sizes, int32_t (*dtype)() = nullptr) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  const int32_t type = device_type_of(x);
  int32_t index, code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  if (dtype) code = dtype();
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code, type, index, &made) != AOTI_TORCH_SUCCESS)
    no_memory(type, sizes);
  return Tensor(made);
}

struct Argument {
  const char* name;
  Tensor tensor;
};

// Tensors, contiguous or packed, that outlive the pointers given to the kernels.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) { kept_.reserve(kMost); }

  // packed: it is, and stays so.
  View add(const char* name, const Tensor& t, bool packed = false) {
    const DType dtype = dtype_of(op_, name, t);
    kept_.push_back({name, packed ? t : as_contiguous(t)});
    return {kept_.back().tensor.const_data_ptr(), dtype};
  }

  // The same, of x's dtype, or that of another.
  View add_like(const char* name, const Tensor& t, const Tensor& x, const char* name_of_x = "x", bool packed = false) {
    check(scalar_type_of(t) == scalar_type_of(x), op_, name, " must have ", name_of_x, "'s dtype, ", DtypeOf{x}, ", got ",
          DtypeOf{t});
    return add(name, t, packed);
  }
  View add_like(const char* name, const MaybeTensor& t, const Tensor& x, bool packed = false) {
    return t ? add_like(name, *t, x, "x", packed) : View{};
  }

  // Weights of experts in int8, and their scales [E, s] of any floating dtype.
  View add_int8(const char* name, const Tensor& t) {
    check(scalar_type_of(t) == ScalarType::Char, op_, name, " must be int8, got ", DtypeOf{t});
    kept_.push_back({name, as_contiguous(t)});
    return {kept_.back().tensor.const_data_ptr(), DType::i8};
  }
  View add_scale(const char* name, const Tensor& t, const ExpertsShape& shape) {
    check_shape(op_, name, t, {shape.E, shape.s}, "[E, s]");
    return add(name, t);
  }

  const bool* add_mask(const char* name, const Tensor& t) {
    check(scalar_type_of(t) == ScalarType::Bool, op_, name, " must be bool, got ", DtypeOf{t});
    kept_.push_back({name, as_contiguous(t)});
    return static_cast<const bool*>(kept_.back().tensor.const_data_ptr());
  }

  const char* op() const { return op_; }
  const std::vector<Argument>& all() const { return kept_; }

 private:
  static constexpr size_t kMost = 16;  // that any op has
  const char* op_;
  std::vector<Argument> kept_;
};

inline RouterShape check_router(const char* op, const Tensor& x, const Tensor& v1, const Tensor& v2) {
  check(x.dim() == 2 && x.size(1) >= 1, op, "x must be [T, d] with d >= 1, got ", ShapeOf{x});
  check(v1.dim() == 2 && v1.size(1) == x.size(1), op, "v1 must be [r, d = ", x.size(1), "], got ", ShapeOf{v1});
  check(v2.dim() == 2 && v2.size(1) == v1.size(0), op, "v2 must be [E, r = ", v1.size(0), "], got ", ShapeOf{v2});
  check(v2.size(0) >= 1, op, "v2 must have at least one expert, got ", ShapeOf{v2});
  return {x.size(0), x.size(1), v1.size(0), v2.size(0)};
}

inline Router router_of(Arguments& keep, const Tensor& v1, const Tensor& v2, float tau) {
  return {keep.add("v1", v1), keep.add("v2", v2), v1.size(0), tau};
}

inline void check_router_experts(const char* op, const Tensor& v2, int64_t E) {
  check(v2.size(0) == E, op, "v2 must have a row for each of the E = ", E, " experts of w_up, got ", ShapeOf{v2});
}

inline void check_scores(const char* op, const Tensor& scores) {
  check(scores.dim() == 2 && scores.size(1) >= 1, op, "scores must be [T, E] with E >= 1, got ", ShapeOf{scores});
  check(scalar_type_of(scores) == ScalarType::Float, op, "scores must be float32, got ", DtypeOf{scores});
}

inline float check_tau(const char* op, double tau) {
  check(tau >= 0 && tau <= 1, op, "tau must be in [0, 1] (0: every expert, 1: the top expert), got ", tau);
  return static_cast<float>(tau);
}

// What experts of floats and of int8 have in common: all but weights, scales, and y, which the caller allocates, [T, d_out] of
// x's dtype.
inline Experts check_experts(Arguments& keep, const Tensor& x, const Tensor& w_up, const Tensor& w_down, const MaybeTensor& b_up,
                             const MaybeTensor& w_gate, const MaybeTensor& b_gate, const MaybeTensor& b_out,
                             const std::string& act) {
  const char* op = keep.op();
  check(x.dim() == 2 && x.size(1) >= 1, op, "x must be [T, d] with d >= 1, got ", ShapeOf{x});
  check(w_up.dim() == 3 && w_up.size(2) == x.size(1), op, "w_up must be [E, s, d = ", x.size(1), "], got ", ShapeOf{w_up});
  const int64_t E = w_up.size(0), s = w_up.size(1), d = x.size(1);
  check(E >= 1 && s >= 1, op, "w_up must have at least one expert of one neuron, got ", ShapeOf{w_up});
  check(w_down.dim() == 3 && w_down.size(0) == E && w_down.size(1) == s, op, "w_down must be [E = ", E, ", s = ", s,
        ", d_out], got ", ShapeOf{w_down});
  if (b_up) check_shape(op, "b_up", *b_up, {E, s}, "[E, s]");
  if (w_gate) check_shape(op, "w_gate", *w_gate, {E, s, d}, "[E, s, d]");
  check(w_gate || !b_gate, op, "b_gate needs w_gate");
  if (b_gate) check_shape(op, "b_gate", *b_gate, {E, s}, "[E, s]");
  if (b_out) check_shape(op, "b_out", *b_out, {w_down.size(2)}, "[d_out]");
  Experts p;
  p.shape = {x.size(0), d, w_down.size(2), E, s};
  p.act = activation_of(op, act);
  p.x = keep.add("x", x);
  p.b_up = keep.add_like("b_up", b_up, x);
  p.b_gate = keep.add_like("b_gate", b_gate, x);
  p.b_out = keep.add_like("b_out", b_out, x);
  return p;
}

// All but up, which the caller writes. choice: a mask, or scores of which those count that reach tau.
inline MaskedActivation check_masked_activation(Arguments& keep, const Tensor& up, const MaybeTensor& gate, const Tensor& choice,
                                                double tau, const std::string& act) {
  const char* op = keep.op();
  check(up.dim() == 2 && up.size(1) >= 1, op, "up must be [T, E s] with E s >= 1, got ", ShapeOf{up});
  check(up.is_contiguous(), op, "up must be contiguous, as it is written in place; got strides ", StridesOf{up});
  const int64_t T = up.size(0), neurons = up.size(1);
  if (gate) check_shape(op, "gate", *gate, {T, neurons}, "[T, E s]");
  const bool fits = choice.dim() == 2 && choice.size(0) == T && choice.size(1) >= 1 && neurons % choice.size(1) == 0;
  check(fits, op, "choice must be [T = ", T, ", E] where E divides the ", neurons, " columns of up, got ", ShapeOf{choice});
  const DType dtype = dtype_of(op, "up", up);
  const View of_gate = gate ? keep.add_like("gate", *gate, up, "up") : View{};
  const int64_t E = choice.size(1);
  const std::optional<ScalarType> type = scalar_type_of(choice);
  const bool scores = type == ScalarType::Float;
  check(scores || type == ScalarType::Bool, op, "choice must be a bool mask or float32 scores, got ", DtypeOf{choice});
  Choice chosen;
  if (scores)
    chosen = {nullptr, static_cast<const float*>(keep.add("choice", choice).data), check_tau(op, tau)};
  else
    chosen.mask = keep.add_mask("choice", choice);
  return {T, E, neurons / E, dtype, nullptr, of_gate.data, chosen, activation_of(op, act)};
}

// mask bool [T, E]
inline const bool* check_mask(Arguments& keep, const Tensor& mask, const ExpertsShape& shape) {
  check_shape(keep.op(), "mask", mask, {shape.T, shape.E}, "[T, E]");
  return keep.add_mask("mask", mask);
}

// takes_packed: its kernels do.
inline Experts check_arguments(Arguments& keep, const Tensor& x, const Tensor& w_up, const Tensor& w_down,
                               const MaybeTensor& b_up, const MaybeTensor& w_gate, const MaybeTensor& b_gate,
                               const MaybeTensor& b_out, const std::string& act, bool takes_packed = false) {
  Experts p = check_experts(keep, x, w_up, w_down, b_up, w_gate, b_gate, b_out, act);
  p.packed = takes_packed && is_packed(w_up) && (!w_gate || is_packed(*w_gate));
  p.w_up = keep.add_like("w_up", w_up, x, "x", p.packed);
  p.w_down = keep.add_like("w_down", w_down, x);
  p.w_gate = keep.add_like("w_gate", w_gate, x, p.packed);
  return p;
}

// The same of int8 weights and their scales.
inline Experts check_int8_arguments(Arguments& keep, const Tensor& x, const Tensor& w_up, const Tensor& w_down,
                                    const Tensor& scale_up, const Tensor& scale_down, const MaybeTensor& b_up,
                                    const MaybeTensor& w_gate, const MaybeTensor& scale_gate, const MaybeTensor& b_gate,
                                    const MaybeTensor& b_out, const MaybeTensor& scale_out, const std::string& act) {
  const char* op = keep.op();
  Experts p = check_experts(keep, x, w_up, w_down, b_up, w_gate, b_gate, b_out, act);
  check(w_gate.has_value() == scale_gate.has_value(), op, "w_gate and scale_gate need each other");
  constexpr int64_t kMost = 1 << 17;  // products that fit a sum of 32 bits, however they are rounded
  check(p.shape.s <= kMost && p.shape.d <= kMost, op, "w_up of int8 must be [E, s, d] with s and d up to ", kMost,
        ", got s = ", p.shape.s, ", d = ", p.shape.d);
  p.w_up = keep.add_int8("w_up", w_up);
  p.w_down = keep.add_int8("w_down", w_down);
  p.scale_up = keep.add_scale("scale_up", scale_up, p.shape);
  p.scale_down = keep.add_scale("scale_down", scale_down, p.shape);
  if (w_gate) p.w_gate = keep.add_int8("w_gate", *w_gate);
  if (scale_gate) p.scale_gate = keep.add_scale("scale_gate", *scale_gate, p.shape);
  if (scale_out) {
    check_shape(op, "scale_out", *scale_out, {p.shape.d_out}, "[d_out]");
    p.scale_out = keep.add("scale_out", *scale_out);
  }
  return p;
}

}  // namespace sadmoe
