// With few tokens, time is spent reading weights. Each weight that any token needs is read once, by 16 bytes, with many
// reads in flight, and every token goes along; what a token did not choose is left out of its sum. Results are those of
// up.cuh and down.cuh bit for bit.
#pragma once
#include <type_traits>

#include "cuda/plan.cuh"
#include "cuda/strip.cuh"
#include "cuda/up.cuh"

namespace sadmoe::cuda {

// Of shared memory that every device gives a block without being asked; what is left holds a few words more.
constexpr int kStageBytes = 46 << 10, kMostStages = 16;
constexpr int kInFlight = 8;  // copies of a thread on their way before the first is used

// Every kernel here begins so: the launch of the next is under way while this one works.
SADMOE_DEVICE void begin_kernel() {
  start_kernel_after();
  wait_kernel_before();
}

// The words of both groups and the active experts, by one block.
SADMOE_KERNEL(kWordThreads) plan_decode(Plan p) {
  begin_kernel();
  SADMOE_SHARED(WordMemory, memory);
  make_words(p, 0, memory);
  sync_block();
  make_words(p, 1, memory);
  int32_t before = 0;
  for (int64_t e0 = 0; e0 < p.E; e0 += kWordThreads) {
    const int64_t e = e0 + thread_index();
    const bool active = e < p.E && (p.words[e] | p.words[p.E + e]);  // this thread's own words
    int32_t all;
    const int32_t rank = before + scan_block<kWordThreads>(active, all, memory.warp_sums);
    if (active) {
      p.rows[rank] = static_cast<int32_t>(e);
      p.starts[rank - 1] = static_cast<int32_t>(p.words[e]), p.starts[p.E + rank - 1] = static_cast<int32_t>(p.words[p.E + e]);
    }
    before += all;
  }
  if (thread_index() == 0) p.rows[0] = before;
}

// h[i T + t, j] = act(x[t] . w_up[e, j] + b_up[e, j])   for the i-th active expert e, every token t; GLU as in contract.h
struct DecodeUp : UpOperands {
  const int32_t* active;  // of the plan; null: one expert, which all tokens chose
};

// A block takes 8 neurons a warp: few, so that there are blocks for all multiprocessors; more where x weighs as much.
constexpr int decode_up_threads(int tokens) { return tokens == 16 ? 64 : 128; }

template <class Tile, bool kGated, int kTokens>
struct DecodeUpBlock {
  static constexpr int kThreads = decode_up_threads(kTokens), kWarps = kThreads / 32, kNeurons = 8 * kWarps;
  static constexpr int kDepth = Tile::kDepth * (kTokens == 16 ? 2 : 1), kMatrices = kGated ? 2 : 1;
  using Element = typename Tile::Element;
  struct Stages {
    Stage<Element, kTokens, kDepth, Tile::kRowPad> x;
    Stage<Element, kNeurons, kDepth, Tile::kRowPad> w[kMatrices];
  };
  static constexpr int kStages = stages_in<Stages>(kStageBytes, kMostStages);
  static constexpr int kCopies = (kTokens + kNeurons * kMatrices) * kDepth * sizeof(Element) / 16 / kThreads;
  static_assert((kStages - 1) * kCopies >= kInFlight, "enough on its way");
  struct Memory {
    int64_t neurons[kNeurons];  // rows of the weights
    union {
      Stages stages[kStages];
      float sums[kMatrices][kTokens][kNeurons];
    };
  };
};

// The active neurons in strips of 8, an equal share for every block: block i takes the i-th kWarps of them, and every
// blocks_x-th kWarps after.
template <class Tile, bool kGated, int kTokens>
SADMOE_KERNEL(decode_up_threads(kTokens), 512 / decode_up_threads(kTokens))
decode_up(DecodeUp p) {
  using Block = DecodeUpBlock<Tile, kGated, kTokens>;
  using Memory = typename Block::Memory;
  using Stages = typename Block::Stages;
  using Element = typename Tile::Element;
  using WStage = std::remove_reference_t<decltype(Stages::w[0])>;
  constexpr int kThreads = Block::kThreads, kDepth = Block::kDepth, kNeurons = Block::kNeurons;
  SADMOE_SHARED(Memory, memory);
  begin_kernel();
  const int T = static_cast<int>(p.T), d = static_cast<int>(p.d), s = static_cast<int>(p.s);
  const int strips = (s + 7) / 8, all = (p.active ? p.active[0] : 1) * strips;
  const auto x = source<Element, kThreads, decltype(Stages::x)>(p.x, [&](int r) { return r * p.x.ld; });
  for (int strip0 = static_cast<int>(block_x()) * Block::kWarps; strip0 < all;
       strip0 += static_cast<int>(blocks_x()) * Block::kWarps) {
    if (thread_index() < kNeurons) {
      const int strip = strip0 + thread_index() / 8, i = strip / strips, j = strip % strips * 8 + thread_index() % 8;
      // Beyond the last neuron the last again, whose sums nobody reads.
      memory.neurons[thread_index()] = strip < all ? (p.active ? p.active[1 + i] : 0) * p.s + (j < s ? j : s - 1) : 0;
    }
    sync_block();
    const int rows = (all - strip0) * 8, c0 = thread_index() / 32 * 8;
    const auto neuron = [&](int r) { return memory.neurons[r] * p.w_up.ld; };
    const auto w = source<Element, kThreads, WStage>(p.w_up, neuron);
    const auto gate = source<Element, kThreads, WStage>(kGated ? p.w_gate : p.w_up, neuron);
    Strip<Tile, kTokens> sums, gates;
    int left = d;
    unsigned on = 0;
    pipeline(
        memory.stages, (d + kDepth - 1) / kDepth,
        [&](Stages& stage) {
          const auto fill = [&](const auto& from, auto& to, int rows) {
            if (from.wide())
              from.copy(to, on, rows, left);
            else
              from.load(to, d - left, rows, left);
          };
          fill(w, stage.w[0], rows);
          if constexpr (kGated) fill(gate, stage.w[1], rows);
          fill(x, stage.x, T);
          left -= kDepth, on += kDepth / x.kWide;
        },
        [&](const Stages& stage) {
          sums.rows(stage.x, stage.w[0], c0);
          if constexpr (kGated) gates.rows(stage.x, stage.w[1], c0);
        });
    SADMOE_UNROLL
    for (int i = 0; i < sums.kSums; ++i) {
      memory.sums[0][sums.row(i)][c0 + sums.column(i)] = sums.sums[i];
      if constexpr (kGated) memory.sums[1][sums.row(i)][c0 + sums.column(i)] = gates.sums[i];
    }
    sync_block();
    using Hidden = typename Tile::Hidden;
    constexpr int kTogether = 4 / sizeof(Hidden), kOfRow = kNeurons / kTogether;  // neurons of a thread; threads
    const int c = thread_index() % kOfRow * kTogether, strip = strip0 + c / 8, i = strip / strips;
    const int64_t row = int64_t{i} * T, j = strip % strips * 8 + c % 8;
    if (strip < all && j < p.ld_h)
      write_hidden<Hidden, kGated>(p, memory.neurons[c], s - j, thread_index() / kOfRow, T, kThreads / kOfRow,
                                   InOrder{row * p.ld_h + j, p.ld_h}, [&](int m, int r) { return &memory.sums[m][r][c]; });
    sync_block();
  }
}

// y[t] = b_out + sum over the experts e that t chose, ascending, of h[i T + t] w_down[e], e the i-th active
struct DecodeDown : DownOperands {
  const int32_t *active, *low_words, *high_words;  // of the plan; the words of those experts
};

constexpr int kDownThreads = 128, kDownColumns = kDownThreads / 32 * 8;

template <class Tile, int kTokens>
struct DecodeDownBlock {
  using Element = typename Tile::Element;
  static constexpr int kDepth = Tile::kDepth;
  static constexpr bool kDense = sizeof(Element) == 2;  // rows of 64 bytes, that more stages fit
  struct Stages {
    Stage<Element, kTokens, kDepth, kDense ? 0 : Tile::kRowPad> h;
    Stage<Element, kDepth, kDownColumns, kDense ? 0 : Tile::kDepthPad> w;
    int32_t words[2];  // of the expert: which tokens chose it
    int32_t e;
  };
  static constexpr int kStages = stages_in<Stages>(kStageBytes, kMostStages);
  static_assert((kStages - 1) * kDepth * kDownColumns * sizeof(Element) / 16 / kDownThreads >= kInFlight || kTokens > 16,
                "enough on its way");
  union Memory {
    Stages stages[kStages];
    float y[kTokens][kDownColumns];
  };
};

// The active experts, 32 at a glance, a lane each, the next 32 already on their way. Each warp walks alone and sees the same.
struct ActiveWalk {
  const DecodeDown& p;
  int count, i = 0;  // the next
  int e = 0, low = 0, high = 0, next_e = 0, next_low = 0, next_high = 0;

