// The way through tiles (cpu/tiled.h) on processors without a unit for them: plain loops multiply, AVX512-BF16 lays them out.
#include "tiles.h"

#include <cstring>

#include "cpu/tiles_avx512.h"

namespace sadmoe::test {
namespace {

using cpu::bf16;
using cpu::kTile;

float wide(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

struct Loops {
  struct Registers {
    Registers() {}
  };

  template <int Rows, int Columns>
  static void product(const bf16* left, const bf16* right, int64_t n, int64_t k, float* out, int64_t ld) {
    const int64_t depth = (k + 31) / 32;
    for (int64_t i = 0; i < n && i < 16 * Rows; ++i)
      for (int64_t j = 0; j < 16 * Columns; ++j) {
        float sum = 0;
        for (int64_t q = 0; q < depth * 32; ++q) {
          const bf16 a = left[(i / 16 * depth + q / 32) * kTile + i % 16 * 32 + q % 32];
          const bf16 b = right[(j / 16 * depth + q / 32) * kTile + q % 32 / 2 * 32 + j % 16 * 2 + q % 2];
          sum += wide(a) * wide(b);
        }
        out[i * ld + j] = sum;
      }
  }
};

}  // namespace

const cpu::Kernels& kernels_of_tiles() {
  static const cpu::Kernels kTable = cpu::with_tiles(cpu::kernels_avx512bf16(), "tiles", &cpu::kTilesOf<Loops>);
  return kTable;
}

}  // namespace sadmoe::test
