// up.cuh on devices of capability 9.0, 16 bits: the same functions by the products of warpgroups. Of a block that stays for
// many tiles, one warpgroup brings operands into a ring of stages, rows of tokens by its own copies and weights by the copy
// engine; two multiply them. The sum of an element runs over the depth as in tile.cuh, 16 steps by 16. All kernels have
// the same bits if products of a warpgroup add as those of a warp do: bench_cuda conformance asks the device.
#pragma once
#include "cuda/hopper_ring.cuh"
#include "cuda/up.cuh"

namespace sadmoe::cuda {

struct HopperUp {
  TileMap w_up, w_gate;  // [E, s, d]
  Up up;
  int strips;  // of kNeurons neurons an expert
};

// Two sums of [64, kNeurons] a warpgroup: of two blocks of rows; or, gated, of both matrices. 128 columns fill its registers,
// and bring least: 256 x 128 are 85 FLOP for every byte, where by a model, not measured, an H100's L2 is hidden from 95 on.
// kAll: for `up_all`.
template <class T, bool kGatedOf, int kNeuronsOf, bool kAllOf = false>
struct HopperUpBlock {
  using Element = T;
  static constexpr bool kGated = kGatedOf, kAll = kAllOf;
  static constexpr int kNeurons = kNeuronsOf, kSums = kNeurons / 2, kMatrices = kGated ? 2 : 1;
  static constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup, kWarps = kWarpgroup / 32;
  static constexpr int kBlockRows = 64, kRowBlocks = kGated ? kConsumers : 2 * kConsumers, kRows = kRowBlocks * kBlockRows;
  static constexpr int kDepth = kSwizzledElements;
  static constexpr int kGiven = 72, kTaken = 216;  // registers a thread; with 56 the first spills
  static_assert(kGiven + kConsumers * kTaken <= 65536 / kThreads / 8 * 8 * (1 + kConsumers));

  struct Stage {
    unsigned char x[kRows][kSwizzledBytes], w[kMatrices][kNeurons][kSwizzledBytes];
  };
  // Of a warp: 32 columns of its sums, so that it writes whole sectors and an epilogue is compiled once an element. A row's
  // columns are exchanged, that rows meet in different banks.
  static constexpr int kColumns = 32;
  struct Sums {
    float at[kMatrices][16][kColumns];
    SADMOE_DEVICE static int column(int r, int c) { return c ^ r % 4 * 8; }
  };
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kStages = stages_in<Stage>(kMostBytes - kBarrierBytes - kConsumers * kWarps * sizeof(Sums), 6);
  using Ring = cuda::Ring<kStages>;
  struct Memory {
    alignas(1024) Stage stages[kStages];
    Ring ring;
    Sums sums[kConsumers * kWarps];
  };
  static_assert(sizeof(Memory) <= kMostBytes);
};

// The tiles of this block: of all, expert by expert, every blocks_x-th. 32 experts at a glance, a lane each; every warp walks
// alone and sees the same. Where there are few pairs, tiles are of fewer rows, so that there are some for every block.
template <class Block>
struct UpWalk {
  const HopperUp& p;
  int rows = Block::kRows;
  int64_t at = block_x(), e0 = -32;       // the next tile, counted from the first of expert e0
  int32_t begin = 0, end = 0;             // pairs of this lane's expert
  int32_t before = 0, last = 0, all = 0;  // tiles: before it, up to its last, of all 32

  SADMOE_DEVICE explicit UpWalk(const HopperUp& p) : p(p) {
    const int32_t pairs = pairs_until(p.up.E - 1);
    while (rows > Block::kBlockRows && pairs / rows * p.strips < blocks_x()) rows /= 2;
  }

  // Of all experts up to e.
  SADMOE_DEVICE int32_t pairs_until(int64_t e) const {
    return p.up.starts ? p.up.starts[p.up.tiles * p.up.E + e] : static_cast<int32_t>(p.up.T);
  }

  SADMOE_DEVICE void look() {
    const int64_t e = e0 + thread_index() % 32;
    begin = e < p.up.E && p.up.starts ? p.up.starts[e] : 0, end = e < p.up.E ? pairs_until(e) : 0;
    const int32_t own = (end - begin + rows - 1) / rows * p.strips;
    last = scan_warp(own);
    before = last - own, all = shuffle(last, 31);
  }

