// The words of hopper.cuh mean on the device what the emulator takes them for, and the layer has the same bits by its kernels
// of sm_90a and by the others. Where only bits are others, by rounding, the kernels are of use all the same.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
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

constexpr float kRounding = 1.0f / 64;  // of the largest number of a layer: more is no rounding of 16 bits

enum Found { kSame, kOtherBits, kWrong };

// Whether a case compares wgmma with mma.sync bit for bit, which need not add alike.
bool compares_bits(const char* name) {
  return !std::strncmp(name, "product_bits", 12) || !std::strncmp(name, "product_of_registers", 20);
}

template <class Check>
Found say(const char* name, Check check) {
  std::printf("%-24s ", name);
  const Found found = check();
  std::printf("%s\n", found == kSame ? "ok" : found == kOtherBits ? "OTHER BITS" : "WRONG NUMBERS");
  return found;
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

// How far apart two results are at most, of the largest number of the second; NaN where one of them has some.
float distance(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, sadmoe::DType dtype) {
  const auto value = [&](uint16_t bits) {
    if (dtype == sadmoe::DType::f16) return __half2float(__ushort_as_half(bits));
    return __bfloat162float(__ushort_as_bfloat16(bits));
  };
  float most = 0, largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float other = std::fabs(value(a[i]) - value(b[i]));
    if (std::isnan(other)) return other;
    most = std::max(most, other), largest = std::max(largest, std::fabs(value(b[i])));
  }
  return most / largest;
}

Found same_bits(sadmoe::DType dtype, bool gated, int64_t s) {
  Found found = kSame;
  Layer layer({1000, 776, 520, 12, s}, dtype, gated, 1);
  for (const float share : {0.3f, 0.95f}) {
    layer.mask(share);
    layer.options.hopper = false, layer.options.up_all = layer.options.crowd = 2;
    const std::vector<uint16_t> plain = layer.result();
    layer.options.hopper = true;
    for (const double all : {0.0, 2.0})
      for (const double crowd : {0.0, 2.0}) {
        layer.options.up_all = all, layer.options.crowd = crowd;
        const std::vector<uint16_t> result = layer.result();
        if (result == plain) continue;
        const float apart = distance(result, plain, dtype);
        std::printf("(share %.2f, all %g, crowd %g: %.2g apart) ", share, all, crowd, apart);
        found = std::max(found, apart < kRounding ? kOtherBits : kWrong);
      }
  }
  return found;
}

}  // namespace

int check_hopper() {
  int major = 0;
  Found worst = kSame;
  must(capability(major), "capability");
  if (major != 9) {
    std::printf("no device of capability 9.0: the words of sm_90a are left out\n");
    return 0;
  }
  for (const char* name : kRight)
    for (const HopperCase& c : kHopperCases)
      if (!std::strcmp(c.name, name)) {
        const Found otherwise = compares_bits(name) ? kOtherBits : kWrong;
        worst = std::max(worst, say(name, [&] { return passes(c) ? kSame : otherwise; }));
      }
  for (const int64_t s : {8, 24, 64, 88, 128, 172})
    for (const bool gated : {false, true})
      for (const sadmoe::DType dtype : {sadmoe::DType::bf16, sadmoe::DType::f16}) {
        char name[40];
        std::snprintf(name, sizeof name, "layer, s %d%s, %s", static_cast<int>(s), gated ? ", GLU" : "",
                      dtype == sadmoe::DType::bf16 ? "bf16" : "f16");
        worst = std::max(worst, say(name, [&] { return same_bits(dtype, gated, s); }));
      }
  return worst == kWrong ? 4 : worst == kOtherBits ? 3 : 0;
}

}  // namespace bench
