// The words that a kernel is written in: one function an instruction or built-in, each with two bodies. nvcc compiles the
// ones below; a host compiler with SADMOE_EMULATOR takes those of tests/emulator/device.h, and runs the same kernels.
// Every warp operation is of the whole warp: kernels keep their control flow uniform in a warp.
#pragma once
#include <cstddef>
#include <cstdint>

#include "plan.h"

#if defined(SADMOE_EMULATOR)
#include "emulator/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Threads of a block, and of how many blocks a multiprocessor must hold the registers.
#define SADMOE_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define SADMOE_DEVICE __device__ __forceinline__
#define SADMOE_UNROLL _Pragma("unroll")
#define SADMOE_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define SADMOE_UNROLLED(times) SADMOE_PRAGMA(unroll times)
#define SADMOE_ROLLED _Pragma("unroll 1")
// The block's shared memory as one struct, whose size the launch gives.
#define SADMOE_SHARED(Type, name)                                   \
  extern __shared__ __align__(1024) unsigned char sadmoe_shared_[]; \
  Type& name = *static_cast<Type*>(kept_shared(sadmoe_shared_))

namespace sadmoe::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// --- Where a thread is.
SADMOE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SADMOE_DEVICE int64_t block_x() { return blockIdx.x; }
SADMOE_DEVICE int64_t block_y() { return blockIdx.y; }
SADMOE_DEVICE int64_t blocks_x() { return gridDim.x; }
SADMOE_DEVICE int64_t blocks_y() { return gridDim.y; }

// --- Numbers.
SADMOE_DEVICE float to_float(float v) { return v; }
SADMOE_DEVICE float to_float(bf16 v) { return __bfloat162float(v); }
SADMOE_DEVICE float to_float(f16 v) { return __half2float(v); }
SADMOE_DEVICE void from_float(float v, float& to) { to = v; }
SADMOE_DEVICE void from_float(float v, bf16& to) { to = __float2bfloat16_rn(v); }
SADMOE_DEVICE void from_float(float v, f16& to) { to = __float2half_rn(v); }
SADMOE_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SADMOE_DEVICE float exp(float v) { return expf(v); }
SADMOE_DEVICE float erfc(float v) { return erfcf(v); }
SADMOE_DEVICE float absolute(float v) { return fabsf(v); }
SADMOE_DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }
SADMOE_DEVICE unsigned as_bits(float v) { return __float_as_uint(v); }
// To the nearest of 11 significant bits, ties away from zero.
SADMOE_DEVICE unsigned to_tf32(float v) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(v));
  return bits;
}

// --- Neighbours in memory at once: two floats, on 8 bytes; a word, 4 bytes of any type, on as many; and 16 bytes.
struct Pair {
  float first, second;
};
SADMOE_DEVICE Pair load_pair(const float* from) {
  const float2 pair = *reinterpret_cast<const float2*>(from);
  return {pair.x, pair.y};
}
SADMOE_DEVICE void store_pair(Pair pair, float* to) { *reinterpret_cast<float2*>(to) = {pair.first, pair.second}; }
SADMOE_DEVICE unsigned word_of(float first, float second, bf16) {
  const __nv_bfloat162 word = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const unsigned&>(word);
}
SADMOE_DEVICE unsigned word_of(float first, float second, f16) {
  const __half2 word = __floats2half2_rn(first, second);
  return reinterpret_cast<const unsigned&>(word);
}
template <class T>
SADMOE_DEVICE void store_word(unsigned word, T* to) {
  *reinterpret_cast<unsigned*>(to) = word;
}
SADMOE_DEVICE void store_word(const float (&v)[1], float* to) { *to = v[0]; }
template <class T>
SADMOE_DEVICE void store_word(const float (&v)[2], T* to) {
  store_word(word_of(v[0], v[1], T{}), to);
}
// 16 bytes, on as many, or a single element.
template <class T, int kMany>
SADMOE_DEVICE void load_together(const T* from, T (&to)[kMany]) {
  static_assert(kMany == 1 || sizeof(to) == 16);
  if constexpr (kMany == 1)
    to[0] = *from;
  else
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}
template <class T, int kMany>
SADMOE_DEVICE void store_together(const T (&v)[kMany], T* to) {
  static_assert(kMany == 1 || sizeof(v) == 16);
  if constexpr (kMany == 1)
    *to = v[0];
  else
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(v);
}

