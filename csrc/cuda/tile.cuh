// A tile of a matrix product, kRows x kColumns, by one block: sums live in registers, operands pass through shared memory
// in steps of kDepth. What differs is how a step is multiplied: Fma (float32) or Mma<T> (tensor cores).
//
// The sum of an element runs over the depth in one fixed order, whatever the other rows are: results are batch-invariant.
#pragma once
#include "contract.h"
#include "cuda/device.cuh"

namespace sadmoe::cuda {

constexpr int kRows = 64, kColumns = 64, kThreads = 128;
constexpr int kSums = kRows * kColumns / kThreads;

// A row-major matrix in global memory. wide: every row begins on 16 bytes.
struct Matrix {
  const void* data = nullptr;
  int64_t ld = 0;
  DType dtype = DType::f32;
  bool wide = false;
};

template <class T>
SADMOE_DEVICE float load(const void* data, int64_t i) {
  return to_float(static_cast<const T*>(data)[i]);
}

SADMOE_DEVICE float load(View from, int64_t i) {
  switch (from.dtype) {
    case DType::bf16:
      return load<bf16>(from.data, i);
    case DType::f16:
      return load<f16>(from.data, i);
    default:
      return load<float>(from.data, i);
  }
}

SADMOE_DEVICE void store(void* to, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::bf16:
      return from_float(v, static_cast<bf16*>(to)[i]);
    case DType::f16:
      return from_float(v, static_cast<f16*>(to)[i]);
    default:
      static_cast<float*>(to)[i] = v;
  }
}

// A stage of an operand in shared memory. kPad keeps the accesses of a warp in different banks.
template <class T, int kRowsOf, int kColumnsOf, int kPad>
struct Stage {
  static constexpr int rows = kRowsOf, columns = kColumnsOf;
  alignas(16) T at[kRowsOf][kColumnsOf + kPad];
};

// Element by element. row_of(r): the row of the matrix at row r of the stage, or -1 for zeros.
template <class From, class Stage, class RowOf>
SADMOE_DEVICE void load_elements(Stage& to, const Matrix& from, int64_t c0, int64_t columns, RowOf row_of) {
  const From* data = static_cast<const From*>(from.data);
  SADMOE_ROLLED
  for (int i = thread_index(); i < Stage::rows * Stage::columns; i += kThreads) {
    const int r = i / Stage::columns, c = i % Stage::columns;
    const int64_t row = row_of(r);
    from_float(row >= 0 && c0 + c < columns ? to_float(data[row * from.ld + c0 + c]) : 0.0f, to.at[r][c]);
  }
}

// Eight 16-bit elements at a time, in the background.
template <class T, class Stage, class RowOf>
SADMOE_DEVICE void load_wide(Stage& to, const Matrix& from, int64_t c0, int64_t columns, RowOf row_of) {
  const T* data = static_cast<const T*>(from.data);
  for (int i = thread_index(); i < Stage::rows * Stage::columns / 8; i += kThreads) {
    const int r = i / (Stage::columns / 8), c = i % (Stage::columns / 8) * 8;
    const int64_t row = row_of(r), left = row < 0 ? 0 : columns - c0 - c;
    const int n = left < 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
    copy16_async(&to.at[r][c], n ? data + row * from.ld + c0 + c : data, n * 2);
  }
}

// Operands of any dtype, multiplied and added in float32. A thread holds rows ty + 8 i and columns tx + 16 j.
struct Fma {
  static constexpr int kDepth = 16;
  using RowStage = Stage<float, kRows, kDepth, 1>;       // a row of the tile a row, also of x
  using DepthStage = Stage<float, kDepth, kColumns, 1>;  // a step of the depth a row

  float sums[kSums] = {};

  SADMOE_DEVICE static int row(int i) { return thread_index() / 16 + i / 4 * 8; }
  SADMOE_DEVICE static int column(int i) { return thread_index() % 16 + i % 4 * 16; }

  SADMOE_DEVICE static float at(const RowStage& b, int k, int column) { return b.at[column][k]; }
  SADMOE_DEVICE static float at(const DepthStage& b, int k, int column) { return b.at[k][column]; }

  template <class Stage, class RowOf>
  SADMOE_DEVICE static void load(Stage& to, const Matrix& from, int64_t c0, int64_t columns, RowOf row_of) {
    switch (from.dtype) {
      case DType::bf16:
        return load_elements<bf16>(to, from, c0, columns, row_of);
      case DType::f16:
        return load_elements<f16>(to, from, c0, columns, row_of);
      default:
        return load_elements<float>(to, from, c0, columns, row_of);
    }
  }

