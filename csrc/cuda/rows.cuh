// The plan of many tokens: words, starts, rows, in three launches.
#pragma once
#include "cuda/plan.cuh"

namespace sadmoe::cuda {

constexpr int kScanThreads = 512, kFillThreads = 128;

SADMOE_KERNEL(kWordThreads) plan_words(Plan p) {
  SADMOE_SHARED(WordMemory, memory);
  make_words(p, block_x(), memory);
}

struct ScanMemory {
  int32_t counts[kScanThreads / 32][32];
};

// starts, counted from the first token of each expert, and the totals. A lane an expert, a warp a share of the tiles.
SADMOE_KERNEL(kScanThreads) plan_scan(Plan p) {
  SADMOE_SHARED(ScanMemory, memory);
  constexpr int kWarps = kScanThreads / 32, kAtOnce = 4;  // tiles whose words are on their way before a start is written
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t e = block_x() * 32 + lane, share = (p.tiles + kWarps - 1) / kWarps, begin = warp * share;
  const int64_t end = e >= p.E ? begin : begin + share < p.tiles ? begin + share : p.tiles;
  int32_t count = 0;
  for (int64_t i = begin; i < end; ++i) count += p.tile_count(i, e);
  memory.counts[warp][lane] = count;
  sync_block();
  int32_t start = 0;
  for (int w = 0; w < warp; ++w) start += memory.counts[w][lane];
  for (int64_t i = begin; i < end; i += kAtOnce) {
    int32_t counts[kAtOnce];
    SADMOE_UNROLL
    for (int j = 0; j < kAtOnce; ++j) counts[j] = i + j < end ? p.tile_count(i + j, e) : 0;
    SADMOE_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      if (i + j < end) p.starts[(i + j) * p.E + e] = start;
      start += counts[j];
    }
  }
  if (warp == kWarps - 1 && e < p.E) p.totals()[e] = start;
}

struct FillMemory {
  int32_t warp_sums[kFillThreads / 32];
};

// starts from the first of all pairs, and rows. Every block counts the pairs of the experts below its own itself.
SADMOE_KERNEL(kFillThreads) plan_fill(Plan p) {
  SADMOE_SHARED(FillMemory, memory);
  const int64_t i = block_x(), e0 = block_y() * kFillThreads, e = e0 + thread_index();
  int32_t below = 0, before, all;
  for (int64_t other = thread_index(); other < e0; other += kFillThreads) below += p.totals()[other];
  scan_block<kFillThreads>(below, before, memory.warp_sums);
  const int32_t total = e < p.E ? p.totals()[e] : 0;
  before += scan_block<kFillThreads>(total, all, memory.warp_sums) - total;
  if (e >= p.E) return;
  const int32_t at = p.starts[i * p.E + e] + before;
  p.starts[i * p.E + e] = at;
  if (i == p.tiles - 1) p.starts[p.tiles * p.E + e] = before + total;
  int32_t* to = p.rows + at;
  for (int64_t g = 2 * i; g < 2 * i + 2; ++g) to = put_rows(p.words[g * p.E + e], static_cast<int32_t>(g * kGroupTokens), to);
}

}  // namespace sadmoe::cuda
