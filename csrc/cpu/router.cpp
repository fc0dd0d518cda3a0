#include "cpu/router.h"

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/tiled.h"
#include "cpu/transpose.h"

namespace sadmoe::cpu {
namespace {

bool in_bf16(View x, const Router& router) { return x.dtype == DType::bf16 && router.v1.dtype == DType::bf16; }

// hidden [T, r] = relu(x v1ᵀ), units [begin, end), of x in float32, or in bf16 for such a unit.
void route_hidden(View x, const Router& router, const RouterShape& s, int64_t begin, int64_t end, float* hidden) {
  const Kernels& k = kernels();
  if (k.tiles && in_bf16(x, router)) {
    tiled_hidden(static_cast<const bf16*>(x.data), static_cast<const bf16*>(router.v1.data), s, begin, end, hidden);
  } else {
    const auto project = in_bf16(x, router) ? k.halves->project : k.project[int(router.v1.dtype)];
    project({s.T, end - begin, s.d, s.r, x.data, nullptr, at(router.v1, begin * s.d).data, hidden + begin});
  }
  k.activate({s.T, end - begin, s.r, hidden + begin, nullptr, nullptr, nullptr, Activation::relu});
}

// to [columns, rows], leading dimension ld, = from [rows, columns] transposed, as float32.
void transpose(View from, int64_t rows, int64_t columns, float* to, int64_t ld) {
  const Floats wide(from.dtype == DType::f32 ? 0 : kLineRows * columns);
  for (int64_t r = 0; r < rows; r += kLineRows) {
    const int64_t n = std::min(kLineRows, rows - r), then = std::min(kLineRows, rows - r - n);
    const View some = at(from, r * columns), next = at(some, n * columns);
    if (from.dtype != DType::f32) kernels().widen[int(from.dtype)](some.data, wide.get(), n * columns);
    transpose_rows(from.dtype == DType::f32 ? static_cast<const float*>(some.data) : wide.get(), n, columns, to + r, ld,
                   next.data, then * columns * size_of(from.dtype));
  }
}

// scores [T, E] = |hidden v2ᵀ|, experts [begin, end). r is small: dot products would spend as long on ending their sums as on
// the products, so v2 is turned, into scratch `turned` [r, apart(E)], and its rows are accumulated.
void route_scores(const float* hidden, const Router& router, const RouterShape& s, int64_t begin, int64_t end, float* turned,
                  float* scores) {
  const Kernels& k = kernels();
  const int64_t ld = apart(s.E);
  transpose(at(router.v2, begin * s.r), end - begin, s.r, turned + begin, ld);
  for (int64_t t = 0; t < s.T; ++t) std::fill(scores + t * s.E + begin, scores + t * s.E + end, 0.0f);
  for (int64_t e = begin; e < end; e += k.strip)
    k.accumulate[int(DType::f32)]({s.T, s.r, std::min(k.strip, end - e), s.r, ld, s.E, hidden, nullptr, turned + e, scores + e});
  k.activate({s.T, end - begin, s.E, scores + begin, nullptr, nullptr, nullptr, Activation::abs});
}

}  // namespace

void route(View x, const Router& router, const RouterShape& s, float* scores, const Threads& threads) {
  if (s.r == 0) return void(std::fill(scores, scores + s.T * s.E, 0.0f));
  // Units that multiply bf16 take x as it is: but for denormals the products are as exact, and their sums float32.
  const bool as_it_is = in_bf16(x, router) && kernels().halves;
  const AsFloat wide(as_it_is ? View{} : x, s.T * s.d);
  const View rows = as_it_is ? x : View{wide.get(), DType::f32};
  const Floats hidden(s.T * s.r);
  in_sixteens(s.r, 2, threads, [&](int64_t u0, int64_t u1) { route_hidden(rows, router, s, u0, u1, hidden.get()); });
  const Floats turned(s.r * apart(s.E));
  threads.parallel_for(s.E, 32,
                       [&](int64_t e0, int64_t e1) { route_scores(hidden.get(), router, s, e0, e1, turned.get(), scores); });
}

}  // namespace sadmoe::cpu
