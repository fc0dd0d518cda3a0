// kernel_test [--expect ISAS]: every instruction set that this processor has, against loops in double precision. No torch.
//
//   --expect "avx2, portable"   fail unless these are the ones that may run here, fastest first: for an emulated processor,
//                               on which all takes 40 times as long, so that one layer of seven must do
//   --force ISA                 run it though the processor lacks it, and die: shows that the emulator notices
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "cpu/isa.h"
#include "cpu/moe.h"
#include "cpu/scratch.h"
#include "layer.h"
#include "plans.h"
#include "tile_traps.h"

namespace sadmoe::test {
namespace {

// Sizes on both sides of vectors of 4, 8, 16 and 32, of register tiles, and of blocks of tokens, rows, columns, and entries of a
// row; from the one of 120 tokens on: rows in parts, several blocks of rows, wide pieces of neurons for a row alone, for tiles of
// int8 sums in parts, and more rows and columns than are done at once, chains of experts in narrow strips of columns, and weights
// and routers of more tiles than of rows, whole and not, with one tile of tokens, and with pairs of tiles of rows; last, few
// neurons, whose weights are held in registers.
constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1},       {1, 33, 5, 6, 33, 9},     {2, 31, 3, 7, 17, 4},    {3, 64, 4, 16, 48, 16},
    {4, 15, 17, 3, 95, 31},   {5, 100, 6, 24, 77, 7},   {6, 47, 9, 13, 130, 3},  {7, 65, 3, 32, 129, 5},
    {8, 32, 8, 8, 64, 8},     {13, 9, 65, 2, 5, 12},    {19, 40, 5, 17, 71, 10}, {70, 24, 33, 4, 39, 11},
    {3, 2, 2, 128, 3, 2},     {1100, 5, 3, 4, 6, 2},    {33, 130, 2, 64, 31, 6}, {70, 70, 3, 40, 50, 8},
    {1100, 9, 3, 17, 35, 4},  {120, 8, 17, 9, 400, 4},  {20, 2501, 2, 17, 5, 3}, {360, 140, 2, 5, 5, 3},
    {1, 9, 5, 6, 601, 3},     {200, 530, 2, 35, 21, 3}, {90, 7, 2, 519, 139, 3}, {170, 129, 2, 130, 140, 3},
    {100, 3, 65, 2, 150, 40}, {20, 96, 3, 48, 40, 33},  {16, 64, 3, 32, 40, 64}, {100, 64, 3, 96, 40, 128},
    {60, 20, 3, 100, 70, 4},  {6, 5, 3, 11, 2070, 3},   {60, 24, 3, 4, 71, 4},   {50, 24, 3, 8, 110, 4},
    {60, 24, 3, 12, 93, 4},   {40, 20, 5, 16, 39, 4},
};
constexpr unsigned kKinds = 4 * std::size(kActivations);  // of a shape and a dtype

// The parts that `count` threads would get, in turn on this one.
cpu::Threads threads(int count) {
  return {count, [count](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
            const int64_t part = std::max(grain, (n + count - 1) / count);
            for (int64_t begin = 0; begin < n; begin += part) body(begin, std::min(begin + part, n));
          }};
}

// Activations are rounded to 16 bits, twice, before they are multiplied with int8.
double rounding(const Layer& layer) { return layer.kind.int8 ? 0x1p-14 : 0; }

// Of the kinds a third must do for such, and two thirds for the others, in turn: each meets every second or third shape.
bool takes_long(const Shape& s) { return s.T * s.E * s.s * (s.d + s.d_out) > 1 << 21; }

struct Tally {
  int runs = 0, wrong = 0;
  double worst = 0;
};

