// The words of device.cuh mean on the device what the emulator takes them for.
#include "conformance.h"
#include "device_timer.h"
#include "emulator/planted.cuh"
#include "layer.h"

namespace bench {
namespace {

const char* const kRight[] = {"barrier_between_warps",
                              "warp_operations",
                              "neighbours",
                              "blocks_apart",
                              "copies",
                              "copies_of_nothing",
                              "product",
                              "product_transposed",
                              "turned",
                              "product_tf32",
                              "bits",
                              "warp_in_step",
                              "early"};

bool passes(const sadmoe::cuda::Case& c) {
  using namespace sadmoe::cuda;
  const std::vector<float> ones(kCells + 1, 1.0f);
  const Buffer in(sizeof(float) * (kCells + 1)), out(sizeof(float) * kCells);
  must(cudaMemcpy(in.as<float>(), ones.data(), in.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  must(launch(c.kernel, {c.blocks, 1, c.early}, c.threads, sizeof(Product), nullptr, Buffers{in.as<float>(), out.as<float>()}),
       c.name);
  std::vector<float> said(kCells);
  must(cudaMemcpy(said.data(), out.as<float>(), out.bytes(), cudaMemcpyDeviceToHost), c.name);
  return std::all_of(said.begin(), said.begin() + c.blocks * c.threads, [](float v) { return v == 1; });
}

// Tokens that go through all experts together have the bits of others, and so have pairs where every neuron is computed.
bool same_bits_in_a_crowd(sadmoe::DType dtype, int64_t s, int64_t d_out) {
  Layer layer({1000, 264, d_out, 12, s}, dtype, false, 1);
  layer.mask(0.6f);
  layer.options.hopper = false;
  layer.options.up_all = layer.options.crowd = 2;
  const std::vector<uint16_t> alone = layer.result();
  layer.options.crowd = 0;
  const bool on_the_way_out = layer.result() == alone;
  layer.options.up_all = 0;
  return on_the_way_out && layer.result() == alone;
}

}  // namespace

int check_conformance() {
  int failed = check_hopper();
  for (const int64_t s : {8, 24, 172})
    for (const int64_t d_out : {515, 520})
      for (const sadmoe::DType dtype : {sadmoe::DType::bf16, sadmoe::DType::f16, sadmoe::DType::f32}) {
        const bool right = same_bits_in_a_crowd(dtype, s, d_out);
        const char* type = dtype == sadmoe::DType::bf16 ? "bf16" : dtype == sadmoe::DType::f16 ? "f16" : "f32";
        std::printf("crowd, s %d, d_out %d, %s: %s\n", static_cast<int>(s), static_cast<int>(d_out), type,
                    right ? "ok" : "OTHER BITS");
        failed += !right;
      }
  for (const char* name : kRight)
    for (const sadmoe::cuda::Case& c : sadmoe::cuda::kCases) {
      if (std::strcmp(c.name, name)) continue;
      const bool right = passes(c);
      std::printf("%-24s %s\n", name, right ? "ok" : "WRONG NUMBERS");
      failed += !right;
    }
  return failed;
}

}  // namespace bench
