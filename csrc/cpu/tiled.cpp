#include "cpu/tiled.h"

#include <algorithm>

#include "cpu/ahead.h"
#include "cpu/block_plan.h"

namespace sadmoe::cpu {
namespace {

constexpr int64_t kStripEntries = 8192;  // floats of y in the first-level cache
constexpr int64_t kSmallestExpert = 16;  // neurons: 8 leave most of a tile empty, and gained nothing

constexpr int64_t kTileRows = 16;  // of a tile

// The next expert's w_down is fetched where it lies in short pieces, up to so many columns: the processor itself sees ahead in
// longer ones; and in experts up to so many neurons: with 128 it took up to 1.2 times as long, 2048 wide.
constexpr int64_t kFetchedColumns = 128, kFetchedNeurons = 64;

int64_t whole_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows * kTileRows; }

// Whether so many matrices of m rows stay as they lie, and the n rows that they are multiplied with are turned: the fewer tiles.
bool better_turned(int64_t n, int64_t m, int64_t matrices = 1) { return whole_tiles(n) < matrices * whole_tiles(m); }

// Memory for n entries that stays with this thread: fresh pages would cost as much as filling them.
bf16* kept_memory(int64_t n) {
  thread_local Buffer<bf16> memory;
  thread_local int64_t size = 0;
  if (size < n) {
    size = 0;  // should there be no memory
    memory = Buffer<bf16>(0);
    memory = Buffer<bf16>(n), size = n;
  }
  return memory.get();
}

const bf16* bits(View view, int64_t elements) { return static_cast<const bf16*>(at(view, elements).data); }

class TiledBlock {
 public:
  TiledBlock(const Experts& experts, const TiledWeights& weights, int64_t begin, int64_t end, const bool* mask)
      : p_(experts), s_(experts.shape), k_(kernels()), w_(weights), begin_(begin), T_(end - begin) {
    plan_.build(mask, T_, s_.E);
    starts_.reserve(plan_.active.size() + 1);
    starts_.push_back(0);
    for (const int64_t e : plan_.active) starts_.push_back(starts_.back() + left_size(plan_.count(e), s_.s));
    h_ = Buffer<bf16>(starts_.back());
  }

  int64_t active() const { return static_cast<int64_t>(plan_.active.size()); }

  // Hidden activations of the a-th to b-th active expert.
  void up(int64_t a, int64_t b) {
    int64_t most = 0;
    for (int64_t i = a; i < b; ++i) most = std::max(most, plan_.count(plan_.active[i]));
    const int64_t ld = whole_tiles(s_.s), sums = whole_tiles(most) * ld;
    const Buffer<bf16> x(left_size(most, s_.d)), w(w_.input_size());
    const Floats h(sums), gate(p_.w_gate ? sums : 0);
    const Scratch scratch{x.get(), w.get(), h.get(), gate.get(), ld};
    if (one_tile()) k_.tiles->right_of_rows(bits(p_.x, begin_ * s_.d), nullptr, T_, s_.d, scratch.x);
    for (; a < b; ++a) up_expert(a, a + 1 < b ? w_.up_soon(plan_.active[a + 1]) : Soon{}, scratch);
  }

  // The columns [begin, end) of y, begin a multiple of 16, in strips that the first-level cache holds for all experts.
  void down(int64_t begin, int64_t end, const AsFloat& b_out) {
    const int64_t strip = std::clamp(kStripEntries / T_ / 32 * 32, int64_t{32}, (end - begin + 31) / 32 * 32);
    const Floats y(T_ * strip);
    const Buffer<bf16> w(w_.laid_out() ? 0 : right_size(s_.s, strip));
    bf16* out = static_cast<bf16*>(p_.y) + begin_ * s_.d_out;
    for (int64_t c = begin; c < end; c += strip) {
      const int64_t columns = std::min(strip, end - c);
      std::fill_n(y.get(), T_ * strip, 0.0f);
      for (int64_t t = 0; t < T_ && b_out.get(); ++t) std::copy_n(b_out.from(c), columns, y.get() + t * strip);
      for (int64_t a = 0; a < active(); ++a) {
        const int64_t e = plan_.active[a];
        if (a + 1 < active()) w_.fetch_down(plan_.active[a + 1], c, columns);
        k_.tiles->multiply_add(h_.get() + starts_[a], w_.down(e, c, columns, w.get()), plan_.count(e), columns, s_.s,
                               plan_.rows_of(e), y.get(), strip);
      }
      for (int64_t t = 0; t < T_; ++t) k_.narrow[int(DType::bf16)](y.get() + t * strip, out + t * s_.d_out + c, columns);
    }
  }

