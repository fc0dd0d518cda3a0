// A layer of random numbers on the device, run through csrc/cuda/launch.h.
#pragma once
#include "cuda/launch.h"
#include "device_timer.h"

namespace bench {

// Numbers of about unit variance times `scale`, and a mask of which `share` is set. The same in every run.
void fill(const Buffer& buffer, sadmoe::DType dtype, float scale, unsigned seed);
void choose(const Buffer& mask, float share, unsigned seed);

// Whether the kernels of sm_90a may run, where there are some: for a device on which they have failed.
extern bool hopper_allowed;

// `sets` copies of the weights, so that they can be cold in L2; x, y, mask and scratch are shared by all.
class Layer {
 public:
  Layer(const sadmoe::ExpertsShape& shape, sadmoe::DType dtype, bool gated, int sets);
  void mask(float share) { choose(mask_, share, 7); }
  void run(int set, cudaStream_t stream) const;
  std::vector<uint16_t> result() const;  // y, run once, as 16 bits
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
