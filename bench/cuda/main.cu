// bench_cuda conformance [sm_80 | sm_90a] | constants FILE | layers | blocks: the CUDA kernels on a device, without torch.
#include <algorithm>
#include <cstring>

#include "conformance.h"
#include "constants.h"
#include "layer.h"

namespace bench {
namespace {

struct Shape {
  const char* name;
  int64_t d, E, s;
  bool gated;
};
const Shape kShapes[] = {{"768 x 3072, s 24", 768, 128, 24, false},         {"768 x 3072, s 64", 768, 48, 64, false},
                         {"768 x 3072, s 128", 768, 24, 128, false},        {"1024 x 4096, s 64", 1024, 64, 64, false},
                         {"1024 x 4096, s 512", 1024, 8, 512, false},       {"2048 x 16384 GLU, s 32", 2048, 512, 32, true},
                         {"2048 x 16384 GLU, s 128", 2048, 128, 128, true}, {"4096 x 11008 GLU, s 86", 4096, 128, 86, true},
                         {"4096 x 11008 GLU, s 172", 4096, 64, 172, true}};
const int64_t kTokens[] = {1, 2, 4, 8, 16, 64, 512, 2048, 8192};
const float kShares[] = {0.05f, 0.1f, 0.25f, 0.5f, 1.0f};

// So many sets of weights that what T tokens read of each, if every one chooses that share, is together more than L2 holds.
int cold_sets(const Shape& shape, int64_t T, float share) {
  const double bytes = 2.0 * static_cast<double>(shape.E * shape.s * shape.d) * (shape.gated ? 3 : 2);
  const double chosen = static_cast<double>(experts_of(share, shape.E)) / static_cast<double>(shape.E);
  return static_cast<int>(kCold / (bytes * (1 - std::pow(1 - chosen, T)))) + 1;
}

void time_layer(Layer& layer, const char* name, const Shape& shape, int64_t T) {
  std::printf("%-36s %6lld                ", name, static_cast<long long>(T));
  for (const float share : kShares) {
    layer.mask_of_each(experts_of(share, shape.E));
    const int calls = std::max(T > 1000 ? 4 : 20, cold_sets(shape, T, share));
    const double time = seconds([&](int i, cudaStream_t stream) { layer.run(i, stream); }, calls, 15);
    std::printf(" %10.1f", time * 1e6);
  }
  std::printf("\n");
  std::fflush(stdout);
}

void print_header() {
  std::printf("%-36s %6s  us at a share of", "bf16, router not included", "T");
  for (const float share : kShares) std::printf(" %9.0f%%", share * 100);
  std::printf("\nof every token's experts, one at least\n");
}

// Whether a block of so many tiles as asked for fits this device.
bool fits_down_tiles(const sadmoe::cuda::Options& options) {
  sadmoe::cuda::Device device{1, 0};
  must(cudaDeviceGetAttribute(&device.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0), "shared memory");
  return sadmoe::cuda::down_tiles(1, 1, sadmoe::DType::bf16, options, device) == options.down_tiles;
}

// By how many tokens a block of `down` takes: what launch.cu chooses, and each that fits; where all go through all experts; and
// where every neuron is computed on the way in.
void time_blocks() {
  const char* names[] = {"  blocks of 64 tokens", "  128", "  256"};
  print_header();
  for (const Shape& shape : kShapes)
    for (const int64_t T : {512, 2048, 8192}) {
      Layer layer({T, shape.d, shape.d, shape.E, shape.s}, sadmoe::DType::bf16, shape.gated, 1);
      time_layer(layer, shape.name, shape, T);
      for (int i = 0; i < 3; ++i) {
        layer.options.down_tiles = 1 << i, layer.options.up_all = layer.options.crowd = 2;
        if (fits_down_tiles(layer.options)) time_layer(layer, names[i], shape, T);
      }
      layer.options.down_tiles = 0, layer.options.crowd = 0;
      if (is_hopper()) time_layer(layer, "  256, through all experts, sm_90a", shape, T);
      layer.options.crowd = 2, layer.options.up_all = 0;
      const bool every = shape.s % 8 == 0;  // else never
      if (every && is_hopper()) time_layer(layer, "  every neuron on the way in, sm_90a", shape, T);
      layer.options.hopper = false;
      if (every) time_layer(layer, "  every neuron on the way in, sm_80", shape, T);
      layer.options.up_all = 2, layer.options.crowd = 0;
      time_layer(layer, "  128, through all experts, sm_80", shape, T);
      layer.options.crowd = 2;
      if (is_hopper()) time_layer(layer, "  by what tokens chose, sm_80", shape, T);
    }
}

// Where the device has kernels of its own for many tokens, the others' times too.
void time_layers() {
  print_header();
  for (const Shape& shape : kShapes)
    for (const int64_t T : kTokens) {
      Layer layer({T, shape.d, shape.d, shape.E, shape.s}, sadmoe::DType::bf16, shape.gated, cold_sets(shape, T, kShares[0]));
      time_layer(layer, shape.name, shape, T);
      layer.options.hopper = false;
      if (is_hopper() && T > layer.options.decode_tokens) time_layer(layer, "  without the kernels of sm_90a", shape, T);
    }
}

}  // namespace
}  // namespace bench

int main(int count, char** words) {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // what was said before a hang is kept
  if (count > 1 && !std::strcmp(words[1], "--no-hopper")) bench::hopper_allowed = false, --count, ++words;
  const char* word = count > 1 ? words[1] : "";
  if (!std::strcmp(word, "conformance")) {
    const char* part = count > 2 ? words[2] : "";
    // 3: other bits alone, 4: wrong numbers
    const auto sm_80 = [] { return bench::check_conformance() ? 4 : 0; };
    if (count == 2) return std::max(sm_80(), bench::check_hopper());
    if (count == 3 && !std::strcmp(part, "sm_80")) return sm_80();
    if (count == 3 && !std::strcmp(part, "sm_90a")) return bench::check_hopper();
  }
  if (!std::strcmp(word, "constants") && count == 3) return bench::measure_constants(words[2]), 0;
  if (!std::strcmp(word, "layers") && count == 2) return bench::time_layers(), 0;
  if (!std::strcmp(word, "blocks") && count == 2) return bench::time_blocks(), 0;
  std::fprintf(stderr, "usage: bench_cuda [--no-hopper] conformance [sm_80 | sm_90a] | constants FILE | layers | blocks\n");
  return 2;
}
