// The whole layer on the CPU: stages over token blocks, on all threads. No torch.
#pragma once
#include "contract.h"
#include "cpu/threads.h"

namespace sadmoe::cpu {

// scores [T, E]: x [T, d] of any dtype.
void router_scores(View x, const Router& router, const RouterShape& shape, float* scores, const Threads& threads);

// y of the experts for a given mask [T, E].
void sparse_experts(const Experts& experts, const bool* mask, const Threads& threads);

// The same with the router's own mask.
void dynamic_k_moe(const Experts& experts, const Router& router, const Threads& threads);

// What stands between dense products. In masked.cpp.
void masked_activation(const MaskedActivation& p, const Threads& threads);

}  // namespace sadmoe::cpu
