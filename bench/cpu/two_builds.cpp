// A layer by the CPU kernels of two builds, in turns: see bench/two_builds.py, which compiles those of the one that was before
// into the namespace cpu_before.
//
//   two_builds ROUNDS ISA PACKED THREADS D F S GLU T SHARE DTYPE   [D F S ...]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/moe.h"

namespace sadmoe::cpu_before {
struct Threads {  // as it was, and is
  int count;
  std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)> parallel_for;
};
void sparse_experts(const Experts& experts, const bool* mask, const Threads& threads);
bool use_isa(const std::string& isa);
}  // namespace sadmoe::cpu_before

namespace sadmoe::bench {
namespace {

constexpr int64_t kFar =
    int64_t{200} << 20;  // bytes of layers that are gone through: no cache has a layer from one turn to the next

struct Cell {
  int64_t d, f, s;
  bool gated;
  int64_t T;
  double share;
  std::string dtype;  // float32, bfloat16 or int8

  bool int8() const { return dtype == "int8"; }
  DType rows() const { return dtype == "bfloat16" ? DType::bf16 : DType::f32; }
  int64_t bytes() const { return f * d * (gated ? 3 : 2) * size_of(int8() ? DType::i8 : rows()); }
};

// Layers of small numbers, on lines of the caches, with a mask each.
class Layers {
 public:
  explicit Layers(const Cell& c) : x_(array(c.T * c.d, c.rows())), y_(array(c.T * c.d, c.rows())) {
    const int64_t experts = c.f / c.s, copies = std::max<int64_t>(2, kFar / c.bytes());
    const DType dtype = c.rows(), weights = c.int8() ? DType::i8 : dtype;
    std::mt19937 random(1);
    for (int64_t i = 0; i < copies; ++i) {
      Experts e{};
      e.shape = {c.T, c.d, c.d, experts, c.s};
      e.act = c.gated ? Activation::silu : Activation::relu;
      e.x = x_, e.y = const_cast<void*>(y_.data);
      const auto matrix = [&] { return array(c.f * c.d, weights); };
      const auto of_neurons = [&] { return array(c.f, dtype); };
      e.w_up = matrix(), e.w_down = matrix(), e.b_up = of_neurons(), e.b_out = array(c.d, dtype);
      if (c.gated) e.w_gate = matrix(), e.b_gate = of_neurons();
      if (c.int8()) e.scale_up = of_neurons(), e.scale_down = of_neurons(), e.scale_out = array(c.d, dtype);
      if (c.int8() && c.gated) e.scale_gate = of_neurons();
      layers_.push_back(e);
      masks_.emplace_back(new bool[c.T * experts]);
      for (int64_t k = 0; k < c.T * experts; ++k) masks_.back()[k] = random() < c.share * 4294967296.0;
    }
  }

  // Microseconds a layer.
  template <class Run>
  double timed(const Run& run) const {
    const auto begin = std::chrono::steady_clock::now();
    for (size_t i = 0; i < layers_.size(); ++i) run(layers_[i], masks_[i].get());
    const std::chrono::duration<double, std::micro> passed = std::chrono::steady_clock::now() - begin;
    return passed.count() / static_cast<double>(layers_.size());
  }
  std::vector<char> result() const {
    const char* y = static_cast<const char*>(y_.data);
    return {y, y + layers_[0].shape.T * layers_[0].shape.d_out * size_of(y_.dtype)};
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };

  View array(int64_t n, DType dtype) {
    const int64_t bytes = n * size_of(dtype), lines = (bytes + 63) / 64;
    void* data = std::aligned_alloc(64, lines * 64);
    if (!data) std::abort();
    held_.emplace_back(data);
    for (int64_t i = 0; i < n; ++i) {
      const int small = static_cast<int>(i * 7 % 13) - 6;
      const float value = static_cast<float>(small) / 61;  // no power of two: sums round
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      if (dtype == DType::i8)
        static_cast<int8_t*>(data)[i] = static_cast<int8_t>(small);
      else if (dtype == DType::bf16)
        static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
      else
        static_cast<float*>(data)[i] = value;
    }
    return {data, dtype};
  }

