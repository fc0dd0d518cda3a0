// The kernels of one instruction set, from its Vec. Included by the ISA files alone.
//
// Vec is `width` floats in a register, in an anonymous namespace so that no function of one ISA is linked into another:
//   load, load_part(p, n)     from float, bf16 and f16, widened; n < width, the other lanes 0
//   store, store_part         to float, bf16 and f16
//   max, min                  the second argument where either is NaN
//   where_less(a, b, x, y)    x where a < b, else y
//   scale2(v, n)              v 2^n for whole n
//   round_to(int16_t*)        to nearest even
//   reduce(v[sums])           lane i is the sum of v[i], by one fixed tree
//   project_rows, project_columns, accumulate_rows, accumulate_vecs: register tiles
//   copied                    floats of weights that are copied for many rows to read, see accumulate.h; 0: none
//   always_copied             whether that gains for float32 as well in wide strips of columns, and of few neurons
//   held, held_neurons        registers for the weights of few neurons, see held.h, and how many neurons these are at most, a
//                             multiple of four: of more, tiles of rows are as fast
//   fetched                   the cache that what comes next is fetched into, see ahead.h
//   foreseen                  bytes: longer neurons of float32 are left to the processor to fetch where a row is alone; or kNever
//   hold(v)                   keeps v in a register, lest its load be folded into every use
// Ints is `width` integers of 16 bits, Ints::Sum half as many of 32, as many as floats in a Vec. Pairs, of instruction sets that
// multiply bf16, is `width` bf16, Pairs::Sum a Vec. Both are for the templates of pairs; Weight is int8_t or bf16:
//   load, load_part(p, n)     from Entry, and from Weight, widened
//   load_pairs(a, b, v[2])    a[i], b[i] beside each other for i < width, in an order that to_floats ends; _part(a, b, n, v)
//   set_pair(p)               p[0], p[1] everywhere
//   fma(a, b, sum)            sum + the products of each two neighbours
//   reduce(sum[sums])         a Vec whose lane i is the sum of sum[i]
//   to_floats(sum[2], v[2])   the sums of width columns in their order
//   put_in_order(v[2])        the same of such pairs; to_floats(sum): what they sum up to. Where weights of pairs are held
//   project_rows, project_columns, accumulate_rows, accumulate_groups (of width columns), copied (entries of 16 bits), held,
//   held_neurons
// For all, Entry is what a row in memory is made of, Sum what products are summed in, and sums how many lanes that has.
#pragma once
#include "cpu/accumulate.h"
#include "cpu/activate.h"
#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"
#include "cpu/project.h"
#include "cpu/quantize.h"
#include "cpu/widen.h"
#include "plan.h"

namespace sadmoe::cpu {

template <class Vec>
void select(const Select& p) {
  Vec most = Vec::zero();
  int64_t i = 0;
  for (; i + Vec::width <= p.n; i += Vec::width) most = max(Vec::load(p.scores + i), most);
  if (i < p.n) most = max(Vec::load_part(p.scores + i, p.n - i), most);
  float lanes[Vec::width], best = 0;
  most.store(lanes);
  for (const float lane : lanes) best = larger(lane, best);
  const float threshold = threshold_of(best, p.tau);
  for (int64_t e = 0; e < p.n; ++e) p.mask[e] = reaches(p.scores[e], threshold);
}

// to = a + b
template <class Vec, class H>
void narrow_sum(const float* a, const float* b, void* to, int64_t n) {
  H* out = static_cast<H*>(to);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) (Vec::load(a + i) + Vec::load(b + i)).store(out + i);
  if (i < n) (Vec::load_part(a + i, n - i) + Vec::load_part(b + i, n - i)).store_part(out + i, n - i);
}

template <class Vec>
void add(const float* from, float* to, int64_t n) {
  narrow_sum<Vec, float>(to, from, to, n);
}

// Whole tiles of columns of y.
template <class Vec>
constexpr int64_t kStripOf = kStrip / (Vec::accumulate_vecs * Vec::width) * (Vec::accumulate_vecs * Vec::width);
template <class Pair>
constexpr int64_t kPairStrip = kStrip / (Pair::accumulate_groups * Pair::width) * (Pair::accumulate_groups * Pair::width);

template <class Vec, class Ints>
constexpr Kernels table(const char* isa) {
  static_assert(kStripOf<Vec> > 0 && kPairStrip<Ints> > 0);
  return {isa,
          kStripOf<Vec>,
          kPairStrip<Ints>,
          quantize<Vec>,
          {project<Vec, float>, project<Vec, bf16>, project<Vec, f16>, project<Ints, int8_t>},
          {project_packed<Vec, PackedFloats<Vec, float>>, project_packed<Vec, PackedFloats<Vec, bf16>>,
           project_packed<Vec, PackedFloats<Vec, f16>>},
          {accumulate<Vec, float>, accumulate<Vec, bf16>, accumulate<Vec, f16>, accumulate_pairs<Ints, Vec>},
          activate<Vec>,
          select<Vec>,
          {widen<Vec, float>, widen<Vec, bf16>, widen<Vec, f16>},
          {narrow<Vec, float>, narrow<Vec, bf16>, narrow<Vec, f16>},
          {narrow_sum<Vec, float>, narrow_sum<Vec, bf16>, narrow_sum<Vec, f16>},
          add<Vec>};
}

}  // namespace sadmoe::cpu
