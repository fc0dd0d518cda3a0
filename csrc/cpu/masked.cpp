#include <cstring>

#include "cpu/isa.h"
#include "cpu/moe.h"
#include "cpu/scratch.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kGrain = 16 * 1024;  // activations that are worth a thread

// Neurons [j, j + n) of a token, all of experts that it chose. Scratch for as many of 16 bits.
void activate(const MaskedActivation& p, int64_t t, int64_t j, int64_t n, float* up, float* gate) {
  const Kernels& k = kernels();
  const int64_t first = t * p.E * p.s + j, bytes = size_of(p.dtype);
  void* from = static_cast<char*>(p.up) + first * bytes;
  const void* of_gate = p.gate ? static_cast<const char*>(p.gate) + first * bytes : nullptr;
  if (p.dtype == DType::f32)
    return k.activate({1, n, n, static_cast<float*>(from), nullptr, static_cast<const float*>(of_gate), nullptr, p.act});
  k.widen[int(p.dtype)](from, up, n);
  if (of_gate) k.widen[int(p.dtype)](of_gate, gate, n);
  k.activate({1, n, n, up, nullptr, of_gate ? gate : nullptr, nullptr, p.act});
  k.narrow[int(p.dtype)](up, from, n);
}

// Which experts one token chose: by the mask, any byte of which but 0 is true, or by the rule, into scratch [E].
const uint8_t* chosen(const MaskedActivation& p, int64_t t, bool* scratch) {
  const bool* mask = p.choice.mask ? p.choice.mask + t * p.E : scratch;
  if (mask == scratch) kernels().select({p.E, p.choice.scores + t * p.E, p.choice.tau, scratch});
  return reinterpret_cast<const uint8_t*>(mask);
}

}  // namespace

void masked_activation(const MaskedActivation& p, const Threads& threads) {
  const int64_t neurons = p.E * p.s, bytes = size_of(p.dtype);
  threads.parallel_for(p.T, kGrain / neurons + 1, [&](int64_t t0, int64_t t1) {
    const bool widened = p.dtype != DType::f32;
    const Floats up(widened ? neurons : 0), gate(widened && p.gate ? neurons : 0);
    const Buffer<bool> by_scores(p.choice.mask ? 0 : p.E);
    for (int64_t t = t0; t < t1; ++t) {
      const uint8_t* runs = chosen(p, t, by_scores.get());
      for (int64_t e = 0, end = 0; e < p.E; e = end) {  // experts side by side, all chosen or none
        const bool run = runs[e] != 0;
        while (end < p.E && (runs[end] != 0) == run) ++end;
        if (run)
          activate(p, t, e * p.s, (end - e) * p.s, up.get(), gate.get());
        else
          std::memset(static_cast<char*>(p.up) + (t * neurons + e * p.s) * bytes, 0, (end - e) * p.s * bytes);
      }
    }
  });
}

}  // namespace sadmoe::cpu
