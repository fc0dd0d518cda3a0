// A strip of a matrix product, few tokens by the 8 columns of a warp: what decoding multiplies. The sum of an element runs
// over the depth by the same instructions in the same order as in tile.cuh, so it is the same bit for bit.
//
//   rows(a, b, c0):   b a stage whose rows are columns of the product, c0 the first of the warp's
//   depths(a, b, c0): b a stage whose rows are steps of the depth
#pragma once
#include "cuda/tile.cuh"

namespace sadmoe::cuda {

template <class Tile, int kTokens>
struct Strip;

template <int kTokens>
struct Strip<Fma, kTokens> {
  static constexpr int kSums = kTokens / 4;
  float sums[kSums] = {};

  SADMOE_DEVICE static int row(int i) { return thread_index() % 4 + i * 4; }
  SADMOE_DEVICE static int column(int) { return thread_index() % 32 / 4; }

  template <class A, class B>
  SADMOE_DEVICE void rows(const A& a, const B& b, int c0) {
    add(a, [&](int k) { return b.at[c0 + column(0)][k]; });
  }
  template <class A, class B>
  SADMOE_DEVICE void depths(const A& a, const B& b, int c0) {
    add(a, [&](int k) { return b.at[k][c0 + column(0)]; });
  }

 private:
  template <class A, class Weight>
  SADMOE_DEVICE void add(const A& a, Weight weight) {
    static_assert(A::columns % Fma::kDepth == 0, "whole steps of a tile");
    SADMOE_ROLLED
    for (int k0 = 0; k0 < A::columns; k0 += Fma::kDepth) {
      float parts[kSums] = {};
      SADMOE_ROLLED
      for (int k = k0; k < k0 + Fma::kDepth; ++k) {
        const float w = weight(k);
        SADMOE_UNROLL
        for (int i = 0; i < kSums; ++i) parts[i] = fma(a.at[row(i)][k], w, parts[i]);
      }
      SADMOE_UNROLL
      for (int i = 0; i < kSums; ++i) sums[i] += parts[i];
    }
  }
};

// Where the sums are: [tiles of 16 tokens][4].
template <int kTokens>
struct TensorStrip {
  static constexpr int kSums = kTokens / 4;
  float sums[kSums] = {};

  SADMOE_DEVICE static int lane() { return thread_index() % 32; }
  SADMOE_DEVICE static int row(int i) { return i / 4 * 16 + i % 4 / 2 * 8 + lane() / 4; }
  SADMOE_DEVICE static int column(int i) { return lane() % 4 * 2 + i % 2; }
};

// Fragments of 32 depths at a time, a step of the tile: two of 16.
template <class T, int kTokens, bool kExact>
struct MmaStrip : TensorStrip<kTokens> {
  using TensorStrip<kTokens>::lane, TensorStrip<kTokens>::sums;

  template <class A, class B>
  SADMOE_DEVICE void rows(const A& a, const B& b, int c0) {
    SADMOE_UNROLL
    for (int k = 0; k < A::columns; k += 32) {
      unsigned bs[4];
      load_matrices(bs, b.from(b.offset(c0 + lane() % 8, lane() / 8 * 8) + b.offset(0, k)));
      add(a, k, bs);
    }
  }
  template <class A, class B>
  SADMOE_DEVICE void depths(const A& a, const B& b, int c0) {
    SADMOE_UNROLL
    for (int k = 0; k < A::columns; k += 32) {
      unsigned bs[4];
      load_matrices_transposed(bs, b.from(b.offset(lane(), c0) + b.offset(k, 0)));
      add(a, k, bs);
    }
  }

 private:
  template <class A>
  SADMOE_DEVICE void add(const A& a, int k, const unsigned (&bs)[4]) {
    static_assert(Mma<T>::kDepth == 32);
    float step[kExact ? kTokens / 4 : 1] = {};
    float* to = kExact ? step : sums;
    SADMOE_UNROLL
    for (int half = 0; half < 2; ++half) SADMOE_UNROLL
    for (int m = 0; m < kTokens / 16; ++m) {
      unsigned as[4];
      load_matrices(as, a.from(a.offset(lane() % 16, k + half * 16 + lane() / 16 * 8) + a.offset(m * 16, 0)));
      multiply_16x8x16(to + m * 4, as, bs[half * 2], bs[half * 2 + 1], T{});
    }
    if constexpr (kExact) SADMOE_UNROLL
    for (int i = 0; i < kTokens / 4; ++i) sums[i] += step[i];
  }
};
template <class T, int kTokens>
struct Strip<Mma<T>, kTokens> : MmaStrip<T, kTokens, false> {};
template <class T, int kTokens>
struct Strip<ExactMma<T>, kTokens> : MmaStrip<T, kTokens, true> {};

template <int kParts, int kPartsB, int kTokens>
struct Strip<Tf32<kParts, kPartsB>, kTokens> : TensorStrip<kTokens> {
  using TensorStrip<kTokens>::lane, TensorStrip<kTokens>::sums;

  // Fragments of 16 depths at a time: two of 8.
  template <class A, class B>
  SADMOE_DEVICE void rows(const A& a, const B& b, int c0) {
    SADMOE_UNROLL
    for (int k = 0; k < A::columns; k += 16) {
      unsigned bs[4];
      load_matrices(bs, b.from(b.offset(c0 + lane() % 8, lane() / 8 * 4) + b.offset(0, k)));
      add(a, k, bs);
    }
  }
  template <class A, class B>
  SADMOE_DEVICE void depths(const A& a, const B& b, int c0) {
    SADMOE_UNROLL
    for (int k = 0; k < A::columns; k += 16) {
      unsigned bs[4];
      SADMOE_UNROLL
      for (int i = 0; i < 4; ++i) bs[i] = as_bits(b.at[k + i * 4 + lane() % 4][c0 + lane() / 4]);
      add(a, k, bs);
    }
  }

 private:
  template <class A>
  SADMOE_DEVICE void add(const A& a, int k, const unsigned (&raw)[4]) {
    constexpr bool kExact = kParts * kPartsB > 1;
    const Split<kPartsB> bs(raw);
    float step[kExact ? kTokens / 4 : 1] = {};
    float* to = kExact ? step : sums;
    SADMOE_UNROLL
    for (int half = 0; half < 2; ++half) SADMOE_UNROLL
    for (int m = 0; m < kTokens / 16; ++m) {
      unsigned as[4];
      load_matrices(as, a.from(a.offset(lane() % 16, lane() / 16 * 4) + a.offset(m * 16, k + half * 8)));
      multiply_parts(to + m * 4, Split<kParts>(as), bs, half * 2);
    }
    if constexpr (kExact) SADMOE_UNROLL
    for (int i = 0; i < kTokens / 4; ++i) sums[i] += step[i];
  }
};

}  // namespace sadmoe::cuda
