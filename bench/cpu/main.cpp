// bench_cpu: the stages of the CPU kernels in floats, and the layer made of them, for each instruction set of this processor; and
// how fast memory gives pieces, as few tokens need them. One thread, no torch. Options of Google Benchmark, as
// --benchmark_filter=project/avx512.
#include <benchmark/benchmark.h>

#include <cstring>

#include "cpu/isa.h"
#include "cpu/moe.h"
#include "layer.h"

namespace sadmoe::bench {
namespace {

using test::kActivationNames, test::kActivations, test::kDtypeNames, test::kDtypes, test::Numbers;

constexpr int64_t kWidth = 768, kNeurons = 32, kExperts = 96;  // of a layer of 768 x 3072
constexpr int64_t kRows[] = {1, 4, 16, 64};                    // that chose one expert
constexpr int64_t kTokens[] = {1, 16, 256};
constexpr double kShare = 0.25;

Numbers numbers(int64_t n, DType dtype) {
  std::mt19937 random(1);
  return Numbers::normal(n, 1, dtype, random);
}

const float* floats(const Numbers& n) { return static_cast<const float*>(n.view().data); }

void count(benchmark::State& state, double flops, double bytes) {
  using benchmark::Counter;
  state.counters["flops"] = Counter(flops, Counter::kIsIterationInvariantRate);
  state.counters["bytes"] = Counter(bytes, Counter::kIsIterationInvariantRate, Counter::kIs1024);
}

// n rows, scattered as tokens of an expert are, with the neurons of one expert.
void project(benchmark::State& state, const cpu::Kernels& kernels, DType dtype, int64_t n) {
  const Numbers x = numbers(4 * n * kWidth, DType::f32), w = numbers(kNeurons * kWidth, dtype);
  std::vector<int32_t> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = static_cast<int32_t>(4 * i);
  std::vector<float> out(n * kNeurons);
  for (auto _ : state) {
    kernels.project[int(dtype)]({n, kNeurons, kWidth, kNeurons, floats(x), rows.data(), w.view().data, out.data()});
    benchmark::ClobberMemory();
  }
  count(state, 2.0 * n * kNeurons * kWidth, 1.0 * kNeurons * kWidth * size_of(dtype));
}

// The other way, strip by strip of columns as the layer does it.
void accumulate(benchmark::State& state, const cpu::Kernels& kernels, DType dtype, int64_t n) {
  const Numbers h = numbers(n * kNeurons, DType::f32), w = numbers(kNeurons * kWidth, dtype);
  std::vector<int32_t> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = static_cast<int32_t>(4 * i);
  std::vector<float> y(4 * n * kWidth);
  const char* weights = static_cast<const char*>(w.view().data);
  for (auto _ : state) {
    for (int64_t c = 0; c < kWidth; c += kernels.strip)
      kernels.accumulate[int(dtype)]({n, kNeurons, std::min(kernels.strip, kWidth - c), kNeurons, kWidth, kWidth, floats(h),
                                      rows.data(), weights + c * size_of(dtype), y.data() + c});
    benchmark::ClobberMemory();
  }
  count(state, 2.0 * n * kNeurons * kWidth, 1.0 * kNeurons * kWidth * size_of(dtype));
}

// The same two, of one expert after another that n tokens chose, with weights from memory: of a layer of 384 x 1536 in floats.
void from_memory(benchmark::State& state, const cpu::Kernels& kernels, bool up, int64_t n) {
  constexpr int64_t kD = 384, kBytes = int64_t{128} << 20, kEach = kNeurons * kD;
  const std::vector<float> weights(kBytes / sizeof(float), 1.0f);
  const std::vector<float> from(64 * kD, 1.0f);
  const int64_t experts = static_cast<int64_t>(weights.size()) / kEach;
  std::vector<float> to(64 * kD), partial(n * kD);
  std::vector<int32_t> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = static_cast<int32_t>(64 / n * i);
  for (auto _ : state)
    for (int64_t e = 0; e < experts; ++e) {
      const float *w = weights.data() + e * kEach, *next = e + 1 < experts ? w + kEach : nullptr;
      if (up)
        kernels.project[0]({n, kNeurons, kD, kNeurons, from.data(), rows.data(), w, to.data(), nullptr, next});
      else
        kernels.accumulate[0]({n, kNeurons, kD, kNeurons, kD, kD, from.data(), rows.data(), w, to.data(), partial.data(), next});
      benchmark::ClobberMemory();
    }
  count(state, 2.0 * static_cast<double>(experts * n * kEach), static_cast<double>(kBytes));
}

void activate(benchmark::State& state, const cpu::Kernels& kernels, Activation act, int64_t n) {
  const Numbers from = numbers(n * kNeurons, DType::f32), bias = numbers(kNeurons, DType::f32);
  std::vector<float> h(n * kNeurons);
  for (auto _ : state) {
    std::copy_n(floats(from), h.size(), h.data());  // else the values would run away
    kernels.activate({n, kNeurons, kNeurons, h.data(), floats(bias), nullptr, nullptr, act});
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * n * kNeurons);
}

void select(benchmark::State& state, const cpu::Kernels& kernels) {
  const Numbers scores = numbers(kExperts, DType::f32);
  bool mask[kExperts];
  for (auto _ : state) {
    kernels.select({kExperts, floats(scores), 0.5f, mask});
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kExperts);
}

void convert(benchmark::State& state, const cpu::Kernels& kernels, DType dtype, bool narrow) {
  const Numbers wide = numbers(kWidth, DType::f32);
  Numbers thin = numbers(kWidth, dtype);
  std::vector<float> out(kWidth);
  for (auto _ : state) {
    if (narrow)
      kernels.narrow[int(dtype)](floats(wide), thin.data(), kWidth);
    else
      kernels.widen[int(dtype)](thin.data(), out.data(), kWidth);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kWidth);
}

// sparse_experts with an independent mask: up, activation, down and all that is around them.
void layer(benchmark::State& state, const std::string& isa, DType dtype, int64_t T) {
  cpu::use_isa(isa);
  const test::Layer layer({T, kWidth, kExperts, kNeurons, kWidth, 1}, {dtype, Activation::relu, false, true}, 1);
  const auto mask = test::random_mask(layer.shape, kShare, 1);
  Numbers y(T * kWidth, dtype);
  const Experts experts = layer.experts(y);
  for (auto _ : state) {
    cpu::sparse_experts(experts, mask.get(), cpu::one_thread());
    benchmark::ClobberMemory();
  }
  double pairs = 0, needed = 0;
  for (int64_t e = 0; e < kExperts; ++e) {
    int64_t tokens = 0;
    for (int64_t t = 0; t < T; ++t) tokens += mask[t * kExperts + e];
    pairs += static_cast<double>(tokens);
    needed += tokens > 0;
  }
  count(state, 4.0 * pairs * kNeurons * kWidth, 2 * needed * kNeurons * kWidth * size_of(dtype));
}

// Every line of a share of the pieces of a buffer, ascending, as the weights of those experts are read that a token chose; lines
// are asked for so many bytes of the pieces beforehand, and one of every page a page earlier (see csrc/cpu/ahead.h). What kernels
// can hope for with few tokens, and weights from memory.
void read_pieces(benchmark::State& state, int64_t piece, double share, int64_t ahead) {
  constexpr int64_t kBytes = int64_t{256} << 20, kLine = 64, kPage = 4096;
  const std::vector<char> memory(kBytes, 1);
  std::mt19937 random(1);
  std::vector<const char*> pieces;
  for (int64_t at = 0; at + piece <= kBytes; at += piece)
    if (random() < share * 4294967296.0) pieces.push_back(memory.data() + at);
  for (auto _ : state) {
    uint64_t sum = 0;
    size_t next = ahead / piece;
    int64_t to = ahead % piece;
    for (const char* from : pieces)
      for (int64_t i = 0; i < piece; i += kLine) {
        uint64_t word;
        std::memcpy(&word, from + i, sizeof word);
        sum += word;
        if (ahead == 0 || next >= pieces.size()) continue;
        const char* line = pieces[next] + to;
        if (to == 0) __builtin_prefetch(line, 0, 3);
        if (reinterpret_cast<uintptr_t>(line) % kPage < kLine) __builtin_prefetch(line + kPage, 0, 3);
        __builtin_prefetch(line, 0, 2);
        if ((to += kLine) >= piece) to = 0, ++next;
      }
    benchmark::DoNotOptimize(sum);
  }
  count(state, 0, static_cast<double>(piece) * static_cast<double>(pieces.size()));
}

void add(const std::string& name, std::function<void(benchmark::State&)> run) {
  benchmark::RegisterBenchmark(name.c_str(), std::move(run));
}

void add_isa(const std::string& isa) {
  cpu::use_isa(isa);
  const cpu::Kernels& kernels = cpu::kernels();
  for (const DType dtype : kDtypes) {
    const std::string tail = "/" + isa + "/" + kDtypeNames[int(dtype)];
    for (const int64_t n : kRows) {
      const std::string rows = tail + "/rows:" + std::to_string(n);
      add("project" + rows, [&kernels, dtype, n](benchmark::State& s) { project(s, kernels, dtype, n); });
      add("accumulate" + rows, [&kernels, dtype, n](benchmark::State& s) { accumulate(s, kernels, dtype, n); });
    }
    for (const int64_t T : kTokens)
      add("layer" + tail + "/T:" + std::to_string(T), [isa, dtype, T](benchmark::State& s) { layer(s, isa, dtype, T); });
    if (dtype == DType::f32) continue;
    add("widen" + tail, [&kernels, dtype](benchmark::State& s) { convert(s, kernels, dtype, false); });
    add("narrow" + tail, [&kernels, dtype](benchmark::State& s) { convert(s, kernels, dtype, true); });
  }
  for (const int64_t n : {1, 2, 3, 4, 6, 8, 12})
    for (const bool up : {true, false})
      add("from_memory/" + isa + (up ? "/project" : "/accumulate") + "/rows:" + std::to_string(n),
          [&kernels, up, n](benchmark::State& s) { from_memory(s, kernels, up, n); });
  for (const Activation act : kActivations)
    add("activate/" + isa + "/" + kActivationNames[int(act)],
        [&kernels, act](benchmark::State& s) { activate(s, kernels, act, 64); });
  add("select/" + isa, [&kernels](benchmark::State& s) { select(s, kernels); });
}

void add_memory() {
  for (const double share : {0.25, 1.0})
    for (const int64_t kib : {12, 24, 48, 96, 192, 768})
      for (const int64_t ahead : {0, 2048, 8192, 32768})
        add("read/share:" + std::to_string(static_cast<int>(100 * share)) + "%/KiB:" + std::to_string(kib) +
                "/ahead:" + std::to_string(ahead),
            [=](benchmark::State& s) { read_pieces(s, kib << 10, share, ahead); });
}

}  // namespace
}  // namespace sadmoe::bench

int main(int count, char** words) {
  benchmark::Initialize(&count, words);
  if (benchmark::ReportUnrecognizedArguments(count, words)) return 2;
  for (const std::string& isa : sadmoe::cpu::supported_isas()) sadmoe::bench::add_isa(isa);
  sadmoe::bench::add_memory();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
