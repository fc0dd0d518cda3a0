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

// A stage of an operand in shared memory. kPad keeps the accesses of a warp in different banks, and rows on 16 bytes; rows of
// 64 bytes need none: of row r, the 16 bytes c are at place c ^ r / 2 % 4, and only offsets find an element.
template <class T, int kRowsOf, int kColumnsOf, int kPad>
struct Stage {
  static constexpr int rows = kRowsOf, columns = kColumnsOf;
  alignas(16) T at[kRowsOf][kColumnsOf + kPad];

  // Bytes to an element, and what lies so many bytes on: threads find the former once. Offsets to multiples of 8 rows add up.
  SADMOE_DEVICE static int offset(int r, int c) {
    constexpr int kBytes = sizeof(T);
    static_assert(kPad || kColumnsOf * kBytes == 64, "rows in different banks");
    const int place = kPad ? c * kBytes : (c * kBytes) ^ (r / 2 % 4 * 16);
    return r * (kColumnsOf + kPad) * kBytes + place;
  }
  SADMOE_DEVICE T* from(int offset) { return reinterpret_cast<T*>(reinterpret_cast<char*>(at) + offset); }
  SADMOE_DEVICE const T* from(int offset) const { return reinterpret_cast<const T*>(reinterpret_cast<const char*>(at) + offset); }
};

// The way of a matrix into stages of one kind. Of the first of them, row r begins at element begin(r) of the matrix, and the
// others begin further on. `rows` and `columns` say how much of a stage there is; the rest is zeros.
template <class T, int kThreads, class Stage, class Begin>
class Source {
 public:
  static constexpr int kWide = 16 / sizeof(T);

  SADMOE_DEVICE Source(const Matrix& matrix, Begin begin)
      : matrix_(matrix), begin_(begin), to_(kept(Stage::offset(row(0), column()))) {
    SADMOE_UNROLL
    for (int i = 0; i < kCopies; ++i) from_[i] = kept(static_cast<const T*>(matrix.data) + begin(row(i)) + column());
  }

  // Whether it can be copied.
  SADMOE_DEVICE bool wide() const { return matrix_.wide && (kHalf || matrix_.dtype == DType::f32); }
  // In the background, by 16 bytes, `on` times 16 further: what a thread copies is found once, and costs an addition a stage.
  // Columns are whole copies. From row `used` on there may be anything.
  SADMOE_DEVICE void copy(Stage& to, unsigned on, int rows, int columns, int used = Stage::rows) const {
    const bool whole = column() < columns;
    SADMOE_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      if (i && i * kEvery >= used) break;
      if (kWhole || row(i) < Stage::rows)
        copy16_async(to.from(to_ + Stage::offset(i * kEvery, 0)), from_[i] + int64_t{on} * kWide, whole && row(i) < rows);
    }
  }
  // Element by element, of any dtype, `on` elements further.
  SADMOE_DEVICE void load(Stage& to, int64_t on, int rows, int columns) const {
    if constexpr (kHalf) return load<T>(to, on, rows, columns);
    switch (matrix_.dtype) {
      case DType::bf16:
        return load<bf16>(to, on, rows, columns);
      case DType::f16:
        return load<f16>(to, on, rows, columns);
      default:
        return load<float>(to, on, rows, columns);
    }
  }

 private:
  static constexpr bool kHalf = sizeof(T) == 2;  // operands of 16 bits are all of one dtype; float stages take any
  static constexpr int kOfRow = Stage::columns / kWide, kEvery = kThreads / kOfRow;
  static constexpr int kCopies = (Stage::rows + kEvery - 1) / kEvery;
  static constexpr bool kWhole = Stage::rows % kEvery == 0;  // else some threads have a copy less
  static_assert(Stage::columns % kWide == 0 && kThreads % kOfRow == 0, "whole copies");

  SADMOE_DEVICE static int row(int i) { return thread_index() / kOfRow + i * kEvery; }
  SADMOE_DEVICE static int column() { return thread_index() % kOfRow * kWide; }

  template <class From>
  SADMOE_DEVICE void load(Stage& to, int64_t on, int rows, int columns) const {
    SADMOE_ROLLED
    for (int i = thread_index(); i < Stage::rows * Stage::columns; i += kThreads) {
      const int r = i / Stage::columns, c = i % Stage::columns;
      const bool there = r < rows && c < columns;
      from_float(there ? cuda::load<From>(matrix_.data, begin_(r) + on + c) : 0.0f, *to.from(Stage::offset(r, c)));
    }
  }

  const Matrix& matrix_;
  Begin begin_;
  int to_;
  const T* from_[kCopies];
};

template <class T, int kThreads, class Stage, class Begin>
SADMOE_DEVICE Source<T, kThreads, Stage, Begin> source(const Matrix& matrix, Begin begin) {
  return {matrix, begin};
}

// As many stages as fit `bytes`, at most `most`.
template <class Stage>
constexpr int stages_in(int bytes, int most) {
  return bytes / static_cast<int>(sizeof(Stage)) < most ? bytes / static_cast<int>(sizeof(Stage)) : most;
}

// Steps in order, each multiplied while those after it are on their way, one a stage. fill(stage) starts the loads of the
// next step, use(stage) multiplies the one after the last. Ends with the block in step.
template <class Stages, int kStages, class Fill, class Use>
SADMOE_DEVICE void pipeline(Stages (&stages)[kStages], int steps, Fill fill, Use use) {
  static_assert(kStages >= 2, "one is multiplied, others are filled");
  SADMOE_ROLLED
  for (int i = 1 - kStages, at = 0; i < steps; ++i) {
    if (i >= 0) {
      wait_copies<kStages - 2>();
      sync_block();  // step i is here for all threads, and all are done with step i - 1
    }
    if (i + kStages - 1 < steps) fill(stages[at]);
    commit_copies();
    at = at + 1 < kStages ? at + 1 : 0;  // of step i: all others are filled
    if (i >= 0) use(stages[at]);
  }
  sync_block();
}

}  // namespace sadmoe::cuda
