// Memory that a call works in, and float32 views of what has another dtype.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "contract.h"
#include "cpu/isa.h"

namespace sadmoe::cpu {

// Uninitialised, and on a line of the cache: vectors that lie across two take twice as long.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n = 0) : data_(n ? static_cast<T*>(::operator new(n * sizeof(T), kLine)) : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T, Delete> data_;
};
using Floats = Buffer<float>;

// Floats from row to row, for that many in each: an odd number of lines, for rows a power of two apart would have a few sets of
// the near caches to share.
inline int64_t apart(int64_t columns) {
  constexpr int64_t kLineFloats = 16;
  return ((columns + kLineFloats - 1) / kLineFloats | 1) * kLineFloats;
}

// A vector of n values as float32: itself, or widened into scratch.
class AsFloat {
 public:
  AsFloat(View view, int64_t n) : AsFloat(in_parts(view, n)) { widen(0, n); }
  // With nothing widened yet.
  static AsFloat in_parts(View view, int64_t n) { return {view, Floats(is_float(view) ? 0 : n)}; }

  void widen(int64_t i, int64_t n) {
    if (!is_float(view_)) kernels().widen[int(view_.dtype)](at(view_, i).data, scratch_.get() + i, n);
  }
  const float* get() const { return is_float(view_) ? static_cast<const float*>(view_.data) : scratch_.get(); }
  const float* from(int64_t i) const { return view_ ? get() + i : nullptr; }

 private:
  AsFloat(View view, Floats scratch) : view_(view), scratch_(std::move(scratch)) {}
  static bool is_float(View view) { return !view || view.dtype == DType::f32; }

  View view_;
  Floats scratch_;
};

}  // namespace sadmoe::cpu
