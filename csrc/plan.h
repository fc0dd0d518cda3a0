// A block of the mask as work: for every expert, the tokens that chose it, in ascending order. No torch.
//
//   rows[offsets[e] .. offsets[e + 1])  = { t : mask[t, e] },  ascending;   offsets[E] = executed pairs
//   active = { e : some token chose it },  ascending
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace sadmoe {

struct Plan {
  std::vector<int32_t> offsets, rows, active;

  int64_t pairs() const { return offsets.back(); }
  int64_t count(int64_t e) const { return offsets[e + 1] - offsets[e]; }
  const int32_t* rows_of(int64_t e) const { return rows.data() + offsets[e]; }

  // mask [T, E], row-major. Any byte but 0 is true: tensors of bool that are views of others hold such.
  void build(const bool* chosen, int64_t T, int64_t E) {
    const auto* mask = reinterpret_cast<const uint8_t*>(chosen);
    offsets.assign(E + 1, 0);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t e = 0; e < E; ++e) offsets[e + 1] += mask[t * E + e] != 0;
    active.clear();
    for (int64_t e = 0; e < E; ++e) {
      if (offsets[e + 1]) active.push_back(static_cast<int32_t>(e));
      offsets[e + 1] += offsets[e];
    }
    rows.resize(pairs());
    next_.assign(offsets.begin(), offsets.end() - 1);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t e0 = 0; e0 < E; e0 += 64)
        for (uint64_t word = bits(mask + t * E + e0, E - e0); word; word &= word - 1)
          rows[next_[e0 + __builtin_ctzll(word)]++] = static_cast<int32_t>(t);
  }

 private:
  // The first n, at most 64, of a row of the mask, one bit each: a branch for each would be guessed wrong all the time.
  static uint64_t bits(const uint8_t* mask, int64_t n) {
    uint64_t word = 0;
    for (int64_t i = 0; i < 64 && i < n; i += 8) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, mask + i, n - i < 8 ? n - i : 8);
      for (const int half : {4, 2, 1}) bytes |= bytes >> half;                   // into the last bit of each; others are let go
      word |= ((bytes & 0x0101010101010101u) * 0x0102040810204080u >> 56) << i;  // byte j, 0 or 1, to bit j
    }
    return word;
  }

  std::vector<int32_t> next_;
};

}  // namespace sadmoe
