// AVX512-VNNI, over AVX-512: Intel since Cascade Lake, AMD since Zen 4. Only experts in int8 differ from AVX-512.
#include "cpu/table.h"
#include "cpu/vec_avx512.h"

namespace sadmoe::cpu {

const Kernels& kernels_avx512vnni() {
  static const Kernels kTable = [] {
    Kernels table = kernels_avx512();
    table.isa = "avx512vnni";
    table.project[int(DType::i8)] = project<Ints, int8_t>;
    table.accumulate[int(DType::i8)] = accumulate_pairs<Ints, Vec>;
    return table;
  }();
  return kTable;
}

}  // namespace sadmoe::cpu
