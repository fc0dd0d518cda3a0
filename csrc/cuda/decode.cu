#include "cuda/decode.cuh"
#include "cuda/parts.h"

namespace sadmoe::cuda {
namespace {

// Blocks a multiprocessor: their stages are what it has on its way.
constexpr int64_t kBlocksEach = 2;

// early: the kernel before it is of this file too.
template <class Tile, bool kGated, int kTokens>
int launch_up(const DecodeUp& p, int64_t experts, bool early, void* stream) {
  using Block = DecodeUpBlock<Tile, kGated, kTokens>;
  int processors = 0;
  if (const int code = multiprocessors(processors)) return code;
  const int64_t blocks = std::min(divide(experts * divide(p.s, 8), Block::kWarps), processors * kBlocksEach);
  return launch(decode_up<Tile, kGated, kTokens>, {blocks, 1, early}, Block::kThreads,
                shared_bytes<typename Block::Memory, kBlocksEach>(), stream, p);
}

template <class Tile, bool kGated>
int launch_up(const DecodeUp& p, int64_t experts, bool early, void* stream) {
  return p.T <= 16 ? launch_up<Tile, kGated, 16>(p, experts, early, stream)
                   : launch_up<Tile, kGated, kTileTokens>(p, experts, early, stream);
}

template <class Tile, int kTokens>
int launch_down(const DecodeDown& p, void* stream) {
  using Memory = typename DecodeDownBlock<Tile, kTokens>::Memory;
  return launch(decode_down<Tile, kTokens>, {divide(p.d_out, kDownColumns), 1, true}, kDownThreads, shared_bytes<Memory, 3>(),
                stream, p);
}

}  // namespace

int decode_projection(const Projection& q, void* stream) {
  if (q.T == 0 || q.columns == 0) return 0;
  DecodeUp p{};
  p.x = matrix(q.x, q.depth), p.w_up = matrix(q.w, q.depth);
  p.T = q.T, p.d = q.depth, p.s = q.columns;
  p.h = q.out, p.ld_h = q.columns;
  p.act = q.act;
  return with_router_tile(q.x.dtype, q.w.dtype,
                          [&](auto tile) { return launch_up<typename decltype(tile)::type, false>(p, 1, q.early, stream); });
}

int decode_experts(const Experts& experts, const Plan& plan, bool tf32, void* h, void* stream) {
  const ExpertsShape& s = experts.shape;
  const DType dtype = experts.x.dtype;
  const bool routed = plan.scores;  // by kernels of this file, just before
  int code = launch(plan_decode, {1, 1, routed}, kWordThreads, shared_bytes<WordMemory>(), stream, plan);
  if (code) return code;
  DecodeUp p{};
  p.x = matrix(experts.x, s.d), p.w_up = matrix(experts.w_up, s.d), p.w_gate = matrix(experts.w_gate, s.d);
  p.b_up = experts.b_up, p.b_gate = experts.b_gate;
  p.active = plan.rows;
  p.T = plan.T, p.d = s.d, p.s = s.s;
  p.h = h, p.ld_h = padded(s.s);
  p.act = experts.act;
  code = with_experts_tile(dtype, tf32, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    return p.w_gate.data ? launch_up<Tile, true>(p, s.E, true, stream) : launch_up<Tile, false>(p, s.E, true, stream);
  });
  if (code || s.d_out == 0) return code;
  DecodeDown q{};
  q.h = matrix({h, dtype}, padded(s.s)), q.w_down = matrix(experts.w_down, s.d_out);
  q.b_out = experts.b_out;
  q.active = plan.rows, q.low_words = plan.starts, q.high_words = plan.starts + s.E;
  q.T = plan.T, q.s = s.s, q.d_out = s.d_out;
  q.y = experts.y, q.dtype = dtype;
  return with_experts_tile(dtype, tf32, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    return q.T <= 16 ? launch_down<Tile, 16>(q, stream) : launch_down<Tile, kTileTokens>(q, stream);
  });
}

}  // namespace sadmoe::cuda
