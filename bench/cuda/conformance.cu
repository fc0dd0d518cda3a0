// The words of device.cuh mean on the device what the emulator takes them for.
#include <utility>

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
                              "product_f16",
                              "cut_off",
                              "turned",
                              "product_tf32",
                              "bits",
                              "numbers",
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

using Options = sadmoe::cuda::Options;

// Where every neuron is computed, or all tokens go through all experts together, pairs have the bits of others.
bool same_bits(sadmoe::DType dtype, int64_t s, int64_t d_out, bool gated, double Options::* share) {
  Layer layer({1000, 264, d_out, 12, s}, dtype, gated, 1);
  layer.mask(0.6f);
  layer.options.hopper = false;
  layer.options.up_all = layer.options.crowd = 2;
  const std::vector<uint16_t> alone = layer.result();
  layer.options.*share = 0;
  return layer.result() == alone;
}

int check_guards() {
  int failed = 0;
  for (const int64_t s : {8, 24, 168, 172})
    for (const int64_t d_out : {515, 520})
      for (const sadmoe::DType dtype : {sadmoe::DType::bf16, sadmoe::DType::f16, sadmoe::DType::f32})
        for (const auto& [name, share] : {std::pair{"all neurons", &Options::up_all}, std::pair{"crowd", &Options::crowd}}) {
          if (share == &Options::up_all && s % 8) continue;  // which is for whole eights
          const char* type = dtype == sadmoe::DType::bf16 ? "bf16" : dtype == sadmoe::DType::f16 ? "f16" : "f32";
          std::printf("%s, s %d%s, d_out %d, %s: ", name, static_cast<int>(s), s == 24 ? ", GLU" : "", static_cast<int>(d_out),
                      type);
          const bool right = same_bits(dtype, s, d_out, s == 24, share);
          std::printf("%s\n", right ? "ok" : "OTHER BITS");
          failed += !right;
        }
  return failed;
}

}  // namespace

int check_conformance() {
  int failed = 0;
  for (const char* name : kRight)
    for (const sadmoe::cuda::Case& c : sadmoe::cuda::kCases) {
      if (std::strcmp(c.name, name)) continue;
      std::printf("%-24s ", name);
      const bool right = passes(c);
      std::printf("%s\n", right ? "ok" : "WRONG NUMBERS");
      failed += !right;
    }
  return failed + check_guards();
}

}  // namespace bench
