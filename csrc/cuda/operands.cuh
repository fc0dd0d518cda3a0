// What the projections are given, whichever kernels take them: those of many tokens (up.cuh, down.cuh) or of few (decode.cuh).
#pragma once
#include "cuda/tile.cuh"

namespace sadmoe::cuda {

struct UpOperands {
  Matrix x, w_up, w_gate;  // [T, d]   [E s, d]
  View b_up, b_gate;       // [E s]
  int64_t T, d, s;
  void* h;  // [pairs, ld_h], zeros beyond s
  int64_t ld_h;
  Activation act;
};

struct DownOperands {
  Matrix h, w_down;  // [pairs, s], wide, zeros beyond s   [E s, d_out]
  View b_out;        // [d_out]
  int64_t T, s, d_out;
  void* y;  // [T, d_out]
  DType dtype;
};

}  // namespace sadmoe::cuda