  int64_t e, p0, j0;  // of the tile: expert, first pair, first neuron
  int n;              // pairs, at most `rows`
  // False after the last.
  SADMOE_DEVICE bool next() {
    while (at >= all) {
      at -= all, e0 += 32;
      if (e0 >= p.up.E) return false;
      look();
    }
    const int i = lowest_bit(ballot(last > at));
    const int32_t tile = static_cast<int32_t>(at) - shuffle(before, i);
    const int32_t first = shuffle(begin, i) + tile / p.strips * rows, left = shuffle(end, i) - first;
    e = e0 + i, p0 = first, j0 = int64_t{tile % p.strips} * Block::kNeurons;
    n = left < rows ? left : rows;
    at += blocks_x();
    return true;
  }
};

// The first warpgroup: steps of all tiles, one after another.
template <class Block>
SADMOE_DEVICE void bring(const HopperUp& p, typename Block::Memory& memory) {
  constexpr int kEvery = kWarpgroup / 8, kCopies = Block::kRows / kEvery;  // 8 lanes a row, 16 bytes each
  static_assert(kCopies % 8 == 0, "a lane keeps the token of a row of its warp for 8 copies");
  using T = typename Block::Element;
  const T* x = static_cast<const T*>(p.up.x.data);
  const int lane = thread_index() % 32, r0 = thread_index() / 8, c = thread_index() % 8;
  Bringing<typename Block::Ring> bringing(memory.ring);
  for (UpWalk<Block> tile(p); tile.next();) {
    int32_t tokens[kCopies / 8];
    SADMOE_UNROLL
    for (int i = 0; i < kCopies / 8; ++i) {
      const int r = thread_index() / 32 * 4 + lane % 4 + (i * 8 + lane / 4) * kEvery;
      tokens[i] = r >= tile.n ? -1 : p.up.rows ? p.up.rows[tile.p0 + r] : static_cast<int32_t>(tile.p0 + r);
    }
    SADMOE_ROLLED
    for (int64_t k = 0; k < p.up.d; k += Block::kDepth, bringing.end()) {
      const int at = bringing.begin();
      auto& stage = memory.stages[at];
      Barrier& full = memory.ring.full[at];
      if (thread_index() == 0) {
        expect_bytes(full, sizeof stage.w);
        load_tile(stage.w[0], p.w_up, tile.e, tile.j0, k, full);
        if constexpr (Block::kGated) load_tile(stage.w[1], p.w_gate, tile.e, tile.j0, k, full);
      }
      const int64_t column = k + c * 8;
      SADMOE_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        if (i * kEvery / Block::kBlockRows * Block::kBlockRows >= tile.n) break;
        const int32_t token = shuffle(tokens[i / 8], i % 8 * 4 + lane / 8);
        const int r = r0 + i * kEvery;
        const bool there = token >= 0 && column < p.up.d;
        copy16_async(&stage.x[r][swizzled(r, c)], there ? x + token * p.up.x.ld + column : x, there);
      }
    }
  }
  bringing.finish();
}

// A tile without pairs for this warpgroup.
template <class Block>
SADMOE_DEVICE void skip(const HopperUp& p, typename Block::Memory& memory, Turn<typename Block::Ring>& turn) {
  SADMOE_ROLLED
  for (int64_t k = 0; k < p.up.d; k += Block::kDepth, turn.next()) {
    wait_barrier(memory.ring.full[turn.stage], turn.parity);
    memory.ring.release(turn.stage);
  }
}

// A tile's sums, kLive of them, on a warpgroup: [64, kNeurons] each.
template <class Block, int kLive>
SADMOE_DEVICE void multiply(const HopperUp& p, typename Block::Memory& memory, Turn<typename Block::Ring>& turn,
                            float (&sums)[2][Block::kSums]) {
  const int first = (thread_index() / kWarpgroup - 1) * Block::kBlockRows;
  SADMOE_UNROLL
  for (int q = 0; q < kLive; ++q) {
    SADMOE_UNROLL
    for (int i = 0; i < Block::kSums; ++i) sums[q][i] = 0;
    settle(sums[q]);
  }
  int before = -1;  // the stage that is still multiplied
  SADMOE_ROLLED
  for (int64_t k = 0; k < p.up.d; k += Block::kDepth, before = turn.stage, turn.next()) {
    const auto& stage = memory.stages[turn.stage];
    wait_barrier(memory.ring.full[turn.stage], turn.parity);
    begin_products();
    SADMOE_UNROLL
    for (int depth = 0; depth < kSwizzledBytes; depth += 32) SADMOE_UNROLL
    for (int q = 0; q < kLive; ++q) {
      const int row = Block::kGated ? first : q * Block::kConsumers * Block::kBlockRows + first;
      multiply_64(sums[q], operand(&stage.x[row][depth]), operand(&stage.w[Block::kGated ? q : 0][0][depth]),
                  typename Block::Element{});
    }
    commit_products();
    wait_products<1>();
    if (before >= 0) memory.ring.release(before);
  }
  wait_products<0>();
  SADMOE_UNROLL
  for (int q = 0; q < kLive; ++q) settle(sums[q]);
  memory.ring.release(before);
}