class Test {
 public:
  void run(unsigned one_of) {
    unsigned seed = 0, shapes = 0;
    for (const Shape& shape : kShapes) {
      ++shapes;
      for (const DType dtype : kDtypes)
        for (const Activation act : kActivations)
          for (const bool gated : {false, true})
            for (const bool int8 : {false, true}) {
              const bool bias = ++seed % 5 != 0;
              const unsigned turn = (seed + seed / kKinds + shapes) % 3;  // a shape shifts it: 3 dtypes times kKinds is 0
              if (seed % one_of || (takes_long(shape) ? turn != 0 : turn == 1)) continue;
              kinds_.insert(seed % (kKinds * std::size(kDtypes)));
              const Layer layer(shape, {dtype, act, gated, bias, int8}, seed);
              for (const bool packed : {false, true}) {
                if (packed && int8) continue;
                given_mask(layer, random_mask(shape, 0.4, seed), packed);
                if (shape.E > 2 && shape.T > 32) given_mask(layer, mask_of_one_hot_expert(shape, seed), packed);
              }
              if (!int8) between_products(layer, random_mask(shape, 0.4, seed), seed);
              if (act == Activation::relu && !gated) routed(layer);
            }
    }
  }

  bool report() const {
    bool passed = true;
    for (const auto& [isa, tally] : tallies_) {
      std::printf("%-12s %5d results, %d wrong, largest error %.2f of what is allowed\n", isa.c_str(), tally.runs, tally.wrong,
                  tally.worst);
      passed = passed && tally.runs && !tally.wrong;
    }
    const auto kinds = kKinds * std::size(kDtypes);
    if (kinds_.size() < kinds) std::printf("%zu kinds of %zu were run\n", kinds_.size(), kinds);
    return passed && !tallies_.empty() && kinds_.size() == kinds;
  }

 private:
  // y for a mask from outside: right, and the same bits in the parts of three threads, of a token without its neighbours or
  // beside one of NaN, and with int8 by tiles as without.
  void given_mask(const Layer& layer, const std::unique_ptr<bool[]>& mask, bool packed) {
    const auto truth = layer.output<double>(mask.get()), plain = layer.output<float>(mask.get());
    std::map<std::string, std::vector<double>> found;
    for_isas([&](const std::string& isa) {
      const auto of_threads = [&](int count) {
        return output(layer, packed, [&](const Experts& p) { cpu::sparse_experts(p, mask.get(), threads(count)); });
      };
      const auto y = of_threads(1);
      const std::string name = packed ? "sparse_experts, packed," : "sparse_experts";
      judge(isa, name, layer, error_of_allowed(y, plain, truth, layer.kind.dtype, rounding(layer)));
      judge(isa, name + " of 3 threads", layer, y == of_threads(3) ? 0 : INFINITY);
      const int64_t t = layer.shape.T / 2, d_out = layer.shape.d_out;
      const auto alone = output(layer, packed, [&](Experts p) {
        p.x = at(p.x, t * p.shape.d), p.shape.T = 1;
        cpu::sparse_experts(p, mask.get() + t * p.shape.E, threads(1));
      });
      judge(isa, name + " of a token alone", layer,
            std::equal(alone.begin(), alone.begin() + d_out, y.begin() + t * d_out) ? 0 : INFINITY);
      if (t > 0) {
        std::vector<unsigned char> x(layer.shape.T * layer.shape.d * size_of(layer.kind.dtype));
        const auto beside = output(layer, packed, [&](Experts p) {
          std::memcpy(x.data(), p.x.data, x.size());
          std::memset(x.data(), 0xff, x.size() / layer.shape.T);  // NaN in every dtype
          p.x.data = x.data();
          cpu::sparse_experts(p, mask.get(), threads(1));
        });
        judge(isa, name + " beside a token of NaN", layer,
              std::equal(beside.begin() + d_out, beside.end(), y.begin() + d_out) ? 0 : INFINITY);
      }
      found[isa] = y;
    });
    for (const char* isa : {"amx", kTrapped})
      if (layer.kind.int8 && found.count(isa))
        judge(isa, "sparse_experts without tiles", layer, found[isa] == found["avx512vnni"] ? 0 : INFINITY);
    if (found.count("avx512zen5"))  // which fetches into another cache
      judge("avx512zen5", "sparse_experts as by avx512bf16", layer, found["avx512zen5"] == found["avx512bf16"] ? 0 : INFINITY);
  }

