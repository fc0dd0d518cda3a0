// What a launch needs of torch beside pointers: the device, its current stream, and what the kernels may touch. Two
// bodies: the CUDA library's, and that of the emulator in tests/emulator, whose ops run on CPU tensors.
#pragma once
#include "bind/check.h"
#include "cuda/launch.h"

#if defined(SADMOE_EMULATOR)
#include <deque>

#include "emulator/emulator.h"

#define SADMOE_NAMESPACE sadmoe_emulated
#define SADMOE_KEY CPU

namespace sadmoe {

class OnDevice {
 public:
  OnDevice(const Arguments& arguments, const Tensor&, const char* = "x") {
    for (const Argument& a : arguments.all()) allow(a.name, a.tensor, emulator::Use::read);
  }
  void* stream() const { return nullptr; }
  void writes(const char* name, const Tensor& t) { allow(name, t, emulator::Use::write); }
  void updates(const char* name, const Tensor& t) { allow(name, t, emulator::Use::update); }

 private:
  void allow(const char* name, const Tensor& t, emulator::Use use) {
    kept_.push_back(t);  // no other tensor takes its place
    regions_.emplace_back(name, t.const_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size(), t.element_size(), use);
  }
  std::vector<Tensor> kept_;
  std::deque<emulator::Region> regions_;
};

}  // namespace sadmoe

#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define SADMOE_NAMESPACE sadmoe
#define SADMOE_KEY CUDA

extern "C" {
// Of libtorch_cuda. Weak, so that this library also loads beside a torch without CUDA.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
}

namespace sadmoe {

// All arguments are on x's device, which is current while this lives.
class OnDevice {
 public:
  OnDevice(const Arguments& arguments, const Tensor& x, const char* name = "x") : guard_(checked_index(arguments, x, name)) {
    if (aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_) != AOTI_TORCH_SUCCESS)
      fail(arguments.op(), "the current stream of ", name_of(x), " cannot be had");
    const int code = cuda::use_device(x.get_device_index());
    if (code != 0) fail(arguments.op(), name_of(x), " cannot be used: ", cuda::error_string(code));
  }
  void* stream() const { return stream_; }
  void writes(const char*, const Tensor&) {}
  void updates(const char*, const Tensor&) {}

 private:
  static std::string name_of(const Tensor& t) { return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "the CPU"; }

  static int32_t checked_index(const Arguments& arguments, const Tensor& x, const char* name) {
    for (const auto& [of, tensor] : arguments.all())
      if (tensor.is_cuda() != x.is_cuda() || tensor.get_device_index() != x.get_device_index())
        fail(arguments.op(), "all tensors must be on one device: ", of, " is on ", name_of(tensor), ", ", name, " on ",
             name_of(x));
    check(aoti_torch_get_current_cuda_stream != nullptr, arguments.op(), "this torch was built without CUDA");
    return x.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace sadmoe
#endif
