// down.cuh for crowds, tokens that chose many experts, by the products of a warp. The same sums bit for bit, but a token keeps
// its row whatever it chose, so that all of y stays in registers; who did not choose an expert multiplies zeros, and adds
// nothing. hopper_down.cuh is the same by the products of warpgroups.
#pragma once
#include "cuda/down.cuh"

namespace sadmoe::cuda {

template <class TileOf>
struct CrowdBlock {
  using Tile = TileOf;
  using Element = typename Tile::Element;
  static constexpr int kTiles = kChained<Tile> ? 1 : 2;  // of the plan: as many as registers hold y of
  static constexpr int kTokens = kTiles * kTileTokens, kGroups = kTokens / kGroupTokens;
  static_assert(kTileTokens == kRows && kCrowdTokens % kTokens == 0);

  struct Stages {
    RowStage<Tile> h[kTiles];
    DepthStage<Tile> w;
    unsigned words[kGroups];  // of the plan: who chose the expert
    int32_t e;
  };
  union Memory {
    Stages stages[kStages];
    float y[kRows][kColumns + 8];
  };
};

// Experts that a token of the block chose.
template <class Block>
struct CrowdExperts : Glances<CrowdExperts<Block>> {
  using Glances = cuda::Glances<CrowdExperts<Block>>;
  using Glances::E;
  const uint32_t* words;
  const int32_t* starts;
  int groups;
  unsigned own[Block::kGroups];  // of this lane's expert
  int32_t start = 0;

  SADMOE_DEVICE CrowdExperts(const Down& p, int64_t block)
      : Glances(p),
        words(p.words + block * Block::kGroups * p.E),
        starts(p.starts + block * Block::kTiles * p.E),
        groups(static_cast<int>((p.T + kGroupTokens - 1) / kGroupTokens - block * Block::kGroups)) {}

  SADMOE_DEVICE bool see(int e) {
    unsigned any = 0;
    SADMOE_UNROLL
    for (int g = 0; g < Block::kGroups; ++g) any |= own[g] = e < E && g < groups ? words[g * E + e] : 0;
    start = any ? starts[e] : 0;
    return any != 0;
  }

  struct Expert {
    int e;
    int32_t first;  // of its pairs in the block
    unsigned words[Block::kGroups];
  };
  // There must be one.
  SADMOE_DEVICE void next(Expert& expert) {
    const int i = this->next_lane();
    expert.e = this->e0 + i, expert.first = shuffle(start, i);
    SADMOE_UNROLL
    for (int g = 0; g < Block::kGroups; ++g) expert.words[g] = shuffle(own[g], i);
  }
};

// Of h, the way of a block's tokens into the stages of an expert: a group of tokens at a time, 4 threads a row.
template <class Block>
struct CrowdRows {
  using Element = typename Block::Element;
  using Stage = RowStage<typename Block::Tile>;
  static constexpr int kWide = 16 / sizeof(Element), kOfRow = Stage::columns / kWide;
  static_assert(kThreads / kOfRow == kGroupTokens, "a row of each group for every thread");
  static constexpr unsigned kNowhere = ~0u;
  const Element* h;
  unsigned ld, on = 0, from[Block::kGroups];  // in 16 bytes; from: of a token that did not choose the expert, nowhere

  SADMOE_DEVICE explicit CrowdRows(const Matrix& matrix)
      : h(static_cast<const Element*>(matrix.data)), ld(static_cast<unsigned>(matrix.ld / kWide)) {}

  SADMOE_DEVICE static int row() { return thread_index() / kOfRow; }
  SADMOE_DEVICE static int column() { return thread_index() % kOfRow; }