// The sums of 32 columns, the kPart-th of a warp's, to shared memory.
template <class Block, int kPart>
SADMOE_DEVICE void put(float (&to)[16][Block::kColumns], const float (&sums)[Block::kSums]) {
  constexpr int kCount = Block::kColumns / 2;
  if constexpr (kPart * kCount < Block::kSums) {
    SADMOE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int lane = thread_index() % 32, r = lane / 4 + i % 4 / 2 * 8, c = i / 4 * 8 + lane % 4 * 2 + i % 2;
      to[r][Block::Sums::column(r, c)] = sums[kPart * kCount + i];
    }
  }
}
template <class Block>
SADMOE_DEVICE void put(int part, float (&to)[16][Block::kColumns], const float (&sums)[Block::kSums]) {
  switch (part) {  // registers have no index at run time
    case 0:
      return put<Block, 0>(to, sums);
    case 1:
      return put<Block, 1>(to, sums);
    case 2:
      return put<Block, 2>(to, sums);
    default:
      return put<Block, 3>(to, sums);
  }
}

// h of a warp's 16 rows of every block of its sums, from `row` of the tile on.
template <class Block, class Walk>
SADMOE_DEVICE void finish(const Up& p, const Walk& tile, int row, typename Block::Sums& buffer, float (&sums)[2][Block::kSums]) {
  constexpr int kNext = Block::kConsumers * Block::kBlockRows, kColumns = Block::kColumns;
  const int lane = thread_index() % 32;
  SADMOE_ROLLED
  for (; row < tile.n; row += kNext) {
    SADMOE_ROLLED
    for (int c0 = 0; c0 < Block::kNeurons && tile.j0 + c0 < p.ld_h; c0 += kColumns) {
      put<Block>(c0 / kColumns, buffer.at[0], sums[0]);
      if constexpr (Block::kGated) put<Block>(c0 / kColumns, buffer.at[1], sums[1]);
      sync_warp();
      constexpr int kTogether = 4 / sizeof(typename Block::Element), kOfRow = kColumns / kTogether;  // neurons of a lane; lanes
      const int c = lane % kOfRow * kTogether, n = tile.n - row < 16 ? tile.n - row : 16;
      if (const int64_t j = tile.j0 + c0 + c; j < p.ld_h)
        write_hidden<typename Block::Element, Block::kGated>(p, tile.e * p.s + j, p.s - j, lane / kOfRow, n, 32 / kOfRow,
                                                             place<Block::kAll>(p, tile.p0 + row, j),
                                                             [&](int m, int r) { return &buffer.at[m][r][buffer.column(r, c)]; });
      sync_warp();
    }
    SADMOE_UNROLL
    for (int i = 0; i < Block::kSums; ++i) sums[0][i] = sums[1][i];
  }
}

// The other warpgroups: blocks of 64 rows in turn.
template <class Block>
SADMOE_DEVICE void consume(const HopperUp& p, typename Block::Memory& memory) {
  const int warp = thread_index() / 32 - Block::kWarps, first = warp / Block::kWarps * Block::kBlockRows;
  const int row = first + warp % Block::kWarps * 16;
  constexpr int kNext = Block::kConsumers * Block::kBlockRows;
  Turn<typename Block::Ring> turn;
  for (UpWalk<Block> tile(p); tile.next();) {
    float sums[2][Block::kSums];
    if (first >= tile.n)
      skip<Block>(p, memory, turn);
    else if (!Block::kGated && first + kNext >= tile.n)
      multiply<Block, 1>(p, memory, turn, sums);
    else
      multiply<Block, 2>(p, memory, turn, sums);
    finish<Block>(p.up, tile, row, memory.sums[warp], sums);
  }
}

template <class Block>
SADMOE_DEVICE void compute_hidden(const HopperUp& p, typename Block::Memory& memory) {
  if (thread_index() == 0) memory.ring.init(Block::kWarps, Block::kConsumers * Block::kWarps);
  sync_block();
  if (thread_index() < kWarpgroup) {
    give_registers<Block::kGiven>();
    bring<Block>(p, memory);
  } else {
    take_registers<Block::kTaken>();
    consume<Block>(p, memory);
  }
}

template <class T, bool kGated, int kNeurons>
SADMOE_KERNEL(HopperUpBlock<T, kGated, kNeurons>::kThreads, 1)
hopper_up(SADMOE_PARAMETER HopperUp p) {
  using Block = HopperUpBlock<T, kGated, kNeurons>;
  SADMOE_SHARED(typename Block::Memory, memory);
  if (!p.up.guard.reached()) compute_hidden<Block>(p, memory);
}

template <class T, bool kGated>
SADMOE_KERNEL(HopperUpBlock<T, kGated, 128, true>::kThreads, 1)
hopper_up_all(SADMOE_PARAMETER HopperUp p) {
  using Block = HopperUpBlock<T, kGated, 128, true>;
  SADMOE_SHARED(typename Block::Memory, memory);
  if (p.up.guard.reached()) compute_hidden<Block>(p, memory);
}

}  // namespace sadmoe::cuda
