// AVX512-BF16, over AVX512-VNNI: AMD since Zen 4, Intel since Cooper Lake. Only bf16 differs from that.
#include "cpu/vec_avx512bf16.h"

namespace sadmoe::cpu {

const Kernels& kernels_avx512bf16() {
  static const Kernels kTable = [] {
    Kernels table = kernels_avx512vnni();
    table.isa = "avx512bf16", table.halves = &kHalves;
    return table;
  }();
  return kTable;
}

}  // namespace sadmoe::cpu
