// The kernels of AMX on processors without it: each instruction that they lack is trapped, and done by plain loops.
#pragma once
#include "cpu/kernels.h"

namespace sadmoe::test {

constexpr const char* kTrapped = "amx, trapped";

// Null where the processor has AMX, and runs them as they are, or lacks AVX512-BF16, which they need as well; or not on Linux.
const cpu::Kernels* kernels_by_traps();

}  // namespace sadmoe::test
