// down.cuh for crowds, tokens that chose many experts, on devices of capability 9.0, 16 bits. The same sums bit for bit, but a
// token keeps its row whatever it chose, so that all of y stays in registers; who did not choose an expert multiplies zeros, and
// adds nothing. By the products of warpgroups, of the transposed matrices: columns of y by tokens.
//
// One warpgroup brings operands into a ring of stages; each of two others multiplies half of the tokens.
#pragma once
#include "cuda/down.cuh"
#include "cuda/hopper_ring.cuh"

namespace sadmoe::cuda {

// kSlices: of 16 neurons that a stage has of an expert: 1, 2 or 4, and of 4, 2 or 1 experts.
template <class T, int kSlicesOf>
struct HopperDownBlock {
  using Element = T;
  static constexpr int kSlices = kSlicesOf, kNeurons = 16 * kSlices, kExperts = kSwizzledElements / kNeurons;
  static constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup, kWarps = kWarpgroup / 32;
  static constexpr int kOwnTokens = kCrowdTokens / kConsumers, kGroups = kCrowdTokens / kGroupTokens;
  static constexpr int kColumns = 64, kSums = kColumns * kOwnTokens / kWarpgroup;
  static constexpr int kGiven = 104, kTaken = 200;  // registers a thread
  static_assert(kGiven + kConsumers * kTaken <= 65536 / kThreads / 8 * 8 * (1 + kConsumers));

  using Weights = Stage<T, kSwizzledElements, kColumns, 8>;
  struct Step {
    alignas(1024) unsigned char h[kCrowdTokens][kSwizzledBytes];
    Weights w;
    unsigned words[kExperts][kGroups];  // of the plan: who chose an expert
  };
  static constexpr int kStages = 5;
  using Ring = cuda::Ring<kStages>;
  struct Memory {
    alignas(1024) Step steps[kStages];
    Ring ring;
  };
  static_assert(sizeof(Memory) <= kMostBytes);
};

// Experts that a token of the block chose.
struct CrowdWalk : Glances<CrowdWalk> {
  const int32_t *starts, *ends;  // of the block's pairs, by expert
  int32_t start = 0;             // of this lane's expert

  SADMOE_DEVICE explicit CrowdWalk(const Down& p)
      : Glances(p), starts(crowd_starts(p, block_x())), ends(crowd_starts(p, block_x() + 1)) {}

  SADMOE_DEVICE bool see(int e) {
    start = e < E ? starts[e] : 0;
    return e < E && ends[e] > start;
  }
  // The next expert, and its first pair. There must be one.
  SADMOE_DEVICE int next(int32_t& first) {
    const int i = next_lane();
    first = shuffle(start, i);
    return e0 + i;
  }
};

// Of an expert, as stages have at most 64 neurons.
template <class Block>
SADMOE_DEVICE int parts_of(const Down& p) {
  return Block::kExperts > 1 ? 1 : static_cast<int>((p.s + Block::kNeurons - 1) / Block::kNeurons);
}

// The experts of a stage, -1 where there is none, and of one of them, `own`, the words and the first pair.
template <class Block>
struct Chosen {
  int experts[Block::kExperts];
  int32_t first = 0;
  unsigned words[Block::kGroups];

