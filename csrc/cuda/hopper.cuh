// More words, of devices of capability 9.0 alone (sm_90a): barriers in shared memory, tiles that a copy engine loads, products
// of four warps (a warpgroup: 128 threads, the first a multiple of 128) straight from shared memory. Two bodies, as in
// device.cuh.
//
// An operand is rows of 128 bytes, from a multiple of 1024 on, swizzled: the 16 bytes c of row r are at place c ^ r % 8.
#pragma once
#include "contract.h"
#include "cuda/device.cuh"

namespace sadmoe::cuda {

constexpr int kSwizzledBytes = 128, kSwizzledElements = 64;  // of a row, and of 16 bits
constexpr int kWarpgroup = 128;

SADMOE_DEVICE int swizzled(int row, int c) { return (c ^ row % 8) * 16; }

}  // namespace sadmoe::cuda

#if defined(SADMOE_EMULATOR)
#include "emulator/hopper.h"
#else
#include <cuda.h>
#include <cudaTypedefs.h>

// A kernel's parameter whose address the copy engine may read.
#define SADMOE_PARAMETER const __grid_constant__

namespace sadmoe::cuda {

// --- Barriers: a phase ends when all arrivals and all expected bytes are there, and the next begins.
struct alignas(8) Barrier {
  uint64_t state;
};
SADMOE_DEVICE void init_barrier(Barrier& b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&b)), "r"(arrivals) : "memory");
}
// What this thread wrote to shared memory, barriers too, is there for copy engine and products.
SADMOE_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
SADMOE_DEVICE void arrive(Barrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&b)) : "memory");
}
// The phase also waits for that many bytes of load_tile. Before the arrival of the thread that says so.
SADMOE_DEVICE void expect_bytes(Barrier& b, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&b)), "r"(bytes) : "memory");
}
// Until a phase of that parity has ended; the first has parity 0, and the one before it counts as ended.
SADMOE_DEVICE void wait_barrier(Barrier& b, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}\n" ::"r"(shared_address(&b)),
      "r"(parity)
      : "memory");
}

// --- Tiles: box_rows rows of 64 elements of one of many row-major matrices of 16 bits. Zeros where a matrix ends.
using TileMap = CUtensorMap;
// The driver's, found at run time, once: this library loads without one.
struct TileMapMaker {
  PFN_cuTensorMapEncodeTiled_v12000 make = nullptr;
  int code = 0;  // a cudaError_t

  TileMapMaker() {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    if (code == 0 && found != cudaDriverEntryPointSuccess) code = cudaErrorNotSupported;
    make = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }
};
// 0 or a cudaError_t.
inline int make_tile_map(TileMap& map, View data, int64_t matrices, int64_t rows, int64_t columns, int box_rows) {
  static const TileMapMaker maker;
  if (maker.code) return maker.code;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(matrices)};
  const cuuint64_t bytes[] = {sizes[0] * 2, sizes[0] * sizes[1] * 2};
  const cuuint32_t box[] = {kSwizzledElements, static_cast<cuuint32_t>(box_rows), 1}, every[] = {1, 1, 1};
  const auto type = data.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return static_cast<int>(maker.make(&map, type, 3, const_cast<void*>(data.data), sizes, bytes, box, every,
                                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}
// By one thread, in the background; box_rows * 128 bytes arrive at the barrier, beyond the matrix too.
SADMOE_DEVICE void load_tile(void* shared, const TileMap& map, int64_t matrix, int64_t row, int64_t column, Barrier& b) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(static_cast<int>(column)), "r"(static_cast<int>(row)), "r"(static_cast<int>(matrix)), "r"(shared_address(&b))
      : "memory");
}

