// Few tokens: time is the weights' way from memory. Each weight that any token needs is read once, by 16 bytes, with many
// reads in flight, and every token goes along; what a token did not choose is left out of its sum. Results are those of
// up.cuh and down.cuh bit for bit.
#pragma once
#include "cuda/plan.cuh"
#include "cuda/strip.cuh"
#include "cuda/up.cuh"

namespace sadmoe::cuda {

// Of shared memory that every device gives a block without being asked; what is left holds a few words more.
constexpr int kStageBytes = 46 << 10, kMostStages = 12;
constexpr int kInFlight = 8;  // copies of a thread on their way before the first is used

// Every kernel here begins so: the launch of the next is under way while this one works.
SADMOE_DEVICE void begin_kernel() {
  start_kernel_after();
  wait_kernel_before();
}

// The words of both groups and the active experts, by one block.
SADMOE_KERNEL(kWordThreads) plan_decode(Plan p) {
  begin_kernel();
  SADMOE_SHARED(WordMemory, memory);
  make_words(p, 0, memory);
  sync_block();
  make_words(p, 1, memory);
  int32_t before = 0;
  for (int64_t e0 = 0; e0 < p.E; e0 += kWordThreads) {
    const int64_t e = e0 + thread_index();
    const bool active = e < p.E && (p.words[e] | p.words[p.E + e]);  // this thread's own words
    int32_t all;
    const int32_t rank = before + scan_block<kWordThreads>(active, all, memory.warp_sums);
    if (active) p.rows[rank] = static_cast<int32_t>(e);
    before += all;
  }
  if (thread_index() == 0) p.rows[0] = before;
}

// h[i T + t, j] = act(x[t] . w_up[e, j] + b_up[e, j])   for the i-th active expert e, every token t; GLU as in contract.h
struct DecodeUp {
  Matrix x, w_up, w_gate;  // [T, d]   [E s, d]
  View b_up, b_gate;       // [E s]
  const int32_t* active;   // of the plan; null: one expert, which all tokens chose
  int64_t T, d, s;
  void* h;  // [active T, ld_h]
  int64_t ld_h;
  DType h_dtype;
  Activation act;
};

// A block takes 8 neurons a warp: few, so that there are blocks for all multiprocessors; more where x weighs as much.
constexpr int decode_up_threads(int tokens) { return tokens == 16 ? 64 : 128; }

template <class Tile, bool kGated, int kTokens>
struct DecodeUpBlock {
  static constexpr int kThreads = decode_up_threads(kTokens), kWarps = kThreads / 32, kNeurons = 8 * kWarps;
  static constexpr int kDepth = Tile::kDepth * (kTokens == 16 ? 2 : 1), kMatrices = kGated ? 2 : 1;
  using Element = typename Tile::Element;
  struct Stages {
    Stage<Element, kTokens, kDepth, Tile::kRowPad> x;
    Stage<Element, kNeurons, kDepth, Tile::kRowPad> w[kMatrices];
  };
  static constexpr int kStages = stages_in<Stages>(kStageBytes, kMostStages);
  static constexpr int kCopies = (kTokens + kNeurons * kMatrices) * kDepth * sizeof(Element) / 16 / kThreads;
  static_assert((kStages - 1) * kCopies >= kInFlight, "enough on its way");
  struct Memory {
    int64_t neurons[kNeurons];  // rows of the weights, or -1
    union {
      Stages stages[kStages];
      float sums[kMatrices][kTokens][kNeurons];
    };
  };
};

// The active neurons in strips of 8, an equal share for every block: block i takes the i-th kWarps of them, and every
// blocks_x-th kWarps after.
template <class Tile, bool kGated, int kTokens>
SADMOE_KERNEL(decode_up_threads(kTokens), 512 / decode_up_threads(kTokens))
decode_up(DecodeUp p) {
  using Block = DecodeUpBlock<Tile, kGated, kTokens>;
  using Memory = typename Block::Memory;
  using Stages = typename Block::Stages;
  constexpr int kThreads = Block::kThreads, kDepth = Block::kDepth, kNeurons = Block::kNeurons;
  SADMOE_SHARED(Memory, memory);
  begin_kernel();
  const int64_t strips = (p.s + 7) / 8, all = (p.active ? p.active[0] : 1) * strips;
  for (int64_t strip0 = block_x() * Block::kWarps; strip0 < all; strip0 += blocks_x() * Block::kWarps) {
    if (thread_index() < kNeurons) {
      const int64_t strip = strip0 + thread_index() / 8, i = strip / strips, j = strip % strips * 8 + thread_index() % 8;
      memory.neurons[thread_index()] = strip < all && j < p.s ? (p.active ? p.active[1 + i] : 0) * p.s + j : -1;
    }
    sync_block();
    const auto token = [&](int r) { return r < p.T ? r : -1; };
    const auto neuron = [&](int r) { return memory.neurons[r]; };
    const int c0 = thread_index() / 32 * 8;
    Strip<Tile, kTokens> sums, gates;
    pipeline(
        memory.stages, static_cast<int>((p.d + kDepth - 1) / kDepth),
        [&](Stages& stage, int step) {
          const int64_t k = int64_t{step} * kDepth;
          Tile::template load<kThreads>(stage.w[0], p.w_up, k, p.d, neuron);
          if constexpr (kGated) Tile::template load<kThreads>(stage.w[1], p.w_gate, k, p.d, neuron);
          Tile::template load<kThreads>(stage.x, p.x, k, p.d, token);
        },
        [&](const Stages& stage, int) {
          sums.rows(stage.x, stage.w[0], c0);
          if constexpr (kGated) gates.rows(stage.x, stage.w[1], c0);
        });
    SADMOE_UNROLL
    for (int i = 0; i < sums.kSums; ++i) {
      memory.sums[0][sums.row(i)][c0 + sums.column(i)] = sums.sums[i];
      if constexpr (kGated) memory.sums[1][sums.row(i)][c0 + sums.column(i)] = gates.sums[i];
    }
    sync_block();
    SADMOE_ROLLED
    for (int i = thread_index(); i < p.T * kNeurons; i += kThreads) {
      const int64_t t = i / kNeurons, c = i % kNeurons, strip = strip0 + c / 8, neuron = memory.neurons[c];
      if (neuron < 0) continue;
      const int64_t row = strip / strips * p.T + t, j = strip % strips * 8 + c % 8;
      const float gate = kGated ? memory.sums[kGated ? 1 : 0][t][c] : 0;
      store(p.h, p.h_dtype, row * p.ld_h + j, epilogue<kGated>(p, neuron, memory.sums[0][t][c], gate));
    }
    sync_block();
  }
}

// y[t] = b_out + sum over the experts e that t chose, ascending, of h[i T + t] w_down[e], e the i-th active
struct DecodeDown {
  Matrix h, w_down;  // [active T, s]   [E s, d_out]
  View b_out;        // [d_out]
  const int32_t* active;
  const uint32_t* words;  // of the plan
  int64_t T, E, s, d_out;
  void* y;  // [T, d_out]
  DType dtype;
};

constexpr int kDownThreads = 128, kDownColumns = kDownThreads / 32 * 8;

template <class Tile, int kTokens>
struct DecodeDownBlock {
  using Element = typename Tile::Element;
  static constexpr int kDepth = Tile::kDepth;
  struct Stages {
    Stage<Element, kTokens, kDepth, Tile::kRowPad> h;
    Stage<Element, kDepth, kDownColumns, Tile::kDepthPad> w;
  };
  static constexpr int kStages = stages_in<Stages>(kStageBytes, kMostStages);
  static_assert((kStages - 1) * kDepth * kDownColumns * sizeof(Element) / 16 / kDownThreads >= kInFlight || kTokens > 16,
                "enough on its way");
  union Memory {
    Stages stages[kStages];
    float y[kTokens][kDownColumns];
  };
};

// A block owns columns of y and walks all active neurons: no sum crosses blocks. Experts follow each other in one pipeline.
template <class Tile, int kTokens>
SADMOE_KERNEL(kDownThreads, 4)
decode_down(DecodeDown p) {
  using Block = DecodeDownBlock<Tile, kTokens>;
  using Memory = typename Block::Memory;
  using Stages = typename Block::Stages;
  constexpr int kDepth = Block::kDepth;
  SADMOE_SHARED(Memory, memory);
  begin_kernel();
  const int64_t block_c0 = block_x() * kDownColumns;
  const int c0 = thread_index() / 32 * 8, steps = static_cast<int>((p.s + kDepth - 1) / kDepth);
  Strip<Tile, kTokens> y, sums;
  SADMOE_UNROLL
  for (int i = 0; i < y.kSums; ++i) {
    const int64_t c = block_c0 + c0 + y.column(i);
    y.sums[i] = p.b_out.data && c < p.d_out ? load(p.b_out, c) : 0;
  }
  pipeline(
      memory.stages, p.active[0] * steps,
      [&](Stages& stage, int step) {
        const int64_t i = step / steps, k = int64_t{step % steps} * kDepth, e = p.active[1 + i];
        const auto token = [&](int r) { return r < p.T ? i * p.T + r : -1; };
        const auto neuron = [&](int r) { return k + r < p.s ? e * p.s + k + r : -1; };
        Tile::template load<kDownThreads>(stage.w, p.w_down, block_c0, p.d_out, neuron);
        Tile::template load<kDownThreads>(stage.h, p.h, k, p.s, token);
      },
      [&](const Stages& stage, int step) {
        sums.depths(stage.h, stage.w, c0);
        if (step % steps != steps - 1) return;
        const int64_t e = p.active[1 + step / steps];
        const uint32_t low = p.words[e], high = p.words[p.E + e];
        SADMOE_UNROLL
        for (int i = 0; i < sums.kSums; ++i) {
          const int t = sums.row(i);
          if ((t < 32 ? low : high) >> (t % 32) & 1) y.sums[i] += sums.sums[i];
          sums.sums[i] = 0;
        }
      });
  SADMOE_UNROLL
  for (int i = 0; i < y.kSums; ++i) memory.y[y.row(i)][c0 + y.column(i)] = y.sums[i];
  sync_block();
  SADMOE_ROLLED
  for (int i = thread_index(); i < p.T * kDownColumns; i += kDownThreads) {
    const int64_t t = i / kDownColumns, c = block_c0 + i % kDownColumns;
    if (c < p.d_out) store(p.y, p.dtype, t * p.d_out + c, memory.y[t][i % kDownColumns]);
  }
}

}  // namespace sadmoe::cuda
