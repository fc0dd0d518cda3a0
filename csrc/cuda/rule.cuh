// The rule of dynamic-k (contract.h): an expert runs where its score is at least tau times the largest of the token.
#pragma once
#include "cuda/device.cuh"

namespace sadmoe::cuda {

// Of one token, by a warp; every lane gets it. A NaN is never the largest.
SADMOE_DEVICE float threshold_of(const float* scores, int64_t E, float tau) {
  float best = 0;
  for (int64_t e = thread_index() % 32; e < E; e += 32) best = scores[e] > best ? scores[e] : best;
  SADMOE_UNROLL
  for (int lanes = 16; lanes; lanes /= 2) {
    const float other = shuffle_xor(best, lanes);
    best = other > best ? other : best;
  }
  return tau == 0 ? 0 : tau * best;  // 0 * inf would be NaN
}

SADMOE_DEVICE bool reaches(float score, float threshold) { return (score < 0 ? 0 : score) >= threshold; }

}  // namespace sadmoe::cuda
