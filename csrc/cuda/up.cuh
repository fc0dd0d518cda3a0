// Hidden activations of the pairs of a plan, in compact rows: expert by expert (`up`), or, of tokens that chose many experts, as
// one product of all tokens and all neurons, of which the pairs are kept (`up_all`); and both layers of the router.
#pragma once
#include "cuda/plan.cuh"
#include "cuda/tile.cuh"

namespace sadmoe::cuda {

// h[p, j] = act(x[rows[p]] . w_up[e, j] + b_up[e, j])   for the pairs p of expert e; GLU as in contract.h
struct Up {
  Matrix x, w_up, w_gate;  // [T, d]   [E s, d]
  View b_up, b_gate;       // [E s]
  const int32_t* starts;   // of the plan, [tiles + 1, E]; null: one expert, and pair p is token p
  const int32_t* rows;
  const uint32_t* words;
  int64_t T, d, E, s, tiles;
  void* h;  // [pairs, ld_h], zeros beyond s
  int64_t ld_h;
  DType h_dtype;
  Activation act;
  int64_t first, strips;  // of a launch: neurons of every expert from the first on, in so many strips
  int32_t all_from;       // pairs of the plan from which `up_all` computes h, and `up` nothing; 0: never
};

SADMOE_DEVICE bool all_at_once(const Up& p) { return p.all_from && p.starts[p.tiles * p.E + p.E - 1] >= p.all_from; }

// As csrc/cpu/activate.h. NaN stays NaN. Minus infinity, which gelu would multiply with 0 and the others divide by infinity,
// becomes 0.
SADMOE_DEVICE float activate(Activation act, float v) {
  constexpr float kLeast = -3.402823466e38f;
  const float bounded = v < kLeast ? kLeast : v;
  switch (act) {
    case Activation::relu:
      return v < 0 ? 0 : v;
    case Activation::gelu:
      return 0.5f * bounded * erfc(-0.70710678118654752f * v);
    case Activation::gelu_tanh:
      return bounded / (1 + exp(-1.5957691216057308f * v * fma(v * v, 0.044715f, 1.0f)));
    case Activation::silu:
      return bounded / (1 + exp(-v));
    case Activation::abs:
      return v < 0 ? -v : v;
    default:
      return v;
  }
}

// body(the activation), compiled for each.
template <class Body>
SADMOE_DEVICE void with_activation(Activation act, Body body) {
  switch (act) {
    case Activation::relu:
      return body([](float v) { return activate(Activation::relu, v); });
    case Activation::gelu:
      return body([](float v) { return activate(Activation::gelu, v); });
    case Activation::gelu_tanh:
      return body([](float v) { return activate(Activation::gelu_tanh, v); });
    case Activation::silu:
      return body([](float v) { return activate(Activation::silu, v); });
    case Activation::abs:
      return body([](float v) { return activate(Activation::abs, v); });
    default:
      return body([](float v) { return v; });
  }
}

// Where a row of a tile is in h, in elements from its first: all rows of one expert's pairs are, one after another;
struct InOrder {
  int64_t at, ld;
  SADMOE_DEVICE bool has(int) const { return true; }
  SADMOE_DEVICE int64_t of(int r) const { return at + r * ld; }
};
// of all tokens those that chose the expert, by their rank in the plan. Row r is token r + base of a group.
struct ByRank {
  uint32_t word;
  int base;
  int64_t at, ld;  // at: of the group's first pair
  SADMOE_DEVICE bool has(int r) const { return word >> (r + base) & 1; }
  SADMOE_DEVICE int64_t of(int r) const { return at + rank_in(word, r + base) * ld; }
};
// Of neuron j of all, from row 0 of the tile, which is token t0, to the end of the group of the row r0.
SADMOE_DEVICE ByRank by_rank(const Up& p, int64_t j, int64_t t0, int r0) {
  const int64_t g = (t0 + r0) / kGroupTokens, e = static_cast<int>(j) / static_cast<int>(p.s);
  const uint32_t* words = p.words + g * p.E + e;
  const int64_t first = p.starts[g / 2 * p.E + e] + (g % 2 ? count_bits(words[-p.E]) : 0);
  return {*words, static_cast<int>(t0 - g * kGroupTokens), first * p.ld_h + j - e * p.s, p.ld_h};
}

// h of some neighbouring neurons, 4 bytes in all, of the rows first, first + step, ... below n, as far as `place` has them. Only
// the first `valid` of them are neurons, the others fill up a row of h with zeros. sums(m, r): where the sums of row r are, of
// w_up (0) and w_gate (1). P: Up or DecodeUp.
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

// body(To{}) of the type of h: what the tile multiplies, or float32, in which the router continues.
template <class Element, bool kGated, class Body>
SADMOE_DEVICE void with_hidden_type(DType dtype, Body body) {
  if constexpr (!kGated && sizeof(Element) == 2)
    if (dtype == DType::f32) return body(float{});
  body(Element{});
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

// Block (x, y): expert and strip of its neurons x, every blocks_y-th strip of its tokens from y on. kAll: of one expert that has
// the neurons of all, and that every token takes.
template <class Tile, bool kGated, bool kAll>
SADMOE_DEVICE void compute_hidden(const Up& p, UpMemory<Tile, kGated>& memory) {
  using Stages = UpStages<Tile, kGated>;
  using Element = typename Tile::Element;
  constexpr int kDepth = Tile::kDepth;
  const bool by_expert = !kAll && p.starts;
  const int64_t e = kAll ? 0 : block_x() / p.strips, j0 = p.first + (block_x() - e * p.strips) * Tile::columns;
  const int64_t begin = by_expert ? p.starts[e] : 0, end = by_expert ? p.starts[p.tiles * p.E + e] : p.T;
  const int64_t all = kAll ? p.E * p.s : p.s;  // neurons
  const auto neuron = [&](int r) { return (e * p.s + j0 + r) * p.w_up.ld; };
  const auto w = source<Element, kThreads, ColumnStage<Tile>>(p.w_up, neuron);
  const auto gate = source<Element, kThreads, ColumnStage<Tile>>(kGated ? p.w_gate : p.w_up, neuron);
  const int neurons = kept(static_cast<int>(all - j0)), d = static_cast<int>(p.d);
  for (int64_t p0 = begin + block_y() * Tile::rows; p0 < end; p0 += blocks_y() * Tile::rows) {
    const int n = static_cast<int>(end - p0 < Tile::rows ? end - p0 : Tile::rows);
    if (const int r = thread_index(); r < Tile::rows)
      memory.tokens[r] = static_cast<int>(by_expert && r < n ? p.rows[p0 + r] : p0 + r);
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
          const auto multiply = [&](Tile& to, const auto& w) {
            if constexpr (Tile::columns < kColumns)
              to.multiply(stage.x, w, n, neurons);
            else
              to.multiply(stage.x, w, n);
          };
          multiply(sums, stage.w[0]);
          if constexpr (kGated) multiply(gates, stage.w[1]);
        });
    store_sums(sums, memory.sums[0]);
    if constexpr (kGated) store_sums(gates, memory.sums[1]);
    sync_block();
    with_hidden_type<Element, kGated>(p.h_dtype, [&](auto to) {
      constexpr int kNeurons = 4 / sizeof(to), kOfRow = Tile::columns / kNeurons, kStep = kThreads / kOfRow;  // threads; rows
      const int c = thread_index() % kOfRow * kNeurons, r0 = thread_index() / kOfRow;
      const int64_t j = j0 + c;
      const auto sums_of = [&](int m, int r) { return &memory.sums[m][r][c]; };
      if constexpr (kAll) {
        const int rows = j < all ? n : 0;
        SADMOE_ROLLED
        for (int r = r0; r < rows; r += kGroupTokens) {
          const int last = r - r0 + kGroupTokens;
          write_hidden<decltype(to), kGated>(p, j, all - j, r, last < n ? last : n, kStep, by_rank(p, j, p0, r), sums_of);
        }
      } else if (j < p.ld_h) {
        write_hidden<decltype(to), kGated>(p, e * p.s + j, p.s - j, r0, n, kStep, InOrder{p0 * p.ld_h + j, p.ld_h}, sums_of);
      }
    });
    sync_block();
  }
}

template <class Tile, bool kGated>
SADMOE_KERNEL(kThreads, kGated ? 3 : 4)
up(Up p) {
  using Memory = UpMemory<Tile, kGated>;
  SADMOE_SHARED(Memory, memory);
  if (!all_at_once(p)) compute_hidden<Tile, kGated, false>(p, memory);
}

// Of experts of a multiple of 8 neurons: rows of h have no more, and neighbours are of one expert.
template <class Tile, bool kGated>
SADMOE_KERNEL(kThreads, kGated ? 3 : 4)
up_all(Up p) {
  using Memory = UpMemory<Tile, kGated>;
  SADMOE_SHARED(Memory, memory);
  if (all_at_once(p)) compute_hidden<Tile, kGated, true>(p, memory);
}

}  // namespace sadmoe::cuda
