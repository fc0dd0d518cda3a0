// Rows of 16-bit floats as float32, and back. One template for every instruction set; no intrinsics here.
#pragma once
#include <cstdint>

namespace sadmoe::cpu {

template <class Vec, class W>
void widen(const void* from, float* to, int64_t n) {
  const W* source = static_cast<const W*>(from);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) Vec::load(source + i).store(to + i);
  if (i < n) Vec::load_part(source + i, n - i).store_part(to + i, n - i);
}

template <class Vec, class W>
void narrow(const float* from, void* to, int64_t n) {
  W* target = static_cast<W*>(to);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) Vec::load(from + i).store(target + i);
  if (i < n) Vec::load_part(from + i, n - i).store_part(target + i, n - i);
}

}  // namespace sadmoe::cpu
