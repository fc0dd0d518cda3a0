// Hidden activations of the pairs of a plan, in compact rows: expert by expert (`up`), or, where tokens chose many experts, as
// one product of all tokens and all neurons, of which the pairs are kept (`up_all`); and both layers of the router.
#pragma once
#include "cuda/operands.cuh"
#include "cuda/plan.cuh"

namespace sadmoe::cuda {

// What decides on the device which of the two works: how many pairs a plan has. And where `up_all` finds the row of a pair.
struct Guard {
  const int32_t* starts;  // of the plan, [tiles + 1, E]
  const uint32_t* words;  // [2 tiles, E]
  int64_t E, s, tiles;
  int32_t least;  // pairs that are work for `up_all`, fewer for `up`; 0: all are for `up`
  SADMOE_DEVICE bool reached() const { return least && starts[tiles * E + E - 1] >= least; }
};

// h[p, j] = act(x[rows[p]] . w_up[e, j] + b_up[e, j])   for the pairs p of expert e; GLU as in contract.h
struct Up : UpOperands {
  const int32_t* starts;  // of the plan, [tiles + 1, E]; null: one expert, and pair p is token p
  const int32_t* rows;    // of the plan; null likewise
  int64_t E, tiles;
  int64_t first, strips;  // of a launch: neurons of every expert from the first on, in so many strips
  Guard guard;            // of `up_all`, for which all neurons are one expert's: of the experts
};

// For minus infinity, which gelu would multiply with 0 and the others divide by infinity.
SADMOE_DEVICE float bounded(float v) {
  constexpr float kLeast = -3.402823466e38f;
  return v < kLeast ? kLeast : v;
}
// body(the activation), compiled for each. As csrc/cpu/activate.h; NaN stays NaN.
template <class Body>
SADMOE_DEVICE void with_activation(Activation act, Body body) {
  switch (act) {
    case Activation::relu:
      return body([](float v) { return v < 0 ? 0 : v; });
    case Activation::gelu:
      return body([](float v) { return 0.5f * bounded(v) * erfc(-0.70710678118654752f * v); });
    case Activation::gelu_tanh:
      return body([](float v) { return bounded(v) / (1 + exp(-1.5957691216057308f * v * fma(v * v, 0.044715f, 1.0f))); });
    case Activation::silu:
      return body([](float v) { return bounded(v) / (1 + exp(-v)); });
    case Activation::quick_gelu:
      return body([](float v) { return bounded(v) / (1 + exp(-1.702f * v)); });
    case Activation::relu2:
      return body([](float v) { return v < 0 ? 0 : v * v; });
    default:  // abs
      return body([](float v) { return v < 0 ? -v : v; });
  }
}

// Which rows of a tile are rows of h, and where, in elements. Of an expert's pairs all are, one after another.
struct InOrder {
  int64_t at, ld;
  SADMOE_DEVICE bool has(int) const { return true; }
  SADMOE_DEVICE int64_t of(int r) const { return at + r * ld; }
};
// Of all tokens those are that chose the expert, by their rank in the plan. The tile's rows are tokens of one group, from its
// `base`-th on; `at` is where the group's first pair is.
struct ByRank {
  uint32_t word;
  int base;
  int64_t at, ld;
  SADMOE_DEVICE bool has(int r) const { return word >> (base + r) & 1; }
  SADMOE_DEVICE int64_t of(int r) const { return at + rank_in(word, base + r) * ld; }
};
// Of neuron j, row 0 being row p0 of h, or token p0.
template <bool kAll, class P>
SADMOE_DEVICE auto place(const P& p, int64_t p0, int64_t j) {
  if constexpr (kAll) {
    const Guard& guard = p.guard;
    const int64_t g = p0 / kGroupTokens, e = static_cast<int>(j) / static_cast<int>(guard.s);
    const uint32_t* words = guard.words + g * guard.E + e;
    const int64_t first = guard.starts[g / 2 * guard.E + e] + (g % 2 ? count_bits(words[-guard.E]) : 0);
    return ByRank{*words, static_cast<int>(p0 % kGroupTokens), first * guard.s + j - e * guard.s, guard.s};
  } else {
    return InOrder{p0 * p.ld_h + j, p.ld_h};
  }
}

// h of some neighbouring neurons, 4 bytes in all, of the rows first, first + step, ... below n, where `place` has them. Only the
// first `valid` of them are neurons, the others fill up a row of h with zeros. sums(m, r): where the sums of row r are, of w_up
// (0) and w_gate (1). P: Up or DecodeUp.
template <class To, bool kGated, class P, class Place, class Sums>
SADMOE_DEVICE void write_hidden(const P& p, int64_t neuron, int64_t valid, int first, int n, int step, const Place& place,
                                Sums sums) {
  constexpr int kNeurons = 4 / sizeof(To);
  float up_bias[kNeurons] = {}, gate_bias[kNeurons] = {};
  SADMOE_UNROLL
  for (int i = 0; i < kNeurons; ++i) {
    if (i >= valid) break;
    if (p.b_up.data) up_bias[i] = load(p.b_up, neuron + i);
    if (kGated && p.b_gate.data) gate_bias[i] = load(p.b_gate, neuron + i);
  }
  To* to = static_cast<To*>(p.h);
  with_activation(p.act, [&](auto act) {
    SADMOE_UNROLLED(2)
    for (int r = first; r < n; r += step) {
      if (!place.has(r)) continue;
      float values[kNeurons];
      SADMOE_UNROLL
      for (int i = 0; i < kNeurons; ++i) {
        const float up = sums(0, r)[i] + up_bias[i];
        const float value = kGated ? act(sums(kGated ? 1 : 0, r)[i] + gate_bias[i]) * up : act(up);
        values[i] = i < valid ? value : 0;
      }
      store_word(values, to + place.of(r));
    }
  });
}

template <class Tile, bool kGated>
struct UpStages {
  RowStage<Tile> x;
  ColumnStage<Tile> w[kGated ? 2 : 1];
};

template <class Tile, bool kGated>
struct UpMemory {
  int32_t tokens[Tile::rows];
  union {
    UpStages<Tile, kGated> stages[kStages];
    float sums[kGated ? 2 : 1][Tile::rows][Tile::columns + 8];  // that neighbouring rows are in different banks
  };
};

// Block (x, y): expert and strip of its neurons x, every blocks_y-th strip of its tokens from y on.
template <class Tile, bool kGated, bool kAll>
SADMOE_DEVICE void compute_hidden(const Up& p, UpMemory<Tile, kGated>& memory) {
  using Stages = UpStages<Tile, kGated>;
  using Element = typename Tile::Element;
  constexpr int kDepth = Tile::kDepth;
  const int64_t e = block_x() / p.strips, j0 = p.first + block_x() % p.strips * Tile::columns;
  const int64_t begin = p.starts ? p.starts[e] : 0, end = p.starts ? p.starts[p.tiles * p.E + e] : p.T;
  const auto neuron = [&](int r) { return (e * p.s + j0 + r) * p.w_up.ld; };
  const auto w = source<Element, kThreads, ColumnStage<Tile>>(p.w_up, neuron);
  const auto gate = source<Element, kThreads, ColumnStage<Tile>>(kGated ? p.w_gate : p.w_up, neuron);
  const int neurons = kept(static_cast<int>(p.s - j0)), d = static_cast<int>(p.d);
  for (int64_t p0 = begin + block_y() * Tile::rows; p0 < end; p0 += blocks_y() * Tile::rows) {
    const int n = static_cast<int>(end - p0 < Tile::rows ? end - p0 : Tile::rows);
    if (const int r = thread_index(); r < Tile::rows)
      memory.tokens[r] = static_cast<int>(p.rows && r < n ? p.rows[p0 + r] : p0 + r);
    sync_block();
    const auto x = source<Element, kThreads, RowStage<Tile>>(p.x, [&](int r) { return memory.tokens[r] * p.x.ld; });
    Tile sums, gates;
    int left = d;
    unsigned on = 0;
    pipeline(
        memory.stages, (d + kDepth - 1) / kDepth,
        [&](Stages& stage) {
          const auto fill = [&](const auto& from, auto& to, int rows, int used) {
            if (from.wide())
              from.copy(to, on, rows, left, used);
            else
              from.load(to, d - left, rows, left);
          };
          fill(x, stage.x, n, n);
          fill(w, stage.w[0], neurons, Tile::columns);
          if constexpr (kGated) fill(gate, stage.w[1], neurons, Tile::columns);
          left -= kDepth, on += kDepth / x.kWide;
        },
        [&](const Stages& stage) {
          sums.multiply(stage.x, stage.w[0], n, neurons);
          if constexpr (kGated) gates.multiply(stage.x, stage.w[1], n, neurons);
        });
    store_sums(sums, memory.sums[0]);
    if constexpr (kGated) store_sums(gates, memory.sums[1]);
    sync_block();
    using Hidden = typename Tile::Hidden;
    constexpr int kNeurons = 4 / sizeof(Hidden), kOfRow = Tile::columns / kNeurons;  // threads
    constexpr int kTogether = kAll ? kGroupTokens : Tile::rows;                      // rows
    const int c = thread_index() % kOfRow * kNeurons;
    const int64_t j = j0 + c;
    SADMOE_ROLLED
    for (int r0 = 0; r0 < n && j < p.ld_h; r0 += kTogether)
      write_hidden<Hidden, kGated>(p, e * p.s + j, p.s - j, thread_index() / kOfRow, n - r0 < kTogether ? n - r0 : kTogether,
                                   kThreads / kOfRow, place<kAll>(p, p0 + r0, j),
                                   [&](int m, int r) { return &memory.sums[m][r0 + r][c]; });
    sync_block();
  }
}

template <bool kGated>
constexpr int kUpBlocks = kGated ? 3 : 4;  // a multiprocessor

template <class Tile, bool kGated>
SADMOE_KERNEL(kThreads, kUpBlocks<kGated>)
up(Up p) {
  using Memory = UpMemory<Tile, kGated>;
  SADMOE_SHARED(Memory, memory);
  if (!p.guard.reached()) compute_hidden<Tile, kGated, false>(p, memory);
}

// Of experts of a multiple of 8 neurons: rows of h have no others, and neighbours are one expert's.
template <class Tile, bool kGated>
SADMOE_KERNEL(kThreads, kUpBlocks<kGated>)
up_all(Up p) {
  using Memory = UpMemory<Tile, kGated>;
  SADMOE_SHARED(Memory, memory);
  if (p.guard.reached()) compute_hidden<Tile, kGated, true>(p, memory);
}

}  // namespace sadmoe::cuda
