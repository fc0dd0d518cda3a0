#include "cpu/block.h"

#include <algorithm>

#include "cpu/ahead.h"
#include "cpu/block_plan.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kFewRows = 32;    // of an expert, on average: below it the time is spent fetching weights
constexpr int64_t kSums = 1 << 16;  // sums of y that near caches hold, beside weights that are used once
// Neurons that three rows and more take at once on the way out: with their columns they stay in the first-level cache.
int64_t neurons_a_turn() { return near_cache() >= 48 * 1024 ? 32 : 16; }
// Experts of a token that are summed in one chain: in one of hundreds, rounding errs more than in torch's product.
constexpr int64_t kChain = 16;
// Experts are summed in two halves, by their number, so that two threads may have one each, where an expert has fewer rows than
// this on average: rows of weights in memory of which each thread reads a half take up to 1.9 times as long. Of more rows, the
// halves' sums take as long to put together as is gained.
constexpr int64_t kRowsOfHalves = 8;
int64_t second_half(int64_t E) { return (E + 1) / 2; }  // its first expert

// Rows of activations in 16 bits, for weights in int8.
class IntRows {
 public:
  IntRows() = default;
  IntRows(int64_t n, int64_t d, int64_t ld) : d_(d), ld_(ld), rows_(n * ld), steps_(n) {}

  void quantize(int64_t first, int64_t n, const float* x) {
    kernels().quantize({n, d_, ld_, x, rows_.get() + first * ld_, steps_.get() + first});
  }
  const int16_t* row(int64_t i) const { return rows_.get() + i * ld_; }
  const float* steps() const { return steps_.get(); }

 private:
  int64_t d_ = 0, ld_ = 0;
  Buffer<int16_t> rows_;
  Floats steps_;
};

// What rows of activations are, as the experts' kernels take them: float32, whole numbers for weights in int8, or bf16.
enum class Form { floats, ints, halves };

Form form_of(const Experts& p, const Kernels& k) {
  if (p.w_up.dtype == DType::i8) return Form::ints;
  return k.halves && p.w_up.dtype == DType::bf16 && !(p.packed && p.shape.d % 2) ? Form::halves : Form::floats;
}

auto project_of(const Experts& p, const Kernels& k, Form form) {
  if (form == Form::halves) return p.packed ? k.halves->project_packed : k.halves->project;
  return p.packed ? k.project_packed[int(p.w_up.dtype)] : k.project[int(p.w_up.dtype)];
}

// The tokens of which each active expert ends a chain. Chains begin anew with each half of the experts.
class ChainEnds {
 public:
  ChainEnds() = default;
  ChainEnds(const BlockPlan& plan, int64_t T, int64_t E) : T_(T), experts_(2 * T) {
    offsets_.reserve(plan.active.size());
    for (const int32_t e : plan.active) {
      int32_t* experts = experts_.data() + (e < second_half(E) ? 0 : T);
      for (const int32_t* t = plan.rows_of(e); t != plan.rows_of(e + 1); ++t)
        if (const int64_t n = ++experts[*t]; n % kChain == 0) ends_.push_back({*t, n == kChain});
      offsets_.push_back(ends_.size());
    }
  }

  bool any() const { return !ends_.empty(); }
  bool any_of(int half, int64_t t) const { return any() && experts_[half * T_ + t] >= kChain; }
  // body(token, whether it is the token's first end), for those of the active expert a
  template <class Body>
  void for_each(size_t a, const Body& body) const {
    if (!any()) return;
    for (size_t i = a > 0 ? offsets_[a - 1] : 0; i < offsets_[a]; ++i) body(ends_[i].token, ends_[i].is_first);
  }

 private:
  struct End {
    int32_t token;
    bool is_first;
  };
  int64_t T_ = 0;
  std::vector<End> ends_;
  std::vector<size_t> offsets_;   // in ends_, after each active expert
  std::vector<int32_t> experts_;  // [half, token]
};

