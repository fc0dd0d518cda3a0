// Experts in bf16 by a unit that multiplies tiles (see Tiles). A token's bits are the same in any block, as everywhere.
#pragma once
#include "contract.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace sadmoe::cpu {

// Whether a call goes this way: all in bf16, experts not too small, nor packed, on a processor that has the unit.
bool runs_by_tiles(const Experts& experts);

// The experts' weights in tiles: those that do not stay where they lie, laid out anew in every call, by each block for itself, or
// once for all where there are many.
class TiledWeights {
 public:
  explicit TiledWeights(const Experts& experts);
  void lay_out_all(const Threads& threads);  // in memory that stays with the calling thread

  bool laid_out() const { return all_; }
  int64_t input_size() const { return input_size_; }
  // Where they are, or into scratch: an expert's w_up or w_gate, of input_size; columns [c, c + columns) of its w_down, c a
  // multiple of 16.
  const bf16* up(int64_t e, bf16* scratch) const;
  const bf16* gate(int64_t e, bf16* scratch) const;
  const bf16* down(int64_t e, int64_t c, int64_t columns, bf16* scratch) const;
  // What up, gate and down are to read.
  Soon up_soon(int64_t e) const;
  Soon gate_soon(int64_t e) const;
  void fetch_down(int64_t e, int64_t c, int64_t columns) const;

 private:
  const bf16* input(View w, int64_t e, int64_t all_at, bf16* scratch) const;
  Soon input_soon(View w, int64_t e, int64_t all_at) const;

  const Experts& p_;
  const Tiles& tiles_;
  int64_t input_size_, expert_size_;
  bf16* all_ = nullptr;
};

// The tokens [begin, end) from x to y under mask [end - begin, E].
void run_tiled(const Experts& experts, const TiledWeights& weights, const bool* mask, int64_t begin, int64_t end,
               const AsFloat& b_out, const Threads& threads);

// hidden [T, r] = x v1ᵀ for bf16 x [T, d] and v1 [r, d], units [begin, end), begin a multiple of 16.
void tiled_hidden(const bf16* x, const bf16* v1, const RouterShape& shape, int64_t begin, int64_t end, float* hidden);

}  // namespace sadmoe::cpu
