#include "cuda/hopper_down.cuh"
#include "cuda/hopper_up.cuh"
#include "cuda/parts.h"

namespace sadmoe::cuda {
namespace {

template <class Block>
int launch_tiles(void (*kernel)(HopperUp), HopperUp& p, void* stream) {
  const Up& up = p.up;
  int processors = 0;
  int code = multiprocessors(processors);
  if (code == 0) code = make_tile_map(p.w_up, {up.w_up.data, up.w_up.dtype}, up.E, up.s, up.d, Block::kNeurons);
  if (code == 0 && Block::kGated)
    code = make_tile_map(p.w_gate, {up.w_gate.data, up.w_gate.dtype}, up.E, up.s, up.d, Block::kNeurons);
  if (code) return code;
  const int64_t most = up.E * p.strips * divide(up.T, Block::kBlockRows);
  return launch(kernel, {std::min<int64_t>(most, processors)}, Block::kThreads, sizeof(typename Block::Memory), stream, p);
}

template <class T, bool kGated, int kNeurons>
int launch_up(HopperUp& p, void* stream) {
  return launch_tiles<HopperUpBlock<T, kGated, kNeurons>>(hopper_up<T, kGated, kNeurons>, p, stream);
}

// Strips as even as steps of 32 neurons allow.
template <class T, bool kGated>
int launch_up(HopperUp& p, void* stream) {
  p.strips = static_cast<int>(divide(p.up.s, 128));
  switch (divide(divide(p.up.s, p.strips), 32)) {
    case 1:
      return launch_up<T, kGated, 32>(p, stream);
    case 2:
      return launch_up<T, kGated, 64>(p, stream);
    case 3:
      return launch_up<T, kGated, 96>(p, stream);
    default:
      return launch_up<T, kGated, 128>(p, stream);
  }
}

template <class T, bool kGated>
int launch_up_all(HopperUp& p, void* stream) {
  using Block = HopperUpBlock<T, kGated, 128, true>;
  p.strips = static_cast<int>(divide(p.up.s, Block::kNeurons));
  return launch_tiles<Block>(hopper_up_all<T, kGated>, p, stream);
}

template <class T, bool kGated>
int launch_up(HopperUp& p, bool all, void* stream) {
  return all ? launch_up_all<T, kGated>(p, stream) : launch_up<T, kGated>(p, stream);
}

template <class T>
int launch_up(const Up& up, bool all, void* stream) {
  HopperUp p{};
  p.up = up;
  return up.w_gate.data ? launch_up<T, true>(p, all, stream) : launch_up<T, false>(p, all, stream);
}

template <class T, int kSlices>
int launch_crowds(const Down& p, void* stream) {
  using Block = HopperDownBlock<T, kSlices>;
  return launch(hopper_down<T, kSlices>, {divide(p.T, kCrowdTokens), divide(p.d_out, Block::kColumns)}, Block::kThreads,
                sizeof(typename Block::Memory), stream, p);
}

// Experts of few neurons share a stage.
template <class T>
int launch_crowds(const Down& p, void* stream) {
  switch (crowd_depth(p.s)) {
    case 16:
      return launch_crowds<T, 1>(p, stream);
    case 32:
      return launch_crowds<T, 2>(p, stream);
    default:
      return launch_crowds<T, 4>(p, stream);
  }
}

}  // namespace

bool fits_hopper(const Up& p) {
  const bool halves = p.x.dtype != DType::f32 && p.x.dtype == p.w_up.dtype;
  return halves && p.x.wide && p.w_up.wide && (p.w_gate.wide || !p.w_gate.data);
}

int up_on_hopper(const Up& p, bool all, void* stream) {
  return p.x.dtype == DType::bf16 ? launch_up<bf16>(p, all, stream) : launch_up<f16>(p, all, stream);
}

bool fits_hopper(const Down& p) { return p.dtype != DType::f32 && p.w_down.dtype == p.dtype && p.h.wide && p.w_down.wide; }

int crowds_on_hopper(const Down& p, void* stream) {
  return p.dtype == DType::bf16 ? launch_crowds<bf16>(p, stream) : launch_crowds<f16>(p, stream);
}

}  // namespace sadmoe::cuda
