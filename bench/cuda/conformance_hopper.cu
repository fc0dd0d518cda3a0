// The words of hopper.cuh mean on the device what the emulator takes them for, and the layer has the same bits by its kernels
// of sm_90a and by the others.
#include <cuda_bf16.h>

#include <cstring>

#include "conformance.h"
#include "emulator/planted_hopper.cuh"
#include "layer.h"

namespace bench {
namespace {

using namespace sadmoe::cuda;

const char* const kRight[] = {"hand_over",
                              "tile",
                              "product_64",
                              "registers",
                              "product_bits_bf16_32",
                              "product_bits_bf16_64",
                              "product_bits_bf16_96",
                              "product_bits_bf16_128",
                              "product_bits_f16_32",
                              "product_bits_f16_128",
                              "product_of_registers_bf16",
                              "product_of_registers_f16"};

template <class Check>
int say(const char* name, Check check) {
  std::printf("%-24s ", name);
  const bool right = check();
  std::printf("%s\n", right ? "ok" : "WRONG NUMBERS");
  return !right;
}

bool passes(const HopperCase& c) {
  std::vector<bf16> numbers;
  for (int i = 0; i < kMapMatrices * kMapRows * kMapColumns; ++i) {
    const int row = i / kMapColumns;
    numbers.push_back(__float2bfloat16_rn(map_number(row / kMapRows, row % kMapRows, i % kMapColumns)));
  }
  const Buffer in(numbers.size() * sizeof(bf16)), out(sizeof(float) * kHopperThreads);
  must(cudaMemcpy(in.as<bf16>(), numbers.data(), in.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  HopperBuffers p{{}, out.as<float>()};
  must(make_tile_map(p.map, {in.as<void>(), sadmoe::DType::bf16}, kMapMatrices, kMapRows, kMapColumns, kBoxRows),
       "make_tile_map");
  must(launch(c.kernel, {1}, c.threads, sizeof(BitsMemory), nullptr, p), c.name);
  std::vector<float> said(kHopperThreads);
  must(cudaMemcpy(said.data(), out.as<float>(), out.bytes(), cudaMemcpyDeviceToHost), c.name);
  return std::all_of(said.begin(), said.begin() + c.threads, [](float v) { return v == 1; });
}

bool same_bits(sadmoe::DType dtype, bool gated, int64_t s) {
  Layer layer({1000, 776, 520, 12, s}, dtype, gated, 1);
  for (const float share : {0.3f, 0.95f}) {
    layer.mask(share);
    layer.options.hopper = false, layer.options.up_all = layer.options.crowd = 2;
    const std::vector<uint16_t> plain = layer.result();
    layer.options.hopper = true;
    for (const double all : {0.0, 2.0})
      for (const double crowd : {0.0, 2.0}) {
        layer.options.up_all = all, layer.options.crowd = crowd;
        if (layer.result() != plain) return false;
      }
  }
  return true;
}

}  // namespace

int check_hopper() {
  int major = 0, failed = 0;
  must(capability(major), "capability");
  if (major != 9) {
    std::printf("no device of capability 9.0: the words of sm_90a are left out\n");
    return 0;
  }
  for (const char* name : kRight)
    for (const HopperCase& c : kHopperCases)
      if (!std::strcmp(c.name, name)) failed += say(name, [&] { return passes(c); });
  for (const int64_t s : {8, 24, 64, 88, 128, 172})
    for (const bool gated : {false, true})
      for (const sadmoe::DType dtype : {sadmoe::DType::bf16, sadmoe::DType::f16}) {
        char name[40];
        std::snprintf(name, sizeof name, "layer, s %d%s, %s", static_cast<int>(s), gated ? ", GLU" : "",
                      dtype == sadmoe::DType::bf16 ? "bf16" : "f16");
        failed += say(name, [&] { return same_bits(dtype, gated, s); });
      }
  return failed;
}

}  // namespace bench
