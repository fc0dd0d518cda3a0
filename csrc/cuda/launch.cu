#include <algorithm>

#include "cuda/down.cuh"
#include "cuda/launch.h"
#include "cuda/plan.cuh"
#include "cuda/select.cuh"
#include "cuda/up.cuh"

namespace sadmoe::cuda {
namespace {

constexpr int64_t kRowBlocks = 64;  // blocks an expert and strip, each striding over the tokens; the rest exits at once

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
int64_t divide(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t padded(int64_t n) { return divide(n, 8) * 8; }  // whole 16 bytes in any dtype

View at(View view, int64_t i) {
  if (view) view.data = static_cast<const char*>(view.data) + i * size_of(view.dtype);
  return view;
}

Matrix matrix(View view, int64_t ld) {
  const bool wide = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && ld * size_of(view.dtype) % 16 == 0;
  return {view.data, ld, view.dtype, wide};
}

// Shared memory that every device gives a block without being asked.
template <class Memory>
constexpr size_t shared_bytes() {
  static_assert(sizeof(Memory) <= 48 << 10);
  return sizeof(Memory);
}

template <class Tile>
int launch_up(const Up& p, void* stream) {
  const Grid grid{p.E * divide(p.s, kColumns), std::min(divide(p.T, kRows), kRowBlocks)};
  if (p.w_gate.data) return launch(up<Tile, true>, grid, kThreads, shared_bytes<UpMemory<Tile, true>>(), stream, p);
  return launch(up<Tile, false>, grid, kThreads, shared_bytes<UpMemory<Tile, false>>(), stream, p);
}

// Tensor cores where both operands are of one 16-bit type.
int launch_up(const Up& p, void* stream) {
  if (p.T == 0 || p.s == 0) return 0;
  if (p.x.dtype != p.w_up.dtype || p.x.dtype == DType::f32) return launch_up<Fma>(p, stream);
  return p.x.dtype == DType::bf16 ? launch_up<Mma<bf16>>(p, stream) : launch_up<Mma<f16>>(p, stream);
}

template <class Tile>
int launch_down(const Down& p, void* stream) {
  return launch(down<Tile>, {divide(p.T, kTileTokens), divide(p.d_out, kColumns)}, kThreads, shared_bytes<DownMemory<Tile>>(),
                stream, p);
}

int launch_down(const Down& p, void* stream) {
  if (p.T == 0 || p.d_out == 0) return 0;
  switch (p.dtype) {
    case DType::bf16:
      return launch_down<Mma<bf16>>(p, stream);
    case DType::f16:
      return launch_down<Mma<f16>>(p, stream);
    default:
      return launch_down<Fma>(p, stream);
  }
}

int make_plan(const Plan& p, void* stream) {
  const Grid grid{p.tiles, divide(p.E, kPlanThreads)};
  int code = launch(plan_count, grid, kPlanThreads, 0, stream, p);
  if (code == 0) code = launch(plan_scan, {1}, kScanThreads, shared_bytes<ScanMemory>(), stream, p);
  if (code == 0) code = launch(plan_fill, grid, kPlanThreads, 0, stream, p);
  return code;
}

// One layer of the router: a single expert that every row takes.
int project(View x, View w, int64_t T, int64_t depth, int64_t columns, Activation act, float* out, void* stream) {
  Up p{};
  p.x = matrix(x, depth);
  p.w_up = matrix(w, depth);
  p.T = T, p.d = depth, p.E = 1, p.s = columns;
  p.h = out, p.ld_h = columns, p.h_dtype = DType::f32;
  p.act = act;
  return launch_up(p, stream);
}

// The tokens [begin, end), which fit the workspace.
int run_chunk(const Experts& experts, const bool* mask, const Scratch& scratch, int64_t begin, int64_t end, void* stream) {
  const ExpertsShape& s = experts.shape;
  const DType dtype = experts.x.dtype;
  const Plan plan{mask + begin * s.E, scratch.starts, scratch.rows, end - begin, s.E, divide(end - begin, kTileTokens)};
  int code = make_plan(plan, stream);
  if (code) return code;
  Up p{};
  p.x = matrix(at(experts.x, begin * s.d), s.d);
  p.w_up = matrix(experts.w_up, s.d);
  p.w_gate = matrix(experts.w_gate, s.d);
  p.b_up = experts.b_up, p.b_gate = experts.b_gate;
  p.starts = plan.starts, p.rows = plan.rows;
  p.T = plan.T, p.d = s.d, p.E = s.E, p.s = s.s, p.tiles = plan.tiles;
  p.h = scratch.h, p.ld_h = padded(s.s), p.h_dtype = dtype;
  p.act = experts.act;
  code = launch_up(p, stream);
  if (code) return code;
  Down q{};
  q.h = matrix({scratch.h, dtype}, padded(s.s));
  q.w_down = matrix(experts.w_down, s.d_out);
  q.b_out = experts.b_out;
  q.starts = plan.starts, q.rows = plan.rows;
  q.T = plan.T, q.E = s.E, q.s = s.s, q.d_out = s.d_out;
  q.y = static_cast<char*>(experts.y) + begin * s.d_out * size_of(dtype), q.dtype = dtype;
  return launch_down(q, stream);
}

}  // namespace

int use_device(int index) { return set_device(index); }

int router_scores(View x, const Router& router, const RouterShape& s, float* hidden, float* scores, void* stream) {
  const int code = project(x, router.v1, s.T, s.d, router.r, Activation::relu, hidden, stream);
  return code ? code : project({hidden, DType::f32}, router.v2, s.T, router.r, s.E, Activation::abs, scores, stream);
}

int select(const float* scores, int64_t T, int64_t E, float tau, bool* mask, void* stream) {
  if (T == 0) return 0;
  return launch(select, {divide(T, kSelectThreads / 32)}, kSelectThreads, 0, stream, Select{scores, mask, T, E, tau});
}

Workspace workspace(const ExpertsShape& s, DType dtype, int64_t limit) {
  const int64_t token_bytes = s.E * padded(s.s) * size_of(dtype);
  const int64_t tiles =
      std::clamp(limit / (token_bytes * kTileTokens), int64_t{1}, std::max(int64_t{1}, divide(s.T, kTileTokens)));
  const int64_t chunk = std::min(tiles * kTileTokens, s.T);
  return {chunk, (tiles + 1) * s.E, chunk * s.E, chunk * s.E * padded(s.s)};
}

int sparse_experts(const Experts& experts, const bool* mask, const Workspace& workspace, const Scratch& scratch, void* stream) {
  int code = 0;
  for (int64_t t = 0; t < experts.shape.T && code == 0; t += workspace.chunk)
    code = run_chunk(experts, mask, scratch, t, std::min(t + workspace.chunk, experts.shape.T), stream);
  return code;
}

const char* error_string(int code) { return error_text(code); }

}  // namespace sadmoe::cuda
