// AVX512-VNNI, over AVX-512: Intel since Cascade Lake, AMD since Zen 4. Only experts in int8 differ from AVX-512.
#include "cpu/table.h"
#include "cpu/vec_avx512.h"

namespace sadmoe::cpu {

const Kernels& kernels_avx512vnni() {
  static constexpr Kernels kTable = table<Vec, Ints>("avx512vnni");
  return kTable;
}

}  // namespace sadmoe::cpu
