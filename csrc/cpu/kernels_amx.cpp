// AMX-BF16 and AMX-INT8, over AVX512-BF16: Intel since Sapphire Rapids. Only the router in bf16, bf16 in
// experts that are not too small, and int8 in experts with many rows, differ from that.
#include "cpu/int_tiles_amx.h"
#include "cpu/tiles_amx.h"

namespace sadmoe::cpu {

const Kernels& kernels_amx() {
  static const Kernels kTable = [] {
    Kernels table = kernels_avx512bf16();
    table.isa = "amx", table.tiles = &kTiles;
    table.project[int(DType::i8)] = int_project;
    table.accumulate[int(DType::i8)] = int_accumulate;
    return table;
  }();
  return kTable;
}

}  // namespace sadmoe::cpu
