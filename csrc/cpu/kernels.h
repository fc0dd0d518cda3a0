// The CPU stages that depend on the instruction set: contract of every implementation. No torch, no intrinsics.
#pragma once
#include <cstdint>

#include "contract.h"
#include "cpu/half.h"

namespace sadmoe::cpu {

// q[i, k] = x[i, k] / steps[i], rounded to 16 bits, for the least steps[i] that leaves a sum of its products with weights of 8
// bits in 32 bits. A row that is not finite has a step of NaN, and zeros.
//   x [n, d] float32   q [n, .] leading dimension ld, zero from d on   d up to 2^17
struct Quantize {
  int64_t n, d, ld;
  const float* x;
  int16_t* q;
  float* steps;
};

// out[i, j] = x[rows[i]] . w[j]   for i < n, j < m. The sum over k has one fixed order, whatever n, m, and the rows are.
//   x [., d] float32, with int8 weights quantized: int16 with steps, of the kernel of halves bf16
//   w [m, d] of the kernel's weight dtype
//   out [n, .] float32, leading dimension ld
struct Project {
  int64_t n, m, d, ld;
  const void* x;
  const int32_t* rows;  // null: row i is i
  const void* w;
  float* out;
  const float* steps = nullptr;  // of the rows of quantized x
  const void* next = nullptr;    // the w of the next call, of about the same shape, to be fetched meanwhile; or null
  int64_t ld_w = 0;              // of packed w, see Kernels::project_packed
};

// In place on h [n, m], leading dimension ld:
//   h = act(scale h + bias) out_scale,   or with a gate   h = act(gate_scale gate + gate_bias) (scale h + bias) out_scale
struct Activate {
  int64_t n, m, ld;
  float* h;
  const float *bias, *gate, *gate_bias;  // [m], [n, m] with leading dimension ld, [m]; each may be null
  Activation act;
  const float *scale = nullptr, *gate_scale = nullptr, *out_scale = nullptr;  // [m], all of them that apply, or none
};

// y[rows[i], c] += sum over j of h[i, j] w[j, c]   for i < n, c < columns, columns >= 1. The sum has one fixed order, whatever n
// and columns are, and is added as one: it errs less than a sum of all experts' products. Rows are distinct.
//   h [n, m] float32, leading dimension ld_h; with int8 weights quantized, of the kernel of halves bf16: then ld_h is even, with
//   a zero where m is odd
//   w [m, .] of the kernel's weight dtype, leading dimension ld_w   y float32, leading dimension ld_y
struct Accumulate {
  int64_t n, m, columns, ld_h, ld_w, ld_y;
  const void* h;
  const int32_t* rows;
  const void* w;
  float* y;
  float* partial = nullptr;      // scratch [n, columns], of float32 h and more than Kernels::strip columns
  const void* next = nullptr;    // the w of the next call, of about the same shape, to be fetched meanwhile; or null
  const float* steps = nullptr;  // of the rows of quantized h
  int64_t turn = 16;             // of float32 h: neurons at once, of three rows or more, but where experts have few
  int64_t mean_rows = 16;        // of this call and those that come next: few take turns that stay in the first-level cache
};

// The rule of plan.h on one row. One of all zeros selects every expert.
struct Select {
  int64_t n;
  const float* scores;
  float tau;
  bool* mask;
};

// Memory to be fetched into the second-level cache while products are summed, at an even pace: from may be null, none.
struct Soon {
  const void* from;
  int64_t bytes;
};

// Products of bf16 matrices by a unit that multiplies tiles of 1 KiB, summed in float32, k ascending for every entry:
//   left  [n, k]  tiles of 16 rows x 32 k:                    left[i / 16][k / 32][i % 16][k % 32]
//   right [k, m]  tiles of 32 k, in pairs, x 16 columns:      right[j / 16][k / 32][k % 32 / 2][j % 16][k % 2]
// Tiles are filled up with zeros beyond k; what they hold beyond n and m is used for nothing.
struct Tiles {
  // Rows of a matrix [., k]: those that rows says, or without it the first n, or m.
  void (*left_of_rows)(const bf16* x, const int32_t* rows, int64_t n, int64_t k, bf16* left);
  void (*right_of_rows)(const bf16* w, const int32_t* rows, int64_t m, int64_t k, bf16* right);  // transposed
  void (*left_of_floats)(const float* h, int64_t ld, int64_t n, int64_t k, bf16* left);          // of h [n, k], rounded
  void (*right_of_columns)(const bf16* w, int64_t ld, int64_t k, int64_t m, bf16* right);        // of w [k, m]
  // out = left right: [n, m], both rounded up to 16, leading dimension ld
  void (*multiply)(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, float* out, int64_t ld, Soon soon);
  // The same for w [m, k] on the left, as it lies, and rows on the right: out[i, j] = (w right)[j, columns[i]], the same bits.
  // columns ascend; without them, of the first n. n > 0, m rounded up to 16. scratch: of left_size(m, k), for a w that is not of
  // whole tiles.
  void (*multiply_turned)(const bf16* w, const bf16* right, const int32_t* columns, int64_t n, int64_t m, int64_t k,
                          bf16* scratch, float* out, int64_t ld);
  // y[rows[i], j] += (left right)[i, j]   for i < n and j < m rounded up to 16. Rows are distinct.
  void (*multiply_add)(const bf16* left, const bf16* right, int64_t n, int64_t m, int64_t k, const int32_t* rows, float* y,
                       int64_t ld);
};

constexpr int64_t kTile = 512;  // entries
[[gnu::always_inline]] inline int64_t left_size(int64_t n, int64_t k) { return (n + 15) / 16 * ((k + 31) / 32) * kTile; }
[[gnu::always_inline]] inline int64_t right_size(int64_t k, int64_t m) { return left_size(m, k); }

// Products of bf16 by a unit that sums those of two neighbours, in float32: weights and rows are taken as they are.
struct Halves {
  void (*project)(const Project&);
  void (*project_packed)(const Project&);  // as of Kernels, d even
  void (*accumulate)(const Accumulate&);
};

struct Kernels {
  const char* isa;
  int64_t strip;       // columns of y that accumulate is best given at once, more of them with Accumulate::partial
  int64_t pair_strip;  // the same of int8 weights, and of halves
  void (*quantize)(const Quantize&);
  void (*project[4])(const Project&);         // by DType of w
  void (*project_packed[3])(const Project&);  // the same of w [d, m], leading dimension ld_w: neurons side by side
  void (*accumulate[4])(const Accumulate&);   // by DType of w
  void (*activate)(const Activate&);
  void (*select)(const Select&);
  void (*widen[3])(const void* from, float* to, int64_t n);                    // to float32
  void (*narrow[3])(const float* from, void* to, int64_t n);                   // round to nearest even
  void (*narrow_sum[3])(const float* a, const float* b, void* to, int64_t n);  // of a + b
  void (*add)(const float* from, float* to, int64_t n);                        // to += from
  const Halves* halves = nullptr;                                              // null where there is no such unit
  const Tiles* tiles = nullptr;
};

// One line of kernels.inc each.
#define SADMOE_KERNELS(isa) const Kernels& kernels_##isa();
#include "cpu/kernels.inc"
#undef SADMOE_KERNELS

}  // namespace sadmoe::cpu
