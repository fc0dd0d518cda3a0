// A mask as work, made on the device: counts, a scan, lists. No sort, no atomics, no word to the host, so a captured
// graph replays with any mask.
//
//   tile i = tokens [i n, (i + 1) n), n = kTileTokens
//   rows[starts[i, e] .. starts[i + 1, e])      = the tokens of tile i that chose expert e, ascending
//   rows[starts[0, e] .. starts[tiles, e])      = all tokens that chose e, ascending; starts[0, e + 1] follows
#pragma once
#include "cuda/device.cuh"

namespace sadmoe::cuda {

constexpr int kTileTokens = 64;
constexpr int kPlanThreads = 128;
constexpr int kScanThreads = 256;

struct Plan {
  const bool* mask;  // [T, E]
  int32_t* starts;   // [tiles + 1, E]
  int32_t* rows;     // [T E] at most
  int64_t T, E, tiles;
};

// starts[i, e] = tokens of tile i that chose e. A thread an expert, so that a warp reads whole lines of the mask.
SADMOE_KERNEL(kPlanThreads) plan_count(Plan p) {
  const int64_t i = block_x(), e = block_y() * kPlanThreads + thread_index();
  if (e >= p.E) return;
  int32_t count = 0;
  for (int64_t t = i * kTileTokens; t < p.T && t < (i + 1) * kTileTokens; ++t) count += p.mask[t * p.E + e];
  p.starts[i * p.E + e] = count;
}

struct ScanMemory {
  int32_t warp_sums[kScanThreads / 32];
};

// Inclusive sums over the threads of the block, and the sum of all.
SADMOE_DEVICE int32_t scan_block(int32_t value, int32_t& total, ScanMemory& memory) {
  constexpr int kWarps = kScanThreads / 32;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  SADMOE_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int32_t below = shuffle_up(value, lanes);
    value += lane >= lanes ? below : 0;
  }
  if (lane == 31) memory.warp_sums[warp] = value;
  sync_block();
  total = 0;
  SADMOE_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    value += w < warp ? memory.warp_sums[w] : 0;
    total += memory.warp_sums[w];
  }
  sync_block();
  return value;
}

// Counts to starts, in one block.
SADMOE_KERNEL(kScanThreads) plan_scan(Plan p) {
  SADMOE_SHARED(ScanMemory, memory);
  int32_t before = 0;  // pairs of the experts below e0
  for (int64_t e0 = 0; e0 < p.E; e0 += kScanThreads) {
    const int64_t e = e0 + thread_index();
    int32_t count = 0, total;
    if (e < p.E)
      for (int64_t i = 0; i < p.tiles; ++i) count += p.starts[i * p.E + e];
    int32_t start = before + scan_block(count, total, memory) - count;
    if (e < p.E) {
      for (int64_t i = 0; i < p.tiles; ++i) {
        const int32_t n = p.starts[i * p.E + e];
        p.starts[i * p.E + e] = start;
        start += n;
      }
      p.starts[p.tiles * p.E + e] = start;
    }
    before += total;
  }
}

SADMOE_KERNEL(kPlanThreads) plan_fill(Plan p) {
  const int64_t i = block_x(), e = block_y() * kPlanThreads + thread_index();
  if (e >= p.E) return;
  int32_t at = p.starts[i * p.E + e];
  for (int64_t t = i * kTileTokens; t < p.T && t < (i + 1) * kTileTokens; ++t)
    if (p.mask[t * p.E + e]) p.rows[at++] = static_cast<int32_t>(t);
}

}  // namespace sadmoe::cuda
