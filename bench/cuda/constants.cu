// What the cost model (python/sadmoe/crossover) must know of a card, measured on it.
#include <cstdio>
#include <string>

#include "constants.h"
#include "layer.h"

namespace bench {
namespace {

// Reads n uint4 so many times over, from L2 at best, each thread many at once and another part every time; never true, so
// the sum is needed.
__global__ void read_all(const uint4* data, size_t n, int times, unsigned* out) {
  unsigned sum = 0;
  const size_t step = gridDim.x * size_t{512};
  for (int time = 0; time < times; ++time)
    for (size_t i = (blockIdx.x + time) % gridDim.x * size_t{512} + threadIdx.x; i < n; i += 8 * step)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (i + j * step < n) sum ^= __ldcg(data + i + j * step).x;
  if (sum == 0x12345678) *out = sum;
}
// Reads shared memory so many times over, 16 bytes a thread, neighbours from neighbours: no bank is asked twice at once.
__global__ void read_shared(int times, unsigned* out) {
  constexpr int kLines = 1024;
  __shared__ uint4 lines[kLines];
  for (unsigned i = threadIdx.x; i < kLines; i += blockDim.x) lines[i] = {i, i, i, i};
  __syncthreads();
  unsigned sum = 0;
  for (int time = 0; time < times; ++time)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint4 line = lines[(threadIdx.x + 128 * j + time) % kLines];
      sum ^= line.x ^ line.y ^ line.z ^ line.w;
    }
  if (sum == 0x12345678) *out = sum;
}
__global__ void nothing() {}

int processors() {
  int count = 0;
  must(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");
  return count;
}

double read_rate(size_t bytes, int times, int calls) {
  const Buffer data(bytes), out(4);
  const int blocks = 4 * processors();
  const double time = seconds(
      [&](int, cudaStream_t stream) {
        read_all<<<blocks, 512, 0, stream>>>(data.as<uint4>(), bytes / sizeof(uint4), times, out.as<unsigned>());
        must(cudaGetLastError(), "read_all");
      },
      calls);
  return static_cast<double>(bytes) * times / time;
}

// Of all multiprocessors together.
double shared_rate() {
  constexpr int kThreads = 512, kTimes = 2000;
  const Buffer out(4);
  const int blocks = 4 * processors();
  const double time = seconds(
      [&](int, cudaStream_t stream) {
        read_shared<<<blocks, kThreads, 0, stream>>>(kTimes, out.as<unsigned>());
        must(cudaGetLastError(), "read_shared");
      },
      4);
  return 8.0 * sizeof(uint4) * kTimes * kThreads * blocks / time;
}

double launch_gap() {
  return seconds(
      [](int, cudaStream_t stream) {
        nothing<<<1, 32, 0, stream>>>();
        must(cudaGetLastError(), "nothing");
      },
      200);
}

// Products of one expert that all tokens take: nothing is sparse, all is at hand.
double product_rate(sadmoe::DType dtype) {
  Layer layer({8192, 2048, 2048, 1, 2048}, dtype, false, 1);
  layer.options.hopper = false, layer.options.crowd = 2;
  layer.mask(1);
  return layer.flops() / seconds([&](int i, cudaStream_t stream) { layer.run(i, stream); }, 4);
}

// The same of `up` by sm_90a: of two depths the difference, which leaves out the rest of a call.
double hopper_rate() {
  double flops[2], times[2];
  for (int i = 0; i < 2; ++i) {
    Layer layer({8192, 2048 << i, 64, 1, 2048}, sadmoe::DType::bf16, false, 1);
    layer.options.crowd = 2;
    layer.mask(1);
    flops[i] = layer.flops();
    times[i] = seconds([&](int set, cudaStream_t stream) { layer.run(set, stream); }, 4);
  }
  return (flops[1] - flops[0]) / (times[1] - times[0]);
}

// Weights read while decoding one token, from memory: the sets are more than L2 holds.
double decode_rate() {
  Layer layer({1, 4096, 4096, 64, 172}, sadmoe::DType::bf16, true, 4);
  layer.mask(1);
  const double time = seconds([&](int i, cudaStream_t stream) { layer.run(i, stream); }, 8);
  return layer.weight_bytes() / (time - 3 * launch_gap());
}

// A step of the pipeline of `up` whose loads L2 answers: two narrow layers whose depth differs, one tile. Two steps are on
// their way.
double step_seconds() {
  double times[2];
  for (int i = 0; i < 2; ++i) {
    Layer layer({65, i ? 16384 : 8192, 64, 1, 8}, sadmoe::DType::bf16, false, 1);
    layer.options.hopper = false;  // whose steps are others
    layer.mask(1);
    times[i] = seconds([&](int set, cudaStream_t stream) { layer.run(set, stream); });
  }
  return 3 * (times[1] - times[0]) / (8192 / 32);
}

}  // namespace

void measure_constants(const char* path) {
  cudaDeviceProp card{};
  must(cudaGetDeviceProperties(&card, 0), "cudaGetDeviceProperties");
  int clock = 0;
  must(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0), "clock rate");
  const std::string beside = std::string(path) + ".part";
  FILE* file = std::fopen(beside.c_str(), "w");
  if (!file) {
    std::fprintf(stderr, "bench_cuda: cannot write %s\n", beside.c_str());
    std::exit(1);
  }
  const double memory = read_rate(size_t{1} << 30, 1, 4);
  std::fprintf(file, "{\"name\": \"%s\", \"capability\": [%d, %d], \"processors\": %d, \"clock\": %.6g,\n", card.name, card.major,
               card.minor, card.multiProcessorCount, clock * 1e3);
  std::fprintf(file, " \"shared_bytes\": %zu, \"shared\": %.6g,\n", card.sharedMemPerMultiprocessor,
               shared_rate() / (clock * 1e3 * card.multiProcessorCount));
  std::fprintf(file, " \"memory\": %.6g, \"streamed\": %.6g, \"l2\": %.6g, \"launch\": %.6g, \"step\": %.6g,\n", memory,
               decode_rate() / memory, read_rate(size_t{16} << 20, 64, 4), launch_gap(), step_seconds());
  const double halves = product_rate(sadmoe::DType::bf16), floats = product_rate(sadmoe::DType::f32);
  std::fprintf(file, " \"products_16\": %.6g, \"products_32\": %.6g", halves, floats);
  if (is_hopper()) std::fprintf(file, ", \"products_16_hopper\": %.6g", hopper_rate());
  std::fprintf(file, "}\n");
  std::fclose(file);
  if (std::rename(beside.c_str(), path)) {
    std::fprintf(stderr, "bench_cuda: cannot write %s\n", path);
    std::exit(1);
  }
}

}  // namespace bench