  SADMOE_DEVICE void begin(const typename CrowdExperts<Block>::Expert& expert) {
    unsigned pair = expert.first;
    on = column();
    SADMOE_UNROLL
    for (int g = 0; g < Block::kGroups; ++g) {
      const unsigned word = expert.words[g];
      from[g] = word >> row() & 1 ? (pair + rank_in(word, row())) * ld : kNowhere;
      pair += count_bits(word);
    }
  }
  // The next step of the depth, of which `left` are left.
  SADMOE_DEVICE void copy(Stage (&to)[Block::kTiles], int left) {
    constexpr int kOfTile = kTileTokens / kGroupTokens;
    SADMOE_UNROLL
    for (int g = 0; g < Block::kGroups; ++g) {
      const bool there = column() * kWide < left && from[g] != kNowhere;
      copy16_async(to[g / kOfTile].from(Stage::offset(row(), column() * kWide) + Stage::offset(g % kOfTile * kGroupTokens, 0)),
                   there ? h + int64_t{from[g] + on} * kWide : h, there);
    }
    on += kOfRow;
  }
};

constexpr int kCrowdBlocks = 2;  // a multiprocessor

template <class Tile>
SADMOE_KERNEL(kThreads, kCrowdBlocks)
down_crowd(Down p) {
  using Block = CrowdBlock<Tile>;
  using Stages = typename Block::Stages;
  using Memory = typename Block::Memory;
  using Element = typename Tile::Element;
  constexpr int kDepth = Tile::kDepth;
  SADMOE_SHARED(Memory, memory);
  if (!crowded(p, block_x() * Block::kTokens / kCrowdTokens)) return;
  const int64_t c0 = block_y() * kColumns;
  Tile sums[Block::kTiles];
  Chain<Tile, Block::kTiles * kSums> chain;
  SADMOE_UNROLL
  for (int i = 0; i < kSums; ++i) {
    const int64_t c = c0 + Tile::column(i);
    const float bias = p.b_out.data && c < p.d_out ? load(p.b_out, c) : 0;
    SADMOE_UNROLL
    for (int tile = 0; tile < Block::kTiles; ++tile) chain.y[tile * kSums + i] = bias;
  }
  const auto w = source<Element, kThreads, DepthStage<Tile>>(p.w_down, [&](int r) { return r * p.w_down.ld + c0; });
  const unsigned w_row = static_cast<unsigned>(p.w_down.ld / w.kWide);
  const int s = static_cast<int>(p.s), steps = (s + kDepth - 1) / kDepth, columns = kept(static_cast<int>(p.d_out - c0));
  CrowdExperts<Block> walk(p, block_x());
  CrowdRows<Block> h(p.h);
  unsigned word = 0;  // of this thread's group
  int e = 0, neuron = 0, left = 0, used = 0;
  pipeline(
      memory.stages, walk.count() * steps,
      [&](Stages& stage) {
        if (left <= 0) {
          typename CrowdExperts<Block>::Expert expert;
          walk.next(expert);
          h.begin(expert);
          e = expert.e, neuron = e * s, left = s;
          SADMOE_UNROLL
          for (int g = 0; g < Block::kGroups; ++g) word = thread_index() == g ? expert.words[g] : word;
        }
        if (w.wide())
          w.copy(stage.w, neuron * w_row, left, columns);
        else
          w.load(stage.w, neuron * p.w_down.ld, left, columns);
        h.copy(stage.h, left);
        if (thread_index() < Block::kGroups) stage.words[thread_index()] = word;
        if (chain.kOn && thread_index() == 0) stage.e = e;
        left -= kDepth, neuron += kDepth;
      },
      [&](const Stages& stage) {
        SADMOE_UNROLL
        for (int tile = 0; tile < Block::kTiles; ++tile) sums[tile].multiply(stage.h[tile], stage.w, kRows);
        if (++used < steps) return;
        used = 0;
        if constexpr (chain.kOn) chain.begin(stage.e);
        SADMOE_UNROLL
        for (int g = 0; g < Block::kGroups; ++g) {
          const unsigned chosen = stage.words[g] >> Tile::row(0);
          const int tile = g * kGroupTokens / kRows;
          SADMOE_UNROLL
          for (int i = 0; i < kSums; ++i) {
            const int row = tile * kRows + Tile::row(i) - Tile::row(0) - g * kGroupTokens;
            if (row < 0 || row >= kGroupTokens) continue;
            if (chosen >> row & 1) chain.add(tile * kSums + i, sums[tile].sums[i]);
            sums[tile].sums[i] = 0;
          }
        }
      });
  chain.end();
  SADMOE_UNROLL
  for (int tile = 0; tile < Block::kTiles; ++tile) {
    store_sums<Tile>(chain.y + tile * kSums, memory.y);
    sync_block();
    SADMOE_ROLLED
    for (int i = thread_index(); i < kRows * kColumns; i += kThreads) {
      const int64_t t = block_x() * Block::kTokens + tile * kRows + i / kColumns, c = c0 + i % kColumns;
      if (t < p.T && c < p.d_out) store(p.y, p.dtype, t * p.d_out + c, memory.y[i / kColumns][i % kColumns]);
    }
    sync_block();
  }
}

}  // namespace sadmoe::cuda
