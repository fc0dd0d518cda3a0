// The ops on the CPU: tensors in, pointers to the kernels, threads of torch's own pool.
#include <torch/csrc/stable/library.h>

#include <exception>
#include <mutex>

#include "bind/check.h"
#include "cpu/isa.h"
#include "cpu/moe.h"

namespace sadmoe {
namespace {

// The first error of any thread, memory's for one, is the caller's: of one that left a thread torch would only say that it came.
void on_torch_threads(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  std::exception_ptr error;
  std::mutex error_mutex;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

cpu::Threads torch_threads() {
  const int count = static_cast<int>(torch::stable::get_num_threads());
  return count == 1 ? cpu::one_thread() : cpu::Threads{count, on_torch_threads};
}

Tensor router_scores(const Tensor& x, const Tensor& v1, const Tensor& v2) {
  const char* op = "router_scores";
  const RouterShape shape = check_router(op, x, v1, v2);
  Arguments keep(op);
  const View rows = keep.add("x", x);
  const Router router = router_of(keep, v1, v2, 0);
  Tensor scores = empty_beside(x, {shape.T, shape.E}, aoti_torch_dtype_float32);
  cpu::router_scores(rows, router, shape, static_cast<float*>(scores.mutable_data_ptr()), torch_threads());
  return scores;
}

Tensor dynamic_k_select(const Tensor& scores, double tau) {
  const char* op = "dynamic_k_select";
  check_scores(op, scores);
  const float threshold = check_tau(op, tau);
  const int64_t T = scores.size(0), E = scores.size(1);
  Arguments keep(op);
  const float* rows = static_cast<const float*>(keep.add("scores", scores).data);
  Tensor mask = empty_beside(scores, {T, E}, aoti_torch_dtype_bool);
  bool* out = static_cast<bool*>(mask.mutable_data_ptr());
  torch_threads().parallel_for(T, 4096 / E + 1, [&](int64_t t0, int64_t t1) {
    const cpu::Kernels& k = cpu::kernels();
    for (int64_t t = t0; t < t1; ++t) k.select({E, rows + t * E, threshold, out + t * E});
  });
  return mask;
}

void masked_activation(Tensor up, const MaybeTensor& gate, const Tensor& choice, double tau, StringHandle act_handle) {
  const std::string act = taken(act_handle);
  Arguments keep("_masked_activation_");
  MaskedActivation p = check_masked_activation(keep, up, gate, choice, tau, act);
  p.up = up.mutable_data_ptr();
  cpu::masked_activation(p, torch_threads());
}

constexpr bool kTakesPacked = true;

// y for a mask from outside.
Tensor run(Arguments& keep, Experts p, const Tensor& x, const Tensor& mask) {
  const bool* chosen = check_mask(keep, mask, p.shape);
  Tensor y = empty_beside(x, {p.shape.T, p.shape.d_out});
  p.y = y.mutable_data_ptr();
  cpu::sparse_experts(p, chosen, torch_threads());
  return y;
}

// y for the router's own mask.
Tensor run(Arguments& keep, Experts p, const Tensor& x, const Tensor& v1, const Tensor& v2, double tau) {
  check_router(keep.op(), x, v1, v2);
  check_router_experts(keep.op(), v2, p.shape.E);
  const Router router = router_of(keep, v1, v2, check_tau(keep.op(), tau));
  Tensor y = empty_beside(x, {p.shape.T, p.shape.d_out});
  p.y = y.mutable_data_ptr();
  cpu::dynamic_k_moe(p, router, torch_threads());
  return y;
}

Tensor sparse_experts(const Tensor& x, const Tensor& mask, const Tensor& w_up, const Tensor& w_down, const MaybeTensor& b_up,
                      const MaybeTensor& w_gate, const MaybeTensor& b_gate, const MaybeTensor& b_out, StringHandle act_handle) {
  const std::string act = taken(act_handle);
  Arguments keep("sparse_experts");
  return run(keep, check_arguments(keep, x, w_up, w_down, b_up, w_gate, b_gate, b_out, act, kTakesPacked), x, mask);
}

Tensor dynamic_k_moe(const Tensor& x, const Tensor& v1, const Tensor& v2, const Tensor& w_up, const Tensor& w_down,
                     const MaybeTensor& b_up, const MaybeTensor& w_gate, const MaybeTensor& b_gate, const MaybeTensor& b_out,
                     double tau, StringHandle act_handle) {
  const std::string act = taken(act_handle);
  Arguments keep("dynamic_k_moe");
  return run(keep, check_arguments(keep, x, w_up, w_down, b_up, w_gate, b_gate, b_out, act, kTakesPacked), x, v1, v2, tau);
}

Tensor sparse_experts_int8(const Tensor& x, const Tensor& mask, const Tensor& w_up, const Tensor& w_down, const Tensor& scale_up,
                           const Tensor& scale_down, const MaybeTensor& b_up, const MaybeTensor& w_gate,
                           const MaybeTensor& scale_gate, const MaybeTensor& b_gate, const MaybeTensor& b_out,
                           const MaybeTensor& scale_out, StringHandle act_handle) {
  const std::string act = taken(act_handle);
  Arguments keep("sparse_experts_int8");
  const Experts p =
      check_int8_arguments(keep, x, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out, act);
  return run(keep, p, x, mask);
}

Tensor dynamic_k_moe_int8(const Tensor& x, const Tensor& v1, const Tensor& v2, const Tensor& w_up, const Tensor& w_down,
                          const Tensor& scale_up, const Tensor& scale_down, const MaybeTensor& b_up, const MaybeTensor& w_gate,
                          const MaybeTensor& scale_gate, const MaybeTensor& b_gate, const MaybeTensor& b_out,
                          const MaybeTensor& scale_out, double tau, StringHandle act_handle) {
  const std::string act = taken(act_handle);
  Arguments keep("dynamic_k_moe_int8");
  const Experts p =
      check_int8_arguments(keep, x, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out, act);
  return run(keep, p, x, v1, v2, tau);
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

std::string cpu_isas() { return join(cpu::supported_isas()); }

std::string cpu_isa() { return cpu::kernels().isa; }

void use_cpu_isa(StringHandle handle) {
  const std::string isa = taken(handle);
  check(cpu::use_isa(isa), "_use_cpu_isa", "this processor does not run the '", isa, "' kernels; it runs auto, ", cpu_isas());
}

}  // namespace
}  // namespace sadmoe

STABLE_TORCH_LIBRARY_IMPL(sadmoe, CPU, m) {
  m.impl("router_scores", TORCH_BOX(&sadmoe::router_scores));
  m.impl("dynamic_k_select", TORCH_BOX(&sadmoe::dynamic_k_select));
  m.impl("_masked_activation_", TORCH_BOX(&sadmoe::masked_activation));
  m.impl("sparse_experts", TORCH_BOX(&sadmoe::sparse_experts));
  m.impl("dynamic_k_moe", TORCH_BOX(&sadmoe::dynamic_k_moe));
  m.impl("sparse_experts_int8", TORCH_BOX(&sadmoe::sparse_experts_int8));
  m.impl("dynamic_k_moe_int8", TORCH_BOX(&sadmoe::dynamic_k_moe_int8));
}

STABLE_TORCH_LIBRARY_IMPL(sadmoe, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isas", TORCH_BOX(&sadmoe::cpu_isas));
  m.impl("_cpu_isa", TORCH_BOX(&sadmoe::cpu_isa));
  m.impl("_use_cpu_isa", TORCH_BOX(&sadmoe::use_cpu_isa));
}
