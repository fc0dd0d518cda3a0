// NEON: any Arm processor of 64 bits.
#include <arm_neon.h>

#include "cpu/table.h"

namespace sadmoe::cpu {
namespace {

// Four floats.
struct Vec {
  using Entry = float;
  using Sum = Vec;
  static constexpr int width = 4, sums = 4;
  static constexpr int project_rows = 5, project_columns = 4;     // 20 sums, 5 rows, 1 weight: 26 of 32 registers
  static constexpr int accumulate_rows = 5, accumulate_vecs = 4;  // 20 sums, 4 weights, up to 5 activations
  static constexpr int copied = 8192, held_neurons = 0;
  static constexpr bool always_copied = true;
  static constexpr int fetched = kSecondLevel;
  static constexpr int64_t foreseen = kNever;

  float32x4_t v;

  static float32x4_t widen(uint16x4_t bits, bf16) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
  static float32x4_t widen(uint16x4_t bits, f16) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
  static uint16x4_t narrow(float32x4_t v, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
  static uint16x4_t narrow(float32x4_t v,
                           bf16) {  // add half of the last kept bit, and one less where that is even; NaN stays NaN
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
  }

  static Vec zero() { return {vdupq_n_f32(0)}; }
  static Vec set(float a) { return {vdupq_n_f32(a)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_part(const float* p, int64_t n) {
    float32x4_t v = vdupq_n_f32(0);
    if (n > 0) v = vld1q_lane_f32(p, v, 0);
    if (n > 1) v = vld1q_lane_f32(p + 1, v, 1);
    if (n > 2) v = vld1q_lane_f32(p + 2, v, 2);
    return {v};
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_part(float* p, int64_t n) const {
    if (n > 0) vst1q_lane_f32(p, v, 0);
    if (n > 1) vst1q_lane_f32(p + 1, v, 1);
    if (n > 2) vst1q_lane_f32(p + 2, v, 2);
  }
  template <class H>
  static Vec load(const H* p) {
    return {widen(vld1_u16(&p->bits), H{})};
  }
  template <class H>
  static Vec load_part(const H* p, int64_t n) {
    uint16x4_t bits = vdup_n_u16(0);
    if (n > 0) bits = vld1_lane_u16(&p->bits, bits, 0);
    if (n > 1) bits = vld1_lane_u16(&p[1].bits, bits, 1);
    if (n > 2) bits = vld1_lane_u16(&p[2].bits, bits, 2);
    return {widen(bits, H{})};
  }
  template <class H>
  void store(H* p) const {
    vst1_u16(&p->bits, narrow(v, H{}));
  }
  template <class H>
  void store_part(H* p, int64_t n) const {
    H full[width];
    store(full);
    for (int64_t i = 0; i < n; ++i) p[i] = full[i];
  }
  void round_to(int16_t* p) const { vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(v))); }

  static Vec reduce(const Vec* a) { return {vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v))}; }

  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  friend void hold(Vec& a) { asm("" : "+w"(a.v)); }
  friend Vec max(Vec a, Vec b) { return where_less(b, a, a, b); }
  friend Vec min(Vec a, Vec b) { return where_less(a, b, a, b); }
  friend Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
  friend Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
  friend Vec scale2(Vec a, Vec n) {
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127)), 23);
    return {vmulq_f32(a.v, vreinterpretq_f32_s32(power))};
  }
  friend Vec where_less(Vec a, Vec b, Vec x, Vec y) { return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)}; }
};

// Eight integers of 16 bits; their products are summed in four of 32.
struct Ints {
  struct Sum {
    int32x4_t v;
    static Sum zero() { return {vdupq_n_s32(0)}; }
  };
  using Entry = int16_t;
  using Weight = int8_t;
  static constexpr int width = 8, sums = 4;
  static constexpr int project_rows = 3, project_columns = 4;
  static constexpr int accumulate_rows = 4, accumulate_groups = 1;
  static constexpr int copied = 8192, held_neurons = 0;
  static constexpr int fetched = Vec::fetched;

  int16x8_t v;

  static void zip(int8x8_t a, int8x8_t b, Ints* out) {
    const int8x8x2_t pairs = vzip_s8(a, b);
    out[0].v = vmovl_s8(pairs.val[0]), out[1].v = vmovl_s8(pairs.val[1]);
  }
  // The first n and zeros.
  template <class I>
  static Ints load_part(const I* p, int64_t n) {
    int16_t full[width] = {};
    for (int64_t i = 0; i < n; ++i) full[i] = p[i];
    return load(full);
  }
  static Ints load(const int16_t* p) { return {vld1q_s16(p)}; }
  static Ints load(const int8_t* p) { return {vmovl_s8(vld1_s8(p))}; }
  void store(int16_t* p) const { vst1q_s16(p, v); }
  static void load_pairs(const int8_t* a, const int8_t* b, Ints* out) { zip(vld1_s8(a), vld1_s8(b), out); }
  static void load_pairs_part(const int8_t* a, const int8_t* b, int64_t n, Ints* out) {
    zip(vmovn_s16(load_part(a, n).v), vmovn_s16(load_part(b, n).v), out);
  }
  static Ints set_pair(const int16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {vreinterpretq_s16_s32(vdupq_n_s32(pair))};
  }

  static Vec reduce(const Sum* a) { return {vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(a[0].v, a[1].v), vpaddq_s32(a[2].v, a[3].v)))}; }
  static void to_floats(const Sum* sums, Vec* out) {
    for (int half = 0; half < 2; ++half) out[half].v = vcvtq_f32_s32(sums[half].v);
  }

  friend Sum fma(Ints a, Ints b, Sum sum) {
    const int32x4_t low = vmull_s16(vget_low_s16(a.v), vget_low_s16(b.v)), high = vmull_high_s16(a.v, b.v);
    return {vaddq_s32(sum.v, vpaddq_s32(low, high))};
  }
};

}  // namespace

const Kernels& kernels_neon() {
  static constexpr Kernels kTable = table<Vec, Ints>("neon");
  return kTable;
}

}  // namespace sadmoe::cpu
