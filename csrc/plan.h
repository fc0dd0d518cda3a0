// Who runs what (contract.h), as every device finds it: the rule of dynamic-k, and a mask as words of bits, which counting turns
// into lists of tokens. One source for the CPU, CUDA and tests. No torch, no instruction set.
//
//   group g = the tokens [32 g, 32 g + 32);   bit i of words[g, e] = token 32 g + i chose expert e
//   rows of expert e = the tokens that chose it, ascending: of group after group, bit after bit
#pragma once
#include <cstdint>

// Always inlined: a file of one instruction set must leave no code that others are linked with.
#if defined(__CUDACC__)
#define SADMOE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define SADMOE_EVERYWHERE [[gnu::always_inline]] inline
#endif

namespace sadmoe {

constexpr int kGroupTokens = 32;

// --- The rule: an expert runs where its score is at least tau times the largest of the token. Scores below 0 count as 0; a NaN
// is never the largest, and reaches nothing.
SADMOE_EVERYWHERE float larger(float score, float best) { return score > best ? score : best; }
SADMOE_EVERYWHERE float threshold_of(float best, float tau) { return tau == 0 ? 0 : tau * best; }  // 0 * inf would be NaN
SADMOE_EVERYWHERE bool reaches(float score, float threshold) { return (score < 0 ? 0 : score) >= threshold; }

// --- Words.
SADMOE_EVERYWHERE int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  word -= word >> 1 & 0x55555555u;  // no call, and in vectors, where a processor's own instruction may not be used
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0fu;
  word += word >> 8;
  return static_cast<int>((word + (word >> 16)) & 63);
#endif
}
SADMOE_EVERYWHERE int lowest_bit(uint32_t word) {  // of a word that has one
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}
// How many tokens of a word are before its i-th: the rank of a pair among those of its expert in the group.
SADMOE_EVERYWHERE int rank_in(uint32_t word, int i) { return count_bits(word & ((1u << i) - 1)); }

// The tokens of a word, the first of whose group is `first`, as rows; returns where the next ones go.
SADMOE_EVERYWHERE int32_t* put_rows(uint32_t word, int32_t first, int32_t* rows) {
  for (; word; word &= word - 1) *rows++ = first + lowest_bit(word);
  return rows;
}

}  // namespace sadmoe
