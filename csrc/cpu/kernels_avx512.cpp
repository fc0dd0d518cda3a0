// AVX-512 (F, BW, DQ, VL): any server x86 since Skylake-SP, AMD since Zen 4.
#include "cpu/table.h"
#include "cpu/vec_avx512.h"

namespace sadmoe::cpu {

const Kernels& kernels_avx512() {
  static constexpr Kernels kTable = table<Vec, Ints>("avx512");
  return kTable;
}

}  // namespace sadmoe::cpu
