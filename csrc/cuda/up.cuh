// Hidden activations of the pairs of a plan, expert by expert, in compact rows; and both layers of the router.
#pragma once
#include "cuda/tile.cuh"

namespace sadmoe::cuda {

// h[p, j] = act(x[rows[p]] . w_up[e, j] + b_up[e, j])   for the pairs p of expert e; GLU as in contract.h
struct Up {
  Matrix x, w_up, w_gate;  // [T, d]   [E s, d]
  View b_up, b_gate;       // [E s]
  const int32_t* starts;   // of the plan, [tiles + 1, E]; null: one expert, and pair p is token p
  const int32_t* rows;
  int64_t T, d, E, s, tiles;
  void* h;  // [pairs, ld_h]
  int64_t ld_h;
  DType h_dtype;
  Activation act;
};

// As csrc/cpu/activate.h. NaN stays NaN.
SADMOE_DEVICE float activate(Activation act, float v) {
  switch (act) {
    case Activation::relu:
      return v < 0 ? 0 : v;
    case Activation::gelu:
      return 0.5f * v * erfc(-0.70710678118654752f * v);
    case Activation::gelu_tanh:
      return v / (1 + exp(-1.5957691216057308f * v * fma(v * v, 0.044715f, 1.0f)));
    case Activation::silu:
      return v / (1 + exp(-v));
    case Activation::abs:
      return v < 0 ? -v : v;
    default:
      return v;
  }
}

template <class Tile, bool kGated>
struct UpStages {
  RowStage<Tile> x, w[kGated ? 2 : 1];
};

template <class Tile, bool kGated>
struct UpMemory {
  int32_t tokens[kRows];
  union {
    UpStages<Tile, kGated> stages[kStages];
    float sums[kGated ? 2 : 1][kRows][kColumns];
  };
};

template <bool kGated>
SADMOE_DEVICE float activate(Activation act, float value, float gate) {
  return kGated ? activate(act, gate) * value : activate(act, value);
}

// P: Up or DecodeUp.
template <bool kGated, class P>
SADMOE_DEVICE float epilogue(const P& p, int64_t neuron, float value, float gate) {
  if (p.b_up.data) value += load(p.b_up, neuron);
  if (kGated && p.b_gate.data) gate += load(p.b_gate, neuron);
  return activate<kGated>(p.act, value, gate);
}

// Block (x, y): expert and strip of its neurons x, every blocks_y-th strip of its tokens from y on.
template <class Tile, bool kGated>
SADMOE_KERNEL(kThreads, kGated ? 3 : 4)
up(Up p) {
  using Stages = UpStages<Tile, kGated>;
  using Memory = UpMemory<Tile, kGated>;
  SADMOE_SHARED(Memory, memory);
  const int64_t strips = (p.s + kColumns - 1) / kColumns, e = block_x() / strips, j0 = block_x() % strips * kColumns;
  const int64_t begin = p.starts ? p.starts[e] : 0, end = p.starts ? p.starts[p.tiles * p.E + e] : p.T;
  for (int64_t p0 = begin + block_y() * kRows; p0 < end; p0 += blocks_y() * kRows) {
    const int n = static_cast<int>(end - p0 < kRows ? end - p0 : kRows);
    if (const int r = thread_index(); r < kRows)
      memory.tokens[r] = r < n ? p.rows ? p.rows[p0 + r] : static_cast<int32_t>(p0 + r) : -1;
    sync_block();
    const auto token = [&](int r) { return memory.tokens[r]; };
    const auto neuron = [&](int r) { return j0 + r < p.s ? e * p.s + j0 + r : -1; };
    Tile sums, gates;
    pipeline(
        memory.stages, static_cast<int>((p.d + Tile::kDepth - 1) / Tile::kDepth),
        [&](Stages& stage, int step) {
          const int64_t k = int64_t{step} * Tile::kDepth;
          Tile::template load<kThreads>(stage.x, p.x, k, p.d, token);
          Tile::template load<kThreads>(stage.w[0], p.w_up, k, p.d, neuron);
          if constexpr (kGated) Tile::template load<kThreads>(stage.w[1], p.w_gate, k, p.d, neuron);
        },
        [&](const Stages& stage, int) {
          sums.multiply(stage.x, stage.w[0], n);
          if constexpr (kGated) gates.multiply(stage.x, stage.w[1], n);
        });
    store_sums(sums, memory.sums[0]);
    if constexpr (kGated) store_sums(gates, memory.sums[1]);
    sync_block();
    SADMOE_ROLLED
    for (int i = thread_index(); i < n * kColumns; i += kThreads) {
      const int r = i / kColumns, c = i % kColumns;
      if (j0 + c >= p.s) continue;
      const float gate = kGated ? memory.sums[kGated ? 1 : 0][r][c] : 0;
      store(p.h, p.h_dtype, (p0 + r) * p.ld_h + j0 + c, epilogue<kGated>(p, e * p.s + j0 + c, memory.sums[0][r][c], gate));
    }
    sync_block();
  }
}

}  // namespace sadmoe::cuda
