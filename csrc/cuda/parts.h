// What launch.cu and decode.cu share: views as matrices, and which tile multiplies which dtypes.
#pragma once
#include <algorithm>

#include "cuda/down.cuh"
#include "cuda/launch.h"
#include "cuda/plan.cuh"
#include "cuda/tile.cuh"
#include "cuda/up.cuh"

namespace sadmoe::cuda {

inline int64_t divide(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t padded(int64_t n) { return divide(n, 8) * 8; }  // whole 16 bytes in any dtype

inline Matrix matrix(View view, int64_t ld) {
  const bool wide = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && ld * size_of(view.dtype) % 16 == 0;
  return {view.data, ld, view.dtype, wide};
}

// Shared memory that every device gives a block without being asked, and so little that so many blocks fit a multiprocessor of an
// A100: as many as their registers allow, or one less.
template <class Memory, int kBlocks = 1>
constexpr size_t shared_bytes() {
  constexpr size_t kOfA100 = 164 << 10;
  static_assert(sizeof(Memory) <= kGivenBytes);
  static_assert(kBlocks * (sizeof(Memory) + kBlockBytes) <= kOfA100);
  return sizeof(Memory);
}

template <class T>
struct Type {
  using type = T;
};

// body(Type<Tile>) of the tile for experts, all operands of one dtype.
template <class Body>
int with_experts_tile(DType dtype, bool tf32, Body body) {
  if (dtype == DType::bf16) return body(Type<Mma<bf16>>{});
  if (dtype == DType::f16) return body(Type<Mma<f16>>{});
  return tf32 ? body(Type<Tf32<1, 1>>{}) : body(Type<Fma>{});
}

// The same of few columns.
template <class Body>
int with_tall_tile(DType dtype, bool tf32, Body body) {
  if (dtype == DType::bf16) return body(Type<TallMma<bf16>>{});
  if (dtype == DType::f16) return body(Type<TallMma<f16>>{});
  return tf32 ? body(Type<TallTf32>{}) : body(Type<TallFma>{});
}

// The same for a layer of the router, with the accuracy of float32 whatever the dtypes: sums begin anew (tile.cuh); mixed, 16
// bits fit tf32, and 32 bits two of it to one in the last place.
template <class Body>
int with_router_tile(DType x, DType w, Body body) {
  if (x == w && x == DType::bf16) return body(Type<ExactMma<bf16>>{});
  if (x == w && x == DType::f16) return body(Type<ExactMma<f16>>{});
  if (x == DType::f32 && w != DType::f32) return body(Type<Tf32<2, 1>>{});
  if (x != DType::f32 && w == DType::f32) return body(Type<Tf32<1, 2>>{});
  return body(Type<Fma>{});
}

// One layer of the router: out [T, columns] = act(x wᵀ), a single expert that every token takes.
struct Projection {
  View x, w;
  int64_t T, depth, columns;
  Activation act;
  float* out;
  bool early;  // the one of the other layer is just before
};

inline UpOperands router_operands(const Projection& q) {
  return {matrix(q.x, q.depth), matrix(q.w, q.depth), {}, {}, {}, q.T, q.depth, q.columns, q.out, q.columns, q.act};
}
inline UpOperands up_operands(const Experts& experts, void* h) {
  const ExpertsShape& s = experts.shape;
  const Matrix x = matrix(experts.x, s.d), w_up = matrix(experts.w_up, s.d), w_gate = matrix(experts.w_gate, s.d);
  return {x, w_up, w_gate, experts.b_up, experts.b_gate, s.T, s.d, s.s, h, padded(s.s), experts.act};
}
inline DownOperands down_operands(const Experts& experts, void* h) {
  const ExpertsShape& s = experts.shape;
  const DType dtype = experts.x.dtype;
  const Matrix rows = matrix({h, dtype}, padded(s.s)), w_down = matrix(experts.w_down, s.d_out);
  return {rows, w_down, experts.b_out, s.T, s.s, s.d_out, experts.y, dtype};
}

// Of 16 bits, in rows that begin on 16 bytes: the same as launching `up` or `up_all`, on a device of capability 9.0. In
// hopper.cu.
bool fits_hopper(const Up& p);
int up_on_hopper(const Up& p, bool all, void* stream);
// Likewise what `down` leaves: the tokens of crowds.
bool fits_hopper(const Down& p);
int crowds_on_hopper(const Down& p, void* stream);
// Neurons of an expert there, with those that fill up a stage.
inline int64_t crowd_depth(int64_t s) { return s <= 16 ? 16 : s <= 32 ? 32 : divide(s, 64) * 64; }

// At most kTileTokens tokens, in decode.cu.
int decode_projection(const Projection& p, void* stream);
int decode_experts(const Experts& experts, const Plan& plan, bool tf32, void* h, void* stream);

}  // namespace sadmoe::cuda
