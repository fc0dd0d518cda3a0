// The router's scores on the CPU.
#pragma once
#include "contract.h"
#include "cpu/threads.h"

namespace sadmoe::cpu {

// scores [T, E] = |relu(x v1ᵀ) v2ᵀ| of few tokens by all threads, or of one block by one.
void route(View x, const Router& router, const RouterShape& shape, float* scores, const Threads& threads);

}  // namespace sadmoe::cpu
