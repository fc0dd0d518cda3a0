// The rule of plan.h, by a warp.
#pragma once
#include "cuda/device.cuh"

namespace sadmoe::cuda {

// Of one token; every lane gets it.
SADMOE_DEVICE float threshold_of(const float* scores, int64_t E, float tau) {
  float best = 0;
  for (int64_t e = thread_index() % 32; e < E; e += 32) best = larger(scores[e], best);
  SADMOE_UNROLL
  for (int lanes = 16; lanes; lanes /= 2) best = larger(shuffle_xor(best, lanes), best);
  return sadmoe::threshold_of(best, tau);
}

}  // namespace sadmoe::cuda
