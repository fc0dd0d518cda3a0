// down.cuh for crowds, tokens that chose many experts, by the products of a warp. The same sums bit for bit, but a token keeps
// its row whatever it chose, so that all of y stays in registers; who did not choose an expert multiplies zeros, and adds
// nothing. hopper_down.cuh is the same by the products of warpgroups.
#pragma once
#include "cuda/down.cuh"

namespace sadmoe::cuda {

constexpr int kBlockTiles = 2, kBlockTokens = kBlockTiles * kTileTokens,
              kBlockGroups = kBlockTokens / kGroupTokens;  // of the plan
static_assert(kTileTokens == kRows && kCrowdTokens % kBlockTokens == 0);

template <class Tile>
struct CrowdStages {
  RowStage<Tile> h[kBlockTiles];
  DepthStage<Tile> w;
  unsigned words[kBlockGroups];  // of the plan: who chose the expert
};

template <class Tile>
union CrowdMemory {
  CrowdStages<Tile> stages[kStages];
  float y[kRows][kColumns + 8];
};

// Experts that a token of the block chose.
struct CrowdExperts : Glances<CrowdExperts> {
  const uint32_t* words;
  const int32_t* starts;
  int groups;
  unsigned own[kBlockGroups];  // of this lane's expert
  int32_t start = 0;

  SADMOE_DEVICE CrowdExperts(const Down& p, int64_t block)
      : Glances(p),
        words(p.words + block * kBlockGroups * p.E),
        starts(p.starts + block * kBlockTiles * p.E),
        groups(static_cast<int>((p.T + kGroupTokens - 1) / kGroupTokens - block * kBlockGroups)) {}

  SADMOE_DEVICE bool see(int e) {
    unsigned any = 0;
    SADMOE_UNROLL
    for (int g = 0; g < kBlockGroups; ++g) any |= own[g] = e < E && g < groups ? words[g * E + e] : 0;
    start = any ? starts[e] : 0;
    return any != 0;
  }

  struct Expert {
    int e;
    int32_t first;  // of its pairs in the block
    unsigned words[kBlockGroups];
  };
  // There must be one.
  SADMOE_DEVICE void next(Expert& expert) {
    const int i = next_lane();
    expert.e = e0 + i, expert.first = shuffle(start, i);
    SADMOE_UNROLL
    for (int g = 0; g < kBlockGroups; ++g) expert.words[g] = shuffle(own[g], i);
  }
};

// Of h, the way of a block's tokens into the stages of an expert: a group of tokens at a time, 4 threads a row.
template <class Tile>
struct CrowdRows {
  using Element = typename Tile::Element;
  using Stage = RowStage<Tile>;
  static constexpr int kWide = 16 / sizeof(Element), kOfRow = Tile::kDepth / kWide;
  static_assert(kThreads / kOfRow == kGroupTokens, "a row of each group for every thread");
  static constexpr unsigned kNowhere = ~0u;
  const Element* h;
  unsigned ld, on = 0, from[kBlockGroups];  // in 16 bytes; from: of a token that did not choose the expert, nowhere

  SADMOE_DEVICE explicit CrowdRows(const Matrix& matrix)
      : h(static_cast<const Element*>(matrix.data)), ld(static_cast<unsigned>(matrix.ld / kWide)) {}

  SADMOE_DEVICE static int row() { return thread_index() / kOfRow; }
  SADMOE_DEVICE static int column() { return thread_index() % kOfRow; }

