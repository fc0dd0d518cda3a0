// The words of csrc/cuda/device.cuh on the emulator. Not instrumented: what an instruction reads is checked here.
#pragma once
#include <cmath>
#include <cstring>

#include "emulator/emulator.h"
#include "emulator/tensor_core.h"

#define SADMOE_KERNEL(...) void
#define SADMOE_DEVICE inline __attribute__((always_inline))
#define SADMOE_UNROLL
#define SADMOE_UNROLLED(times)
#define SADMOE_ROLLED
#define SADMOE_SHARED(Type, name) Type& name = *static_cast<Type*>(::sadmoe::emulator::shared_memory())

// A primitive, and the line of the kernel that calls it.
#define SADMOE_WORD inline __attribute__((no_sanitize("thread")))
#define SADMOE_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace sadmoe::cuda {

// Not structs: the compiler calls no hook where it reads one for an argument.
enum class bf16 : uint16_t {};
enum class f16 : uint16_t {};

SADMOE_WORD int thread_index() { return emulator::here().thread; }
SADMOE_WORD int64_t block_x() { return emulator::here().block_x; }
SADMOE_WORD int64_t block_y() { return emulator::here().block_y; }
SADMOE_WORD int64_t blocks_x() { return emulator::here().blocks_x; }
SADMOE_WORD int64_t blocks_y() { return emulator::here().blocks_y; }

