// AMX: a unit that multiplies tiles of 16 rows x 64 bytes. Included by the files of such instruction sets alone.
//
// What goes to an intrinsic is in parentheses: in the headers of GCC 11 its casts bind to the first word alone.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/half.h"
#include "cpu/kernels.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kTileBytes = 1024;

// The tile registers of this thread, for as long as it lives. Given back, a thread switch saves less.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));  // of the intrinsic, GCC 12 takes it for 8 bytes
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// What was written to them is in memory: GCC's intrinsics do not say that tiles are loaded from there.
inline void will_be_loaded(const void* left, const void* right) { asm volatile("" ::"r"(left), "r"(right) : "memory"); }

// Tiles of a left operand, in memory of their own or where a matrix lies: entries from one to the next in depth, and to the
// next 16 rows; bytes from row to row.
struct LeftTiles {
  const bf16* first;
  int64_t deeper, below, row_bytes;

  LeftTiles from(int64_t row) const { return {first + row / 16 * below, deeper, below, row_bytes}; }  // a multiple of 16
};

// What each of so many steps fetches of what comes soon.
class Fetches {
 public:
  Fetches(Soon soon, int64_t steps)
      : at_(static_cast<const char*>(soon.from)),
        end_(soon.from ? at_ + soon.bytes : at_),
        each_((soon.bytes / steps / kLine + 1) * kLine) {}

  void step() {
    const char* end = end_ - at_ < each_ ? end_ : at_ + each_;
    for (; at_ < end; at_ += kLine) __builtin_prefetch(at_, 0, kSecondLevel);
  }

 private:
  const char *at_, *end_;
  int64_t each_;
};

// Products of Rows x Columns tiles of bf16, 1 or 2 each, summed over the depth, in tiles: out [16 Rows, 16 Columns], its rows ld
// apart.
template <int Rows, int Columns>
void bf16_products(const LeftTiles& left, const bf16* right, int64_t depth, float* out, int64_t ld, Fetches& fetches) {
  constexpr int64_t kEntries = kTileBytes / sizeof(bf16);
  will_be_loaded(left.first, right);
  _tile_zero(0);
  if (Columns > 1) _tile_zero(1);
  if (Rows > 1) _tile_zero(2);
  if (Rows > 1 && Columns > 1) _tile_zero(3);
  for (int64_t i = 0; i < depth; ++i) {
    _tile_loadd(6, (right + i * kEntries), 64);
    if (Columns > 1) _tile_loadd(7, (right + (depth + i) * kEntries), 64);
    _tile_loadd(4, (left.first + i * left.deeper), left.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    fetches.step();
    if (Columns > 1) _tile_dpbf16ps(1, 4, 7);
    if (Rows > 1) {
      _tile_loadd(5, (left.first + left.below + i * left.deeper), left.row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (Columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  const int64_t stride = ld * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, out, stride);
  if (Columns > 1) _tile_stored(1, (out + 16), stride);
  if (Rows > 1) _tile_stored(2, (out + 16 * ld), stride);
  if (Rows > 1 && Columns > 1) _tile_stored(3, (out + 16 * ld + 16), stride);
}

// The same of integers of 16 bits with bytes, of one tile of rows: in left each tile of their upper bytes, with the sign, is
// followed by that of the lower ones. high and low [16, 16 Columns], rows ld apart: their sums, modulo 2^32.
template <int Columns>
void byte_products(const int8_t* left, const int8_t* right, int64_t depth, int32_t* high, int32_t* low, int64_t ld) {
  will_be_loaded(left, right);
  _tile_zero(0);
  _tile_zero(1);
  if (Columns > 1) _tile_zero(2);
  if (Columns > 1) _tile_zero(3);
  for (int64_t i = 0; i < depth; ++i) {
    _tile_loadd(4, (left + 2 * i * kTileBytes), 64);
    _tile_loadd(5, (left + (2 * i + 1) * kTileBytes), 64);
    _tile_loadd(6, (right + i * kTileBytes), 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbusd(1, 5, 6);
    if (Columns > 1) {
      _tile_loadd(7, (right + (depth + i) * kTileBytes), 64);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
  }
  const int64_t stride = ld * static_cast<int64_t>(sizeof(int32_t));
  _tile_stored(0, high, stride);
  _tile_stored(1, low, stride);
  if (Columns > 1) _tile_stored(2, (high + 16), stride);
  if (Columns > 1) _tile_stored(3, (low + 16), stride);
}

}  // namespace
}  // namespace sadmoe::cpu
