// The emulated device: fibers and where they meet (emulator.cpp), what runs beside them (background.cpp), products of
// warpgroups (products.cpp).
#pragma once
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "emulator/memory.h"

namespace sadmoe::emulator {

constexpr int kWarp = 32, kWarpgroup = 128, kMaxThreads = 1024, kMaxLaneBytes = 32;
constexpr size_t kStack = 64 << 10;
constexpr size_t kMaxShared = 227 << 10;

struct Copy {
  char* to;
  const char* from;
  bool there;  // else zeros
};

// A barrier in shared memory.
struct Flag {
  int arrivals, missing;
  int64_t bytes;  // expected, and not here yet
  uint32_t phase;
  Clocks::Seen telling, told;  // of this phase, of the last
};

struct TileLoad {
  char* to;
  TileMap map;
  int64_t matrix, row, column;
  Flag* flag;
};

constexpr int kProductDepth = 16;

struct Issued : Product {
  uint16_t rows[2][kProductDepth];  // of a, that this thread multiplies, where they come from registers
};

enum class State { ready, at_barrier, in_warp, at_flag, done };

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::ready;
  const char* file = "";
  int line = 0;
  int meetings = 0;     // of its warp that it took part in
  bool waited = false;  // for the kernels before
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> commits;
  const Flag* flag = nullptr;  // waited for, until its phase is not of this parity
  uint32_t parity = 0;
  int registers = 0;   // 0: as launched
  bool begun = false;  // products may be issued
  std::vector<Issued> products;
  std::vector<std::vector<Issued>> product_commits;
  std::vector<const char*> touched;  // of the stack, since products were begun
  size_t issued = 0;                 // products, of those of its warpgroup
};

// What the lanes bring. Two take turns: a lane may come to the next meeting while others still read of the last.
struct Meeting {
  int arrived;
  size_t n;
  const char* file;
  int line;
  alignas(16) char bytes[kWarp * kMaxLaneBytes];
  Clocks::Seen told;  // where lanes tell each other
};

struct Warp {
  Meeting meetings[2];
};

class Device {
 public:
  int run(const Launch& launch);
  void barrier(const char* file, int line);
  const void* meet(const void* bytes, size_t n, const char* file, int line);
  void sync_warp(const char* file, int line);
  void access(const void* p, size_t n, size_t alignment, Access kind, void* pc);
  bool running() const { return current_ != nullptr; }
  void wait_kernel_before() { current_->waited = true; }

  void copy_async(void* shared, const void* global, bool there, void* pc);
  void commit_copies();
  void wait_copies(int left, void* pc);
  void init_barrier(void* barrier, int arrivals, void* pc);
  void fence() { memory.clocks.fence(position.thread); }
  void arrive(void* barrier, void* pc);
  void expect_bytes(void* barrier, int bytes, void* pc);
  void wait_barrier(void* barrier, uint32_t parity, const char* file, int line, void* pc);
  void load_tile(const TileLoad& load, void* barrier, void* pc);

  void set_registers(int registers, bool more, const char* file, int line);
  void multiply(const Product& product, const char* file, int line, void* pc);
  void begin_products();
  void commit_products();
  void wait_products(int left);

  std::mutex lock;
  Memory memory;
  Position position{};
  std::string error;
  char* shared = nullptr;
  Order order = Order::forward;
  unsigned seed = 1;
  bool late_copies = true;
  int64_t launched = 0, products_issued = 0, warp_threads_multiplied = 0;

 private:
  static void enter();
  void run_block(int64_t block);
  bool pass(std::mt19937& random);
  bool may_run(const Fiber& fiber) const;
  void start_fibers();
  template <class Index>
  void arrange(std::vector<Index>& turns, std::mt19937& random) const;
  void leave();
  [[noreturn]] void fail(const std::string& what, void* pc);
  std::string stuck() const;
  std::string too_many_registers() const;
  void set_waiting(State state, const char* file, int line);
  void land(const Copy& copy);
  bool on_host(const char* p) const;

  Flag& flag_of(void* barrier, void* pc);
  void end_phase(Flag& flag);
  void copy_tile(const TileLoad& load) const;
  void land_tile(size_t i);

  const char* chunk(uint64_t operand, int row, int half) const;
  template <class Body>
  void each_chunk(const Product& product, Body body) const;
  void check_issued(const Product& product, const char* file, int line);
  void check_touch(const char* p, void* pc);
  void gather_rows(Issued& product, const char* file, int line);
  void multiply_now(const Issued& product) const;

  const Launch* launch_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> turns_;
  Fiber* current_ = nullptr;
  void* main_stack_ = nullptr;
  char* stacks_ = nullptr;
  int waiting_ = 0;  // at the barrier
  std::map<const void*, Flag> flags_;
  std::vector<TileLoad> tile_loads_;          // in flight
  std::vector<std::vector<Product>> issued_;  // of every warpgroup, by its first warp to come
};

Device& device();

}  // namespace sadmoe::emulator
