// The ops on CUDA: tensors in, pointers to the launches, scratch and output from torch. No CUDA header. Nothing waits for
// the device. Compiled a second time for the emulator, as sadmoe_emulated on CPU tensors.
#include <torch/csrc/stable/library.h>

#include "bind/device_glue.h"
#include "cuda/launch.h"

namespace sadmoe {
namespace {

cuda::Options options;

[[maybe_unused]] void allow_tf32(bool allow) { options.tf32 = allow; }
[[maybe_unused]] void use_hopper(bool use) { options.hopper = use; }
[[maybe_unused]] void use_up_all(double share) { options.up_all = share; }
[[maybe_unused]] void use_crowd(double share) { options.crowd = share; }
[[maybe_unused]] void use_down_tiles(int64_t tiles) {
  check(tiles == 0 || tiles == 1 || tiles == 2 || tiles == 4, "_use_down_tiles",
        "tiles must be 0 (by the shape), 1, 2 or 4, got ", tiles);
  options.down_tiles = tiles;
}

void check_launch(int code, const char* op) {
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice
  const char* why = code == kNoKernelImage
                        ? "; kernels are for 8.0 and later, of those that sadmoe.build_info() names; where they "
                          "were left out (SADMOE_CUDA=off pip install .) plain torch runs"
                        : "";
  if (code != 0) fail(op, "CUDA error ", code, ": ", cuda::error_string(code), why);
}

template <class T>
T* written(OnDevice& device, const char* name, const Tensor& t) {
  device.writes(name, t);
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor run_router(OnDevice& device, const char* op, const Tensor& x, View rows, const Router& router, const RouterShape& shape) {
  const cuda::Options now = options;                                                        // which another thread may set
  check(shape.T <= INT32_MAX, op, "x must have under 2^31 tokens on CUDA, got ", shape.T);  // the kernels number them in 32 bits
  const Tensor hidden = empty_beside(x, {shape.T, shape.r}, aoti_torch_dtype_float32);
  const Tensor scores = empty_beside(x, {shape.T, shape.E}, aoti_torch_dtype_float32);
  check_launch(cuda::router_scores(rows, router, shape, now, written<float>(device, "hidden", hidden),
                                   written<float>(device, "scores", scores), device.stream()),
               op);
  return scores;
}

Tensor run_experts(OnDevice& device, const char* op, const Tensor& x, Experts& p, const Choice& choice) {
  const cuda::Options now = options;
  const cuda::Workspace size = cuda::workspace(p.shape, p.x.dtype, now);
  const Tensor words = empty_beside(x, {size.words}, aoti_torch_dtype_int32);
  const Tensor starts = empty_beside(x, {size.starts}, aoti_torch_dtype_int32);
  const Tensor rows = empty_beside(x, {size.rows}, aoti_torch_dtype_int32);
  const Tensor h = empty_beside(x, {size.h});
  const Tensor y = empty_beside(x, {p.shape.T, p.shape.d_out});
  p.y = written<void>(device, "y", y);
  const cuda::Scratch scratch{written<int32_t>(device, "words", words), written<int32_t>(device, "starts", starts),
                              written<int32_t>(device, "rows", rows), written<void>(device, "h", h)};
  check_launch(cuda::sparse_experts(p, choice, now, size, scratch, device.stream()), op);
  return y;
}

Tensor router_scores(const Tensor& x, const Tensor& v1, const Tensor& v2) {
  const char* op = "router_scores";
  const RouterShape shape = check_router(op, x, v1, v2);
  Arguments keep(op);
  const View rows = keep.add("x", x);
  const Router router = router_of(keep, v1, v2, 0);
  OnDevice device(keep, x);
  return run_router(device, op, x, rows, router, shape);
}

Tensor dynamic_k_select(const Tensor& scores, double tau) {
  const char* op = "dynamic_k_select";
  check_scores(op, scores);
  const float threshold = check_tau(op, tau);
  Arguments keep(op);
  const float* rows = static_cast<const float*>(keep.add("scores", scores).data);
  OnDevice device(keep, scores);
  const int64_t T = scores.size(0), E = scores.size(1);
  const Tensor mask = empty_beside(scores, {T, E}, aoti_torch_dtype_bool);
  check_launch(cuda::select(rows, T, E, threshold, written<bool>(device, "mask", mask), device.stream()), op);
  return mask;
}

void masked_activation(Tensor up, const MaybeTensor& gate, const Tensor& choice, double tau, StringHandle act_handle) {
  const std::string act = taken(act_handle);
  const char* op = "_masked_activation_";
  Arguments keep(op);
  MaskedActivation p = check_masked_activation(keep, up, gate, choice, tau, act);
  OnDevice device(keep, up, "up");
  device.updates("up", up);
  p.up = up.mutable_data_ptr();
  check_launch(cuda::masked_activation(p, device.stream()), op);
}

// The kernels count 16 bytes of it in 32 bits, and take a strip of 64 outputs by a block of a grid's second axis.
void check_size(const char* op, const Tensor& w_down) {
  constexpr int64_t kGiB = 1 << 30;
  const int64_t bytes = w_down.numel() * static_cast<int64_t>(w_down.element_size());
  check(bytes < 64 * kGiB, op, "w_down must be under 64 GiB on CUDA, got ", (bytes + kGiB - 1) / kGiB, " GiB");
  constexpr int64_t kMostOutputs = 65535 * 64;
  const int64_t d_out = w_down.dim() == 3 ? w_down.size(2) : 0;
  check(d_out <= kMostOutputs, op, "w_down must have at most ", kMostOutputs, " outputs on CUDA, got ", d_out);
}

Tensor sparse_experts(const Tensor& x, const Tensor& mask, const Tensor& w_up, const Tensor& w_down, const MaybeTensor& b_up,
                      const MaybeTensor& w_gate, const MaybeTensor& b_gate, const MaybeTensor& b_out, StringHandle act_handle) {
  const std::string act = taken(act_handle);
  const char* op = "sparse_experts";
  check_size(op, w_down);
  Arguments keep(op);
  Experts p = check_arguments(keep, x, w_up, w_down, b_up, w_gate, b_gate, b_out, act);
  const Choice choice{check_mask(keep, mask, p.shape)};
  OnDevice device(keep, x);
  return run_experts(device, op, x, p, choice);
}

Tensor dynamic_k_moe(const Tensor& x, const Tensor& v1, const Tensor& v2, const Tensor& w_up, const Tensor& w_down,
                     const MaybeTensor& b_up, const MaybeTensor& w_gate, const MaybeTensor& b_gate, const MaybeTensor& b_out,
                     double tau, StringHandle act_handle) {
  const std::string act = taken(act_handle);
  const char* op = "dynamic_k_moe";
  check_size(op, w_down);
  Arguments keep(op);
  Experts p = check_arguments(keep, x, w_up, w_down, b_up, w_gate, b_gate, b_out, act);
  const RouterShape shape = check_router(op, x, v1, v2);
  check_router_experts(op, v2, p.shape.E);
  const Router router = router_of(keep, v1, v2, check_tau(op, tau));
  OnDevice device(keep, x);
  const Tensor scores = run_router(device, op, x, p.x, router, shape);
  return run_experts(device, op, x, p, {nullptr, static_cast<const float*>(scores.const_data_ptr()), router.tau});
}

}  // namespace
}  // namespace sadmoe

STABLE_TORCH_LIBRARY_IMPL(SADMOE_NAMESPACE, SADMOE_KEY, m) {
  m.impl("router_scores", TORCH_BOX(&sadmoe::router_scores));
  m.impl("dynamic_k_select", TORCH_BOX(&sadmoe::dynamic_k_select));
  m.impl("_masked_activation_", TORCH_BOX(&sadmoe::masked_activation));
  m.impl("sparse_experts", TORCH_BOX(&sadmoe::sparse_experts));
  m.impl("dynamic_k_moe", TORCH_BOX(&sadmoe::dynamic_k_moe));
}

#if defined(SADMOE_EMULATOR)
// For tests: chunks without large shapes, the kernels of many tokens on few, those of sm_80 on what is a Hopper, all neurons
// and crowds from any share on, and blocks of any size.
extern "C" __attribute__((visibility("default"))) void sadmoe_set_options(int64_t hidden_bytes, int64_t decode_tokens, bool tf32,
                                                                          bool hopper, double up_all, double crowd,
                                                                          int64_t down_tiles) {
  sadmoe::options = {hidden_bytes, decode_tokens, tf32, hopper, up_all, crowd, down_tiles};
}
// What the kernels would pick on a device that is not here, for experts of so many bytes a weight.
extern "C" __attribute__((visibility("default"))) int sadmoe_down_tiles(int64_t T, int64_t d_out, int bytes_each,
                                                                        int multiprocessors, int shared) {
  const sadmoe::DType dtype = bytes_each == 2 ? sadmoe::DType::bf16 : sadmoe::DType::f32;
  return sadmoe::cuda::down_tiles(T, d_out, dtype, sadmoe::options, {multiprocessors, shared});
}
extern "C" __attribute__((visibility("default"))) double sadmoe_up_all_share(int64_t T, int64_t E, int64_t s, int bytes_each,
                                                                             bool gated, bool warpgroups, int multiprocessors) {
  const sadmoe::DType dtype = bytes_each == 2 ? sadmoe::DType::bf16 : sadmoe::DType::f32;
  return sadmoe::cuda::up_all_share({T, 0, 0, E, s}, dtype, gated, warpgroups, {}, {multiprocessors, 0});
}
extern "C" __attribute__((visibility("default"))) double sadmoe_crowd_share(int64_t T, int64_t d_out, int64_t s, int bytes_each,
                                                                            bool warpgroups, int multiprocessors) {
  const sadmoe::DType dtype = bytes_each == 2 ? sadmoe::DType::bf16 : sadmoe::DType::f32;
  return sadmoe::cuda::crowd_share({T, 0, d_out, 0, s}, dtype, warpgroups, {}, {multiprocessors, 0});
}
#else
STABLE_TORCH_LIBRARY_IMPL(sadmoe, CompositeExplicitAutograd, m) {
  m.impl("_allow_tf32", TORCH_BOX(&sadmoe::allow_tf32));
  m.impl("_use_hopper", TORCH_BOX(&sadmoe::use_hopper));
  m.impl("_use_up_all", TORCH_BOX(&sadmoe::use_up_all));
  m.impl("_use_crowd", TORCH_BOX(&sadmoe::use_crowd));
  m.impl("_use_down_tiles", TORCH_BOX(&sadmoe::use_down_tiles));
}
#endif
