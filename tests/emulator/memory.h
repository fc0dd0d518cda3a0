// Every byte that a kernel may touch, who touched it last, and whether that was in order.
//
// Time is counted in phases: a block begins a new one, and so does each of its barriers; within a phase, by the threads'
// clocks. Nothing else orders memory, so two accesses of different threads, one of them a write, need a barrier between them
// or a way from clock to clock; and different blocks of a launch must not meet at all.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/emulator.h"

namespace sadmoe::emulator {

struct Cell {
  Mark write, read, other;  // the last write, the last read, and the last read by another thread than that
  int16_t in_flight = 0;    // asynchronous copies to here
  int16_t multiplied = 0;   // products in flight that read here
};

struct Span {
  std::string name;
  const char *begin = nullptr, *end = nullptr;
  size_t element = 1;
  bool writable = false, initialised = false, shared = false;
  std::vector<Cell> cells;

  bool contains(const void* p) const { return begin <= p && p < end; }
  std::string at(const void* p) const;
};

class Memory {
 public:
  void begin_launch() { launch_phase_ = phase_ + 1; }
  void begin_block(char* shared, size_t bytes, int threads);
  void next_phase() { ++phase_, clocks.meet(); }

  // Empty, or what is wrong.
  std::string access(const void* p, size_t n, size_t alignment, Access kind, int thread);
  // Global memory that some kernel may write.
  bool may_be_written(const void* p) const;
  // Of shared memory: what the copy engine and products must not touch yet, because its writer did not fence.
  std::string unfenced(const void* p, size_t n) const;
  // A copy to shared memory begins or ends: until then nobody may touch it.
  void set_in_flight(const void* p, size_t n, int change);
  // The copy engine has written there.
  void land(const void* p, size_t n);
  // A product that reads shared memory begins or ends: until then nobody may write there.
  void set_multiplied(const void* p, size_t n, int change);
  bool is_shared(const void* p, size_t n) const { return shared_.contains(p) && static_cast<const char*>(p) + n <= shared_.end; }

  std::vector<std::unique_ptr<Span>> spans;
  Clocks clocks;

 private:
  template <class Body>
  void each_shared(const void* p, size_t n, Body body);
  const Mark* unordered(const Span& span, const Cell& cell, Access kind, int thread) const;
  void remember(Cell& cell, Access kind, int thread);
  bool ordered(const Span& span, const Mark& mark, int thread) const;
  std::string race(const Span& span, const void* p, const char* now, const char* before, const Mark& mark) const;

  Span shared_;
  uint32_t phase_ = 0, launch_phase_ = 0, block_phase_ = 0;
};

}  // namespace sadmoe::emulator
