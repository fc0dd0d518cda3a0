// The output, a tile of tokens by a strip of columns at a time: every expert in ascending order adds into float32 sums in
// shared memory, and y is written once. No atomics: the same bits every time, whatever the other tokens are.
#pragma once
#include "cuda/plan.cuh"
#include "cuda/tile.cuh"

namespace sadmoe::cuda {

// y[t] = b_out + sum over the pairs p of t, experts ascending, of h[p] w_down[e]
struct Down {
  Matrix h, w_down;  // [pairs, s]   [E s, d_out]
  View b_out;        // [d_out]
  const int32_t* starts;
  const uint32_t* words;
  int64_t T, E, s, d_out;
  void* y;  // [T, d_out]
  DType dtype;
};

template <class Tile>
struct DownStages {
  RowStage<Tile> h;
  DepthStage<Tile> w;
  int16_t tokens[kTileTokens];  // of the tile, whose pairs are the rows of h
};

template <class Tile>
struct DownMemory {
  float y[kTileTokens][kColumns];
  DownStages<Tile> stages[kStages];
};

static_assert(kTileTokens == kRows, "the pairs of an expert in a tile of tokens are the rows of one product");

// The experts of a tile of tokens, ascending, 32 at a glance: a lane holds the words and the first pair of one. Each warp
// walks alone and sees the same.
struct Walk {
  const Down& p;
  int64_t tile, e0 = -32;
  unsigned low, high, active = 0;  // of this lane's expert; of the 32 experts, those still to come
  int32_t start;

  SADMOE_DEVICE Walk(const Down& p, int64_t tile) : p(p), tile(tile) {}

  SADMOE_DEVICE void look(int64_t from) {
    const int64_t e = (e0 = from) + thread_index() % 32;
    low = e < p.E ? p.words[2 * tile * p.E + e] : 0, high = e < p.E ? p.words[(2 * tile + 1) * p.E + e] : 0;
    start = e < p.E ? p.starts[tile * p.E + e] : 0;
    active = ballot((low | high) != 0);
  }
  SADMOE_DEVICE int count() {
    int n = 0;
    for (int64_t from = 0; from < p.E; from += 32) look(from), n += count_bits(active);
    e0 = -32, active = 0;
    return n;
  }

  struct Expert {
    int64_t e, p0;
    unsigned low, high;
    SADMOE_DEVICE int pairs() const { return count_bits(low) + count_bits(high); }
  };
  // There must be one more.
  SADMOE_DEVICE Expert next() {
    while (!active) look(e0 + 32);
    const int i = lowest_bit(active);
    active &= active - 1;
    return {e0 + i, shuffle(start, i), shuffle(low, i), shuffle(high, i)};
  }
};

// tokens[r] = the r-th token that chose the expert.
SADMOE_DEVICE void list_tokens(const Walk::Expert& expert, int16_t (&tokens)[kTileTokens]) {
  const int t = thread_index();
  if (t >= kTileTokens) return;
  const unsigned word = t < 32 ? expert.low : expert.high, below = (1u << t % 32) - 1;
  if (word >> t % 32 & 1) tokens[(t < 32 ? 0 : count_bits(expert.low)) + count_bits(word & below)] = static_cast<int16_t>(t);
}

template <class Tile>
SADMOE_KERNEL(kThreads, 4)
down(Down p) {
  using Stages = DownStages<Tile>;
  constexpr int kDepth = Tile::kDepth;
  SADMOE_SHARED(DownMemory<Tile>, memory);
  const int64_t t0 = block_x() * kTileTokens, c0 = block_y() * kColumns;
  SADMOE_ROLLED
  for (int i = thread_index(); i < kTileTokens * kColumns; i += kThreads) {
    const int64_t c = c0 + i % kColumns;
    memory.y[i / kColumns][i % kColumns] = p.b_out.data && c < p.d_out ? load(p.b_out, c) : 0;
  }
  // One pipeline for all experts, which come twice: to be loaded, and to be added.
  Walk loaded(p, block_x()), added(p, block_x());
  Walk::Expert ahead{}, expert{};
  const int steps = static_cast<int>((p.s + kDepth - 1) / kDepth);
  Tile sums;
  pipeline(
      memory.stages, loaded.count() * steps,
      [&](Stages& stage, int step) {
        if (step % steps == 0) ahead = loaded.next();
        const int64_t k = int64_t{step % steps} * kDepth;
        const int n = ahead.pairs();
        const auto pair = [&](int r) { return r < n ? ahead.p0 + r : -1; };
        const auto neuron = [&](int r) { return k + r < p.s ? ahead.e * p.s + k + r : -1; };
        Tile::template load<kThreads>(stage.h, p.h, k, p.s, pair);
        Tile::template load<kThreads>(stage.w, p.w_down, c0, p.d_out, neuron);
        list_tokens(ahead, stage.tokens);
      },
      [&](const Stages& stage, int step) {
        if (step % steps == 0) expert = added.next();
        const int n = expert.pairs();
        sums.multiply(stage.h, stage.w, n);
        if (step % steps != steps - 1) return;
        SADMOE_UNROLL
        for (int i = 0; i < kSums; ++i) {
          if (const int r = Tile::row(i); r < n) memory.y[stage.tokens[r]][Tile::column(i)] += sums.sums[i];
          sums.sums[i] = 0;
        }
      });
  SADMOE_ROLLED
  for (int i = thread_index(); i < kTileTokens * kColumns; i += kThreads) {
    const int64_t t = t0 + i / kColumns, c = c0 + i % kColumns;
    if (t < p.T && c < p.d_out) store(p.y, p.dtype, t * p.d_out + c, memory.y[i / kColumns][i % kColumns]);
  }
}

}  // namespace sadmoe::cuda
