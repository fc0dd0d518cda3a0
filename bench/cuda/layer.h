// A layer of random numbers on the device, run through csrc/cuda/launch.h.
#pragma once
#include <cmath>

#include "cuda/launch.h"
#include "device_timer.h"

namespace bench {

// Numbers of about unit variance times `scale`. The same in every run.
void fill(const Buffer& buffer, sadmoe::DType dtype, float scale, unsigned seed);

constexpr double kCold = 200e6;  // bytes that L2 does not hold

// How many of each token's E experts are that share: one at least.
inline int64_t experts_of(float share, int64_t E) { return std::max<int64_t>(1, std::lround(share * static_cast<float>(E))); }

// Whether the kernels of sm_90a may run, where there are some: not on a device on which they have failed.
extern bool hopper_allowed;
// Whether they run.
bool is_hopper();

// `sets` copies of the weights, so that they can be cold in L2; x, y, mask and scratch are shared by all.
class Layer {
 public:
  Layer(const sadmoe::ExpertsShape& shape, sadmoe::DType dtype, bool gated, int sets);
  void mask(float share) const;              // of all pairs, by chance: a token may have none
  void mask_of_each(int64_t experts) const;  // so many of every token
  void run(int set, cudaStream_t stream) const;
  std::vector<uint16_t> result() const;  // y, run once, as 16 bits, NaN where it was not written
  double weight_bytes() const;           // of one set
  double flops() const;                  // of all pairs
  sadmoe::cuda::Options options;

 private:
  sadmoe::ExpertsShape shape_;
  sadmoe::DType dtype_;
  bool gated_;
  Buffer x_, y_, mask_, words_, starts_, rows_, h_;
  std::vector<Buffer> weights_;
};

}  // namespace bench
