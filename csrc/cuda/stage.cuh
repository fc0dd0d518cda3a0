// Operands on their way: matrices in global memory, stages of them in shared memory, and the pipeline between.
#pragma once
#include "contract.h"
#include "cuda/device.cuh"

namespace sadmoe::cuda {

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

// A stage of an operand in shared memory. kPad keeps the accesses of a warp in different banks, and rows on 16 bytes.
template <class T, int kRowsOf, int kColumnsOf, int kPad>
struct Stage {
  static constexpr int rows = kRowsOf, columns = kColumnsOf;
  alignas(16) T at[kRowsOf][kColumnsOf + kPad];
};

// Element by element. row_of(r): the row of the matrix at row r of the stage, or -1 for zeros.
template <class From, int kThreads, class Stage, class RowOf>
SADMOE_DEVICE void load_elements(Stage& to, const Matrix& from, int64_t c0, int64_t columns, RowOf row_of) {
  const From* data = static_cast<const From*>(from.data);
  SADMOE_ROLLED
  for (int i = thread_index(); i < Stage::rows * Stage::columns; i += kThreads) {
    const int r = i / Stage::columns, c = i % Stage::columns;
    const int64_t row = row_of(r);
    from_float(row >= 0 && c0 + c < columns ? to_float(data[row * from.ld + c0 + c]) : 0.0f, to.at[r][c]);
  }
}

template <int kThreads, class Stage, class RowOf>
SADMOE_DEVICE void load_elements(Stage& to, const Matrix& from, int64_t c0, int64_t columns, RowOf row_of) {
  switch (from.dtype) {
    case DType::bf16:
      return load_elements<bf16, kThreads>(to, from, c0, columns, row_of);
    case DType::f16:
      return load_elements<f16, kThreads>(to, from, c0, columns, row_of);
    default:
      return load_elements<float, kThreads>(to, from, c0, columns, row_of);
  }
}

// 16 bytes at a time, in the background.
template <class T, int kThreads, class Stage, class RowOf>
SADMOE_DEVICE void load_wide(Stage& to, const Matrix& from, int64_t c0, int64_t columns, RowOf row_of) {
  constexpr int kWide = 16 / sizeof(T), kCopies = Stage::columns / kWide;
  static_assert(Stage::columns % kWide == 0, "whole copies");
  const T* data = static_cast<const T*>(from.data);
  for (int i = thread_index(); i < Stage::rows * kCopies; i += kThreads) {
    const int r = i / kCopies, c = i % kCopies * kWide;
    const int64_t row = row_of(r), left = row < 0 ? 0 : columns - c0 - c;
    const int n = left < 0 ? 0 : left < kWide ? static_cast<int>(left) : kWide;
    copy16_async(&to.at[r][c], n ? data + row * from.ld + c0 + c : data, n * static_cast<int>(sizeof(T)));
  }
}

// As many stages as fit `bytes`, at most `most`.
template <class Stage>
constexpr int stages_in(int bytes, int most) {
  return bytes / static_cast<int>(sizeof(Stage)) < most ? bytes / static_cast<int>(sizeof(Stage)) : most;
}

// Steps in order, each multiplied while those after it are on their way, one a stage. fill(stage, i) starts the loads of
// step i, use(stage, i) multiplies it. Ends with the block in step.
template <class Stages, int kStages, class Fill, class Use>
SADMOE_DEVICE void pipeline(Stages (&stages)[kStages], int steps, Fill fill, Use use) {
  static_assert(kStages >= 2, "one is multiplied, others are filled");
  for (int i = 1 - kStages; i < steps; ++i) {
    if (i >= 0) {
      wait_copies<kStages - 2>();
      sync_block();  // step i is here for all threads, and all are done with step i - 1
    }
    const int ahead = i + kStages - 1;
    if (ahead < steps) fill(stages[ahead % kStages], ahead);
    commit_copies();
    if (i >= 0) use(stages[i % kStages], i);
  }
  sync_block();
}

}  // namespace sadmoe::cuda
