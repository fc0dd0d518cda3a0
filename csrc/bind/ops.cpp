// The one list of ops. Implementations are in ops_cpu.cpp and ops_cuda.cpp; formulas in sadmoe/reference.py, gradients in
// sadmoe/ops/gradients.py, all else about an op in sadmoe/ops.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_info.h"

STABLE_TORCH_LIBRARY(sadmoe, m) {
  m.def("router_scores(Tensor x, Tensor v1, Tensor v2) -> Tensor");
  m.def("dynamic_k_select(Tensor scores, float tau) -> Tensor");
  m.def(
      "sparse_experts(Tensor x, Tensor mask, Tensor w_up, Tensor w_down, Tensor? b_up=None, Tensor? w_gate=None, "
      "Tensor? b_gate=None, Tensor? b_out=None, str act='relu') -> Tensor");
  m.def(
      "dynamic_k_moe(Tensor x, Tensor v1, Tensor v2, Tensor w_up, Tensor w_down, Tensor? b_up=None, Tensor? w_gate=None, "
      "Tensor? b_gate=None, Tensor? b_out=None, float tau=0., str act='relu') -> Tensor");
  m.def(
      "sparse_experts_int8(Tensor x, Tensor mask, Tensor w_up, Tensor w_down, Tensor scale_up, Tensor scale_down, "
      "Tensor? b_up=None, Tensor? w_gate=None, Tensor? scale_gate=None, Tensor? b_gate=None, Tensor? b_out=None, "
      "Tensor? scale_out=None, str act='relu') -> Tensor");
  m.def(
      "dynamic_k_moe_int8(Tensor x, Tensor v1, Tensor v2, Tensor w_up, Tensor w_down, Tensor scale_up, Tensor scale_down, "
      "Tensor? b_up=None, Tensor? w_gate=None, Tensor? scale_gate=None, Tensor? b_gate=None, Tensor? b_out=None, "
      "Tensor? scale_out=None, float tau=0., str act='relu') -> Tensor");
  // Of the layer's dense path. choice: a mask, or scores, of which those run that reach tau.
  m.def("_masked_activation_(Tensor(a!) up, Tensor? gate, Tensor choice, float tau, str act) -> ()");
  m.def("_build_info() -> str");
  m.def("_cpu_isas() -> str");
  m.def("_cpu_isa() -> str");
  m.def("_use_cpu_isa(str isa) -> ()");
  m.def("_allow_tf32(bool allow) -> ()");
  // For tests and benches.
  m.def("_use_hopper(bool use) -> ()");
  m.def("_use_up_all(float share) -> ()");
  m.def("_use_crowd(float share) -> ()");
  m.def("_use_down_tiles(int tiles) -> ()");
}

namespace {
std::string build_info() { return SADMOE_BUILD_INFO; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sadmoe, CompositeExplicitAutograd, m) { m.impl("_build_info", TORCH_BOX(&build_info)); }