  // Hidden activations of dense products, in place.
  void between_products(const Layer& layer, const std::unique_ptr<bool[]>& mask, unsigned seed) {
    const int64_t T = layer.shape.T, E = layer.shape.E, s = layer.shape.s;
    const Kind& kind = layer.kind;
    std::mt19937 random(seed);
    const Numbers up = Numbers::normal(T * E * s, 3, kind.dtype, random);
    const Numbers gate = Numbers::normal(kind.gated ? T * E * s : 0, 3, kind.dtype, random);
    const auto truth = masked_activation<double>(layer, up, gate, mask.get());
    const auto plain = masked_activation<float>(layer, up, gate, mask.get());
    for_isas([&](const std::string& isa) {
      const auto hidden = [&](int count) {
        Numbers h = up;
        cpu::masked_activation({T, E, s, kind.dtype, h.data(), gate.view().data, {mask.get()}, kind.act}, threads(count));
        return h.read();
      };
      const auto h = hidden(1);
      judge(isa, "masked_activation", layer, error_of_allowed(h, plain, truth, kind.dtype));
      judge(isa, "masked_activation of 3 threads", layer, hidden(3) == h ? 0 : INFINITY);
    });
  }

  // Scores, and y for the mask that follows from them. The truth of y takes the mask of our own scores, which decide in float.
  void routed(const Layer& layer) {
    const float tau = 0.4f;
    const RouterShape shape = layer.router_shape();
    const auto truth = layer.scores<double>(), plain = layer.scores<float>();
    for_isas([&](const std::string& isa) {
      std::vector<float> scores(shape.T * shape.E);
      Numbers unused(shape.T * layer.shape.d_out, layer.kind.dtype);
      cpu::router_scores(layer.experts(unused).x, layer.router(tau), shape, scores.data(), threads(1));
      judge(isa, "router_scores", layer, error_of_allowed({scores.begin(), scores.end()}, plain, truth, DType::f32));
      std::vector<float> shared(scores.size());
      cpu::router_scores(layer.experts(unused).x, layer.router(tau), shape, shared.data(), threads(3));
      judge(isa, "router_scores of 3 threads", layer, shared == scores ? 0 : INFINITY);

      std::unique_ptr<bool[]> mask(new bool[shape.T * shape.E]);
      for (int64_t t = 0; t < shape.T; ++t) {
        const float* row = scores.data() + t * shape.E;
        for (int64_t e = 0; e < shape.E; ++e) mask[t * shape.E + e] = row[e] >= tau * *std::max_element(row, row + shape.E);
      }
      const auto with = [&](int count) {
        return output(layer, false, [&](const Experts& p) { cpu::dynamic_k_moe(p, layer.router(tau), threads(count)); });
      };
      const auto y = with(1);
      judge(isa, "dynamic_k_moe of 3 threads", layer, with(3) == y ? 0 : INFINITY);
      judge(isa, "dynamic_k_moe", layer,
            error_of_allowed(y, layer.output<float>(mask.get()), layer.output<double>(mask.get()), layer.kind.dtype,
                             rounding(layer)));
    });
  }

  template <class Run>
  static std::vector<double> output(const Layer& layer, bool packed, Run run) {
    Numbers y(layer.shape.T * layer.shape.d_out, layer.kind.dtype);
    run(layer.experts(y, packed));
    return y.read();
  }

  template <class Body>
  static void for_isas(Body body) {
    for (const std::string& isa : cpu::supported_isas()) {
      cpu::use_isa(isa);
      body(isa);
    }
#if defined(__x86_64__)
    const std::vector<std::string> isas = cpu::supported_isas();
    const auto runs = [&](const char* isa) { return std::count(isas.begin(), isas.end(), isa) > 0; };
    if (runs("avx512bf16") && !runs("avx512zen5"))  // which takes the same instructions
      cpu::use_kernels(cpu::kernels_avx512zen5()), body("avx512zen5");
#endif
    if (const cpu::Kernels* kernels = kernels_by_traps()) cpu::use_kernels(*kernels), body(kTrapped);
  }

