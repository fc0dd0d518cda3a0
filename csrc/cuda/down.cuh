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
  const int32_t *starts, *rows;
  int64_t T, E, s, d_out;
  void* y;  // [T, d_out]
  DType dtype;
};

template <class Tile>
struct DownStages {
  RowStage<Tile> h;
  DepthStage<Tile> w;
};

template <class Tile>
struct DownMemory {
  float y[kTileTokens][kColumns];
  DownStages<Tile> stages[kStages];
};

static_assert(kTileTokens == kRows, "the pairs of an expert in a tile of tokens are the rows of one product");

// One expert: its n pairs from p0 on, of the tile that begins with token t0.
template <class Tile>
SADMOE_DEVICE void add_expert(DownMemory<Tile>& memory, const Down& p, int64_t e, int64_t p0, int n, int64_t t0, int64_t c0) {
  using Stages = DownStages<Tile>;
  Tile sums;
  pipeline(
      memory.stages, static_cast<int>((p.s + Tile::kDepth - 1) / Tile::kDepth),
      [&](Stages& stage, int step) {
        const int64_t k = int64_t{step} * Tile::kDepth;
        const auto pair = [&](int r) { return r < n ? p0 + r : -1; };
        const auto neuron = [&](int r) { return k + r < p.s ? e * p.s + k + r : -1; };
        Tile::template load<kThreads>(stage.h, p.h, k, p.s, pair);
        Tile::template load<kThreads>(stage.w, p.w_down, c0, p.d_out, neuron);
      },
      [&](const Stages& stage, int) { sums.multiply(stage.h, stage.w, n); });
  SADMOE_UNROLL
  for (int i = 0; i < kSums; ++i)
    if (const int r = Tile::row(i); r < n) memory.y[p.rows[p0 + r] - t0][Tile::column(i)] += sums.sums[i];
}

template <class Tile>
SADMOE_KERNEL(kThreads, 4)
down(Down p) {
  SADMOE_SHARED(DownMemory<Tile>, memory);
  const int64_t t0 = block_x() * kTileTokens, c0 = block_y() * kColumns;
  SADMOE_ROLLED
  for (int i = thread_index(); i < kTileTokens * kColumns; i += kThreads) {
    const int64_t c = c0 + i % kColumns;
    memory.y[i / kColumns][i % kColumns] = p.b_out.data && c < p.d_out ? load(p.b_out, c) : 0;
  }
  // 32 experts at a glance: each warp sees the same, so the block stays in step.
  for (int64_t e0 = 0; e0 < p.E; e0 += 32) {
    const int64_t e = e0 + thread_index() % 32;
    const int32_t* starts = p.starts + block_x() * p.E;
    const int32_t start = e < p.E ? starts[e] : 0, count = e < p.E ? starts[p.E + e] - start : 0;
    for (unsigned active = ballot(count > 0); active; active &= active - 1) {
      const int i = lowest_bit(active);
      add_expert(memory, p, e0 + i, shuffle(start, i), shuffle(count, i), t0, c0);
    }
  }
  sync_block();
  SADMOE_ROLLED
  for (int i = thread_index(); i < kTileTokens * kColumns; i += kThreads) {
    const int64_t t = t0 + i / kColumns, c = c0 + i % kColumns;
    if (t < p.T && c < p.d_out) store(p.y, p.dtype, t * p.d_out + c, memory.y[i / kColumns][i % kColumns]);
  }
}

}  // namespace sadmoe::cuda
