// The hidden activations of dense products, in place: zeros where a token did not choose the expert.
#pragma once
#include "cuda/up.cuh"

namespace sadmoe::cuda {

constexpr int kMaskedThreads = 256, kMaskedBlocks = 5;  // of a multiprocessor

// A thread has kWidth neighbours, of one expert, of every so many tokens.
template <class T, int kWidth, bool kGated>
SADMOE_KERNEL(kMaskedThreads, kMaskedBlocks)
masked_activation(MaskedActivation p) {
  const int64_t j = (block_x() * kMaskedThreads + thread_index()) * kWidth, neurons = p.E * p.s, e = j / p.s;
  if (j >= neurons) return;
  T* up = static_cast<T*>(p.up) + j;
  const T* gate = kGated ? static_cast<const T*>(p.gate) + j : up;
  const auto* mask = reinterpret_cast<const uint8_t*>(p.mask);  // any byte but 0 is true
  with_activation(p.act, [&](auto act) {
    for (int64_t t = block_y(); t < p.T; t += blocks_y()) {
      const int64_t at = t * neurons;
      alignas(16) T values[kWidth] = {}, gates[kWidth];
      if (mask[t * p.E + e]) {
        load_together(up + at, values);
        if (kGated) load_together(gate + at, gates);
        SADMOE_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          const float v = to_float(values[i]);
          from_float(kGated ? act(to_float(gates[i])) * v : act(v), values[i]);
        }
      }
      store_together(values, up + at);
    }
  });
}

}  // namespace sadmoe::cuda
