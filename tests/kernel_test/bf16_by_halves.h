// VCVTNE2PS2BF16 as two conversions: Bochs 3.0 fills both halves of its result from the second operand. For on_bochs.sh alone.
#if defined(__AVX512BF16__)
#include <immintrin.h>

[[gnu::always_inline]] static inline __m512bh bf16_by_halves(__m512 high, __m512 low) {
  const __m256i halves[] = {(__m256i)_mm512_cvtneps_pbh(low), (__m256i)_mm512_cvtneps_pbh(high)};
  return (__m512bh)_mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
}
#define _mm512_cvtne2ps_pbh bf16_by_halves
#endif
