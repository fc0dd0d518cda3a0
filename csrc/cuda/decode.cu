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
  const DecodeUp p{router_operands(q), nullptr};
  return with_router_tile(q.x.dtype, q.w.dtype,
                          [&](auto tile) { return launch_up<typename decltype(tile)::type, false>(p, 1, q.early, stream); });
}

int decode_experts(const Experts& experts, const Plan& plan, bool tf32, void* h, void* stream) {
  const ExpertsShape& s = experts.shape;
  const DType dtype = experts.x.dtype;
  const bool routed = plan.scores;  // by kernels of this file, just before
  int code = launch(plan_decode, {1, 1, routed}, kWordThreads, shared_bytes<WordMemory>(), stream, plan);
  if (code) return code;
  const DecodeUp p{up_operands(experts, h), plan.rows};
  code = with_experts_tile(dtype, tf32, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    return p.w_gate.data ? launch_up<Tile, true>(p, s.E, true, stream) : launch_up<Tile, false>(p, s.E, true, stream);
  });
  if (code || s.d_out == 0) return code;
  const DecodeDown q{down_operands(experts, h), plan.rows, plan.starts, plan.starts + s.E};
  return with_experts_tile(dtype, tf32, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    return q.T <= 16 ? launch_down<Tile, 16>(q, stream) : launch_down<Tile, kTileTokens>(q, stream);
  });
}

}  // namespace sadmoe::cuda
