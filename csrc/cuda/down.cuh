// The output, a block of tokens by a strip of columns at a time: every expert in ascending order adds into float32 sums in
// shared memory, and y is written once. No atomics: the same bits every time, whatever the other tokens are and however
// many a block takes. More tokens a block read the weights of an expert fewer times; fewer make more blocks.
#pragma once
#include "cuda/operands.cuh"
#include "cuda/plan.cuh"

namespace sadmoe::cuda {

// y[t] = b_out + sum over the pairs p of t, experts ascending, of h[p] w_down[e]
struct Down : DownOperands {
  const int32_t* starts;
  const uint32_t* words;
  int64_t E;
  int32_t crowd;  // pairs that make a crowd of kCrowdTokens tokens, which another kernel takes; 0: nothing is
};

constexpr int kCrowdTokens = 4 * kTileTokens;

// Of the i-th kCrowdTokens tokens, by expert the first pair.
SADMOE_DEVICE const int32_t* crowd_starts(const Down& p, int64_t i) {
  const int64_t tile = i * (kCrowdTokens / kTileTokens), tiles = (p.T + kTileTokens - 1) / kTileTokens;
  return p.starts + (tile < tiles ? tile : tiles) * p.E;
}
// Every warp finds it alone, and all the same.
SADMOE_DEVICE bool crowded(const Down& p, int64_t i) {
  const int32_t *starts = crowd_starts(p, i), *ends = crowd_starts(p, i + 1);
  int32_t pairs = 0;
  for (int64_t e = thread_index() % 32; e < p.E; e += 32) pairs += ends[e] - starts[e];
  return sum_warp(pairs) >= p.crowd;
}

template <class Tile>
struct DownStages {
  RowStage<Tile> h;
  DepthStage<Tile> w;
  int32_t pairs;  // of the expert, the rows of h
  int32_t e;
  int16_t tokens[kRows];  // of the block: those of its pairs, at its last step
};

// kTiles: of the plan, in a block.
template <class Tile, int kTiles>
struct DownMemory {
  float y[kTiles * kTileTokens][kColumns + 8];  // that the rows of few tokens are in different banks
  DownStages<Tile> stages[kTiles == 1 ? kStages : kStages + 1];
};

// Experts in ascending order, 32 at a glance, a lane each. Every warp walks alone and sees the same. Lanes keep what they see:
// see(e), of a derived class, says whether expert e, which may be past the last, is one of them.
template <class Seer>
struct Glances {
  int E, e0 = -32;
  unsigned active = 0;  // of the 32 experts, those still to come

  SADMOE_DEVICE explicit Glances(const Down& p) : E(static_cast<int>(p.E)) {}

  SADMOE_DEVICE void look(int from) {
    e0 = from;
    active = ballot(static_cast<Seer*>(this)->see(from + thread_index() % 32));
  }
  SADMOE_DEVICE int count() {
    int n = 0;
    for (int from = 0; from < E; from += 32) look(from), n += count_bits(active);
    e0 = -32, active = 0;
    return n;
  }
  // The lane of the next. There must be one.
  SADMOE_DEVICE int next_lane() {
    while (!active) look(e0 + 32);
    const int i = lowest_bit(active);
    active &= active - 1;
    return i;
  }
};

// The experts of a block of tokens. What lanes see is the same for all warps, but for the words: a warp has those of the tokens
// that it lists, thread by thread.
template <int kTiles>
struct Walk : Glances<Walk<kTiles>> {
  using Glances = cuda::Glances<Walk<kTiles>>;
  using Glances::E, Glances::e0, Glances::active;
  static constexpr int kGroups = kTiles * kTileTokens / kGroupTokens, kWarps = kThreads / 32;
  static constexpr int kOwn = (kGroups + kWarps - 1) / kWarps;  // words of a warp
  const uint32_t* words;
  const int32_t* starts;
  int groups;
  unsigned own[kOwn];  // of this lane's expert
  int32_t before[kOwn], start, pairs;

  SADMOE_DEVICE Walk(const Down& p, int64_t block)
      : Glances(p),
        words(p.words + block * kGroups * p.E),
        starts(p.starts + block * kTiles * p.E),
        groups(static_cast<int>((p.T + kGroupTokens - 1) / kGroupTokens - block * kGroups)) {}

  SADMOE_DEVICE bool see(int e) {
    const int warp = thread_index() / 32;
    pairs = 0;
    SADMOE_UNROLL
    for (int i = 0; i < kOwn; ++i) own[i] = 0, before[i] = 0;
    SADMOE_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const unsigned word = e < E && g < groups ? words[g * E + e] : 0;
      if (g % kWarps == warp) own[g / kWarps] = word, before[g / kWarps] = pairs;
      pairs += count_bits(word);
    }
    start = e < E ? starts[e] : 0;
    return pairs != 0;
  }
  // Products that the pairs of all experts take, of kRows rows at most.
  SADMOE_DEVICE int count() {
    if constexpr (kTiles == 1) return Glances::count();
    int n = 0;
    for (int from = 0; from < E; from += 32) {
      this->look(from);
      n += sum_warp((pairs + kRows - 1) / kRows);
    }
    e0 = -32, active = 0;
    return n;
  }

  // first: its first pair in the block, of the next product.   left: its pairs from there on.
  struct Expert {
    int e, first, left;
    unsigned own[kOwn];
    int32_t before[kOwn];  // tokens of the next product before those of the word; negative: of products that are done
    SADMOE_DEVICE int rows() const { return kTiles == 1 || left < kRows ? left : kRows; }
  };
  // There must be one.
  SADMOE_DEVICE void next(Expert& expert) {
    if constexpr (kTiles > 1)
      if (expert.left > kRows) {
        expert.first += kRows, expert.left -= kRows;
        SADMOE_UNROLL
        for (int i = 0; i < kOwn; ++i) expert.before[i] -= kRows;
        return;
      }
    const int i = this->next_lane();
    expert.e = e0 + i, expert.first = shuffle(start, i), expert.left = shuffle(pairs, i);
    SADMOE_UNROLL
    for (int j = 0; j < kOwn; ++j) expert.own[j] = shuffle(own[j], i), expert.before[j] = shuffle(before[j], i);
  }
};