// The tokens of one block with everything they need on the way from x to y. A part of the work (neurons of active
// experts, columns of y) is a range, so that one thread may do it all, or several threads share it.
class Block {
 public:
  Block(const Experts& experts, int64_t begin, int64_t end, const bool* mask, const AsFloat& b_out, const AsFloat& scale_out)
      : p_(experts),
        s_(experts.shape),
        k_(kernels()),
        T_(end - begin),
        form_(form_of(experts, k_)),
        project_(project_of(p_, k_, form_)),
        accumulate_(form_ == Form::halves ? k_.halves->accumulate : k_.accumulate[int(p_.w_down.dtype)]),
        x_as_it_is_(at(experts.x, begin * s_.d)),
        x_(form_ == Form::halves ? View{} : x_as_it_is_, T_ * s_.d),
        b_out_(b_out),
        scale_out_(scale_out),
        bias_(of_neurons(p_.b_up)),
        gate_bias_(of_neurons(p_.b_gate)),
        scale_(of_neurons(p_.scale_up)),
        gate_scale_(of_neurons(p_.scale_gate)),
        out_scale_(of_neurons(p_.scale_down)),
        y_(static_cast<char*>(experts.y) + begin * s_.d_out * size_of(experts.x.dtype)),
        ld_h_(form_ == Form::floats ? s_.s : (s_.s + 1) / 2 * 2) {
    plan_.build(mask, T_, s_.E);
    for (AsFloat* some : {&bias_, &gate_bias_, &scale_, &gate_scale_, &out_scale_})
      for (const int64_t e : plan_.active) some->widen(e * s_.s, s_.s);
    if (form_ == Form::floats && p_.x.dtype == DType::f32)
      chain_ends_ = ChainEnds(plan_, T_, s_.E);  // others round more coarsely
    switch (form_) {
      case Form::floats:
        h_ = Floats(plan_.pairs() * s_.s);
        break;
      case Form::ints:
        int_x_ = IntRows(T_, s_.d, s_.d), int_h_ = IntRows(plan_.pairs(), s_.s, ld_h_);
        int_x_.quantize(0, T_, x_.get());
        break;
      case Form::halves:
        half_h_ = Buffer<bf16>(plan_.pairs() * ld_h_);
    }
  }

  // What up may be given a part of: neurons, whole vectors of packed ones, or where the activations of an expert are quantized
  // together, experts.
  int64_t neurons_together() const {
    constexpr int64_t kVectors = 32;
    if (form_ == Form::ints) return s_.s;
    return p_.packed && s_.s % kVectors == 0 ? kVectors : 1;
  }
  int64_t active_neurons() const { return static_cast<int64_t>(plan_.active.size()) * s_.s; }

  // Hidden activations of the neurons [begin, end) of the active experts, put in a row.
  void up(int64_t begin, int64_t end) {
    int64_t most = 0;
    for (int64_t a = begin / s_.s; a * s_.s < end; ++a) most = std::max(most, plan_.count(plan_.active[a]));
    const Floats h(form_ == Form::floats ? 0 : most * s_.s), gate(p_.w_gate ? most * s_.s : 0);
    const bool all = begin == 0 && end == active_neurons();  // then the way out begins with the first expert's weights
    for (int64_t n0 = begin; n0 < end;) {
      const int64_t a = n0 / s_.s, n1 = std::min(end, (a + 1) * s_.s);
      const void* next = n1 < end ? neuron(p_.w_up, plan_.active[n1 / s_.s] * s_.s)
                         : all    ? at(p_.w_down, plan_.active[0] * s_.s * s_.d_out).data
                                  : nullptr;
      up_expert(plan_.active[a], n0 - a * s_.s, n1 - a * s_.s, next, h.get(), gate.get());
      n0 = n1;
    }
  }

  // y, by all threads: each has columns, of all experts or of a half of them.
  void down(const Threads& threads) {
    constexpr int64_t kLeast = 4;  // sixteens of columns
    const int64_t strip = columns_together();
    if (threads.count == 1 || mean_rows() >= kRowsOfHalves)
      return in_sixteens(s_.d_out, kLeast, threads, [&](int64_t begin, int64_t end) {
        const int64_t ld = std::min(end - begin, strip);
        const Floats sums(2 * T_ * ld);
        for (int64_t c = begin; c < end; c += strip) {
          const int64_t columns = std::min(strip, end - c);
          for (const int half : {0, 1}) sum_half(half, c, columns, sums.get() + half * T_ * ld, ld, half == 0);
          finish(c, columns, sums.get(), ld);
        }
      });
    const int64_t ld = apart(s_.d_out), sixteens = (s_.d_out + 15) / 16;
    const Floats sums(2 * T_ * ld);
    threads.parallel_for(2 * sixteens, kLeast, [&](int64_t i, int64_t end) {
      for (int64_t then; i < end; i = then) {
        const int half = i >= sixteens;
        then = half ? end : std::min(end, sixteens);
        const int64_t first = half * sixteens, stop = std::min(16 * (then - first), s_.d_out);
        for (int64_t c = 16 * (i - first); c < stop; c += strip)
          sum_half(half, c, std::min(strip, stop - c), sums.get() + half * T_ * ld + c, ld, false);
      }
    });
    in_sixteens(s_.d_out, 4 * kLeast, threads,
                [&](int64_t begin, int64_t end) { finish(begin, end - begin, sums.get() + begin, ld); });
  }

