#include "cpu/moe.h"

#include <algorithm>
#include <memory>

#include "cpu/block.h"
#include "cpu/isa.h"
#include "cpu/router.h"
#include "cpu/scratch.h"
#include "cpu/tiled.h"

namespace sadmoe::cpu {
namespace {

// Tokens a thread works on at once: the more, the fewer times the weights are read. Their rows need not stay in a near cache
// together, only those that chose one expert. No result depends on it. 256 were slower where d is 2048, and as fast elsewhere.
constexpr int64_t kBlock = 512, kSmallestBlock = 64, kLargestBlock = 2048;
// Floats of activations that a thread's block may need where every expert runs; one that has grown, as many as dense has.
constexpr int64_t kHidden = 1 << 22;
constexpr int64_t kWantedRows = 64;      // of an expert, on average, for which blocks grow where weights come from memory:
constexpr int64_t kLastLevel = 1 << 25;  // bytes of weights that a last-level cache may hold from one block to the next
// Up to this many tokens a thread, threads share every token and split the weights: more where each has kBroad columns of y.
constexpr int64_t kShared = 32, kSharedIfBroad = 128, kBroad = 128;

int64_t block_tokens(const Experts& p) { return std::clamp(kHidden / (p.shape.E * p.shape.s), kSmallestBlock, kBlock); }

// Whether blocks grow where experts have few rows in them, so that weights are read less often from memory.
bool blocks_grow(const Experts& p, const Threads& threads) {
  const ExpertsShape& s = p.shape;
  const int64_t bytes = s.E * s.s * ((p.w_gate ? 2 : 1) * s.d + s.d_out) * size_of(p.w_up.dtype);
  return bytes > kLastLevel && s.T > block_tokens(p) * threads.count && !runs_by_tiles(p);
}

int64_t grown_block(const Experts& p, const bool* mask) {
  const int64_t least = block_tokens(p), all = p.shape.T * p.shape.E;
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask);  // see BlockPlan
  const int64_t pairs = all - std::count(bytes, bytes + all, uint8_t{0});
  return std::clamp(kWantedRows * all / std::max<int64_t>(pairs, 1), least, kLargestBlock);
}

// Calls run(begin, end, threads) for blocks of tokens, whose results have so many columns: few tokens in one block on all
// threads, many in a block a thread.
void for_blocks(int64_t T, int64_t columns, int64_t block, const Threads& threads,
                const std::function<void(int64_t, int64_t, const Threads&)>& run) {
  if (T == 0) return;
  const int64_t count = threads.count, broad = columns >= kBroad * count ? std::min(kSharedIfBroad * count, block) : 0;
  if (T <= (count == 1 ? block : std::max(kShared * count, broad))) return run(0, T, threads);
  // A whole number of rounds of the threads, in blocks as equal as they can be.
  const int64_t rounds = (T + block * count - 1) / (block * count), blocks = rounds * count;
  threads.parallel_for(blocks, 1, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b)
      if (const int64_t begin = T * b / blocks, end = T * (b + 1) / blocks; begin < end) run(begin, end, one_thread());
  });
}

// The tokens [begin, end) of a call, under mask [end - begin, E].
class Runner {
 public:
  Runner(const Experts& p, const Threads& threads)
      : p_(p), b_out_(p.b_out, p.shape.d_out), scale_out_(p.scale_out, p.shape.d_out) {
    if (!runs_by_tiles(p)) return;
    weights_ = std::make_unique<TiledWeights>(p);
    if (p.shape.T > block_tokens(p) * threads.count) weights_->lay_out_all(threads);
  }

  void operator()(const bool* mask, int64_t begin, int64_t end, const Threads& threads) {
    if (weights_) return run_tiled(p_, *weights_, mask, begin, end, b_out_, threads);
    run_block(p_, mask, begin, end, b_out_, scale_out_, threads);
  }

 private:
  const Experts& p_;
  AsFloat b_out_, scale_out_;
  std::unique_ptr<TiledWeights> weights_;
};

}  // namespace

void router_scores(View x, const Router& router, const RouterShape& shape, float* scores, const Threads& threads) {
  for_blocks(shape.T, shape.E, kBlock, threads, [&](int64_t begin, int64_t end, const Threads& inner) {
    const RouterShape part{end - begin, shape.d, shape.r, shape.E};
    route(at(x, begin * shape.d), router, part, scores + begin * shape.E, inner);
  });
}

void sparse_experts(const Experts& p, const bool* mask, const Threads& threads) {
  Runner run(p, threads);
  const int64_t block = blocks_grow(p, threads) ? grown_block(p, mask) : block_tokens(p);
  for_blocks(p.shape.T, p.shape.d_out, block, threads,
             [&](int64_t begin, int64_t end, const Threads& inner) { run(mask + begin * p.shape.E, begin, end, inner); });
}

void dynamic_k_moe(const Experts& p, const Router& router, const Threads& threads) {
  const int64_t T = p.shape.T, E = p.shape.E;
  const auto choose = [&](int64_t begin, int64_t end, bool* mask, const Threads& inner) {
    const RouterShape part{end - begin, p.shape.d, router.r, E};
    const Floats scores(part.T * E);
    route(at(p.x, begin * part.d), router, part, scores.get(), inner);
    const Kernels& k = kernels();
    for (int64_t t = 0; t < part.T; ++t) k.select({E, scores.get() + t * E, router.tau, mask + t * E});
  };
  if (blocks_grow(p, threads)) {  // by what all tokens chose
    const Buffer<bool> mask(T * E);
    for_blocks(T, E, kBlock, threads,
               [&](int64_t begin, int64_t end, const Threads& inner) { choose(begin, end, mask.get() + begin * E, inner); });
    return sparse_experts(p, mask.get(), threads);
  }
  Runner run(p, threads);
  for_blocks(T, p.shape.d_out, block_tokens(p), threads, [&](int64_t begin, int64_t end, const Threads& inner) {
    const Buffer<bool> mask((end - begin) * E);
    choose(begin, end, mask.get(), inner);
    run(mask.get(), begin, end, inner);
  });
}

}  // namespace sadmoe::cpu
