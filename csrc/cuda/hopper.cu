#include "cuda/hopper_down.cuh"
#include "cuda/hopper_up.cuh"
#include "cuda/parts.h"

namespace sadmoe::cuda {
namespace {

template <class T, bool kGated, int kNeurons>
int launch_tiles(HopperUp& p, void* stream) {
  using Block = HopperUpBlock<T, kGated, kNeurons>;
  const Up& up = p.up;
  int processors = 0;
  int code = multiprocessors(processors);
  if (code == 0) code = make_tile_map(p.w_up, {up.w_up.data, up.w_up.dtype}, up.E, up.s, up.d, kNeurons);
  if (code == 0 && kGated) code = make_tile_map(p.w_gate, {up.w_gate.data, up.w_gate.dtype}, up.E, up.s, up.d, kNeurons);
  if (code) return code;
  const int64_t most = up.E * p.strips * divide(up.T, Block::kBlockRows);
  return launch(hopper_up<T, kGated, kNeurons>, {std::min<int64_t>(most, processors)}, Block::kThreads,
                sizeof(typename Block::Memory), stream, p);
}

// Strips as even as steps of 32 neurons allow.
template <class T, bool kGated>
int launch_tiles(HopperUp& p, void* stream) {
  p.strips = static_cast<int>(divide(p.up.s, 128));
  switch (divide(divide(p.up.s, p.strips), 32)) {
    case 1:
      return launch_tiles<T, kGated, 32>(p, stream);
    case 2:
      return launch_tiles<T, kGated, 64>(p, stream);
    case 3:
      return launch_tiles<T, kGated, 96>(p, stream);
    default:
      return launch_tiles<T, kGated, 128>(p, stream);
  }
}

template <class T>
int launch_tiles(const Up& up, void* stream) {
  HopperUp p{};
  p.up = up;
  return up.w_gate.data ? launch_tiles<T, true>(p, stream) : launch_tiles<T, false>(p, stream);
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
  return halves && p.d > 0 && p.x.wide && p.w_up.wide && (p.w_gate.wide || !p.w_gate.data);
}

int up_on_hopper(const Up& p, void* stream) {
  return p.x.dtype == DType::bf16 ? launch_tiles<bf16>(p, stream) : launch_tiles<f16>(p, stream);
}

bool fits_hopper(const Down& p) { return p.dtype != DType::f32 && p.w_down.dtype == p.dtype && p.h.wide && p.w_down.wide; }

int crowds_on_hopper(const Down& p, void* stream) {
  return p.dtype == DType::bf16 ? launch_crowds<bf16>(p, stream) : launch_crowds<f16>(p, stream);
}

}  // namespace sadmoe::cuda
