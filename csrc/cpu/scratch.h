// Memory that a call works in, and float32 views of what has another dtype.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "contract.h"
#include "cpu/isa.h"

namespace sadmoe::cpu {

// Uninitialised, and on a line of the cache: vectors that lie across two take twice as long.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n = 0) : data_(static_cast<T*>(::operator new(n * sizeof(T), kLine))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T, Delete> data_;
};
using Floats = Buffer<float>;

// A vector of n values as float32: itself, or widened into scratch.
class AsFloat {
 public:
  AsFloat(View view, int64_t n) {
    if (!view || view.dtype == DType::f32) {
      data_ = static_cast<const float*>(view.data);
    } else {
      scratch_.resize(n);
      kernels().widen[int(view.dtype)](view.data, scratch_.data(), n);
      data_ = scratch_.data();
    }
  }
  const float* get() const { return data_; }
  const float* from(int64_t i) const { return data_ ? data_ + i : nullptr; }

 private:
  const float* data_;
  std::vector<float> scratch_;
};

}  // namespace sadmoe::cpu
