#include <cmath>

#include "cuda/crowd.cuh"
#include "cuda/down.cuh"
#include "cuda/launch.h"
#include "cuda/masked.cuh"
#include "cuda/parts.h"
#include "cuda/rows.cuh"
#include "cuda/select.cuh"

namespace sadmoe::cuda {
namespace {

constexpr int64_t kMaskedRows = 1024;   // blocks for each piece of a row of masked_activation, each striding over the tokens
constexpr int64_t kRowBlocks = 64;      // blocks an expert and strip, each striding over the tokens; the rest exits at once
constexpr int64_t kMostBlocks = 65535;  // of one expert that all tokens take, as the router, whose every block has work

// Whether the current device has the instructions of sm_90a, and may use them.
int on_hopper(const Options& options, bool& is) {
  int major = 0;
  const int code = capability(major);
  is = options.hopper && major == 9;
  return code;
}

// The neurons [first, last) of every expert.
template <class Tile, bool kGated>
int launch_up(Up p, int64_t first, int64_t last, void* stream) {
  p.first = first, p.strips = divide(last - first, Tile::columns);
  const Grid grid{p.E * p.strips, std::min(divide(p.T, Tile::rows), p.starts ? kRowBlocks : kMostBlocks)};
  return launch(up<Tile, kGated>, grid, kThreads, shared_bytes<UpMemory<Tile, kGated>, kUpBlocks<kGated>>(), stream, p);
}

// Neurons in strips of 64; the last of an expert, where they fill no more than half of one, in tall tiles.
int up_experts(const Up& p, const Options& options, void* stream) {
  const int64_t left = p.s % kColumns, whole = 2 * left <= kColumns ? p.s - left : p.s;
  const auto part = [&](int64_t first, int64_t last) {
    return [&p, first, last, stream](auto tile) {
      using Tile = typename decltype(tile)::type;
      return p.w_gate.data ? launch_up<Tile, true>(p, first, last, stream) : launch_up<Tile, false>(p, first, last, stream);
    };
  };
  const int code = whole ? with_experts_tile(p.x.dtype, options.tf32, part(0, whole)) : 0;
  if (code || whole == p.s) return code;
  return with_tall_tile(p.x.dtype, options.tf32, part(whole, p.s));
}

template <class Tile, int kTiles>
constexpr size_t down_bytes() {
  if constexpr (kTiles == 1) return shared_bytes<DownMemory<Tile, 1>, 3>();
  constexpr size_t kBytes = sizeof(DownMemory<Tile, kTiles>), kMultiprocessor = kTiles == 2 ? 164 << 10 : 228 << 10;
  static_assert(2 * (kBytes + kBlockBytes) <= kMultiprocessor, "two blocks, of an A100; of 4 tiles, of an H100");
  return kBytes;
}

// See launch.h: what a multiprocessor reads is, for every neuron, a row of the weights once a block and the activations of a
// quarter of its tokens; two such blocks must fit it.
template <class Tile>
int down_tiles(int64_t T, int64_t d_out, const Options& options, const Device& device) {
  constexpr int kMost = kMostDownTiles<Tile>;
  if (const int asked = static_cast<int>(std::min<int64_t>(options.down_tiles, kMost)))  // fewer where so many do not fit
    return asked < 4 || down_bytes<Tile, kMost>() + kBlockBytes <= static_cast<size_t>(device.shared) ? asked : 2;
  int tiles = 0;
  int64_t least = 0;
  const auto consider = [&](int n, size_t bytes) {
    const int64_t tokens = n * kTileTokens, blocks = divide(T, tokens) * divide(d_out, kColumns);
    const int64_t read = divide(blocks, device.multiprocessors) * (kColumns + tokens / 4);
    const bool fits = n == 1 || 2 * (bytes + kBlockBytes) <= static_cast<size_t>(device.shared);
    if (fits && (tiles == 0 || read < least)) tiles = n, least = read;
  };
  consider(1, down_bytes<Tile, 1>());
  consider(2, down_bytes<Tile, 2>());
  if constexpr (kMost == 4) consider(4, down_bytes<Tile, 4>());
  return tiles;
}

template <class Tile, int kTiles>
int launch_down(const Down& p, void* stream) {
  const Grid grid{divide(p.T, kTiles * kTileTokens), divide(p.d_out, kColumns)};
  return launch(down<Tile, kTiles>, grid, kThreads, down_bytes<Tile, kTiles>(), stream, p);
}

template <class Tile>
int launch_down(const Down& p, const Options& options, const Device& device, void* stream) {
  const int tiles = down_tiles<Tile>(p.T, p.d_out, options, device);
  if (tiles == 1) return launch_down<Tile, 1>(p, stream);
  return tiles == 2 ? launch_down<Tile, 2>(p, stream) : launch_down<Tile, kMostDownTiles<Tile>>(p, stream);
}

template <class Tile>
int launch_down_crowd(const Down& p, void* stream) {
  using Block = CrowdBlock<Tile>;
  const Grid grid{divide(p.T, Block::kTokens), divide(p.d_out, kColumns)};
  return launch(down_crowd<Tile>, grid, kThreads, shared_bytes<typename Block::Memory, kCrowdBlocks>(), stream, p);
}

int make_plan(const Plan& p, void* stream) {
  int code = launch(plan_words, {2 * p.tiles}, kWordThreads, shared_bytes<WordMemory>(), stream, p);
  if (code == 0) code = launch(plan_scan, {divide(p.E, 32)}, kScanThreads, shared_bytes<ScanMemory>(), stream, p);
  if (code) return code;
  return launch(plan_fill, {p.tiles, divide(p.E, kFillThreads)}, kFillThreads, shared_bytes<FillMemory>(), stream, p);
}

int project(const Projection& q, const Options& options, void* stream) {
  if (q.T <= std::min(options.decode_tokens, int64_t{kTileTokens})) return decode_projection(q, stream);
  if (q.columns == 0) return 0;
  Up p{router_operands(q), nullptr, nullptr, 1, 0, 0, 0, {}};
  return with_router_tile(q.x.dtype, q.w.dtype,
                          [&](auto tile) { return launch_up<typename decltype(tile)::type, false>(p, 0, p.s, stream); });
}

// Of the pairs that T tokens may have, so many that it is this share of all.
int32_t pairs_of(double share, int64_t T, int64_t E) {
  return std::max(1, static_cast<int32_t>(std::ceil(share * static_cast<double>(T * E))));
}

template <class Tile, bool kGated>
int launch_up_all(Up p, void* stream) {
  p.first = 0, p.strips = divide(p.s, Tile::columns);
  const Grid grid{p.strips, std::min(divide(p.T, Tile::rows), kRowBlocks)};
  return launch(up_all<Tile, kGated>, grid, kThreads, shared_bytes<UpMemory<Tile, kGated>, kUpBlocks<kGated>>(), stream, p);
}

int up_all_experts(const Up& p, const Options& options, void* stream) {
  return with_experts_tile(p.x.dtype, options.tf32, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    return p.w_gate.data ? launch_up_all<Tile, true>(p, stream) : launch_up_all<Tile, false>(p, stream);
  });
}

// By `up`, or, from as many pairs on as the guard says, `up_all`.
int hidden_activations(Up p, bool on_hopper, const Options& options, void* stream) {
  const int code = on_hopper ? up_on_hopper(p, false, stream) : up_experts(p, options, stream);
  if (code || !p.guard.least) return code;
  p.starts = p.rows = nullptr;
  p.s *= p.E, p.E = 1, p.ld_h = p.s;
  return on_hopper ? up_on_hopper(p, true, stream) : up_all_experts(p, options, stream);
}

// Any number of tokens that fits the workspace.
int run_chunk(const Experts& experts, const Plan& plan, const Options& options, void* h, void* stream) {
  const ExpertsShape& s = experts.shape;
  const DType dtype = experts.x.dtype;
  bool hopper = false;
  Device device{};
  int code = on_hopper(options, hopper);
  if (code == 0) code = multiprocessors(device.multiprocessors);
  if (code == 0) code = shared_of_multiprocessor(device.shared);
  if (code == 0) code = make_plan(plan, stream);
  if (code) return code;
  Up p{up_operands(experts, h), plan.starts, plan.rows, s.E, plan.tiles, 0, 0, {}};
  const bool up_warpgroups = hopper && fits_hopper(p);
  if (const double share = up_all_share(s, dtype, p.w_gate.data, up_warpgroups, options, device); share <= 1)
    p.guard = {plan.starts, plan.words, s.E, s.s, plan.tiles, pairs_of(share, plan.T, s.E)};
  code = hidden_activations(p, up_warpgroups, options, stream);
  if (code || s.d_out == 0) return code;
  Down q{down_operands(experts, h), plan.starts, plan.words, s.E, 0};
  const bool warpgroups = hopper && fits_hopper(q);
  if (const double share = crowd_share(s, dtype, warpgroups, options, device); q.T >= kCrowdTokens && share <= 1)
    q.crowd = pairs_of(share, kCrowdTokens, s.E);
  return with_experts_tile(dtype, options.tf32, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    const int error = launch_down<Tile>(q, options, device, stream);
    if (error || !q.crowd) return error;
    return warpgroups ? crowds_on_hopper(q, stream) : launch_down_crowd<Tile>(q, stream);
  });
}