 private:
  // Of one thread on the way in: rows and weights laid out, sums of leading dimension ld.
  struct Scratch {
    bf16 *x, *w;
    float *h, *gate;
    int64_t ld;
  };

  // All tokens fit into a tile, and are turned at once, for every expert.
  bool one_tile() const { return T_ <= kTileRows; }

  void up_expert(int64_t a, Soon then, const Scratch& to) {
    const int64_t e = plan_.active[a], n = plan_.count(e);
    const bool turned = one_tile() || (!w_.laid_out() && better_turned(n, s_.s, p_.w_gate ? 2 : 1));
    turned ? turned_products(e, n, to) : products(e, n, then, to);
    const AsFloat bias(at(p_.b_up, e * s_.s), s_.s), gate_bias(at(p_.b_gate, e * s_.s), s_.s);
    k_.activate({n, s_.s, to.ld, to.h, bias.get(), p_.w_gate ? to.gate : nullptr, gate_bias.get(), p_.act});
    k_.tiles->left_of_floats(to.h, to.ld, n, s_.s, h_.get() + starts_[a]);
  }

  void products(int64_t e, int64_t n, Soon then, const Scratch& to) {
    k_.tiles->left_of_rows(bits(p_.x, begin_ * s_.d), plan_.rows_of(e), n, s_.d, to.x);
    k_.tiles->multiply(to.x, w_.up(e, to.w), n, s_.s, s_.d, to.h, to.ld, p_.w_gate ? w_.gate_soon(e) : then);
    if (p_.w_gate) k_.tiles->multiply(to.x, w_.gate(e, to.w), n, s_.s, s_.d, to.gate, to.ld, then);
  }

  void turned_products(int64_t e, int64_t n, const Scratch& to) {
    if (!one_tile()) k_.tiles->right_of_rows(bits(p_.x, begin_ * s_.d), plan_.rows_of(e), n, s_.d, to.x);
    const auto product = [&, columns = one_tile() ? plan_.rows_of(e) : nullptr](View weights, float* out) {
      k_.tiles->multiply_turned(bits(weights, e * s_.s * s_.d), to.x, columns, n, s_.s, s_.d, to.w, out, to.ld);
    };
    product(p_.w_up, to.h);
    if (p_.w_gate) product(p_.w_gate, to.gate);
  }

  const Experts& p_;
  const ExpertsShape& s_;
  const Kernels& k_;
  const TiledWeights& w_;
  int64_t begin_, T_;
  BlockPlan plan_;
  std::vector<int64_t> starts_;  // of each active expert in h
  Buffer<bf16> h_;
};

}  // namespace

bool runs_by_tiles(const Experts& experts) {
  return kernels().tiles && experts.w_up.dtype == DType::bf16 && !experts.packed && experts.shape.s >= kSmallestExpert;
}

TiledWeights::TiledWeights(const Experts& experts)
    : p_(experts), tiles_(*kernels().tiles), input_size_(right_size(p_.shape.d, p_.shape.s)) {
  expert_size_ = (p_.w_gate ? 2 : 1) * input_size_ + right_size(p_.shape.s, p_.shape.d_out);
}

void TiledWeights::lay_out_all(const Threads& threads) {
  const ExpertsShape& s = p_.shape;
  bf16* all = kept_memory(s.E * expert_size_);
  threads.parallel_for(s.E, 1, [&](int64_t e0, int64_t e1) {
    for (int64_t e = e0; e < e1; ++e) {
      bf16* to = all + e * expert_size_;
      up(e, to);
      if (p_.w_gate) gate(e, to + input_size_);
      tiles_.right_of_columns(bits(p_.w_down, e * s.s * s.d_out), s.d_out, s.s, s.d_out,
                              to + expert_size_ - right_size(s.s, s.d_out));
    }
  });
  all_ = all;
}

