// The output, a tile of tokens by a strip of columns at a time: every expert in ascending order adds into float32 sums in
// shared memory, and y is written once. No atomics: the same bits every time, whatever the other tokens are.
#pragma once
#include "cuda/plan.cuh"
#include "cuda/tile.cuh"

namespace sadmoe::cuda {

// y[t] = b_out + sum over the pairs p of t, experts ascending, of h[p] w_down[e]
struct Down {
  Matrix h, w_down;  // [pairs, s], wide, zeros beyond s   [E s, d_out]
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
  int32_t pairs;                // of the expert, the rows of h
  int16_t tokens[kTileTokens];  // of the tile: those of its pairs, at its last step
};

template <class Tile>
struct DownMemory {
  float y[kTileTokens][kColumns + 8];  // that the rows of few tokens are in different banks
  DownStages<Tile> stages[kStages];
};

static_assert(kTileTokens == kRows, "the pairs of an expert in a tile of tokens are the rows of one product");

// The experts of a tile of tokens, ascending, 32 at a glance: a lane holds the words and the first pair of one. Each warp
// walks alone and sees the same.
struct Walk {
  const uint32_t *low_words, *high_words;
  const int32_t* starts;
  int E, e0 = -32;
  unsigned low, high, active = 0;  // of this lane's expert; of the 32 experts, those still to come
  int32_t start;

  SADMOE_DEVICE Walk(const Down& p, int64_t tile)
      : low_words(p.words + 2 * tile * p.E),
        high_words(low_words + p.E),
        starts(p.starts + tile * p.E),
        E(static_cast<int>(p.E)) {}

  SADMOE_DEVICE void look(int from) {
    const int e = (e0 = from) + thread_index() % 32;
    low = e < E ? low_words[e] : 0, high = e < E ? high_words[e] : 0, start = e < E ? starts[e] : 0;
    active = ballot((low | high) != 0);
  }
  SADMOE_DEVICE int count() {
    int n = 0;
    for (int from = 0; from < E; from += 32) look(from), n += count_bits(active);
    e0 = -32, active = 0;
    return n;
  }

  struct Expert {
    int e, first;  // and its first pair in the tile
    unsigned low, high;
    SADMOE_DEVICE int pairs() const { return count_bits(low) + count_bits(high); }
  };
  // There must be one.
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
  using Element = typename Tile::Element;
  constexpr int kDepth = Tile::kDepth;
  SADMOE_SHARED(DownMemory<Tile>, memory);
  const int64_t t0 = block_x() * kTileTokens, c0 = block_y() * kColumns;
  SADMOE_ROLLED
  for (int i = thread_index(); i < kTileTokens * kColumns; i += kThreads) {
    const int64_t c = c0 + i % kColumns;
    memory.y[i / kColumns][i % kColumns] = p.b_out.data && c < p.d_out ? load(p.b_out, c) : 0;
  }
  const auto h = source<Element, kThreads, RowStage<Tile>>(p.h, [&](int r) { return r * p.h.ld; });
  const auto w = source<Element, kThreads, DepthStage<Tile>>(p.w_down, [&](int r) { return r * p.w_down.ld + c0; });
  const unsigned h_row = static_cast<unsigned>(p.h.ld / h.kWide), w_row = static_cast<unsigned>(p.w_down.ld / w.kWide);
  const int s = static_cast<int>(p.s), steps = (s + kDepth - 1) / kDepth, columns = kept(static_cast<int>(p.d_out - c0));
  // One pipeline for all experts.
  Walk walk(p, block_x());
  Walk::Expert expert{};
  unsigned h_on = 0, w_on = 0;
  int left = 0, pairs = 0, used = 0;
  Tile sums;
  pipeline(
      memory.stages, walk.count() * steps,
      [&](Stages& stage) {
        if (left <= 0) {
          expert = walk.next();
          pairs = expert.pairs(), left = s;
          h_on = expert.first * h_row, w_on = expert.e * (s * w_row);
        }
        if (w.wide())
          w.copy(stage.w, w_on, left, columns);
        else
          w.load(stage.w, (expert.e * p.s + s - left) * p.w_down.ld, left, columns);
        h.copy(stage.h, h_on, pairs, left, pairs);
        if (thread_index() == 0) stage.pairs = pairs;
        if (left <= kDepth) list_tokens(expert, stage.tokens);
        left -= kDepth, h_on += kDepth / h.kWide, w_on += kDepth * w_row;
      },
      [&](const Stages& stage) {
        sums.multiply(stage.h, stage.w, stage.pairs);
        if (++used < steps) return;
        used = 0;
        sums.add_to(memory.y, stage.tokens, stage.pairs);
      });
  SADMOE_ROLLED
  for (int i = thread_index(); i < kTileTokens * kColumns; i += kThreads) {
    const int64_t t = t0 + i / kColumns, c = c0 + i % kColumns;
    if (t < p.T && c < p.d_out) store(p.y, p.dtype, t * p.d_out + c, memory.y[i / kColumns][i % kColumns]);
  }
}

}  // namespace sadmoe::cuda