  // left: experts still to come.
  SADMOE_DEVICE void load(const Down& p, CrowdWalk& walk, int left, int own) {
    const int64_t g0 = block_x() * Block::kGroups;
    const int groups = static_cast<int>((p.T + kGroupTokens - 1) / kGroupTokens - g0);
    int mine = -1;
    SADMOE_UNROLL
    for (int i = 0; i < Block::kExperts; ++i) {
      int32_t begin = 0;
      experts[i] = i < left ? walk.next(begin) : -1;
      if (i == own) mine = experts[i], first = begin;
    }
    SADMOE_UNROLL
    for (int g = 0; g < Block::kGroups; ++g) words[g] = mine >= 0 && g < groups ? p.words[(g0 + g) * p.E + mine] : 0;
  }
};

// The first warpgroup: 8 lanes a row, 16 bytes each. Those of a row of h have the same token, and may have different experts.
template <class Block>
SADMOE_DEVICE void bring_crowd(const Down& p, typename Block::Memory& memory) {
  using T = typename Block::Element;
  constexpr int kEvery = kWarpgroup / 8, kOfExpert = Block::kNeurons / 8;
  const T *h = static_cast<const T*>(p.h.data), *w = static_cast<const T*>(p.w_down.data);
  const int r0 = thread_index() / 8, c = thread_index() % 8, own = c / kOfExpert;
  const int64_t c0 = block_y() * Block::kColumns + c * 8;
  const int parts = parts_of<Block>(p), s = static_cast<int>(p.s);
  CrowdWalk walk(p);
  Bringing<typename Block::Ring> bringing(memory.ring);
  int left = walk.count();
  Chosen<Block> now, next;
  next.load(p, walk, left, own);
  SADMOE_ROLLED
  for (; left > 0; left -= Block::kExperts) {
    now = next;
    next.load(p, walk, left - Block::kExperts, own);  // while stages are filled
    SADMOE_ROLLED
    for (int part = 0; part < parts; ++part, bringing.end()) {
      auto& step = memory.steps[bringing.begin()];
      const int j0 = part * Block::kNeurons, column = j0 + c % kOfExpert * 8;
      const T* from = h + int64_t{now.first} * p.h.ld + column;
      SADMOE_UNROLL
      for (int g = 0; g < Block::kGroups; ++g) {
        const unsigned word = now.words[g];
        if (r0 == 0 && c % kOfExpert == 0) step.words[own][g] = word;
        SADMOE_UNROLL
        for (int i = 0; i < kGroupTokens / kEvery; ++i) {
          const int r = r0 + i * kEvery;
          const bool there = (word >> r & 1) && column < p.h.ld;
          const T* row = from + rank_in(word, r) * p.h.ld;
          copy16_async(&step.h[g * kGroupTokens + r][swizzled(r, c)], there ? row : h, there);
        }
        from += count_bits(word) * p.h.ld;
      }
      SADMOE_UNROLL
      for (int i = 0; i < kSwizzledElements / kEvery; ++i) {  // of 16 neurons: of one expert
        const int e = now.experts[i / Block::kSlices], j = j0 + i % Block::kSlices * kEvery + r0;
        const bool there = e >= 0 && j < s && c0 < p.d_out;
        copy16_async(step.w.from(Block::Weights::offset(i * kEvery + r0, c * 8)),
                     there ? w + (int64_t{e} * s + j) * p.w_down.ld + c0 : w, there);
      }
    }
  }
  bringing.finish();
}

// The other warpgroups. Of the warp w, with g = lane / 4 and t = lane % 4, y[4 j + i] is column 16 w + g + i / 2 * 8 of token
// 8 j + 2 t + i % 2.
template <class Block>
SADMOE_DEVICE void sum_crowd(const Down& p, typename Block::Memory& memory) {
  using T = typename Block::Element;
  constexpr int kWords = Block::kOwnTokens / kGroupTokens, kSums = Block::kSums;
  const int half = thread_index() / kWarpgroup - 1, lane = thread_index() % 32, t = lane % 4;
  const int warp_column = thread_index() / 32 % Block::kWarps * 16, parts = parts_of<Block>(p);
  const int64_t c = block_y() * Block::kColumns + warp_column + lane / 4;
  float y[kSums], sums[kSums];
  const float biases[2] = {p.b_out.data && c < p.d_out ? load(p.b_out, c) : 0,
                           p.b_out.data && c + 8 < p.d_out ? load(p.b_out, c + 8) : 0};
  SADMOE_UNROLL
  for (int i = 0; i < kSums; ++i) y[i] = biases[i % 4 / 2], sums[i] = 0;
  CrowdWalk walk(p);
  Turn<typename Block::Ring> turn;
  SADMOE_ROLLED
  for (int left = walk.count(); left > 0; left -= Block::kExperts) SADMOE_ROLLED
  for (int part = 0; part < parts; ++part, turn.next()) {
    const auto& step = memory.steps[turn.stage];
    wait_barrier(memory.ring.full[turn.stage], turn.parity);
    SADMOE_UNROLL
    for (int i = 0; i < Block::kExperts; ++i) {
      unsigned words[kWords], any = 0;
      SADMOE_UNROLL
      for (int g = 0; g < kWords; ++g) any |= words[g] = step.words[i][half * kWords + g];
      if (!any) continue;
      unsigned ws[Block::kSlices][4];
      SADMOE_UNROLL
      for (int k = 0; k < Block::kSlices; ++k)
        load_matrices_transposed(ws[k],
                                 step.w.from(Block::Weights::offset(lane / 16 * 8 + lane % 8, warp_column + lane / 8 % 2 * 8) +
                                             Block::Weights::offset((i * Block::kSlices + k) * 16, 0)));
      begin_products();
      SADMOE_UNROLL
      for (int k = 0; k < Block::kSlices; ++k)
        multiply_64(sums, ws[k], operand(&step.h[half * Block::kOwnTokens][(i * Block::kSlices + k) * 32]), part > 0 || k > 0,
                    T{});
      commit_products();
      wait_products<0>();
      settle(sums);
      if (part + 1 < parts) continue;
      SADMOE_UNROLL
      for (int g = 0; g < kWords; ++g) {
        const unsigned own = words[g] >> t * 2;
        SADMOE_UNROLL
        for (int j = 0; j < kGroupTokens / 8; ++j) SADMOE_UNROLL
        for (int k = 0; k < 4; ++k)
          if (own >> (j * 8 + k % 2) & 1) y[(g * 4 + j) * 4 + k] += sums[(g * 4 + j) * 4 + k];
      }
    }
    memory.ring.release(turn.stage);
  }
  // Two tokens of a column become two columns of a token.
  SADMOE_UNROLL
  for (int i = 0; i < kSums; i += 2) {
    const unsigned word = transposed(word_of(y[i], y[i + 1], T{}));
    const int64_t token = block_x() * kCrowdTokens + half * Block::kOwnTokens + i / 4 * 8 + lane / 4;
    const int64_t column = block_y() * Block::kColumns + warp_column + i % 4 / 2 * 8 + t * 2;
    if (token < p.T && column < p.d_out) store_word(word, static_cast<T*>(p.y) + token * p.d_out + column);
  }
}

template <class T, int kSlices>
SADMOE_KERNEL(HopperDownBlock<T, kSlices>::kThreads, 1)
hopper_down(Down p) {
  using Block = HopperDownBlock<T, kSlices>;
  SADMOE_SHARED(typename Block::Memory, memory);
  if (!crowded(p, block_x())) return;
  if (thread_index() == 0) memory.ring.init(Block::kWarps, Block::kConsumers * Block::kWarps);
  sync_block();
  if (thread_index() < kWarpgroup) {
    give_registers<Block::kGiven>();
    bring_crowd<Block>(p, memory);
  } else {
    take_registers<Block::kTaken>();
    sum_crowd<Block>(p, memory);
  }
}

}  // namespace sadmoe::cuda