template <class T, int kWidth>
int launch_masked(const MaskedActivation& p, void* stream) {
  const Grid grid{divide(p.E * p.s, kMaskedThreads * kWidth), std::min(p.T, kMaskedRows)};
  const auto kernel = p.gate ? masked_activation<T, kWidth, true> : masked_activation<T, kWidth, false>;
  return launch(kernel, grid, kMaskedThreads, shared_bytes<MaskedMemory, kMaskedBlocks>(), stream, p);
}

template <class T>
int launch_masked(const MaskedActivation& p, void* stream) {
  constexpr int kTogether = 16 / sizeof(T);
  const auto on_16_bytes = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool wide = p.s % kTogether == 0 && on_16_bytes(p.up) && on_16_bytes(p.gate);
  return wide ? launch_masked<T, kTogether>(p, stream) : launch_masked<T, 1>(p, stream);
}

// The tokens [begin, end) of a choice, and of the experts' arguments.
Plan plan_of(const Choice& choice, const Scratch& scratch, int64_t begin, int64_t end, int64_t E) {
  Plan plan{};
  plan.mask = choice.mask ? choice.mask + begin * E : nullptr;
  plan.scores = choice.scores ? choice.scores + begin * E : nullptr;
  plan.tau = choice.tau;
  plan.words = reinterpret_cast<uint32_t*>(scratch.words), plan.starts = scratch.starts, plan.rows = scratch.rows;
  plan.T = end - begin, plan.E = E, plan.tiles = divide(end - begin, kTileTokens);
  return plan;
}

