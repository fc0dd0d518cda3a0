// The whole layer on the CPU: stages over token blocks, on all threads. No torch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

#include "contract.h"

namespace sadmoe::cpu {

// Runs body(begin, end) over parts of [0, n), of about `grain` or more, on the caller's thread pool.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

struct Threads {
  int count;
  ParallelFor parallel_for;
};

// body(begin, end) over parts of [0, n) of about `grain` sixteens or more, which begin at multiples of 16: whole vectors.
template <class Body>
void in_sixteens(int64_t n, int64_t grain, const Threads& threads, const Body& body) {
  threads.parallel_for((n + 15) / 16, grain, [&](int64_t i, int64_t j) { body(16 * i, std::min(16 * j, n)); });
}

// The caller's thread alone.
const Threads& one_thread();

// scores [T, E]: x [T, d] of any dtype.
void router_scores(View x, const Router& router, const RouterShape& shape, float* scores, const Threads& threads);

// y of the experts for a given mask [T, E].
void sparse_experts(const Experts& experts, const bool* mask, const Threads& threads);

// The same with the router's own mask.
void dynamic_k_moe(const Experts& experts, const Router& router, const Threads& threads);

// What stands between dense products. In masked.cpp.
void masked_activation(const MaskedActivation& p, const Threads& threads);

}  // namespace sadmoe::cpu