  void judge(const std::string& isa, const std::string& what, const Layer& layer, double share) {
    Tally& tally = tallies_[isa];
    ++tally.runs;
    tally.worst = std::max(tally.worst, share);
    if (share <= 1) return;
    const auto& [T, d, E, s, d_out, r] = layer.shape;
    if (++tally.wrong <= 20)
      std::printf("%s %s %s %s%s%s%s T=%d d=%d E=%d s=%d d_out=%d r=%d: error %.3g of what is allowed\n", isa.c_str(),
                  what.c_str(), kDtypeNames[int(layer.kind.dtype)], kActivationNames[int(layer.kind.act)],
                  layer.kind.int8 ? " int8" : "", layer.kind.gated ? " gated" : "", layer.kind.bias ? "" : " no bias", int(T),
                  int(d), int(E), int(s), int(d_out), int(r), share);
  }

  std::map<std::string, Tally> tallies_;
  std::set<unsigned> kinds_;  // that were run
};

// accumulate gives the same bits however many neurons rows take at once.
bool turns_agree() {
  constexpr int64_t n = 5, m = 50, columns = 300;
  std::vector<float> h(n * m), w(m * columns);
  for (size_t i = 0; i < h.size(); ++i) h[i] = static_cast<float>(i * 7 % 31) / 61 - 0.2f;
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i * 11 % 37) / 53 - 0.3f;
  const int32_t rows[n] = {0, 2, 3, 5, 6};
  bool agree = true;
  for (const std::string& isa : cpu::supported_isas()) {
    cpu::use_isa(isa);
    std::vector<std::vector<float>> found;
    for (const int64_t turn : {int64_t{16}, int64_t{32}, m}) {
      std::vector<float> y(7 * columns, 0.5f), partial(n * columns, NAN);
      cpu::kernels().accumulate[int(DType::f32)](
          {n, m, columns, m, columns, columns, h.data(), rows, w.data(), y.data(), partial.data(), nullptr, nullptr, turn});
      found.push_back(y);
    }
    if (found[0] == found[1] && found[0] == found[2] && found[0][0] != 0.5f) continue;
    std::printf("%s: the way out in other turns gives other bits\n", isa.c_str());
    agree = false;
  }
  return agree;
}

// A call past the choice of cpu/isa.h.
bool force(const std::string& isa) {
  const float x[32] = {}, w[32] = {};
  float out = 0;
#define SADMOE_KERNELS(name) \
  if (isa == #name) return cpu::kernels_##name().project[0]({1, 1, 32, 1, x, nullptr, w, &out}), true;
#include "cpu/kernels.inc"
#undef SADMOE_KERNELS
  return false;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

int run(int count, char** words) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // so that a test that dies has told what it knew
  if (count == 3 && !std::strcmp(words[1], "--force")) return force(words[2]) ? 0 : 2;
  if (count != 1 && (count != 3 || std::strcmp(words[1], "--expect") != 0)) {
    std::fprintf(stderr, "usage: kernel_test [--expect ISAS | --force ISA]\n");
    return 2;
  }
  std::vector<std::string> compiled;
#define SADMOE_KERNELS(name) compiled.push_back(#name);
#include "cpu/kernels.inc"
#undef SADMOE_KERNELS
  const std::string isas = joined(cpu::supported_isas());
  std::printf("compiled: %s; run by this processor: %s\n", joined(compiled).c_str(), isas.c_str());
  if (count == 3 && isas != words[2]) {
    std::printf("expected to run here: %s\n", words[2]);
    return 1;
  }
  const bool held = plans_hold() && turns_agree();
  Test test;
  test.run(count == 3 ? 7 : 1);
  return test.report() && held ? 0 : 1;
}

}  // namespace
}  // namespace sadmoe::test

int main(int count, char** words) { return sadmoe::test::run(count, words); }
