#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "layer.h"

namespace bench {
namespace {

using sadmoe::DType;

__device__ float uniform(uint64_t i, unsigned seed) {
  uint64_t z = (i + seed * 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 31)) * 0x94d049bb133111ebull;
  return static_cast<float>(z >> 40) * (1.0f / 16777216);
}
__global__ void fill_numbers(void* data, DType dtype, size_t n, float scale, unsigned seed) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < n; i += gridDim.x * size_t{256}) {
    const float v = (uniform(i, seed) - 0.5f) * 3.46f * scale;
    if (dtype == DType::f32) static_cast<float*>(data)[i] = v;
    if (dtype == DType::bf16) static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v);
    if (dtype == DType::f16) static_cast<__half*>(data)[i] = __float2half_rn(v);
  }
}
constexpr unsigned kMaskSeed = 7;

__global__ void fill_mask(bool* data, size_t n, float share) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < n; i += gridDim.x * size_t{256})
    data[i] = uniform(i, kMaskSeed) < share;
}
// Those `chosen` of a token's E experts whose numbers are the least.
__global__ void fill_mask_of_each(bool* data, size_t n, size_t E, size_t chosen) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < n; i += gridDim.x * size_t{256}) {
    const size_t first = i / E * E;
    const float own = uniform(i, kMaskSeed);
    size_t before = 0;
    for (size_t other = first; other < first + E; ++other) {
      const float number = uniform(other, kMaskSeed);
      before += number < own || (number == own && other < i);
    }
    data[i] = before < chosen;
  }
}

sadmoe::cuda::Workspace workspace(const sadmoe::ExpertsShape& shape, DType dtype) {
  return sadmoe::cuda::workspace(shape, dtype, {});
}

}  // namespace

bool hopper_allowed = true;

bool is_hopper() {
  int major = 0;
  must(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "capability");
  return hopper_allowed && major == 9;
}

void fill(const Buffer& buffer, DType dtype, float scale, unsigned seed) {
  fill_numbers<<<1024, 256>>>(buffer.as<void>(), dtype, buffer.bytes() / size_of(dtype), scale, seed);
  must(cudaGetLastError(), "fill");
}

Layer::Layer(const sadmoe::ExpertsShape& shape, DType dtype, bool gated, int sets)
    : shape_(shape),
      dtype_(dtype),
      gated_(gated),
      x_(shape.T * shape.d * size_of(dtype)),
      y_(shape.T * shape.d_out * size_of(dtype)),
      mask_(shape.T * shape.E),
      words_(workspace(shape, dtype).words * 4),
      starts_(workspace(shape, dtype).starts * 4),
      rows_(workspace(shape, dtype).rows * 4),
      h_(workspace(shape, dtype).h * size_of(dtype)) {
  options.hopper = hopper_allowed;
  fill(x_, dtype, 1, 1);
  for (int i = 0; i < sets * 3; ++i) {  // up, gate, down of every set
    const bool absent = i % 3 == 1 && !gated;
    weights_.emplace_back(absent ? 0 : shape.E * shape.s * (i % 3 == 2 ? shape.d_out : shape.d) * size_of(dtype));
    if (!absent) fill(weights_.back(), dtype, 0.03f, 2 + i);
  }
  must(cudaDeviceSynchronize(), "a layer");
}

void Layer::mask(float share) const {
  fill_mask<<<1024, 256>>>(mask_.as<bool>(), mask_.bytes(), share);
  must(cudaDeviceSynchronize(), "mask");
}

void Layer::mask_of_each(int64_t experts) const {
  fill_mask_of_each<<<1024, 256>>>(mask_.as<bool>(), mask_.bytes(), shape_.E, experts);
  must(cudaDeviceSynchronize(), "mask_of_each");
}

void Layer::run(int set, cudaStream_t stream) const {
  const Buffer* weights = &weights_[set % (weights_.size() / 3) * 3];
  sadmoe::Experts p{};
  p.shape = shape_;
  p.x = {x_.as<void>(), dtype_};
  p.w_up = {weights[0].as<void>(), dtype_}, p.w_down = {weights[2].as<void>(), dtype_};
  if (gated_) p.w_gate = {weights[1].as<void>(), dtype_};
  p.act = gated_ ? sadmoe::Activation::silu : sadmoe::Activation::relu;
  p.y = y_.as<void>();
  const sadmoe::cuda::Scratch scratch{words_.as<int32_t>(), starts_.as<int32_t>(), rows_.as<int32_t>(), h_.as<void>()};
  must(sadmoe::cuda::sparse_experts(p, {mask_.as<bool>()}, options, workspace(shape_, dtype_), scratch, stream),
       "sparse_experts");
}

std::vector<uint16_t> Layer::result() const {
  for (const Buffer* written : {&y_, &h_}) must(cudaMemset(written->as<void>(), 0xff, written->bytes()), "cudaMemset");
  run(0, nullptr);
  std::vector<uint16_t> y(y_.bytes() / sizeof(uint16_t));
  must(cudaMemcpy(y.data(), y_.as<void>(), y_.bytes(), cudaMemcpyDeviceToHost), "y");
  return y;
}

double Layer::weight_bytes() const {
  return static_cast<double>(shape_.E * shape_.s) * ((gated_ ? 2 : 1) * shape_.d + shape_.d_out) * size_of(dtype_);
}

double Layer::flops() const { return 2.0 * static_cast<double>(shape_.T) * weight_bytes() / size_of(dtype_); }

}  // namespace bench