const bf16* TiledWeights::input(View w, int64_t e, int64_t all_at, bf16* scratch) const {
  if (all_) return all_ + e * expert_size_ + all_at;
  tiles_.right_of_rows(bits(w, e * p_.shape.s * p_.shape.d), nullptr, p_.shape.s, p_.shape.d, scratch);
  return scratch;
}

const bf16* TiledWeights::up(int64_t e, bf16* scratch) const { return input(p_.w_up, e, 0, scratch); }

const bf16* TiledWeights::gate(int64_t e, bf16* scratch) const { return input(p_.w_gate, e, input_size_, scratch); }

const bf16* TiledWeights::down(int64_t e, int64_t c, int64_t columns, bf16* scratch) const {
  const ExpertsShape& s = p_.shape;
  if (all_) return all_ + (e + 1) * expert_size_ - right_size(s.s, s.d_out) + right_size(s.s, c);
  tiles_.right_of_columns(bits(p_.w_down, e * s.s * s.d_out + c), s.d_out, s.s, columns, scratch);
  return scratch;
}

Soon TiledWeights::input_soon(View w, int64_t e, int64_t all_at) const {
  if (all_) return {all_ + e * expert_size_ + all_at, input_size_ * int64_t(sizeof(bf16))};
  const int64_t entries = p_.shape.s * p_.shape.d;
  return {bits(w, e * entries), entries * int64_t(sizeof(bf16))};
}

Soon TiledWeights::up_soon(int64_t e) const { return input_soon(p_.w_up, e, 0); }

Soon TiledWeights::gate_soon(int64_t e) const { return input_soon(p_.w_gate, e, input_size_); }

void TiledWeights::fetch_down(int64_t e, int64_t c, int64_t columns) const {
  const ExpertsShape& s = p_.shape;
  if (all_ || columns > kFetchedColumns || s.s > kFetchedNeurons) return;
  for (int64_t j = e * s.s; j < (e + 1) * s.s; ++j) {
    const auto* row = reinterpret_cast<const char*>(bits(p_.w_down, j * s.d_out + c));
    for (int64_t i = 0; i < columns * int64_t(sizeof(bf16)); i += kLine) __builtin_prefetch(row + i, 0, kSecondLevel);
  }
}

void run_tiled(const Experts& experts, const TiledWeights& weights, const bool* mask, int64_t begin, int64_t end,
               const AsFloat& b_out, const Threads& threads) {
  TiledBlock block(experts, weights, begin, end, mask);
  threads.parallel_for(block.active(), 1, [&](int64_t a, int64_t b) { block.up(a, b); });
  in_sixteens(experts.shape.d_out, 4, threads, [&](int64_t c0, int64_t c1) { block.down(c0, c1, b_out); });
}

void tiled_hidden(const bf16* x, const bf16* v1, const RouterShape& s, int64_t begin, int64_t end, float* hidden) {
  const Tiles& tiles = *kernels().tiles;
  const int64_t units = end - begin, ld = whole_tiles(units);
  const Buffer<bf16> rows(left_size(s.T, s.d)), weights(right_size(s.d, units));
  const Floats out(whole_tiles(s.T) * ld);
  if (better_turned(s.T, units)) {
    tiles.right_of_rows(x, nullptr, s.T, s.d, rows.get());
    tiles.multiply_turned(v1 + begin * s.d, rows.get(), nullptr, s.T, units, s.d, weights.get(), out.get(), ld);
  } else {
    tiles.left_of_rows(x, nullptr, s.T, s.d, rows.get());
    tiles.right_of_rows(v1 + begin * s.d, nullptr, units, s.d, weights.get());
    tiles.multiply(rows.get(), weights.get(), s.T, units, s.d, out.get(), ld, Soon{});
  }
  for (int64_t t = 0; t < s.T; ++t) std::copy_n(out.get() + t * ld, units, hidden + t * s.r + begin);
}

}  // namespace sadmoe::cpu