  SADMOE_DEVICE void begin(const CrowdExperts::Expert& expert) {
    unsigned pair = expert.first;
    on = column();
    SADMOE_UNROLL
    for (int g = 0; g < kBlockGroups; ++g) {
      const unsigned word = expert.words[g], below = (1u << row()) - 1;
      from[g] = word >> row() & 1 ? (pair + count_bits(word & below)) * ld : kNowhere;
      pair += count_bits(word);
    }
  }
  // The next step of the depth, of which `left` are left.
  SADMOE_DEVICE void copy(Stage (&to)[kBlockTiles], int left) {
    constexpr int kOfTile = kTileTokens / kGroupTokens;
    SADMOE_UNROLL
    for (int g = 0; g < kBlockGroups; ++g) {
      const bool there = column() * kWide < left && from[g] != kNowhere;
      copy16_async(to[g / kOfTile].from(Stage::offset(row(), column() * kWide) + Stage::offset(g % kOfTile * kGroupTokens, 0)),
                   there ? h + int64_t{from[g] + on} * kWide : h, there);
    }
    on += kOfRow;
  }
};

template <class Tile>
SADMOE_KERNEL(kThreads, 2)
down_crowd(Down p) {
  using Stages = CrowdStages<Tile>;
  using Element = typename Tile::Element;
  using Memory = CrowdMemory<Tile>;
  constexpr int kDepth = Tile::kDepth;
  SADMOE_SHARED(Memory, memory);
  if (!crowded(p, block_x() * kBlockTokens / kCrowdTokens)) return;
  const int64_t c0 = block_y() * kColumns;
  Tile y[kBlockTiles], sums[kBlockTiles];
  SADMOE_UNROLL
  for (int i = 0; i < kSums; ++i) {
    const int64_t c = c0 + Tile::column(i);
    const float bias = p.b_out.data && c < p.d_out ? load(p.b_out, c) : 0;
    SADMOE_UNROLL
    for (int tile = 0; tile < kBlockTiles; ++tile) y[tile].sums[i] = bias;
  }
  const auto w = source<Element, kThreads, DepthStage<Tile>>(p.w_down, [&](int r) { return r * p.w_down.ld + c0; });
  const unsigned w_row = static_cast<unsigned>(p.w_down.ld / w.kWide);
  const int s = static_cast<int>(p.s), steps = (s + kDepth - 1) / kDepth, columns = kept(static_cast<int>(p.d_out - c0));
  CrowdExperts walk(p, block_x());
  CrowdRows<Tile> h(p.h);
  unsigned word = 0;  // of this thread's group
  int neuron = 0, left = 0, used = 0;
  pipeline(
      memory.stages, walk.count() * steps,
      [&](Stages& stage) {
        if (left <= 0) {
          CrowdExperts::Expert expert;
          walk.next(expert);
          h.begin(expert);
          neuron = expert.e * s, left = s;
          SADMOE_UNROLL
          for (int g = 0; g < kBlockGroups; ++g) word = thread_index() == g ? expert.words[g] : word;
        }
        if (w.wide())
          w.copy(stage.w, neuron * w_row, left, columns);
        else
          w.load(stage.w, neuron * p.w_down.ld, left, columns);
        h.copy(stage.h, left);
        if (thread_index() < kBlockGroups) stage.words[thread_index()] = word;
        left -= kDepth, neuron += kDepth;
      },
      [&](const Stages& stage) {
        SADMOE_UNROLL
        for (int tile = 0; tile < kBlockTiles; ++tile) sums[tile].multiply(stage.h[tile], stage.w, kRows);
        if (++used < steps) return;
        used = 0;
        SADMOE_UNROLL
        for (int g = 0; g < kBlockGroups; ++g) {
          const unsigned chosen = stage.words[g] >> Tile::row(0);
          const int tile = g * kGroupTokens / kRows;
          SADMOE_UNROLL
          for (int i = 0; i < kSums; ++i) {
            const int row = tile * kRows + Tile::row(i) - Tile::row(0) - g * kGroupTokens;
            if (row < 0 || row >= kGroupTokens) continue;
            if (chosen >> row & 1) y[tile].sums[i] += sums[tile].sums[i];
            sums[tile].sums[i] = 0;
          }
        }
      });
  SADMOE_UNROLL
  for (int tile = 0; tile < kBlockTiles; ++tile) {
    store_sums(y[tile], memory.y);
    sync_block();
    SADMOE_ROLLED
    for (int i = thread_index(); i < kRows * kColumns; i += kThreads) {
      const int64_t t = block_x() * kBlockTokens + tile * kRows + i / kColumns, c = c0 + i % kColumns;
      if (t < p.T && c < p.d_out) store(p.y, p.dtype, t * p.d_out + c, memory.y[i / kColumns][i % kColumns]);
    }
    sync_block();
  }
}

}  // namespace sadmoe::cuda
