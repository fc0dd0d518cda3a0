// A block of the mask as work, for every expert the tokens that chose it:
//
//   rows[offsets[e] .. offsets[e + 1])  = { t : mask[t, e] },  ascending;   offsets[E] = executed pairs
//   active = { e : some token chose it },  ascending
#pragma once
#include <cstdint>
#include <vector>

#include "plan.h"

namespace sadmoe::cpu {

struct BlockPlan {
  std::vector<int64_t> offsets;
  std::vector<int32_t> rows, active;

  int64_t pairs() const { return offsets.back(); }
  int64_t count(int64_t e) const { return offsets[e + 1] - offsets[e]; }
  const int32_t* rows_of(int64_t e) const { return rows.data() + offsets[e]; }

  // mask [T, E], row-major. Any byte but 0 is true: tensors of bool that are views of others hold such.
  void build(const bool* chosen, int64_t T, int64_t E) {
    const auto* mask = reinterpret_cast<const uint8_t*>(chosen);
    const int64_t groups = (T + kGroupTokens - 1) / kGroupTokens;
    words_.assign(groups * E, 0);
    for (int64_t t = 0; t < T; ++t) {
      uint32_t* words = words_.data() + t / kGroupTokens * E;
      for (int64_t e = 0; e < E; ++e) words[e] |= uint32_t{mask[t * E + e] != 0} << t % kGroupTokens;
    }
    offsets.assign(E + 1, 0);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t e = 0; e < E; ++e) offsets[e + 1] += count_bits(words_[g * E + e]);
    active.resize(E);
    size_t n = 0;
    for (int64_t e = 0; e < E; ++e) {
      active[n] = static_cast<int32_t>(e);
      n += offsets[e + 1] != 0;
      offsets[e + 1] += offsets[e];
    }
    active.resize(n);
    rows.resize(pairs());
    for (const int32_t e : active) {
      int32_t* to = rows.data() + offsets[e];
      for (int64_t g = 0; g < groups; ++g) to = put_rows(words_[g * E + e], static_cast<int32_t>(g * kGroupTokens), to);
    }
  }

 private:
  std::vector<uint32_t> words_;  // [groups, E]
};

}  // namespace sadmoe::cpu
