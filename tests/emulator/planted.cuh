// Small kernels, each with one planted bug, and their right twins: the emulator must catch the first and pass the others,
// and a device must pass the right ones too, which shows that it and the emulator mean the same by a word.
#pragma once
#include <cstring>

#include "cuda/device.cuh"

namespace sadmoe::cuda {
namespace {

constexpr int kCells = 64;
using Cells = float[kCells];

struct Buffers {
  const float* in;  // kCells + 1, on 16 bytes
  float* out;       // kCells
};

SADMOE_KERNEL(64) barrier_between_warps(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  cells[thread_index()] = p.in[thread_index()];
  sync_block();
  p.out[thread_index()] = cells[63 - thread_index()];
}
SADMOE_KERNEL(64) missing_barrier(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  cells[thread_index()] = p.in[thread_index()];
  p.out[thread_index()] = cells[63 - thread_index()];
}
SADMOE_KERNEL(64) missing_barrier_before_reuse(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  cells[thread_index()] = p.in[thread_index()];
  sync_block();
  const float other = cells[63 - thread_index()];
  cells[thread_index()] = other;
  p.out[thread_index()] = other;
}
SADMOE_KERNEL(32) shuffle_as_barrier(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  cells[thread_index()] = p.in[thread_index()];
  const float other = shuffle_xor(1.0f, 1);
  p.out[thread_index()] = cells[31 - thread_index()] * other;
}
SADMOE_KERNEL(32) warp_in_step(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  cells[thread_index()] = p.in[thread_index()];
  sync_warp();
  p.out[thread_index()] = cells[31 - thread_index()];
}
SADMOE_KERNEL(64) warp_as_block(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  cells[thread_index()] = p.in[thread_index()];
  sync_warp();
  p.out[thread_index()] = cells[63 - thread_index()];
}
SADMOE_KERNEL(64) divergent_barrier(Buffers p) {
  if (thread_index() < 32)
    sync_block();
  else
    sync_block();
  p.out[thread_index()] = 1;
}
SADMOE_KERNEL(64) barrier_without_some(Buffers p) {
  if (thread_index() >= 32) return;
  sync_block();
  p.out[thread_index()] = 1;
}
SADMOE_KERNEL(32) warp_operation_without_some(Buffers p) {
  if (thread_index() < 16) p.out[thread_index()] = shuffle(1.0f, 0);
}
SADMOE_KERNEL(32) different_warp_operations(Buffers p) {
  if (thread_index() < 16)
    p.out[thread_index()] = shuffle(1.0f, 0);
  else
    p.out[thread_index()] = shuffle_xor(1.0f, 1);
}
SADMOE_KERNEL(32) warp_operations(Buffers p) {
  const int lane = thread_index();
  const unsigned low = ballot(lane < 3);
  const bool right = shuffle(lane, 5) == 5 && shuffle_xor(lane, 3) == (lane ^ 3) &&
                     shuffle_up(lane, 2) == (lane < 2 ? lane : lane - 2) && low == 7 && lowest_bit(low << 4) == 4;
  p.out[lane] = right ? 1.0f : 0.0f;
}
// Pairs, and 4 bytes of each type.
template <class T>
SADMOE_DEVICE bool writes_words(float* cell) {
  constexpr int kOf4 = 4 / sizeof(T);
  float v[kOf4];
  for (int i = 0; i < kOf4; ++i) v[i] = static_cast<float>(thread_index() + i) + 0.5f;
  T* words = reinterpret_cast<T*>(cell);
  store_word(v, words);
  return to_float(words[0]) == v[0] && to_float(words[kOf4 - 1]) == v[kOf4 - 1];
}
SADMOE_KERNEL(32) neighbours(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  const int lane = thread_index(), other = 31 - lane;
  store_pair({static_cast<float>(lane), static_cast<float>(-lane)}, &cells[lane * 2]);
  sync_warp();
  const Pair pair = load_pair(&cells[other * 2]);
  sync_warp();
  float* own = &cells[lane];
  const bool right = pair.first == other && pair.second == -other && kept(lane) == lane && kept(own) == own &&
                     writes_words<float>(own) && writes_words<bf16>(own) && writes_words<f16>(own);
  p.out[lane] = right ? 1.0f : 0.0f;
}
SADMOE_KERNEL(32) misaligned_pair(Buffers p) {
  const Pair pair = load_pair(p.in + thread_index() + 1);
  p.out[thread_index()] = pair.first * pair.second;
}
SADMOE_KERNEL(32) uninitialised_shared_memory(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  p.out[thread_index()] = cells[thread_index()];
}
SADMOE_KERNEL(32) uninitialised_output(Buffers p) { p.out[thread_index()] += 1; }
SADMOE_KERNEL(32) shared_memory_overflow(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  cells[thread_index() + 225] = 0;
  p.out[thread_index()] = 0;
}
SADMOE_KERNEL(32) read_past_the_end(Buffers p) { p.out[thread_index()] = p.in[thread_index() + 34]; }
SADMOE_KERNEL(32) write_past_the_end(Buffers p) { p.out[thread_index() + 33] = 0; }
SADMOE_KERNEL(32) write_to_input(Buffers p) { const_cast<float*>(p.in)[thread_index()] = 0; }
SADMOE_KERNEL(32) misaligned(Buffers p) {
  const char* bytes = reinterpret_cast<const char*>(p.in) + 2;
  p.out[thread_index()] = reinterpret_cast<const float*>(bytes)[thread_index()];
}
SADMOE_KERNEL(32) blocks_write_one_place(Buffers p) { p.out[thread_index()] = static_cast<float>(block_x()); }
SADMOE_KERNEL(32) block_reads_another(Buffers p) {
  if (block_x() == 0) p.out[thread_index()] = 1;
  if (block_x() == 1) p.out[32 + thread_index()] = p.out[thread_index()];
}
SADMOE_KERNEL(32) blocks_apart(Buffers p) { p.out[block_x() * 32 + thread_index()] = 1; }

// Launched early.
template <bool kWait, bool kTouch>
SADMOE_KERNEL(32)
early(Buffers p) {
  const float in = p.in[thread_index()];
  if (kTouch) p.out[thread_index()] = in;
  start_kernel_after();
  if (kWait) wait_kernel_before();
  if (kWait) p.out[thread_index()] = in;
}

// 16 threads copy 16 bytes each; `wait`, then maybe a barrier, then all read.
template <bool kWait, bool kBarrier, int kOffset>
SADMOE_KERNEL(64)
copies(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  if (thread_index() < 16) copy16_async(&cells[thread_index() * 4], p.in + thread_index() * 4 + kOffset, true);
  commit_copies();
  wait_copies<kWait ? 0 : 1>();
  if (kBarrier) sync_block();
  p.out[thread_index()] = cells[63 - thread_index()];
}
SADMOE_KERNEL(32) copies_past_shared_memory(Buffers p) { copy16_async(p.out, p.in, true); }
// Of 16 threads the first 8 copy, the others only write zeros: their source is not read, nor anywhere.
SADMOE_KERNEL(64) copies_of_nothing(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  const int t = thread_index();
  if (t < 16) copy16_async(&cells[t * 4], p.in + (t < 8 ? t : t << 20) * 4, t < 8);
  commit_copies();
  wait_copies<0>();
  sync_block();
  p.out[t] = cells[t] == (t < 32 ? 1.0f : 0.0f) ? 1.0f : 0.0f;
}
SADMOE_KERNEL(32) copy_over_what_is_read(Buffers p) {
  SADMOE_SHARED(Cells, cells);
  cells[thread_index()] = 0;
  sync_block();
  p.out[thread_index()] = cells[thread_index()];
  if (thread_index() < 8) copy16_async(&cells[thread_index() * 4], p.in + thread_index() * 4, true);
}

// A product of tensor cores against itself by hand: a [16, 16] and b [16, 8] of small whole numbers, b by depth or by column.
template <class T>
struct ProductOf {
  alignas(16) T a[16][16], b[16][16];
};
using Product = ProductOf<bf16>;
SADMOE_DEVICE float number(int i, int j) { return static_cast<float>((i * 5 + j * 3) % 7 - 3); }

template <class T, bool kTransposed, int kWrong>
SADMOE_KERNEL(32)
product(Buffers p) {
  SADMOE_SHARED(ProductOf<T>, m);
  const int lane = thread_index();
  for (int i = lane; i < 256; i += 32) {
    from_float(number(i / 16, i % 16), m.a[i / 16][i % 16]);
    from_float(number(i / 16 + 1, i % 16), m.b[i / 16][i % 16]);
  }
  sync_block();
  unsigned a[4], b[4];
  load_matrices(a, &m.a[lane % 16][lane / (kWrong ? 8 : 16) % 2 * 8]);
  if (kTransposed)
    load_matrices_transposed(b, &m.b[lane % 16][lane / 16 * 8]);
  else
    load_matrices(b, &m.b[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  float sums[4] = {};
  multiply_16x8x16(sums, a, b[0], b[1], T{});
  bool right = true;
  for (int i = 0; i < 4; ++i) {
    const int r = lane / 4 + i / 2 * 8, c = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += number(r, k) * (kTransposed ? number(k + 1, c) : number(c + 1, k));
    right = right && sum == sums[i];
  }
  p.out[lane] = right ? 1.0f : 0.0f;
}

// 16 products of 2 ** -27 make a unit in the last place of 1. Tensor cores cut each of them off, where float32 adds them all.
template <int kWrong>
SADMOE_KERNEL(32)
cut_off(Buffers p) {
  constexpr float kEach = 1.0f / 8192, kUnit = 1.0f / (1 << 23);
  const unsigned all = word_of(kEach, kEach, bf16{}), half = word_of(kEach / 2, kEach / 2, bf16{}),
                 rows[4] = {all, all, all, all};
  float sums[4] = {1, 1, 1, 1};
  multiply_16x8x16(sums, rows, half, half, bf16{});
  p.out[thread_index()] = sums[0] == (kWrong ? 1 + kUnit : 1) ? 1.0f : 0.0f;
}

template <int kWrong>
SADMOE_KERNEL(32)
turned(Buffers p) {
  const int r = thread_index() / 4, c = thread_index() % 4 * 2;
  const auto word = [](float first, float second) { return word_of(first, second, bf16{}); };
  const unsigned found = transposed(word(number(r, c), number(r, c + 1)));
  const bool right = found == (kWrong ? word(number(r, c), number(r, c + 1)) : word(number(c, r), number(c + 1, r)));
  p.out[thread_index()] = right ? 1.0f : 0.0f;
}

// The same of tf32: a [16, 8] and b [8, 8]. The thousandths of a are rounded away.
struct FloatProduct {
  alignas(16) float a[16][8], b[8][8];
};

template <int kWrong>
SADMOE_KERNEL(32)
product_tf32(Buffers p) {
  SADMOE_SHARED(FloatProduct, m);
  const int lane = thread_index();
  for (int i = lane; i < 128; i += 32) m.a[i / 8][i % 8] = number(i / 8, i % 8) * 1.0001f;
  for (int i = lane; i < 64; i += 32) m.b[i / 8][i % 8] = number(i / 8, i % 8);
  sync_block();
  unsigned a[4];
  load_matrices(a, &m.a[lane % 16][lane / 16 * 4]);
  for (int i = 0; i < 4; ++i) a[i] = to_tf32(as_float(a[i]));
  const int depth = lane % 4 + kWrong;
  float sums[4] = {};
  multiply_16x8x8(sums, a, as_bits(m.b[depth % 8][lane / 4]), as_bits(m.b[(depth + 4) % 8][lane / 4]));
  bool right = true;
  for (int i = 0; i < 4; ++i) {
    const int r = lane / 4 + i / 2 * 8, c = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 8; ++k) sum += number(r, k) * number(k, c);
    right = right && sum == sums[i];
  }
  p.out[lane] = right ? 1.0f : 0.0f;
}
SADMOE_KERNEL(32) bits(Buffers p) {
  const float above = 1 + 1.0f / 2048, below = 1 + 1.0f / 4096;  // half of the 11th bit, and less
  const bool right = as_float(to_tf32(above)) == 1 + 1.0f / 1024 && as_float(to_tf32(below)) == 1 &&
                     as_float(to_tf32(-above)) == -1 - 1.0f / 1024 && as_float(as_bits(above)) == above &&
                     count_bits(0xf0f1) == 9;
  p.out[thread_index()] = right ? 1.0f : 0.0f;
}

// Rounding is to nearest, ties to even, and a fma rounds once; functions err by a few units in the last place.
template <class T>
SADMOE_DEVICE bool rounds(float unit) {  // above 1
  T even, up, beyond;
  from_float(1 + unit / 2, even);
  from_float(1 + unit * 1.5f, up);
  from_float(1 + unit * 0.5625f, beyond);
  return to_float(even) == 1 && to_float(up) == 1 + 2 * unit && to_float(beyond) == 1 + unit;
}
SADMOE_KERNEL(32) numbers(Buffers p) {
  const auto close = [](float a, float b) { return a > b * 0.999999f && a < b * 1.000001f; };
  const float tiny = 1.0f / 4096;
  const bool right = rounds<bf16>(1.0f / 128) && rounds<f16>(1.0f / 1024) && close(exp(1.0f), 2.71828183f) &&
                     close(exp(-20.0f), 2.06115362e-9f) && exp(-200.0f) == 0 && close(erfc(0.5f), 0.479500122f) &&
                     close(erfc(-1.0f), 1.84270079f) && close(erfc(4.0f), 1.54172579e-8f) &&
                     fma(1 + tiny, 1 + tiny, -1.0f) == 2 * tiny + tiny * tiny;
  p.out[thread_index()] = right ? 1.0f : 0.0f;
}

// Right twins write 1 everywhere.
struct Case {
  const char* name;
  void (*kernel)(Buffers);
  int64_t blocks;
  int threads;
  bool early = false;
};
const Case kCases[] = {
    {"barrier_between_warps", barrier_between_warps, 1, 64},
    {"missing_barrier", missing_barrier, 1, 64},
    {"missing_barrier_before_reuse", missing_barrier_before_reuse, 1, 64},
    {"shuffle_as_barrier", shuffle_as_barrier, 1, 32},
    {"warp_in_step", warp_in_step, 1, 32},
    {"warp_as_block", warp_as_block, 1, 64},
    {"divergent_barrier", divergent_barrier, 1, 64},
    {"barrier_without_some", barrier_without_some, 1, 64},
    {"warp_operation_without_some", warp_operation_without_some, 1, 32},
    {"different_warp_operations", different_warp_operations, 1, 32},
    {"warp_operations", warp_operations, 1, 32},
    {"neighbours", neighbours, 1, 32},
    {"misaligned_pair", misaligned_pair, 1, 32},
    {"uninitialised_shared_memory", uninitialised_shared_memory, 1, 32},
    {"uninitialised_output", uninitialised_output, 1, 32},
    {"shared_memory_overflow", shared_memory_overflow, 1, 32},
    {"read_past_the_end", read_past_the_end, 1, 32},
    {"write_past_the_end", write_past_the_end, 1, 32},
    {"write_to_input", write_to_input, 1, 32},
    {"misaligned", misaligned, 1, 32},
    {"blocks_write_one_place", blocks_write_one_place, 2, 32},
    {"block_reads_another", block_reads_another, 2, 32},
    {"blocks_apart", blocks_apart, 2, 32},
    {"early", early<true, false>, 1, 32, true},
    {"early_without_wait", early<false, false>, 1, 32, true},
    {"early_before_wait", early<true, true>, 1, 32, true},
    {"copies", copies<true, true, 0>, 1, 64},
    {"copies_without_wait", copies<false, true, 0>, 1, 64},
    {"copies_without_barrier", copies<true, false, 0>, 1, 64},
    {"copies_misaligned", copies<true, true, 1>, 1, 64},
    {"copies_past_shared_memory", copies_past_shared_memory, 1, 32},
    {"copies_of_nothing", copies_of_nothing, 1, 64},
    {"copy_over_what_is_read", copy_over_what_is_read, 1, 32},
    {"product", product<bf16, false, 0>, 1, 32},
    {"product_transposed", product<bf16, true, 0>, 1, 32},
    {"product_f16", product<f16, false, 0>, 1, 32},
    {"cut_off", cut_off<0>, 1, 32},
    {"not_cut_off", cut_off<1>, 1, 32},
    {"product_of_wrong_columns", product<bf16, false, 1>, 1, 32},
    {"turned", turned<0>, 1, 32},
    {"not_turned", turned<1>, 1, 32},
    {"product_tf32", product_tf32<0>, 1, 32},
    {"product_tf32_of_wrong_depths", product_tf32<1>, 1, 32},
    {"bits", bits, 1, 32},
    {"numbers", numbers, 1, 32},
    {"too_many_threads", blocks_apart, 1, 2048},
};

}  // namespace
}  // namespace sadmoe::cuda