 private:
  // y = y scale + bias, if there is one
  static void scale(int64_t columns, const float* __restrict by, const float* __restrict bias, float* __restrict y) {
    for (int64_t c = 0; c < columns; ++c) y[c] *= by[c];
    if (!bias) return;
    for (int64_t c = 0; c < columns; ++c) y[c] += bias[c];
  }

  // The columns from c on, over a half of the experts, in ascending order: sums [T, columns], leading dimension ld. They stand
  // side by side: in y, rows a power of two apart would have a few sets of the near caches to share. goes_on: into the other
  // half.
  void sum_half(int half, int64_t c, int64_t columns, float* sums, int64_t ld, bool goes_on) {
    const auto& active = plan_.active;
    const auto first_of = [&](int64_t e) { return std::lower_bound(active.begin(), active.end(), e) - active.begin(); };
    const int64_t middle = first_of(second_half(s_.E)), all = static_cast<int64_t>(active.size());
    const int64_t begin = half ? middle : 0, end = half ? all : middle, last = goes_on ? all : end;
    const float* begins_with = half || scale_out_.get() ? nullptr : b_out_.get();
    for (int64_t t = 0; t < T_; ++t) {
      float* row = sums + t * ld;
      begins_with ? std::copy_n(begins_with + c, columns, row) : std::fill_n(row, columns, 0.0f);
    }
    const Floats before(chain_ends_.any() ? T_ * columns : 0),
        partial(form_ == Form::floats && columns > k_.strip ? T_ * columns : 0);
    const auto end_chain = [&](int64_t t, bool is_first) {
      float *sum = sums + t * ld, *total = before.get() + t * columns;
      if (is_first)  // nothing is there yet
        std::copy_n(sum, columns, total);
      else
        k_.add(sum, total, columns);
      std::fill_n(sum, columns, 0.0f);
    };
    const auto weights = [&](int64_t e) { return at(p_.w_down, e * s_.s * s_.d_out + c).data; };
    for (int64_t a = begin; a < end; ++a) {
      const int64_t e = active[a], first = plan_.offsets[e];
      const void* next = a + 1 < last ? weights(active[a + 1]) : nullptr;
      accumulate_({plan_.count(e), s_.s, columns, ld_h_, s_.d_out, ld, hidden(first), plan_.rows_of(e), weights(e), sums,
                   partial.get(), next, form_ == Form::ints ? int_h_.steps() + first : nullptr, neurons_a_turn(), mean_rows()});
      chain_ends_.for_each(a, end_chain);
    }
    for (int64_t t = 0; t < T_; ++t)
      if (chain_ends_.any_of(half, t)) k_.add(before.get() + t * columns, sums + t * ld, columns);
  }

  // The columns from c on of y, of the halves' sums [2, T, columns], leading dimension ld.
  void finish(int64_t c, int64_t columns, float* sums, int64_t ld) {
    for (int64_t t = 0; t < T_; ++t) {
      float *first = sums + t * ld, *second = first + T_ * ld;
      void* out = y_ + (t * s_.d_out + c) * size_of(p_.x.dtype);
      if (!scale_out_.get()) {
        k_.narrow_sum[int(p_.x.dtype)](first, second, out, columns);
        continue;
      }
      k_.add(second, first, columns);
      scale(columns, scale_out_.from(c), b_out_.from(c), first);
      k_.narrow[int(p_.x.dtype)](first, out, columns);
    }
  }

  int64_t mean_rows() const { return plan_.pairs() / std::max<int64_t>(plan_.active.size(), 1); }
  bool few_rows() const { return mean_rows() < kFewRows; }

  // Of y. With many rows an expert, so few that their sums stay near; else whole rows of the weights, as memory gives them
  // fastest.
  int64_t columns_together() const {
    const int64_t strip = form_ == Form::floats ? k_.strip : k_.pair_strip;
    return few_rows() ? std::max(kSums / T_ / strip * strip, strip) : strip;
  }

