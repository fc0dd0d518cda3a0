// The CPU stages that depend on the instruction set: contract of every implementation. No torch, no intrinsics.
#pragma once
#include <cstdint>

#include "contract.h"

namespace sadmoe::cpu {

// out[i, j] = x[rows[i]] . w[j]   for i < n, j < m. The sum over k has one fixed order, whatever n, m, and the rows are.
//   x [., d] float32   w [m, d] of the kernel's weight dtype   out [n, .] float32, leading dimension ld
struct Project {
  int64_t n, m, d, ld;
  const float* x;
  const int32_t* rows;  // null: row i is i
  const void* w;
  float* out;
};

// In place on h [n, m], leading dimension ld:   h = act(h + bias),   or with a gate   h = act(gate + gate_bias) * (h + bias)
struct Activate {
  int64_t n, m, ld;
  float* h;
  const float *bias, *gate, *gate_bias;  // [m], [n, m] with leading dimension ld, [m]; each may be null
  Activation act;
};

// y[rows[i], c] += sum over j ascending of h[i, j] w[j, c]   for i < n, c < columns. Rows are distinct.
//   h [n, m] dense   w [m, .] of the kernel's weight dtype, leading dimension ld   y float32, leading dimension ld
struct Accumulate {
  int64_t n, m, columns, ld;
  const float* h;
  const int32_t* rows;
  const void* w;
  float* y;
};

// The rule of dynamic-k on one row: mask[e] = scores[e] >= tau * max(scores). Negative scores count as 0; NaN is never
// selected and never the maximum; comparisons in float32. An all-zero row selects every expert.
struct Select {
  int64_t n;
  const float* scores;
  float tau;
  bool* mask;
};

struct Kernels {
  const char* isa;
  int64_t strip;                             // columns of y that accumulate is best given at once
  void (*project[3])(const Project&);        // by DType of w
  void (*accumulate[3])(const Accumulate&);  // by DType of w
  void (*activate)(const Activate&);
  void (*select)(const Select&);
  void (*widen[3])(const void* from, float* to, int64_t n);   // to float32
  void (*narrow[3])(const float* from, void* to, int64_t n);  // round to nearest even
};

// One line of kernels.inc each.
#define SADMOE_KERNELS(isa) const Kernels& kernels_##isa();
#include "cpu/kernels.inc"
#undef SADMOE_KERNELS

}  // namespace sadmoe::cpu
