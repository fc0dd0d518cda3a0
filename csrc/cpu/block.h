// Experts over one block of tokens, row by row (by a unit that multiplies tiles: tiled.h).
#pragma once
#include "contract.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace sadmoe::cpu {

// The tokens [begin, end) from x to y under mask [end - begin, E].
void run_block(const Experts& experts, const bool* mask, int64_t begin, int64_t end, const AsFloat& b_out,
               const AsFloat& scale_out, const Threads& threads);

}  // namespace sadmoe::cpu