  // The weights of a neuron, of all.
  const void* neuron(View w, int64_t j) const { return at(w, p_.packed ? j / s_.s * s_.s * s_.d + j % s_.s : j * s_.d).data; }

  // Hidden activations of neurons [j0, j1) of expert e: in floats straight into h_, else into scratch h [count, s], whence they
  // are rounded into int_h_ or half_h_. gate: scratch of the same shape. next: the weights that come then.
  void up_expert(int64_t e, int64_t j0, int64_t j1, const void* next, float* h, float* gate) {
    const int64_t n = plan_.count(e), m = j1 - j0, first = e * s_.s + j0, at_h = plan_.offsets[e];
    h = form_ == Form::floats ? h_.get() + at_h * s_.s + j0 : h + j0;
    gate = p_.w_gate ? gate + j0 : nullptr;
    const auto project = [&](View w, float* out, const void* then) {
      project_({n, m, s_.d, s_.s, x_rows(), plan_.rows_of(e), neuron(w, first), out, int_x_.steps(), then, s_.s});
    };
    for (const AsFloat* some : {&bias_, &gate_bias_, &scale_, &gate_scale_, &out_scale_}) fetch(some->from(first), m);
    project(p_.w_up, h, gate ? neuron(p_.w_gate, first) : next);
    if (gate) project(p_.w_gate, gate, next);
    k_.activate({n, m, s_.s, h, bias_.from(first), gate, gate_bias_.from(first), p_.act, scale_.from(first),
                 gate_scale_.from(first), out_scale_.from(first)});
    if (form_ == Form::ints) int_h_.quantize(at_h, n, h);
    if (form_ != Form::halves) return;
    bf16* rows = half_h_.get() + at_h * ld_h_;
    if (m == ld_h_) return k_.narrow[int(DType::bf16)](h, rows, n * m);  // they stand without gaps
    for (int64_t i = 0; i < n; ++i) {
      bf16* row = rows + i * ld_h_;
      k_.narrow[int(DType::bf16)](h + i * s_.s, row + j0, m);
      if (j1 < ld_h_ && j1 == s_.s) row[j1] = {0};
    }
  }

  // Into the caches, while products are summed: of one row they take little longer than memory does for a line.
  static void fetch(const float* from, int64_t n) {
    constexpr int64_t kFloats = kLine / sizeof(float);
    for (int64_t i = 0; from && i < n + kFloats; i += kFloats) __builtin_prefetch(from + std::min(i, n - 1));
  }

  AsFloat of_neurons(View v) const { return AsFloat::in_parts(v, s_.E * s_.s); }

  const void* x_rows() const {
    return form_ == Form::floats ? x_.get() : form_ == Form::ints ? static_cast<const void*>(int_x_.row(0)) : x_as_it_is_.data;
  }
  const void* hidden(int64_t row) const {
    if (form_ == Form::floats) return h_.get() + row * ld_h_;
    return form_ == Form::ints ? static_cast<const void*>(int_h_.row(row)) : half_h_.get() + row * ld_h_;
  }

  const Experts& p_;
  const ExpertsShape& s_;
  const Kernels& k_;
  int64_t T_;
  Form form_;
  void (*project_)(const Project&);
  void (*accumulate_)(const Accumulate&);
  View x_as_it_is_;
  AsFloat x_;
  const AsFloat &b_out_, &scale_out_;
  AsFloat bias_, gate_bias_, scale_, gate_scale_, out_scale_;  // of the neurons of active experts
  char* y_;
  int64_t ld_h_;
  BlockPlan plan_;
  ChainEnds chain_ends_;
  Floats h_;  // of the one that form_ says
  IntRows int_x_, int_h_;
  Buffer<bf16> half_h_;
};

}  // namespace

void run_block(const Experts& experts, const bool* mask, int64_t begin, int64_t end, const AsFloat& b_out,
               const AsFloat& scale_out, const Threads& threads) {
  Block block(experts, begin, end, mask, b_out, scale_out);
  const int64_t unit = block.neurons_together();
  threads.parallel_for(block.active_neurons() / unit, (16 + unit - 1) / unit,
                       [&](int64_t n0, int64_t n1) { block.up(n0 * unit, n1 * unit); });
  block.down(threads);
}

}  // namespace sadmoe::cpu