// --- Registers of each thread, by all warps of a warpgroup.
template <int kRegisters>
SADMOE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
SADMOE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// --- Products, by all warps of a warpgroup. Rows of 128 bytes, as above, from any step of 16 elements on.
SADMOE_DEVICE uint64_t operand(const void* rows) {
  constexpr uint64_t kGroupBytes = 8 * kSwizzledBytes, kSwizzle128 = 1;
  return uint64_t{(shared_address(rows) & 0x3ffff) >> 4} | uint64_t{1} << 16 | kGroupBytes >> 4 << 32 | kSwizzle128 << 62;
}
// Before the first product after sums were touched; a commit ends what it covers.
SADMOE_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
SADMOE_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until at most kLeft commits are in flight. Until then sums and operands must be left alone.
template <int kLeft>
SADMOE_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kLeft) : "memory");
}
// After the wait: the compiler, which does not know what a wait is for, moves no read of the sums before it.
template <int kSums>
SADMOE_DEVICE void settle(float (&sums)[kSums]) {
  SADMOE_UNROLL
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// multiply_64(sums, a, b, T{}): sums [64, n] += a [64, 16] b [n, 16]ᵀ, in the background. Of the warp w of its warpgroup,
// with g = lane / 4 and t = lane % 4, sums[4 j + i] is row 16 w + g + i / 2 * 8, column 8 j + 2 t + i % 2.
#define SADMOE_SUMS_8(i)                                                                                        \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define SADMOE_SUMS_16(i) SADMOE_SUMS_8(i), SADMOE_SUMS_8(i + 8)
#define SADMOE_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SADMOE_NAMES_32 SADMOE_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SADMOE_NAMES_48 SADMOE_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SADMOE_NAMES_64 SADMOE_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SADMOE_MULTIPLY_64(T, type, n, names, a_name, b_name, ...)                                                   \
  SADMOE_DEVICE void multiply_64(float (&sums)[n / 2], uint64_t a, uint64_t b, T) {                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, " a_name ", " b_name \
                 ", 1, 1, 1, 0, 0;\n"                                                                                \
                 : __VA_ARGS__                                                                                       \
                 : "l"(a), "l"(b));                                                                                  \
  }
#define SADMOE_MULTIPLY_64_BY_ALL(T, type)                                                                                   \
  SADMOE_MULTIPLY_64(T, type, 32, SADMOE_NAMES_16, "%16", "%17", SADMOE_SUMS_16(0))                                          \
  SADMOE_MULTIPLY_64(T, type, 64, SADMOE_NAMES_32, "%32", "%33", SADMOE_SUMS_16(0), SADMOE_SUMS_16(16))                      \
  SADMOE_MULTIPLY_64(T, type, 96, SADMOE_NAMES_48, "%48", "%49", SADMOE_SUMS_16(0), SADMOE_SUMS_16(16), SADMOE_SUMS_16(32))  \
  SADMOE_MULTIPLY_64(T, type, 128, SADMOE_NAMES_64, "%64", "%65", SADMOE_SUMS_16(0), SADMOE_SUMS_16(16), SADMOE_SUMS_16(32), \
                     SADMOE_SUMS_16(48))
SADMOE_MULTIPLY_64_BY_ALL(bf16, "bf16")
SADMOE_MULTIPLY_64_BY_ALL(f16, "f16")

// The same with a in registers: of the rows 16 w to 16 w + 15, what a lane holds for multiply_16x8x16. Unless `add`, the sums
// begin anew. Until the wait a must be left alone, too.
#define SADMOE_MULTIPLY_64_REGISTERS(T, type)                                                          \
  SADMOE_DEVICE void multiply_64(float (&sums)[64], const unsigned (&a)[4], uint64_t b, bool add, T) { \
    asm volatile(                                                                                      \
        "{\n"                                                                                          \
        ".reg .pred begun;\n"                                                                          \
        "setp.ne.b32 begun, %69, 0;\n"                                                                 \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" SADMOE_NAMES_64              \
        "}, {%64, %65, %66, %67}, %68, begun, 1, 1, 0;\n"                                              \
        "}\n"                                                                                          \
        : SADMOE_SUMS_16(0), SADMOE_SUMS_16(16), SADMOE_SUMS_16(32), SADMOE_SUMS_16(48)                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));             \
  }
SADMOE_MULTIPLY_64_REGISTERS(bf16, "bf16")
SADMOE_MULTIPLY_64_REGISTERS(f16, "f16")

}  // namespace sadmoe::cuda
#endif