SADMOE_WORD float to_float(float v) { return v; }
SADMOE_WORD float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
SADMOE_WORD float to_float(f16 v) {
  _Float16 half;
  std::memcpy(&half, &v, 2);
  return static_cast<float>(half);
}
SADMOE_WORD uint16_t bf16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
SADMOE_WORD uint16_t f16_bits(float v) {
  const _Float16 half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
// The store itself is the kernel's.
SADMOE_DEVICE void from_float(float v, float& to) { to = v; }
SADMOE_DEVICE void from_float(float v, bf16& to) { to = bf16{bf16_bits(v)}; }
SADMOE_DEVICE void from_float(float v, f16& to) { to = f16{f16_bits(v)}; }
SADMOE_WORD float fma(float a, float b, float c) { return std::fma(a, b, c); }
SADMOE_WORD float exp(float v) { return std::exp(v); }
SADMOE_WORD float erfc(float v) { return std::erfc(v); }
SADMOE_WORD float absolute(float v) { return std::fabs(v); }
SADMOE_WORD float as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
SADMOE_WORD unsigned as_bits(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
constexpr unsigned kTf32Bits = ~0x1fffu;  // of a float, what tensor cores look at
SADMOE_WORD unsigned to_tf32(float v) { return (std::isfinite(v) ? as_bits(v) + 0x1000 : as_bits(v)) & kTf32Bits; }

struct Pair {
  float first, second;
};
// One access of so many bytes, that alignment is checked.
using Word4 = uint32_t __attribute__((may_alias));
using Word8 = uint64_t __attribute__((may_alias));
using Word16 = unsigned __int128 __attribute__((may_alias));
SADMOE_DEVICE Pair load_pair(const float* from) {
  const uint64_t bits = *reinterpret_cast<const Word8*>(from);
  return {as_float(static_cast<unsigned>(bits)), as_float(static_cast<unsigned>(bits >> 32))};
}
SADMOE_DEVICE void store_pair(Pair pair, float* to) {
  *reinterpret_cast<Word8*>(to) = as_bits(pair.first) | static_cast<uint64_t>(as_bits(pair.second)) << 32;
}
SADMOE_WORD unsigned word_of(float first, float second, bf16) {
  return bf16_bits(first) | static_cast<unsigned>(bf16_bits(second)) << 16;
}
SADMOE_WORD unsigned word_of(float first, float second, f16) {
  return f16_bits(first) | static_cast<unsigned>(f16_bits(second)) << 16;
}
template <class T>
SADMOE_DEVICE void store_word(unsigned word, T* to) {
  *reinterpret_cast<Word4*>(to) = word;
}
SADMOE_DEVICE void store_word(const float (&v)[1], float* to) { *to = v[0]; }
template <class T>
SADMOE_DEVICE void store_word(const float (&v)[2], T* to) {
  store_word(word_of(v[0], v[1], T{}), to);
}
template <class T, int kMany>
SADMOE_DEVICE void load_together(const T* from, T (&to)[kMany]) {
  static_assert(kMany == 1 || sizeof(to) == 16);
  if constexpr (kMany == 1) {
    to[0] = *from;
  } else {
    const Word16 bits = *reinterpret_cast<const Word16*>(from);
    std::memcpy(to, &bits, 16);
  }
}
template <class T, int kMany>
SADMOE_DEVICE void store_together(const T (&v)[kMany], T* to) {
  static_assert(kMany == 1 || sizeof(v) == 16);
  if constexpr (kMany == 1) {
    *to = v[0];
  } else {
    Word16 bits;
    std::memcpy(&bits, v, 16);
    *reinterpret_cast<Word16*>(to) = bits;
  }
}

SADMOE_WORD void sync_block(SADMOE_CALLER) { emulator::barrier(file, line); }
SADMOE_WORD void sync_warp(SADMOE_CALLER) { emulator::sync_warp(file, line); }

template <class T>
SADMOE_WORD T of_lane(const void* all, int lane) {
  T v;
  std::memcpy(&v, static_cast<const char*>(all) + (lane & 31) * sizeof(T), sizeof(T));
  return v;
}
template <class T>
SADMOE_WORD T shuffle(T v, int lane, SADMOE_CALLER) {
  return of_lane<T>(emulator::meet(&v, sizeof v, file, line), lane);
}
template <class T>
SADMOE_WORD T shuffle_xor(T v, int lanes, SADMOE_CALLER) {
  return of_lane<T>(emulator::meet(&v, sizeof v, file, line), thread_index() ^ lanes);
}
template <class T>
SADMOE_WORD T shuffle_up(T v, int lanes, SADMOE_CALLER) {
  const int lane = thread_index() % 32;
  return of_lane<T>(emulator::meet(&v, sizeof v, file, line), lane < lanes ? lane : lane - lanes);
}
SADMOE_WORD unsigned ballot(bool v, SADMOE_CALLER) {
  const void* all = emulator::meet(&v, sizeof v, file, line);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(of_lane<bool>(all, lane)) << lane;
  return bits;
}

template <class T>
SADMOE_DEVICE T kept(T v) {
  return v;
}

SADMOE_WORD void wait_kernel_before() { emulator::wait_kernel_before(); }
SADMOE_WORD void start_kernel_after() {}

SADMOE_WORD void copy16_async(void* shared, const void* global, bool there) { emulator::copy_async(shared, global, there); }
SADMOE_WORD void commit_copies() { emulator::commit_copies(); }
template <int kLeft>
SADMOE_WORD void wait_copies() {
  emulator::wait_copies(kLeft);
}

// The element of row r and column c of matrix i, of the rows that the lanes gave.
SADMOE_WORD uint16_t matrix_element(const void* rows, int i, int r, int c) {
  const char* at = of_lane<const char*>(rows, 8 * i + r) + 2 * c;
  emulator::check_read(at, 2, 2);
  uint16_t element;
  std::memcpy(&element, at, 2);
  return element;
}
SADMOE_WORD void load_matrices(unsigned (&to)[4], const void* row, SADMOE_CALLER) {
  emulator::check_read(row, 16, 16);
  const void* rows = emulator::meet(&row, sizeof row, file, line);
  const int r = thread_index() % 32 / 4, c = thread_index() % 4 * 2;
  for (int i = 0; i < 4; ++i)
    to[i] = matrix_element(rows, i, r, c) | static_cast<unsigned>(matrix_element(rows, i, r, c + 1)) << 16;
}
SADMOE_WORD void load_matrices_transposed(unsigned (&to)[4], const void* row, SADMOE_CALLER) {
  emulator::check_read(row, 16, 16);
  const void* rows = emulator::meet(&row, sizeof row, file, line);
  const int r = thread_index() % 32 / 4, c = thread_index() % 4 * 2;
  for (int i = 0; i < 4; ++i)
    to[i] = matrix_element(rows, i, c, r) | static_cast<unsigned>(matrix_element(rows, i, c + 1, r)) << 16;
}

SADMOE_WORD unsigned transposed(unsigned word, SADMOE_CALLER) {
  const void* all = emulator::meet(&word, sizeof word, file, line);
  const int r = thread_index() % 32 / 4, c = thread_index() % 4 * 2;
  const auto element = [&](int row) { return of_lane<unsigned>(all, row * 4 + r / 2) >> r % 2 * 16 & 0xffff; };
  return element(c) | element(c + 1) << 16;
}

struct Fragments {
  unsigned a[4], b[2];
};
template <class T>
SADMOE_WORD float half_of(unsigned pair, int i) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * i)});
}
template <class T>
SADMOE_WORD void multiply_16x8x16(float* sums, const unsigned (&a)[4], unsigned b0, unsigned b1, T, SADMOE_CALLER) {
  emulator::multiplied();
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Fragments* all = static_cast<const Fragments*>(emulator::meet(&mine, sizeof mine, file, line));
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    float row[16], weights[16];
    for (int k = 0; k < 16; ++k) {
      const Fragments &of_row = all[g * 4 + k % 8 / 2], &of_column = all[column * 4 + k % 8 / 2];
      row[k] = half_of<T>(of_row.a[i / 2 + k / 8 * 2], k % 2), weights[k] = half_of<T>(of_column.b[k / 8], k % 2);
    }
    sums[i] = emulator::add_products<16, 8>(sums[i], row, weights);
  }
}
SADMOE_WORD void multiply_16x8x8(float* sums, const unsigned (&a)[4], unsigned b0, unsigned b1, SADMOE_CALLER) {
  emulator::multiplied();
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Fragments* all = static_cast<const Fragments*>(emulator::meet(&mine, sizeof mine, file, line));
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    float row[8], weights[8];
    for (int k = 0; k < 8; ++k) {
      row[k] = as_float(all[g * 4 + k % 4].a[i / 2 + k / 4 * 2] & kTf32Bits);
      weights[k] = as_float(all[column * 4 + k % 4].b[k / 4] & kTf32Bits);
    }
    sums[i] = emulator::add_products<8, 4>(sums[i], row, weights);
  }
}

constexpr size_t kGivenBytes = 48 << 10;
constexpr size_t kBlockBytes = 1 << 10;
inline int shared_of_multiprocessor(int& bytes) {
  bytes = 228 << 10;
  return 0;
}
struct Grid {
  int64_t x, y = 1;
  bool early = false;
};
template <class Parameters>
struct Call {
  void (*kernel)(Parameters);
  Parameters parameters;
  static void run(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    c.kernel(c.parameters);
  }
};
template <class Parameters>
int launch(void (*kernel)(Parameters), Grid grid, int threads, size_t shared_bytes, void*, const Parameters& parameters) {
  const Call<Parameters> call{kernel, parameters};
  return emulator::run({grid.x, grid.y, threads, shared_bytes, &Call<Parameters>::run, &call, sizeof call, grid.early});
}
inline int multiprocessors(int& count) {
  count = 3;  // few, so that blocks take turns with small problems too
  return 0;
}
inline int capability(int& major) {
  major = 9;
  return 0;
}
inline int set_device(int) { return 0; }
inline const char* error_text(int) { return emulator::last_error(); }

}  // namespace sadmoe::cuda