Experts tokens_of(Experts experts, int64_t begin, int64_t end) {
  experts.x = at(experts.x, begin * experts.shape.d);
  experts.y = static_cast<char*>(experts.y) + begin * experts.shape.d_out * size_of(experts.x.dtype);
  experts.shape.T = end - begin;
  return experts;
}

}  // namespace

int use_device(int index) { return set_device(index); }

int router_scores(View x, const Router& router, const RouterShape& s, const Options& options, float* hidden, float* scores,
                  void* stream) {
  const int code = project({x, router.v1, s.T, s.d, router.r, Activation::relu, hidden, false}, options, stream);
  if (code) return code;
  const bool early = router.r > 0;  // else there was no first
  return project({{hidden, DType::f32}, router.v2, s.T, router.r, s.E, Activation::abs, scores, early}, options, stream);
}

int select(const float* scores, int64_t T, int64_t E, float tau, bool* mask, void* stream) {
  if (T == 0) return 0;
  return launch(select, {divide(T, kSelectThreads / 32)}, kSelectThreads, 0, stream, Select{scores, mask, T, E, tau});
}

int masked_activation(const MaskedActivation& p, void* stream) {
  if (p.T == 0) return 0;
  if (p.dtype == DType::f32) return launch_masked<float>(p, stream);
  return p.dtype == DType::bf16 ? launch_masked<bf16>(p, stream) : launch_masked<f16>(p, stream);
}

Workspace workspace(const ExpertsShape& s, DType dtype, const Options& options) {
  const int64_t token_bytes = s.E * padded(s.s) * size_of(dtype);
  const int64_t tiles =
      std::clamp(options.hidden_bytes / (token_bytes * kTileTokens), int64_t{1}, std::max(int64_t{1}, divide(s.T, kTileTokens)));
  const int64_t chunk = std::min(tiles * kTileTokens, s.T);
  return {chunk, 2 * tiles * s.E, (tiles + 2) * s.E, std::max(chunk * s.E, s.E + 1), chunk * s.E * padded(s.s)};
}