  SADMOE_DEVICE explicit ActiveWalk(const DecodeDown& p) : p(p), count(p.active[0]) { look(0); }

  SADMOE_DEVICE void look(int from) {
    const int at = from + thread_index() % 32;
    if (at >= count) return;
    next_e = p.active[1 + at], next_low = p.low_words[at], next_high = p.high_words[at];
  }

  struct Expert {
    int e, low, high;
  };
  // There must be one.
  SADMOE_DEVICE Expert next() {
    const int lane = i++ % 32;
    if (lane == 0) {
      e = next_e, low = next_low, high = next_high;
      look(i + 31);
    }
    return {shuffle(e, lane), shuffle(low, lane), shuffle(high, lane)};
  }
};

// A block owns columns of y and walks all active neurons: no sum crosses blocks. Experts follow each other in one pipeline.
template <class Tile, int kTokens>
SADMOE_KERNEL(kDownThreads, 4)
decode_down(DecodeDown p) {
  using Block = DecodeDownBlock<Tile, kTokens>;
  using Memory = typename Block::Memory;
  using Stages = typename Block::Stages;
  using Element = typename Tile::Element;
  constexpr int kDepth = Block::kDepth;
  SADMOE_SHARED(Memory, memory);
  begin_kernel();
  const int64_t block_c0 = block_x() * kDownColumns;
  const auto h = source<Element, kDownThreads, decltype(Stages::h)>(p.h, [&](int r) { return r * p.h.ld; });
  const auto w = source<Element, kDownThreads, decltype(Stages::w)>(p.w_down, [&](int r) { return r * p.w_down.ld + block_c0; });
  const unsigned h_row = static_cast<unsigned>(p.h.ld / h.kWide), w_row = static_cast<unsigned>(p.w_down.ld / w.kWide);
  const int T = static_cast<int>(p.T), s = static_cast<int>(p.s), columns = kept(static_cast<int>(p.d_out - block_c0));
  const int c0 = thread_index() / 32 * 8, steps = (s + kDepth - 1) / kDepth;
  Strip<Tile, kTokens> sums;
  Chain<Tile, sums.kSums> chain;
  SADMOE_UNROLL
  for (int i = 0; i < sums.kSums; ++i) {
    const int64_t c = block_c0 + c0 + sums.column(i);
    chain.y[i] = p.b_out.data && c < p.d_out ? load(p.b_out, c) : 0;
  }
  ActiveWalk walk(p);
  ActiveWalk::Expert expert{};
  unsigned h_begin = 0, h_on = 0, w_on = 0;
  int left = 0, used = 0;
  pipeline(
      memory.stages, walk.count * steps,
      [&](Stages& stage) {
        if (left <= 0) {
          expert = walk.next();
          left = s, h_on = h_begin, w_on = expert.e * (s * w_row);
          h_begin += T * h_row;
        }
        if (w.wide())
          w.copy(stage.w, w_on, left, columns);
        else
          w.load(stage.w, (expert.e * p.s + s - left) * p.w_down.ld, left, columns);
        h.copy(stage.h, h_on, T, left);
        if (thread_index() == 0) stage.words[0] = expert.low, stage.words[1] = expert.high, stage.e = expert.e;
        left -= kDepth, h_on += kDepth / h.kWide, w_on += kDepth * w_row;
      },
      [&](const Stages& stage) {
        sums.depths(stage.h, stage.w, c0);
        if (++used < steps) return;
        used = 0;
        const unsigned low = stage.words[0], high = stage.words[1];
        chain.begin(stage.e);
        SADMOE_UNROLL
        for (int i = 0; i < sums.kSums; ++i) {
          const int t = sums.row(i);
          if ((t < 32 ? low : high) >> (t % 32) & 1) chain.add(i, sums.sums[i]);
          sums.sums[i] = 0;
        }
      });
  chain.end();
  SADMOE_UNROLL
  for (int i = 0; i < sums.kSums; ++i) memory.y[sums.row(i)][c0 + sums.column(i)] = chain.y[i];
  sync_block();
  SADMOE_ROLLED
  for (int i = thread_index(); i < p.T * kDownColumns; i += kDownThreads) {
    const int64_t t = i / kDownColumns, c = block_c0 + i % kDownColumns;
    if (c < p.d_out) store(p.y, p.dtype, t * p.d_out + c, memory.y[t][i % kDownColumns]);
  }
}

}  // namespace sadmoe::cuda
