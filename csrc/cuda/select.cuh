// The mask of scores.
#pragma once
#include "cuda/rule.cuh"

namespace sadmoe::cuda {

constexpr int kSelectThreads = 128;

struct Select {
  const float* scores;  // [T, E]
  bool* mask;           // [T, E]
  int64_t T, E;
  float tau;
};

// A warp a token.
SADMOE_KERNEL(kSelectThreads) select(Select p) {
  const int64_t t = block_x() * (kSelectThreads / 32) + thread_index() / 32;
  if (t >= p.T) return;
  const float* scores = p.scores + t * p.E;
  const float threshold = threshold_of(scores, p.E, p.tau);
  for (int64_t e = thread_index() % 32; e < p.E; e += 32) p.mask[t * p.E + e] = reaches(scores[e], threshold);
}

}  // namespace sadmoe::cuda
