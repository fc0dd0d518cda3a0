// Matrices turned over, in any code for x86-64, which has SSE2, and in plain C++ elsewhere.
#pragma once
#include <cstdint>

#include "cpu/ahead.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sadmoe::cpu {

constexpr int64_t kLineRows = kLine / int64_t(sizeof(float));  // whose entries are written while their line of `to` is at hand

// to[c, r] = from[r, c]   for 4 rows and 4 columns
inline void transpose_four(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
#if defined(__SSE2__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + ld_from), c = _mm_loadu_ps(from + 2 * ld_from),
         d = _mm_loadu_ps(from + 3 * ld_from);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + ld_to, b), _mm_storeu_ps(to + 2 * ld_to, c), _mm_storeu_ps(to + 3 * ld_to, d);
#else
  for (int c = 0; c < 4; ++c)
    for (int r = 0; r < 4; ++r) to[c * ld_to + r] = from[r * ld_from + c];
#endif
}

// to [columns, rows], leading dimension ld, = from [rows, columns] transposed, rows at most kLineRows. What comes next, so many
// bytes, is fetched meanwhile, in its order, as memory gives it fastest.
inline void transpose_rows(const float* from, int64_t rows, int64_t columns, float* to, int64_t ld, const void* next,
                           int64_t bytes) {
  const char* ahead = static_cast<const char*>(next);
  const char* const end = ahead + bytes;
  int64_t c = 0;
  for (; rows == kLineRows && c + 4 <= columns; c += 4) {
    for (int line = 0; line < 4 && ahead < end; ++line, ahead += kLine) __builtin_prefetch(ahead);
    for (int64_t r = 0; r < rows; r += 4) transpose_four(from + r * columns + c, columns, to + c * ld + r, ld);
  }
  for (; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * ld + r] = from[r * columns + c];
}

}  // namespace sadmoe::cpu
