// A CUDA device on the CPU, for tests: every thread of a block is a fiber, a warp operation is a meeting of its 32 lanes,
// and every access of a kernel to memory is checked. Blocks run one after another. No timing, no caches.
//
// The kernels are compiled with -fsanitize=thread, but not linked to its library: hooks.cpp defines the hooks that the
// compiler calls at each load and store. An error is a launch that fails with a text: thread, block, source line.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sadmoe::emulator {

// --- For kernels, through device.h.
struct Position {
  int thread;
  int64_t block_x, block_y, blocks_x, blocks_y;
};
const Position& here();
void* shared_memory();
void barrier(const char* file, int line);
void wait_kernel_before();
// A meeting of the warp: every lane brings n <= 32 bytes, and gets those of all lanes, one after another.
const void* meet(const void* bytes, size_t n, const char* file, int line);
// The same, and what each did before is ordered before what any does after.
void sync_warp(const char* file, int line);
void copy_async(void* shared, const void* global, bool there);
void commit_copies();
void wait_copies(int left);
// A read by an instruction that the compiler does not see.
void check_read(const void* p, size_t n, size_t alignment);

// --- For kernels of sm_90a, through hopper.h.
size_t shared_offset(const void* p);
void init_barrier(void* barrier, int arrivals);
void fence_async();
void arrive(void* barrier);
void expect_bytes(void* barrier, int bytes);
void wait_barrier(void* barrier, int parity, const char* file, int line);
// Row-major matrices of 16 bits, and how many rows of 128 bytes a load takes.
struct TileMap {
  const void* data;
  int64_t matrices, rows, columns;
  int box_rows;
};
void load_tile(void* shared, const TileMap& map, int64_t matrix, int64_t row, int64_t column, void* barrier);
void set_registers(int registers, bool more, const char* file, int line);
// A product as csrc/cuda/hopper.cuh describes it, of 64 rows: a is an operand, or in a thread's registers.
using Convert = float (*)(uint16_t);
struct Product {
  float* sums;  // [columns / 2] of a thread
  int columns;
  uint64_t a;
  const unsigned* registers;  // [4] of a, or null
  uint64_t b;
  bool add;  // else the sums begin anew
  Convert convert;
};
void multiply(const Product& product, const char* file, int line);
void begin_products();
void commit_products();
void wait_products(int left);
int64_t products();  // that threads have issued so far
// A product of a warp, as each of its threads says.
void multiplied();
int64_t warp_products();  // so far

// --- For the compiler's hooks: an access by the instruction at pc, if a kernel runs.
enum class Access { read, write };
void seen(const void* p, size_t n, size_t alignment, Access kind, void* pc);

// --- For launches.
struct Launch {
  int64_t blocks_x, blocks_y;
  int threads;
  size_t shared_bytes;
  void (*kernel)(const void* parameters);
  const void* parameters;
  size_t parameters_bytes;
  bool early;  // before what the kernels before it write is there
};
int run(const Launch& launch);  // 0, or an error that last_error() tells
int64_t launches();             // so far
const char* last_error();

// --- For tests.
enum class Order { forward, reverse, random };
// In which order threads and blocks run, and whether copies land as late as they may, or at once.
void schedule(Order order, unsigned seed, bool late_copies);

// Memory that kernels may touch while the object lives; anything else is out of bounds. What they write begins uninitialised,
// what they update does not. Two threads may use neighbours of `element` bytes.
enum class Use { read, write, update };
class Region {
 public:
  Region(const char* name, const void* data, size_t bytes, size_t element, Use use);
  ~Region();
  Region(const Region&) = delete;

 private:
  struct Span* span_;
};

}  // namespace sadmoe::emulator
