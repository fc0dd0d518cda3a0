// The same as AVX512-BF16 on a Zen 5, whose first-level cache waits for as many lines as its second-level one: what comes next
// is fetched into that.
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
