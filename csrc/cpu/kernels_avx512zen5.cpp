// AVX512-BF16 on a Zen 5, where it is faster to fetch what comes next into the first-level cache: see ahead.h. The same results.
#include "cpu/vec_avx512bf16.h"

namespace sadmoe::cpu {

const Kernels& kernels_avx512zen5() {
  static const Kernels kTable = [] {
    Kernels zen5 = table<Vec, Ints>("avx512zen5");
    zen5.halves = &kHalves;
    return zen5;
  }();
  return kTable;
}

}  // namespace sadmoe::cpu