// --- Threads together. A shuffle orders no memory.
SADMOE_DEVICE void sync_block() { __syncthreads(); }
SADMOE_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
SADMOE_DEVICE T shuffle(T v, int lane) {
  return __shfl_sync(~0u, v, lane);
}
template <class T>
SADMOE_DEVICE T shuffle_xor(T v, int lanes) {
  return __shfl_xor_sync(~0u, v, lanes);
}
// Of the lane `lanes` below; the lowest lanes get their own.
template <class T>
SADMOE_DEVICE T shuffle_up(T v, int lanes) {
  return __shfl_up_sync(~0u, v, lanes);
}
SADMOE_DEVICE unsigned ballot(bool v) { return __ballot_sync(~0u, v); }

// The same value, pinned in a register: compilers tend to compute it again at every use, and none sees through a shuffle.
SADMOE_DEVICE int kept(int v) { return shuffle(v, thread_index()); }
template <class T>
SADMOE_DEVICE const T* kept(const T* p) {
  return reinterpret_cast<const T*>(shuffle(reinterpret_cast<unsigned long long>(p), thread_index()));
}
SADMOE_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
SADMOE_DEVICE void* kept_shared(void* p) { return __cvta_shared_to_generic(shuffle(shared_address(p), thread_index())); }

// --- Kernels one after another. One that is launched early may begin while the one before it still runs; nothing that a
// kernel writes may be touched until wait_kernel_before, and every thread must come to it. Below capability 9.0 none is early.
SADMOE_DEVICE void wait_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
// Once all blocks have said so, or ended, one that is launched early may begin.
SADMOE_DEVICE void start_kernel_after() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// --- 16 bytes from global to shared memory, in the background; zeros, and nothing is read, where they are not there.
SADMOE_DEVICE void copy16_async(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}
SADMOE_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until at most kLeft of this thread's commits are in flight.
template <int kLeft>
SADMOE_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// --- Tensor cores. Lane 8 i + j gives the address of row j of matrix i (8 x 8 of 16 bits); of matrix i, lane l gets
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4: of the transposed matrix in the second form.
SADMOE_DEVICE void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
SADMOE_DEVICE void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// Of a matrix that lanes hold as above, the transposed one.
SADMOE_DEVICE unsigned transposed(unsigned word) {
  unsigned to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(to) : "r"(word));
  return to;
}
// sums [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = lane % 4, a lane holds of a: (g, 2t) (g + 8, 2t)
// (g, 2t + 8) (g + 8, 2t + 8), each with its right neighbour; of b: (2t, g) (2t + 8, g), each with the one below; of
// sums: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1).
SADMOE_DEVICE void multiply_16x8x16(float* sums, const unsigned (&a)[4], unsigned b0, unsigned b1, bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SADMOE_DEVICE void multiply_16x8x16(float* sums, const unsigned (&a)[4], unsigned b0, unsigned b1, f16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// sums [16, 8] += a [16, 8] b [8, 8] of tf32. A lane holds of a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4); of b: (t, g)
// (t + 4, g).
SADMOE_DEVICE void multiply_16x8x8(float* sums, const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- The host's side: 0 or a cudaError_t.
struct Grid {
  int64_t x, y = 1;
  bool early = false;
};
// Of the current device.
inline int attribute(cudaDeviceAttr which, int& value) {
  int device = 0;
  const cudaError_t code = cudaGetDevice(&device);
  return static_cast<int>(code ? code : cudaDeviceGetAttribute(&value, which, device));
}
inline int multiprocessors(int& count) { return attribute(cudaDevAttrMultiProcessorCount, count); }
// Of its compute capability; 9.0 gives 9.
inline int capability(int& major) { return attribute(cudaDevAttrComputeCapabilityMajor, major); }
constexpr size_t kGivenBytes = 48 << 10;  // of shared memory, to any block; more must be asked for
constexpr size_t kBlockBytes = 1 << 10;   // of it, what a block takes beside its own
// Of a multiprocessor of the current device, in bytes.
inline int shared_of_multiprocessor(int& bytes) { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, bytes); }
template <class Parameters>
int launch(void (*kernel)(Parameters), Grid grid, int threads, size_t shared_bytes, void* stream, const Parameters& parameters) {
  int major = 0;
  if (grid.early)
    if (const int code = capability(major)) return code;
  if (shared_bytes > kGivenBytes) {
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const int code = cudaFuncSetAttribute(kernel, most, static_cast<int>(shared_bytes))) return code;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = major >= 9 ? 1 : 0;
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  return static_cast<int>(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments));
}
inline int set_device(int index) { return static_cast<int>(cudaSetDevice(index)); }
inline const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace sadmoe::cuda
#endif
