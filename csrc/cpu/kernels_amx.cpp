// AMX-BF16, over AVX512-BF16: Intel since Sapphire Rapids. Only bf16 in experts that are not too small differs from that.
#include "cpu/tiles_avx512.h"

namespace sadmoe::cpu {
namespace {

struct TileUnit {
  // The tile registers of this thread, all 16 rows x 64 bytes, for as long as it lives. Given back, a thread switch saves less.
  class Registers {
   public:
    Registers() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
    ~Registers() { _tile_release(); }
    Registers(const Registers&) = delete;
  };

  template <int Rows, int Columns>
  static void product(const bf16* left, const bf16* right, int64_t, int64_t k, float* out, int64_t ld) {
    const int64_t depth = tiles_of(k, kDepth);
    _tile_zero(0);
    if (Columns > 1) _tile_zero(1);
    if (Rows > 1) _tile_zero(2);
    if (Rows > 1 && Columns > 1) _tile_zero(3);
    for (int64_t i = 0; i < depth; ++i) {
      _tile_loadd(6, right + i * kTile, 64);
      if (Columns > 1) _tile_loadd(7, right + (depth + i) * kTile, 64);
      _tile_loadd(4, left + i * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (Columns > 1) _tile_dpbf16ps(1, 4, 7);
      if (Rows > 1) {
        _tile_loadd(5, left + (depth + i) * kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (Columns > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    const int64_t stride = ld * static_cast<int64_t>(sizeof(float));
    _tile_stored(0, out, stride);
    if (Columns > 1) _tile_stored(1, out + 16, stride);
    if (Rows > 1) _tile_stored(2, out + 16 * ld, stride);
    if (Rows > 1 && Columns > 1) _tile_stored(3, out + 16 * ld + 16, stride);
  }
};

}  // namespace

const Kernels& kernels_amx() {
  static const Kernels kTable = with_tiles(kernels_avx512bf16(), "amx", &kTilesOf<TileUnit>);
  return kTable;
}

}  // namespace sadmoe::cpu
