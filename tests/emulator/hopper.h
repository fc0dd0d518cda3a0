// The words of csrc/cuda/hopper.cuh on the emulator.
#pragma once

#define SADMOE_PARAMETER const

namespace sadmoe::cuda {

struct alignas(8) Barrier {
  uint64_t state;
};
SADMOE_WORD void init_barrier(Barrier& b, int arrivals) { emulator::init_barrier(&b, arrivals); }
SADMOE_WORD void fence_async() { emulator::fence_async(); }
SADMOE_WORD void arrive(Barrier& b) { emulator::arrive(&b); }
SADMOE_WORD void expect_bytes(Barrier& b, int bytes) { emulator::expect_bytes(&b, bytes); }
SADMOE_WORD void wait_barrier(Barrier& b, int parity, SADMOE_CALLER) { emulator::wait_barrier(&b, parity, file, line); }

using TileMap = emulator::TileMap;
// What the driver refuses is refused.
inline int make_tile_map(TileMap& map, View data, int64_t matrices, int64_t rows, int64_t columns, int box_rows) {
  constexpr int kInvalid = 1;
  if (reinterpret_cast<uintptr_t>(data.data) % 16 || columns * 2 % 16 || box_rows < 1 || box_rows > 256) return kInvalid;
  if (matrices < 1 || rows < 1 || columns < 1 || data.dtype == DType::f32) return kInvalid;
  map = {data.data, matrices, rows, columns, box_rows};
  return 0;
}
SADMOE_WORD void load_tile(void* shared, const TileMap& map, int64_t matrix, int64_t row, int64_t column, Barrier& b) {
  emulator::load_tile(shared, map, matrix, row, column, &b);
}

template <int kRegisters>
SADMOE_WORD void give_registers(SADMOE_CALLER) {
  emulator::set_registers(kRegisters, false, file, line);
}
template <int kRegisters>
SADMOE_WORD void take_registers(SADMOE_CALLER) {
  emulator::set_registers(kRegisters, true, file, line);
}

SADMOE_WORD uint64_t operand(const void* rows) {
  return uint64_t{emulator::shared_offset(rows) & 0x3ffff} >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
SADMOE_WORD void begin_products() { emulator::begin_products(); }
SADMOE_WORD void commit_products() { emulator::commit_products(); }
template <int kLeft>
SADMOE_WORD void wait_products() {
  emulator::wait_products(kLeft);
}
template <int kSums>
SADMOE_WORD void settle(float (&)[kSums]) {}

template <class T>
SADMOE_WORD float number_of(uint16_t bits) {
  return to_float(T{bits});
}
template <int kSums, class T>
SADMOE_WORD void multiply_64(float (&sums)[kSums], uint64_t a, uint64_t b, T, SADMOE_CALLER) {
  static_assert(kSums % 16 == 0 && kSums <= 64, "columns that csrc/cuda/hopper.cuh has");
  emulator::multiply({sums, kSums * 2, a, nullptr, b, true, &number_of<T>}, file, line);
}
template <class T>
SADMOE_WORD void multiply_64(float (&sums)[64], const unsigned (&a)[4], uint64_t b, bool add, T, SADMOE_CALLER) {
  emulator::multiply({sums, 128, 0, a, b, add, &number_of<T>}, file, line);
}

}  // namespace sadmoe::cuda
