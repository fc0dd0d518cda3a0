// The hidden activations of dense products, in place: zeros where a token did not choose the expert.
#pragma once
#include "cuda/rule.cuh"
#include "cuda/up.cuh"

namespace sadmoe::cuda {

constexpr int kMaskedThreads = 128, kMaskedBlocks = 8;  // of a multiprocessor

struct MaskedMemory {
  float thresholds[kMaskedThreads / 32];
};

// A thread has kWidth neighbours, of one expert, of every so many tokens. Of scores, each warp finds the threshold of one of the
// block's next tokens.
template <class T, int kWidth, bool kGated>
SADMOE_KERNEL(kMaskedThreads, kMaskedBlocks)
masked_activation(MaskedActivation p) {
  constexpr int kWarps = kMaskedThreads / 32;
  SADMOE_SHARED(MaskedMemory, memory);
  const int64_t j = (block_x() * kMaskedThreads + thread_index()) * kWidth, neurons = p.E * p.s, e = j / p.s;
  const auto* mask = reinterpret_cast<const uint8_t*>(p.choice.mask);  // any byte but 0 is true
  with_activation(p.act, [&](auto act) {
    for (int64_t t0 = block_y(); t0 < p.T; t0 += kWarps * blocks_y()) {
      if (!mask) {
        const int64_t t = t0 + thread_index() / 32 * blocks_y();
        sync_block();  // those of the tokens before are read
        const float threshold = t < p.T ? threshold_of(p.choice.scores + t * p.E, p.E, p.choice.tau) : 0;
        if (thread_index() % 32 == 0) memory.thresholds[thread_index() / 32] = threshold;
        sync_block();
      }
      if (e >= p.E) continue;
      SADMOE_ROLLED
      for (int i = 0; i < kWarps; ++i) {
        const int64_t t = t0 + i * blocks_y(), pair = t * p.E + e;
        if (t >= p.T) break;
        T* up = static_cast<T*>(p.up) + t * neurons + j;
        alignas(16) T values[kWidth] = {}, gates[kWidth];
        if (mask ? mask[pair] != 0 : reaches(p.choice.scores[pair], memory.thresholds[i])) {
          load_together(up, values);
          if (kGated) load_together(static_cast<const T*>(p.gate) + t * neurons + j, gates);
          SADMOE_UNROLL
          for (int k = 0; k < kWidth; ++k) {
            const float v = to_float(values[k]);
            from_float(kGated ? act(to_float(gates[k])) * v : act(v), values[k]);
          }
        }
        store_together(values, up);
      }
    }
  });
}

}  // namespace sadmoe::cuda