  std::vector<std::unique_ptr<void, Free>> held_;
  View x_, y_;
  std::vector<Experts> layers_;
  std::vector<std::unique_ptr<bool[]>> masks_;
};

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

// Equal parts on so many threads, as torch's own pool gives them.
template <class Threads>
Threads on_threads(int count) {
  return {count, [count](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
            if (n == 0) return;  // as torch's pool: no token chose an expert
            const int64_t parts = std::min<int64_t>(count, (n + grain - 1) / grain),
                          part = (n + parts - 1) / std::max<int64_t>(parts, 1);
#pragma omp parallel for num_threads(parts) if (parts > 1)
            for (int64_t begin = 0; begin < n; begin += part) body(begin, std::min(begin + part, n));
          }};
}

// packed: now the weights are taken for packed ones, which changes the results and not the time.
void compare(const Cell& c, int rounds, bool packed, int threads) {
  const Layers layers(c);
  const auto then_threads = on_threads<cpu_before::Threads>(threads);
  const auto now_threads = on_threads<cpu::Threads>(threads);
  const auto before = [&](const Experts& e, const bool* mask) { cpu_before::sparse_experts(e, mask, then_threads); };
  const auto now = [&](Experts e, const bool* mask) {
    e.packed = packed && !c.int8();
    cpu::sparse_experts(e, mask, now_threads);
  };
  layers.timed(before);
  const std::vector<char> wanted = layers.result();
  layers.timed(now);
  const bool same = layers.result() == wanted;
  std::vector<double> old, present, ratios;
  for (int round = 0; round < rounds; ++round) {
    double times[2];
    for (const int turn : {round % 2, 1 - round % 2}) times[turn] = turn ? layers.timed(before) : layers.timed(now);
    present.push_back(times[0]), old.push_back(times[1]), ratios.push_back(times[0] / times[1]);
  }
  const std::string layer = std::to_string(c.d) + "x" + std::to_string(c.f) + (c.gated ? "-glu" : "");
  std::printf("%-14s %4d %5d %5.0f%% %-9s %9.1f %9.1f %7.3f  %.3f to %.3f  %s\n", layer.c_str(), static_cast<int>(c.s),
              static_cast<int>(c.T), 100 * c.share, c.dtype.c_str(), quantile(old, 0.5), quantile(present, 0.5),
              quantile(ratios, 0.5), quantile(ratios, 0.25), quantile(ratios, 0.75), same ? "same bits" : "OTHER BITS");
  std::fflush(stdout);
}

}  // namespace
}  // namespace sadmoe::bench

int main(int count, char** words) {
  using sadmoe::bench::Cell;
  constexpr int kFirst = 5, kWords = 7;
  if (count < kFirst + kWords || (count - kFirst) % kWords) return std::fputs("run it by bench/two_builds.py\n", stderr), 2;
  const std::string isa = words[2];
  if (!sadmoe::cpu::use_isa(isa) || !sadmoe::cpu_before::use_isa(isa))
    return std::fprintf(stderr, "this processor does not run the %s kernels\n", isa.c_str()), 2;
  void* volatile large = std::malloc(size_t{16} << 20);
  std::free(large);  // as torch's tensors do: from here on freed memory stays with the process
  std::printf("%-14s %4s %5s %6s %-9s %9s %9s %7s  %s\n", "layer", "s", "T", "share", "dtype", "before us", "now us", "ratio",
              "quartiles");
  for (char** w = words + kFirst; w < words + count; w += kWords)
    sadmoe::bench::compare(
        {std::atoll(w[0]), std::atoll(w[1]), std::atoll(w[2]), !std::strcmp(w[3], "1"), std::atoll(w[4]), std::atof(w[5]), w[6]},
        std::atoi(words[1]), !std::strcmp(words[3], "1"), std::atoi(words[4]));
}
