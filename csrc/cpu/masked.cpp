#include <cstring>

#include "cpu/isa.h"
#include "cpu/moe.h"
#include "cpu/scratch.h"
#include "plan.h"

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

// Which experts one token chose.
class Chosen {
 public:
  Chosen(const Choice& choice, int64_t t, int64_t E)
      : mask_(choice.mask ? reinterpret_cast<const uint8_t*>(choice.mask) + t * E : nullptr),
        scores_(choice.mask ? nullptr : choice.scores + t * E) {
    if (mask_) return;
    float best = 0;
    for (int64_t e = 0; e < E; ++e) best = larger(scores_[e], best);
    threshold_ = threshold_of(best, choice.tau);
  }
  bool operator[](int64_t e) const { return mask_ ? mask_[e] != 0 : reaches(scores_[e], threshold_); }  // any byte but 0 is true

 private:
  const uint8_t* mask_;
  const float* scores_;
  float threshold_ = 0;
};

}  // namespace

void masked_activation(const MaskedActivation& p, const Threads& threads) {
  const int64_t neurons = p.E * p.s, bytes = size_of(p.dtype);
  threads.parallel_for(p.T, kGrain / neurons + 1, [&](int64_t t0, int64_t t1) {
    const bool halves = p.dtype != DType::f32;
    const Floats up(halves ? neurons : 0), gate(halves && p.gate ? neurons : 0);
    for (int64_t t = t0; t < t1; ++t) {
      const Chosen chosen(p.choice, t, p.E);
      for (int64_t e = 0, end = 0; e < p.E; e = end) {  // experts side by side, all chosen or none
        const bool run = chosen[e];
        while (end < p.E && chosen[end] == run) ++end;
        if (run)
          activate(p, t, e * p.s, (end - e) * p.s, up.get(), gate.get());
        else
          std::memset(static_cast<char*>(p.up) + (t * neurons + e * p.s) * bytes, 0, (end - e) * p.s * bytes);
      }
    }
  });
}

}  // namespace sadmoe::cpu
