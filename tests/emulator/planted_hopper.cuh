// The same as planted.cuh, of the words of sm_90a.
#pragma once
#include "cuda/hopper.cuh"

namespace sadmoe::cuda {
namespace {

constexpr int kOutside = 1 << 16;  // bytes: more shared memory than any case has
constexpr int kMapMatrices = 2, kMapRows = 40, kMapColumns = 72, kBoxRows = 64, kHopperThreads = 384;

struct HopperBuffers {
  TileMap map;  // [kMapMatrices, kMapRows, kMapColumns] of map_number, in boxes of kBoxRows
  float* out;   // kHopperThreads
};

enum class Bug {
  none,
  wrong_parity,
  no_parity,
  too_few_arrivals,
  too_many_arrivals,
  no_arrivals,
  not_begun,
  begun_unordered,
  no_wait,
  no_expect,
  expects_more,
  no_fence,
  not_swizzled,
  plain,
  misplaced,
  loads_over,
  no_begin,
  writes_over,
  touched_early,
  old_sums,
  wrong_step,
  different_warps,
  different_lanes,
  outside,
  too_many,
  too_few,
  too_many_kept,
  by_one_warp
};

inline float map_number(int64_t matrix, int64_t row, int64_t column) {
  return static_cast<float>((matrix * 11 + row * 5 + column * 3) % 13 - 6);
}
SADMOE_DEVICE float tile_number(int matrix, int row, int column) {
  return row < kMapRows && column < kMapColumns ? static_cast<float>((matrix * 11 + row * 5 + column * 3) % 13 - 6) : 0.0f;
}
SADMOE_DEVICE void say(const HopperBuffers& p, bool right) { p.out[thread_index()] = right ? 1.0f : 0.0f; }

// The first warp writes, the second waits at a barrier and reads; twice, so that both parities are waited for.
struct HandOver {
  float cells[32];
  Barrier there, back;
};
template <Bug kBug>
SADMOE_KERNEL(64)
hand_over(SADMOE_PARAMETER HopperBuffers p) {
  SADMOE_SHARED(HandOver, m);
  const int lane = thread_index() % 32;
  if (thread_index() == 0 && kBug != Bug::not_begun) {
    Barrier& there = kBug == Bug::outside ? *reinterpret_cast<Barrier*>(p.out) : m.there;
    init_barrier(there, kBug == Bug::too_few_arrivals ? 33 : kBug == Bug::no_arrivals ? 0 : 32);
    init_barrier(m.back, 32);
  }
  if (kBug != Bug::begun_unordered) sync_block();
  bool right = true;
  for (int i = 0; i < 2; ++i)
    if (thread_index() < 32) {
      m.cells[lane] = static_cast<float>(lane + i);
      arrive(m.there);
      if (kBug != Bug::writes_over) wait_barrier(m.back, i);
    } else {
      wait_barrier(m.there, kBug == Bug::wrong_parity ? 1 - i : kBug == Bug::no_parity ? 2 : i);
      right = right && m.cells[31 - lane] == static_cast<float>(31 - lane + i);
      arrive(m.back);
    }
  say(p, right);
}

// A tile that hangs over the end of its matrix, by rows and by columns.
struct TileMemory {
  alignas(1024) unsigned char tile[kBoxRows][kSwizzledBytes];
  unsigned char more[1024];
  Barrier barrier;
};
template <Bug kBug>
SADMOE_KERNEL(64)
tile(SADMOE_PARAMETER HopperBuffers p) {
  SADMOE_SHARED(TileMemory, m);
  constexpr int kMatrix = 1, kRow = 8, kColumn = 64;
  if (thread_index() == 0) {
    init_barrier(m.barrier, 1);
    if (kBug != Bug::no_fence) fence_async();
    constexpr int kBytes = kBoxRows * kSwizzledBytes;
    if (kBug != Bug::no_expect) expect_bytes(m.barrier, kBug == Bug::expects_more ? kBytes + 16 : kBytes);
    if (kBug == Bug::too_many_arrivals) arrive(m.barrier), arrive(m.barrier);  // the bytes are missing yet
    void* to = kBug == Bug::outside ? static_cast<void*>(p.out) : m.tile[kBug == Bug::misplaced ? 1 : 0];
    load_tile(to, p.map, kMatrix, kRow, kColumn, m.barrier);
    arrive(m.barrier);
  }
  sync_block();
  if (kBug != Bug::no_wait) wait_barrier(m.barrier, 0);
  bool right = true;
  const int r = thread_index();
  for (int c = 0; c < kSwizzledElements; ++c) {
    const int place = kBug == Bug::not_swizzled ? c / 8 * 16 : swizzled(r, c / 8);
    const float v = to_float(*reinterpret_cast<const bf16*>(&m.tile[r][place + c % 8 * 2]));
    right = right && v == tile_number(kMatrix, kRow + r, kColumn + c);
  }
  if (kBug == Bug::loads_over && thread_index() == 0) load_tile(m.tile, p.map, kMatrix, kRow, kColumn, m.barrier);
  say(p, right);
}

// A product of a warpgroup against itself by hand: a [64, 64], b [32, 64] of small whole numbers.
struct HopperProduct {
  alignas(1024) unsigned char a[64][kSwizzledBytes], b[32][kSwizzledBytes];
};
SADMOE_DEVICE float factor(int i, int j) { return static_cast<float>((i * 5 + j * 3) % 7 - 3); }

template <Bug kBug>
SADMOE_KERNEL(128)
product_64(SADMOE_PARAMETER HopperBuffers p) {
  SADMOE_SHARED(HopperProduct, m);
  for (int i = thread_index(); i < (64 + 32) * 64; i += 128) {
    const int r = i / 64, c = i % 64, place = (kBug == Bug::not_swizzled ? c / 8 * 16 : swizzled(r, c / 8)) + c % 8 * 2;
    from_float(factor(r + r / 64, c), *reinterpret_cast<bf16*>(&m.a[0][0] + r * kSwizzledBytes + place));
  }
  if (kBug != Bug::no_fence) fence_async();
  sync_block();
  float sums[16];
  for (float& sum : sums) sum = 0;
  const int other =
      (kBug == Bug::different_warps && thread_index() >= 32) || (kBug == Bug::different_lanes && thread_index() % 2) ? 32 : 0;
  if (kBug != Bug::no_begin) begin_products();
  if (kBug == Bug::touched_early) sums[3] += 1;
  for (int k = 0; k < 4; ++k) {
    const int depth = k * (kBug == Bug::wrong_step ? 16 : 32);
    const unsigned char* b = &m.b[0][depth ^ other];
    if (kBug == Bug::outside) b += kOutside;
    multiply_64(sums, operand(&m.a[0][depth]), operand(b) & ~(uint64_t{kBug == Bug::plain} << 62), bf16{});
  }
  commit_products();
  if (kBug == Bug::writes_over) m.a[thread_index() / 2][0] = 0;
  if (kBug == Bug::no_wait)
    wait_products<1>();
  else
    wait_products<0>();
  settle(sums);
  bool right = true;
  const int lane = thread_index() % 32;
  for (int i = 0; i < 16; ++i) {
    const int r = thread_index() / 32 * 16 + lane / 4 + i % 4 / 2 * 8, c = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 64; ++k) sum += factor(r, k) * factor(64 + c + 1, k);
    right = right && sum == sums[i];
  }
  say(p, right);
}

// Every width and type has the bits of multiply_16x8x16, where sums are rounded: what decoding and the rest rely on.
struct BitsMemory {
  alignas(1024) unsigned char a[64][kSwizzledBytes], b[128][kSwizzledBytes];
};
SADMOE_DEVICE float uneven(int i, int j) {
  const unsigned mixed = (static_cast<unsigned>(i) * 2654435761u + static_cast<unsigned>(j)) * 2246822519u;
  return (static_cast<float>(mixed >> 8 & 0xff) - 127.5f) * (mixed & 1 ? 1.0f : 0.015625f) * (mixed & 2 ? 1.0f : 0.001953125f);
}
template <class T>
SADMOE_DEVICE void fill_uneven(BitsMemory& m) {
  for (int i = thread_index(); i < (64 + 128) * 64; i += 128) {
    const int r = i / 64, c = i % 64;
    const float v = r == 0 ? -0.0f : uneven(r, c);  // a zero's sign is a bit, too
    from_float(v, *reinterpret_cast<T*>(&m.a[0][0] + r * kSwizzledBytes + swizzled(r, c / 8) + c % 8 * 2));
  }
  fence_async();
  sync_block();
}
// 16 depths of this warp's rows.
SADMOE_DEVICE void load_rows(const BitsMemory& m, int k, unsigned (&to)[4]) {
  const int lane = thread_index() % 32;
  load_matrices(to, &m.a[thread_index() / 32 * 16 + lane % 16][swizzled(lane % 16, 2 * k + lane / 16)]);
}
// Whether multiply_16x8x16 has the same bits.
template <class T, int kColumns>
SADMOE_DEVICE bool same_by_warps(const BitsMemory& m, const float (&sums)[kColumns / 2]) {
  float few[kColumns / 2];
  SADMOE_UNROLL
  for (int i = 0; i < kColumns / 2; ++i) few[i] = 0;
  SADMOE_UNROLL
  for (int k = 0; k < 4; ++k) {
    unsigned as[4], bs[4];
    load_rows(m, k, as);
    SADMOE_UNROLL
    for (int c = 0; c < kColumns; c += 16) {
      const int r = thread_index() % 32 / 16 * 8 + thread_index() % 8;
      load_matrices(bs, &m.b[c + r][swizzled(r, 2 * k + thread_index() % 32 / 8 % 2)]);
      multiply_16x8x16(few + c / 2, as, bs[0], bs[1], T{});
      multiply_16x8x16(few + c / 2 + 4, as, bs[2], bs[3], T{});
    }
  }
  bool right = true;
  SADMOE_UNROLL
  for (int i = 0; i < kColumns / 2; ++i) {
    const bool zeros = thread_index() < 4 && i % 4 < 2;  // of row 0
    right = right && as_bits(sums[i]) == as_bits(few[i]) && (sums[i] == 0) == zeros;
  }
  return right;
}
template <class T, int kColumns>
SADMOE_KERNEL(128)
product_bits(SADMOE_PARAMETER HopperBuffers p) {
  SADMOE_SHARED(BitsMemory, m);
  fill_uneven<T>(m);
  float sums[kColumns / 2];
  SADMOE_UNROLL
  for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0;
  begin_products();
  SADMOE_UNROLL
  for (int k = 0; k < 128; k += 32) multiply_64(sums, operand(&m.a[0][k]), operand(&m.b[0][k]), T{});
  commit_products();
  wait_products<0>();
  settle(sums);
  say(p, same_by_warps<T, kColumns>(m, sums));
}
// Rows from registers, and sums that begin anew.
template <class T, Bug kBug>
SADMOE_KERNEL(128)
product_of_registers(SADMOE_PARAMETER HopperBuffers p) {
  SADMOE_SHARED(BitsMemory, m);
  fill_uneven<T>(m);
  unsigned rows[4][4];
  SADMOE_UNROLL
  for (int k = 0; k < 4; ++k) load_rows(m, k, rows[k]);
  float sums[64];
  SADMOE_UNROLL
  for (int i = 0; i < 64; ++i) sums[i] = 1;
  begin_products();
  if (kBug == Bug::touched_early) ++rows[2][1];
  SADMOE_UNROLL
  for (int k = 0; k < 4; ++k) multiply_64(sums, rows[k], operand(&m.b[0][k * 32]), kBug == Bug::old_sums || k > 0, T{});
  commit_products();
  if (kBug == Bug::writes_over) ++rows[2][1];
  wait_products<0>();
  settle(sums);
  say(p, same_by_warps<T, 128>(m, sums));
}

template <Bug kBug>
SADMOE_KERNEL(kHopperThreads, 1)
registers(SADMOE_PARAMETER HopperBuffers p) {
  if (thread_index() < 128 - (kBug == Bug::by_one_warp ? 32 : 0))
    give_registers<kBug == Bug::too_many_kept ? 200 : 40>();
  else if (thread_index() >= 128)
    take_registers<kBug == Bug::too_many ? 240 : kBug == Bug::too_few ? 40 : 232>();
  say(p, true);
}

struct HopperCase {
  const char* name;
  void (*kernel)(HopperBuffers);
  int threads;
};
const HopperCase kHopperCases[] = {
    {"hand_over", hand_over<Bug::none>, 64},
    {"hand_over_of_wrong_parity", hand_over<Bug::wrong_parity>, 64},
    {"hand_over_and_over", hand_over<Bug::writes_over>, 64},
    {"hand_over_of_no_parity", hand_over<Bug::no_parity>, 64},
    {"hand_over_of_too_few", hand_over<Bug::too_few_arrivals>, 64},
    {"hand_over_of_none", hand_over<Bug::no_arrivals>, 64},
    {"hand_over_outside", hand_over<Bug::outside>, 64},
    {"hand_over_not_begun", hand_over<Bug::not_begun>, 64},
    {"hand_over_begun_unordered", hand_over<Bug::begun_unordered>, 64},
    {"tile", tile<Bug::none>, 64},
    {"tile_without_expect", tile<Bug::no_expect>, 64},
    {"tile_that_expects_more", tile<Bug::expects_more>, 64},
    {"tile_without_fence", tile<Bug::no_fence>, 64},
    {"tile_without_wait", tile<Bug::no_wait>, 64},
    {"tile_not_swizzled", tile<Bug::not_swizzled>, 64},
    {"tile_misplaced", tile<Bug::misplaced>, 64},
    {"tile_outside", tile<Bug::outside>, 64},
    {"tile_with_too_many", tile<Bug::too_many_arrivals>, 64},
    {"tile_over_what_is_read", tile<Bug::loads_over>, 64},
    {"product_64", product_64<Bug::none>, 128},
    {"product_64_without_fence", product_64<Bug::no_fence>, 128},
    {"product_64_without_begin", product_64<Bug::no_begin>, 128},
    {"product_64_without_wait", product_64<Bug::no_wait>, 128},
    {"product_64_over_its_operands", product_64<Bug::writes_over>, 128},
    {"product_64_touched_early", product_64<Bug::touched_early>, 128},
    {"product_64_not_swizzled", product_64<Bug::not_swizzled>, 128},
    {"product_64_of_wrong_depths", product_64<Bug::wrong_step>, 128},
    {"product_64_of_different_warps", product_64<Bug::different_warps>, 128},
    {"product_64_of_different_lanes", product_64<Bug::different_lanes>, 128},
    {"product_64_outside", product_64<Bug::outside>, 128},
    {"product_64_of_plain_rows", product_64<Bug::plain>, 128},
    {"product_bits_bf16_32", product_bits<bf16, 32>, 128},
    {"product_bits_bf16_64", product_bits<bf16, 64>, 128},
    {"product_bits_bf16_96", product_bits<bf16, 96>, 128},
    {"product_bits_bf16_128", product_bits<bf16, 128>, 128},
    {"product_bits_f16_32", product_bits<f16, 32>, 128},
    {"product_bits_f16_128", product_bits<f16, 128>, 128},
    {"product_of_registers_bf16", product_of_registers<bf16, Bug::none>, 128},
    {"product_of_registers_f16", product_of_registers<f16, Bug::none>, 128},
    {"product_of_registers_touched_early", product_of_registers<bf16, Bug::touched_early>, 128},
    {"product_of_registers_written_over", product_of_registers<bf16, Bug::writes_over>, 128},
    {"product_of_registers_on_old_sums", product_of_registers<bf16, Bug::old_sums>, 128},
    {"registers", registers<Bug::none>, kHopperThreads},
    {"registers_that_nobody_gave", registers<Bug::too_many>, kHopperThreads},
    {"registers_taken_down", registers<Bug::too_few>, kHopperThreads},
    {"registers_given_up", registers<Bug::too_many_kept>, kHopperThreads},
    {"registers_of_one_warp", registers<Bug::by_one_warp>, kHopperThreads},
};

}  // namespace
}  // namespace sadmoe::cuda
