// The rule of dynamic-k (contract.h, select_row): a warp a token.
#pragma once
#include "cuda/device.cuh"

namespace sadmoe::cuda {

constexpr int kSelectThreads = 128;

struct Select {
  const float* scores;  // [T, E]
  bool* mask;           // [T, E]
  int64_t T, E;
  float tau;
};

SADMOE_KERNEL(kSelectThreads) select(Select p) {
  const int lane = thread_index() % 32;
  const int64_t t = block_x() * (kSelectThreads / 32) + thread_index() / 32;
  if (t >= p.T) return;
  const float* scores = p.scores + t * p.E;
  float best = 0;
  for (int64_t e = lane; e < p.E; e += 32) best = scores[e] > best ? scores[e] : best;
  SADMOE_UNROLL
  for (int lanes = 16; lanes; lanes /= 2) {
    const float other = shuffle_xor(best, lanes);
    best = other > best ? other : best;
  }
  const float threshold = p.tau == 0 ? 0 : p.tau * best;  // 0 * inf would be NaN
  for (int64_t e = lane; e < p.E; e += 32) p.mask[t * p.E + e] = (scores[e] < 0 ? 0 : scores[e]) >= threshold;
}

}  // namespace sadmoe::cuda