// tokens[r] = of the block, the token of row r of the next product.
template <class Expert>
SADMOE_DEVICE void list_tokens(const Expert& expert, int16_t (&tokens)[kRows]) {
  const int lane = thread_index() % 32;
  SADMOE_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof expert.own / sizeof *expert.own); ++i) {
    const int r = expert.before[i] + rank_in(expert.own[i], lane);
    if ((expert.own[i] >> lane & 1) && r >= 0 && r < kRows) tokens[r] = static_cast<int16_t>(i * kThreads + thread_index());
  }
}

// Of float32 there are twice the sums: every kChain experts' in shared memory, y in registers.
template <class Tile>
constexpr int kMostDownTiles = kChained<Tile> ? 2 : 4;
template <class Tile, int kTiles>
constexpr int kDownBlocks = (kTiles == 1   ? 4
                             : kTiles == 2 ? 3
                                           : 2) -
                            (kChained<Tile> ? 1 : 0);

template <class Tile, int kTiles>
SADMOE_KERNEL(kThreads, kDownBlocks<Tile, kTiles>)
down(Down p) {
  using Stages = DownStages<Tile>;
  using Element = typename Tile::Element;
  using Memory = DownMemory<Tile, kTiles>;
  constexpr int kDepth = Tile::kDepth, kTokens = kTiles * kTileTokens;
  SADMOE_SHARED(Memory, memory);
  if (p.crowd && crowded(p, block_x() * kTokens / kCrowdTokens)) return;
  const int64_t t0 = block_x() * kTokens, c0 = block_y() * kColumns;
  // Of y a thread has every kThreads-th element; those of a column, as kThreads is a multiple of kColumns.
  constexpr int kOwn = kTokens * kColumns / kThreads, kEvery = kThreads / kColumns;
  static_assert(kThreads % kColumns == 0);
  const int own_row = thread_index() / kColumns, own_column = thread_index() % kColumns;
  const auto own = [&](int i) -> float& { return memory.y[own_row + i * kEvery][own_column]; };
  const float bias = p.b_out.data && c0 + own_column < p.d_out ? load(p.b_out, c0 + own_column) : 0;
  Chain<Tile, kChained<Tile> ? kOwn : 1> chain;
  if constexpr (chain.kOn) {
    SADMOE_UNROLL
    for (int i = 0; i < kOwn; ++i) chain.y[i] = bias, own(i) = -0.0f;
  } else {
    SADMOE_ROLLED
    for (int i = 0; i < kOwn; ++i) own(i) = bias;
  }
  const auto h = source<Element, kThreads, RowStage<Tile>>(p.h, [&](int r) { return r * p.h.ld; });
  const auto w = source<Element, kThreads, DepthStage<Tile>>(p.w_down, [&](int r) { return r * p.w_down.ld + c0; });
  const unsigned h_row = static_cast<unsigned>(p.h.ld / h.kWide), w_row = static_cast<unsigned>(p.w_down.ld / w.kWide);
  const int s = static_cast<int>(p.s), steps = (s + kDepth - 1) / kDepth, columns = kept(static_cast<int>(p.d_out - c0));
  // One pipeline for all experts.
  Walk<kTiles> walk(p, block_x());
  typename Walk<kTiles>::Expert expert{};
  unsigned h_on = 0, w_on = 0;
  int left = 0, rows = 0, used = 0;
  Tile sums;
  pipeline(
      memory.stages, walk.count() * steps,
      [&](Stages& stage) {
        if (left <= 0) {
          walk.next(expert);
          rows = expert.rows(), left = s;
          h_on = expert.first * h_row, w_on = expert.e * (s * w_row);
        }
        if (w.wide())
          w.copy(stage.w, w_on, left, columns);
        else
          w.load(stage.w, (expert.e * p.s + s - left) * p.w_down.ld, left, columns);
        h.copy(stage.h, h_on, rows, left, rows);
        if (thread_index() == 0) stage.pairs = rows, stage.e = expert.e;
        if (left <= kDepth) list_tokens(expert, stage.tokens);
        left -= kDepth, h_on += kDepth / h.kWide, w_on += kDepth * w_row;
      },
      [&](const Stages& stage) {
        if constexpr (chain.kOn)
          if (stage.e / kChain != chain.link) {
            SADMOE_UNROLL
            for (int i = 0; i < kOwn; ++i) chain.y[i] += own(i), own(i) = -0.0f;
            chain.link = stage.e / kChain;
            sync_block();
          }
        sums.multiply(stage.h, stage.w, stage.pairs);
        if (++used < steps) return;
        used = 0;
        sums.add_to(memory.y, stage.tokens, stage.pairs);
      });
  const auto write = [&](int i, float y) {
    const int64_t t = t0 + own_row + i * kEvery, c = c0 + own_column;
    if (t < p.T && c < p.d_out) store(p.y, p.dtype, t * p.d_out + c, y);
  };
  if constexpr (chain.kOn) {
    SADMOE_UNROLL
    for (int i = 0; i < kOwn; ++i) write(i, chain.y[i] + own(i));
  } else {
    SADMOE_ROLLED
    for (int i = 0; i < kOwn; ++i) write(i, own(i));
  }
}

}  // namespace sadmoe::cuda
