// Kernels that no processor has: those of AVX512-BF16 with bf16 by way of tiles that plain loops multiply.
#pragma once
#include "cpu/kernels.h"

namespace sadmoe::test {

const cpu::Kernels& kernels_of_tiles();  // for processors with AVX512-BF16

}  // namespace sadmoe::test