int sparse_experts(const Experts& experts, const Choice& choice, const Options& options, const Workspace& workspace,
                   const Scratch& scratch, void* stream) {
  const ExpertsShape& s = experts.shape;
  const bool decode = s.T <= std::min(options.decode_tokens, int64_t{kTileTokens});
  int code = 0;
  for (int64_t t = 0; t < s.T && code == 0; t += workspace.chunk) {
    const int64_t end = std::min(t + workspace.chunk, s.T);
    const Plan plan = plan_of(choice, scratch, t, end, s.E);
    const Experts part = tokens_of(experts, t, end);
    code =
        decode ? decode_experts(part, plan, options.tf32, scratch.h, stream) : run_chunk(part, plan, options, scratch.h, stream);
  }
  return code;
}

int down_tiles(int64_t T, int64_t d_out, DType dtype, const Options& options, const Device& device) {
  return with_experts_tile(dtype, options.tf32,
                           [&](auto tile) { return down_tiles<typename decltype(tile)::type>(T, d_out, options, device); });
}

// By a model, not measured. `up_all` computes only full tiles. Expert by expert, a strip costs as many of their columns as it
// computes or, if it has few, as fetching its tokens' rows costs. Every multiprocessor must have two tiles.
double up_all_share(const ExpertsShape& shape, DType dtype, bool gated, bool warpgroups, const Options& options,
                    const Device& device) {
  constexpr double kNever = 2, kWorth = 0.9;  // above: not worth a launch
  if (padded(shape.s) != shape.s) return kNever;
  if (options.up_all >= 0) return options.up_all;
  const int64_t blocks = divide(shape.T, kTileTokens) * divide(shape.E * shape.s, warpgroups ? 128 : kColumns);
  if (blocks < 2 * device.multiprocessors) return kNever;
  double columns = 0;
  if (warpgroups) {
    const int64_t strips = divide(shape.s, 128);
    const double computed = static_cast<double>(divide(divide(shape.s, strips), 32) * 32);
    columns = static_cast<double>(strips) * std::max(computed, gated ? 33 + 0.55 * computed : 68 + 0.25 * computed);
  } else {
    const int64_t left = shape.s % kColumns, tall = 2 * left <= kColumns ? left : 0;
    columns = static_cast<double>(divide(shape.s - tall, kColumns) * kColumns);
    const double brought = (gated ? 17 : 31) + 0.25 * static_cast<double>(tall);
    if (tall) columns += dtype == DType::f32 && !options.tf32 ? TallFma::columns : std::max<double>(tall, brought);
  }
  const double waves = static_cast<double>(divide(blocks, device.multiprocessors) * device.multiprocessors);
  const double share = static_cast<double>(shape.s) / columns * waves / static_cast<double>(blocks);
  return share <= kWorth ? share : kNever;
}

// By a model, not measured, of a column of a pair. On sm_90a: hopper_down.cuh takes as long as so many steps of the depth, of a
// product at 0.65 of the dense rate, and 13 to add it; down.cuh 168 to add it in shared memory, and 2.45 for every neuron to
// bring operands. Elsewhere, in clocks of a multiprocessor of an A100: both take `neuron` for each, to multiply it or to bring
// its operands; crowd.cuh 0.0117 to add, down.cuh 0.147. A crowd has few blocks, which must fill the multiprocessors.
double crowd_share(const ExpertsShape& shape, DType dtype, bool warpgroups, const Options& options, const Device& device) {
  if (options.crowd >= 0) return options.crowd;
  int tokens = kCrowdTokens, step = 0;
  if (!warpgroups)
    with_experts_tile(dtype, options.tf32, [&](auto tile) {
      using Tile = typename decltype(tile)::type;
      tokens = CrowdBlock<Tile>::kTokens, step = Tile::kDepth;
      return 0;
    });
  const int64_t blocks = divide(shape.T, tokens) * divide(shape.d_out, kColumns);
  const double waves = static_cast<double>(divide(blocks, device.multiprocessors) * device.multiprocessors);
  double full = 0;
  if (warpgroups) {
    full = static_cast<double>(13 + crowd_depth(shape.s)) / (168 + 2.45 * static_cast<double>(shape.s));
  } else {
    const double neuron = dtype != DType::f32 ? 0.0019 : options.tf32 ? 0.0039 : 0.042;
    const double products = neuron * static_cast<double>(divide(shape.s, step) * step);
    full = (0.0117 + products) / (0.147 + products);
  }
  return full * waves / static_cast<double>(blocks);
}

const char* error_string(int code) { return error_text(code); }

}  // namespace sadmoe::cuda
