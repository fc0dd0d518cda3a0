#include "emulator/planted.cuh"

#include <cstring>
#include <string>

#include "emulator/planted_hopper.cuh"

namespace sadmoe::cuda {
namespace {

struct {
  alignas(16) float in[kCells + 1];
  float gap[1024];
  float out[kCells];
} memory;
std::string said;

template <class Parameters>
const char* said_of(void (*kernel)(Parameters), Grid grid, int threads, size_t bytes, const Parameters& parameters,
                    const float* out) {
  said = launch(kernel, grid, threads, bytes, nullptr, parameters) ? emulator::last_error() : "";
  for (int64_t i = 0; said.empty() && i < grid.x * threads; ++i)
    if (out[i] != 1) said = "wrong numbers";
  return said.c_str();
}

const char* run(const Case& c) {
  auto& [in, gap, out] = memory;
  for (float& v : in) v = 1;
  const emulator::Region input("in", in, sizeof in, sizeof *in, emulator::Use::read),
      output("out", out, sizeof out, sizeof *out, emulator::Use::write);
  return said_of(c.kernel, {c.blocks, 1, c.early}, c.threads, sizeof(Product), Buffers{in, out}, out);
}

const char* run(const HopperCase& c) {
  alignas(16) static bf16 in[kMapMatrices][kMapRows][kMapColumns];
  static float out[kHopperThreads];
  for (int i = 0; i < kMapMatrices * kMapRows * kMapColumns; ++i) {
    const int row = i / kMapColumns;
    from_float(map_number(row / kMapRows, row % kMapRows, i % kMapColumns), in[0][0][i]);
  }
  HopperBuffers p{{}, out};
  if (make_tile_map(p.map, {in, DType::bf16}, kMapMatrices, kMapRows, kMapColumns, kBoxRows)) return "no map of tiles";
  const emulator::Region input("in", in, sizeof in, sizeof(bf16), emulator::Use::read),
      output("out", out, sizeof out, sizeof *out, emulator::Use::write);
  return said_of(c.kernel, {1}, c.threads, sizeof(BitsMemory), p, out);
}

}  // namespace
}  // namespace sadmoe::cuda

// What the emulator says of a case: "" when it passes. A kernel of the product cases writes 1 where the numbers agree.
extern "C" __attribute__((visibility("default"))) const char* sadmoe_run_planted(const char* name) {
  using namespace sadmoe::cuda;
  for (const Case& c : kCases)
    if (!std::strcmp(c.name, name)) return run(c);
  for (const HopperCase& c : kHopperCases)
    if (!std::strcmp(c.name, name)) return run(c);
  return "no such case";
}

extern "C" __attribute__((visibility("default"))) void sadmoe_schedule(int order, unsigned seed, int late_copies) {
  sadmoe::emulator::schedule(static_cast<sadmoe::emulator::Order>(order), seed, late_copies != 0);
}

extern "C" __attribute__((visibility("default"))) int64_t sadmoe_products() { return sadmoe::emulator::products(); }
extern "C" __attribute__((visibility("default"))) int64_t sadmoe_launches() { return sadmoe::emulator::launches(); }
extern "C" __attribute__((visibility("default"))) int64_t sadmoe_warp_products() { return sadmoe::emulator::warp_products(); }
