// A mask as work, made on the device: the words of plan.h, their counts, a scan, lists by rank. No sort, no atomics, no word to
// the host, so a captured graph replays with any mask.
//
//   tile i = groups 2 i and 2 i + 1
//   rows[starts[i, e] .. starts[i + 1, e])      = the tokens of tile i that chose expert e, ascending
//   rows[starts[0, e] .. starts[tiles, e])      = all tokens that chose e, ascending; starts[0, e + 1] follows
//   active = how many experts some token chose, then those, ascending                 (decode: T <= kTileTokens)
//   starts[g, i] = words[g, the i-th active]                                          (likewise, in place of the above)
#pragma once
#include "cuda/rule.cuh"

namespace sadmoe::cuda {

constexpr int kTileTokens = 2 * kGroupTokens;
constexpr int kWordThreads = 256;

struct Plan {
  const bool* mask;     // [T, E]; null: who reaches tau
  const float* scores;  // [T, E]
  float tau;
  uint32_t* words;  // [2 tiles, E]
  int32_t* starts;  // [tiles + 2, E]; the last row: how many tokens chose e; decode: [2, E], words
  int32_t* rows;    // [T E] at most; decode: active
  int64_t T, E, tiles;

  SADMOE_DEVICE int32_t* totals() const { return starts + (tiles + 1) * E; }
  SADMOE_DEVICE int tile_count(int64_t i, int64_t e) const {
    return count_bits(words[2 * i * E + e]) + count_bits(words[(2 * i + 1) * E + e]);
  }
};

struct WordMemory {
  float thresholds[kGroupTokens];
  int32_t warp_sums[kWordThreads / 32];
};

// The words of group g, by the block: lanes are experts, so that a warp reads whole lines.
SADMOE_DEVICE void make_words(const Plan& p, int64_t g, WordMemory& memory) {
  constexpr int kWarps = kWordThreads / 32;
  const int64_t t0 = g * kGroupTokens, left = p.T - t0;
  const int n = left < 0 ? 0 : left < kGroupTokens ? static_cast<int>(left) : kGroupTokens;
  if (!p.mask)
    for (int t = thread_index() / 32; t < n; t += kWarps) {
      const float threshold = threshold_of(p.scores + (t0 + t) * p.E, p.E, p.tau);
      if (thread_index() % 32 == 0) memory.thresholds[t] = threshold;
    }
  sync_block();
  const auto* mask = reinterpret_cast<const uint8_t*>(p.mask);  // any byte but 0 is true
  for (int64_t e = thread_index(); e < p.E; e += kWordThreads) {
    uint32_t word = 0;
    for (int t = 0; t < n; ++t) {
      const int64_t i = (t0 + t) * p.E + e;
      const bool chosen = mask ? mask[i] != 0 : reaches(p.scores[i], memory.thresholds[t]);
      word |= static_cast<uint32_t>(chosen) << t;
    }
    p.words[g * p.E + e] = word;
  }
}

// Over the lanes of a warp: the sum of all, for each of them, and inclusive sums.
SADMOE_DEVICE int32_t sum_warp(int32_t value) {
  SADMOE_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}
SADMOE_DEVICE int32_t scan_warp(int32_t value) {
  SADMOE_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int32_t below = shuffle_up(value, lanes);
    value += thread_index() % 32 >= lanes ? below : 0;
  }
  return value;
}

// Inclusive sums over the threads of the block, and the sum of all.
template <int kThreads>
SADMOE_DEVICE int32_t scan_block(int32_t value, int32_t& total, int32_t (&warp_sums)[kThreads / 32]) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  value = scan_warp(value);
  if (lane == 31) warp_sums[warp] = value;
  sync_block();
  total = 0;
  SADMOE_UNROLL
  for (int w = 0; w < kThreads / 32; ++w) {
    value += w < warp ? warp_sums[w] : 0;
    total += warp_sums[w];
  }
  sync_block();
  return value;
}

}  // namespace sadmoe::cuda
