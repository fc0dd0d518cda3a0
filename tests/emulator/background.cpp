// What goes on beside the threads: copies of 16 bytes, barriers in shared memory, tiles by the copy engine.
#include <algorithm>
#include <cstring>

#include "emulator/machine.h"

namespace sadmoe::emulator {

void Device::land(const Copy& copy) { copy.there ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16); }

void Device::copy_async(void* to, const void* from, bool there, void* pc) {
  if (!memory.is_shared(to, 16)) fail("copy to an address outside shared memory", pc);
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("misaligned source of a copy of 16 bytes", pc);
  if (there) access(from, 16, 16, Access::read, pc);
  access(to, 16, 16, Access::write, pc);
  const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), there};
  memory.set_in_flight(to, 16, 1);
  if (!late_copies) land(copy);
  current_->open.push_back(copy);
}

void Device::commit_copies() {
  current_->commits.push_back(std::move(current_->open));
  current_->open.clear();
}

void Device::wait_copies(int left, void* pc) {
  auto& commits = current_->commits;
  while (static_cast<int>(commits.size()) > left) {
    for (const Copy& copy : commits.front()) {
      memory.set_in_flight(copy.to, 16, -1);
      if (late_copies) land(copy);
      access(copy.to, 16, 16, Access::write, pc);
    }
    commits.erase(commits.begin());
  }
}

void Device::init_barrier(void* barrier, int arrivals, void* pc) {
  if (!memory.is_shared(barrier, 8)) fail("a barrier outside shared memory", pc);
  if (arrivals < 1) fail("a barrier of " + std::to_string(arrivals) + " arrivals", pc);
  access(barrier, 8, 8, Access::write, pc);
  flags_[barrier] = {arrivals, arrivals, 0, 0, {}, {}};
}

// Its beginning must be ordered before its use, as a write before a read.
Flag& Device::flag_of(void* barrier, void* pc) {
  const auto found = flags_.find(barrier);
  if (found == flags_.end()) fail("a barrier is used before init_barrier", pc);
  access(barrier, 8, 8, Access::read, pc);
  return found->second;
}

void Device::end_phase(Flag& flag) {
  if (flag.missing || flag.bytes) return;
  ++flag.phase;
  flag.missing = flag.arrivals;
  flag.told = std::move(flag.telling);
  flag.telling.clear();
}

void Device::arrive(void* barrier, void* pc) {
  Flag& flag = flag_of(barrier, pc);
  if (flag.missing == 0) fail("more arrivals at a barrier than its " + std::to_string(flag.arrivals), pc);
  memory.clocks.tell(position.thread, flag.telling);
  --flag.missing;
  end_phase(flag);
}

void Device::expect_bytes(void* barrier, int bytes, void* pc) { flag_of(barrier, pc).bytes += bytes; }

void Device::wait_barrier(void* barrier, uint32_t parity, const char* file, int line, void* pc) {
  Flag& flag = flag_of(barrier, pc);
  if (parity > 1) fail("parity " + std::to_string(parity), pc);
  current_->flag = &flag, current_->parity = parity;
  while (flag.phase % 2 == parity) {
    set_waiting(State::at_flag, file, line);
    leave();
  }
  current_->state = State::ready;
  memory.clocks.hear(position.thread, flag.told);
}

void Device::load_tile(const TileLoad& load, void* barrier, void* pc) {
  const TileMap& map = load.map;
  const size_t bytes = map.box_rows * 128;
  if (!memory.is_shared(load.to, bytes)) fail("a tile outside shared memory", pc);
  if ((load.to - shared) % 1024) fail("a swizzled tile that does not begin on 1024 bytes", pc);
  Flag& flag = flag_of(barrier, pc);
  for (const auto& [p, n] : {std::pair<const void*, size_t>{barrier, 8}, {load.to, bytes}})
    if (const std::string what = memory.unfenced(p, n); !what.empty()) fail("load_tile uses " + what, pc);
  access(load.to, bytes, 16, Access::write, pc);
  const int64_t columns = std::min<int64_t>(64, map.columns - load.column);
  for (int64_t r = load.row; load.matrix < map.matrices && columns > 0 && r < std::min(map.rows, load.row + map.box_rows); ++r)
    access(static_cast<const uint16_t*>(map.data) + (load.matrix * map.rows + r) * map.columns + load.column, columns * 2, 2,
           Access::read, pc);
  memory.set_in_flight(load.to, bytes, 1);
  tile_loads_.push_back(load);
  tile_loads_.back().flag = &flag;
  if (!late_copies) land_tile(tile_loads_.size() - 1);
}

void Device::copy_tile(const TileLoad& load) const {
  const TileMap& map = load.map;
  for (int i = 0; i < map.box_rows * 64; ++i) {
    const int64_t r = i / 64, c = i % 64, row = load.row + r, column = load.column + c;
    uint16_t element = 0;
    if (load.matrix < map.matrices && row < map.rows && column < map.columns)
      element = static_cast<const uint16_t*>(map.data)[(load.matrix * map.rows + row) * map.columns + column];
    std::memcpy(load.to + r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2, &element, 2);
  }
}

void Device::land_tile(size_t i) {
  const TileLoad load = tile_loads_[i];
  tile_loads_.erase(tile_loads_.begin() + i);
  const size_t bytes = load.map.box_rows * 128;
  copy_tile(load);
  memory.set_in_flight(load.to, bytes, -1);
  memory.land(load.to, bytes);
  memory.clocks.tell(memory.clocks.engine(), load.flag->telling);
  load.flag->bytes -= bytes;
  end_phase(*load.flag);
}

void copy_async(void* to, const void* from, bool there) { device().copy_async(to, from, there, __builtin_return_address(0)); }
void commit_copies() { device().commit_copies(); }
void wait_copies(int left) { device().wait_copies(left, __builtin_return_address(0)); }
void init_barrier(void* barrier, int arrivals) { device().init_barrier(barrier, arrivals, __builtin_return_address(0)); }
void fence_async() { device().fence(); }
void arrive(void* barrier) { device().arrive(barrier, __builtin_return_address(0)); }
void expect_bytes(void* barrier, int bytes) { device().expect_bytes(barrier, bytes, __builtin_return_address(0)); }
void wait_barrier(void* barrier, int parity, const char* file, int line) {
  device().wait_barrier(barrier, static_cast<uint32_t>(parity), file, line, __builtin_return_address(0));
}
void load_tile(void* to, const TileMap& map, int64_t matrix, int64_t row, int64_t column, void* barrier) {
  device().load_tile({static_cast<char*>(to), map, matrix, row, column, nullptr}, barrier, __builtin_return_address(0));
}

}  // namespace sadmoe::emulator