  // The first n rows of the tile.
  template <class StageB>
  SADMOE_DEVICE void multiply(const RowStage& a, const StageB& b, int n) {
    for (int k = 0; k < kDepth; ++k) {
      float bs[4];
      SADMOE_UNROLL
      for (int j = 0; j < 4; ++j) bs[j] = at(b, k, column(j));
      SADMOE_UNROLL
      for (int i = 0; i < kSums; i += 4) {
        if (i / 4 * 8 >= n) break;
        const float x = a.at[row(i)][k];
        SADMOE_UNROLL
        for (int j = 0; j < 4; ++j) sums[i + j] = fma(x, bs[j], sums[i + j]);
      }
    }
  }

  SADMOE_DEVICE void store(float (&to)[kRows][kColumns]) const {
    SADMOE_UNROLL
    for (int i = 0; i < kSums; ++i) to[row(i)][column(i)] = sums[i];
  }
};

// Operands of T, 16 bits, by m16n8k16. A warp holds all rows of 16 columns, so that an expert of few rows wastes no warp.
template <class T>
struct Mma {
  static constexpr int kDepth = 32;
  using RowStage = Stage<T, kRows, kDepth, 8>;
  using DepthStage = Stage<T, kDepth, kColumns, 8>;

  float sums[kSums] = {};  // [4 tiles of 16 rows][2 tiles of 8 columns][4]

  SADMOE_DEVICE static int lane() { return thread_index() % 32; }
  SADMOE_DEVICE static int first_column() { return thread_index() / 32 * 16; }
  SADMOE_DEVICE static int row(int i) { return i / 8 * 16 + i % 4 / 2 * 8 + lane() / 4; }
  SADMOE_DEVICE static int column(int i) { return first_column() + i / 4 % 2 * 8 + lane() % 4 * 2 + i % 2; }

  // Of 16 columns: depths 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  SADMOE_DEVICE static void fragment(unsigned (&to)[4], const RowStage& b, int k) {
    load_matrices(to, &b.at[first_column() + lane() / 16 * 8 + lane() % 8][k + lane() / 8 % 2 * 8]);
  }
  SADMOE_DEVICE static void fragment(unsigned (&to)[4], const DepthStage& b, int k) {
    load_matrices_transposed(to, &b.at[k + lane() % 16][first_column() + lane() / 16 * 8]);
  }

  template <class Stage, class RowOf>
  SADMOE_DEVICE static void load(Stage& to, const Matrix& from, int64_t c0, int64_t columns, RowOf row_of) {
    if (from.wide)
      load_wide<T>(to, from, c0, columns, row_of);
    else
      load_elements<T>(to, from, c0, columns, row_of);
  }

  template <class StageB>
  SADMOE_DEVICE void multiply(const RowStage& a, const StageB& b, int n) {
    SADMOE_UNROLL
    for (int k = 0; k < kDepth; k += 16) {
      unsigned bs[4];
      fragment(bs, b, k);
      SADMOE_UNROLL
      for (int i = 0; i < kSums; i += 8) {
        if (i / 8 * 16 >= n) break;
        unsigned as[4];
        load_matrices(as, &a.at[i / 8 * 16 + lane() % 16][k + lane() / 16 * 8]);
        multiply_16x8x16(sums + i, as, bs[0], bs[1], T{});
        multiply_16x8x16(sums + i + 4, as, bs[2], bs[3], T{});
      }
    }
  }

  SADMOE_DEVICE void store(float (&to)[kRows][kColumns]) const {
    SADMOE_UNROLL
    for (int i = 0; i < kSums; ++i) to[row(i)][column(i)] = sums[i];
  }
};

// Two stages, one filled while the other is multiplied. fill(stage, k) starts the loads of the depths from k on,
// use(stage) multiplies them. Ends with the block in step.
template <int kDepth, class Stages, class Fill, class Use>
SADMOE_DEVICE void pipeline(Stages (&stages)[2], int64_t depth, Fill fill, Use use) {
  if (depth == 0) return;
  fill(stages[0], 0);
  commit_copies();
  for (int64_t k = 0, step = 0; k < depth; k += kDepth, ++step) {
    if (k + kDepth < depth) fill(stages[(step + 1) % 2], k + kDepth);
    commit_copies();
    wait_copies<1>();
    sync_block();
    use(stages[step % 2]);
    sync_block();
  }
}

}  // namespace sadmoe::cuda
