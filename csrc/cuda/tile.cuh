// A tile of a matrix product, rows x columns, by one block: sums live in registers, operands pass through shared memory
// in steps of kDepth. What differs is how a step is multiplied: Fma (float32), Mma<T> (tensor cores, 16 bits) or
// Tf32<kParts, kPartsB> (tensor cores, float32 operands of fewer bits), of 64 x 64 all; and the same of 128 x 32, for experts of
// few neurons: TallFma, TallMma<T>, TallTf32.
//
// Tensor cores cut sums off instead of rounding them: in one chain over a depth of 2,048 the error would be many times that of
// float32. Where results must be as good (ExactMma<T>, Tf32 of several parts: the router's), the products of a step begin a sum
// of their own, which is then added in float32. Of experts in 16 bits the rounding of results outweighs it.
//
// The sum of an element runs over the depth in one fixed order, whatever the other rows are and however many: results are
// batch-invariant. strip.cuh keeps the same order.
#pragma once
#include <type_traits>

#include "cuda/stage.cuh"

namespace sadmoe::cuda {

constexpr int kRows = 64, kColumns = 64, kThreads = 128, kStages = 3;
constexpr int kSums = kRows * kColumns / kThreads;

// How operands are staged: rows of the tile; its columns as rows, or steps of the depth as rows.
template <class T, int kDepthOf, int kRowPadOf, int kRowsOf = kRows>
struct Operands {
  using Element = T;
  using Hidden = T;  // what the activations of its sums are rounded to
  static constexpr int rows = kRowsOf, columns = kRows * kColumns / kRowsOf;
  static constexpr int kDepth = kDepthOf, kRowPad = kRowPadOf, kDepthPad = 8;
  using Rows = Stage<T, rows, kDepth, kRowPad>;
  using Columns = Stage<T, columns, kDepth, kRowPad>;
  using Depths = Stage<T, kDepth, columns, kDepthPad>;
};
template <class Tile>
using RowStage = typename Tile::Rows;
template <class Tile>
using ColumnStage = typename Tile::Columns;
template <class Tile>
using DepthStage = typename Tile::Depths;

// Operands of any dtype, multiplied and added in float32. A thread holds 8 rows, kEvery apart, of 4 columns, kBeside apart. The
// products of a step are summed by themselves: in one chain over a depth of 2,048 the error would be four times that of torch.
template <int kAcross>
struct FmaTile : Operands<float, 16, 4, 256 / kAcross> {
  using Shape = Operands<float, 16, 4, 256 / kAcross>;
  using Shape::kDepth;
  static constexpr int kBeside = Shape::columns / 4, kEvery = kThreads / kBeside;
  float sums[kSums] = {};

  SADMOE_DEVICE static int row(int i) { return thread_index() / kBeside + i / 4 * kEvery; }
  SADMOE_DEVICE static int column(int i) { return thread_index() % kBeside + i % 4 * kBeside; }

  template <class StageB>
  SADMOE_DEVICE static float at(const StageB& b, int k, int column) {
    if constexpr (std::is_same_v<StageB, typename Shape::Columns>)
      return b.at[column][k];
    else
      return b.at[k][column];
  }

  // The first n rows of the tile.
  template <class StageB>
  SADMOE_DEVICE void multiply(const typename Shape::Rows& a, const StageB& b, int n, int = Shape::columns) {
    float parts[kSums] = {};
    for (int k = 0; k < kDepth; ++k) {
      float bs[4];
      SADMOE_UNROLL
      for (int j = 0; j < 4; ++j) bs[j] = at(b, k, column(j));
      SADMOE_UNROLL
      for (int i = 0; i < kSums; i += 4) {
        if (i && i / 4 * kEvery >= n) break;
        const float x = a.at[row(i)][k];
        SADMOE_UNROLL
        for (int j = 0; j < 4; ++j) parts[i + j] = fma(x, bs[j], parts[i + j]);
      }
    }
    SADMOE_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] += parts[i];
  }

  // y[tokens[r]] += row r, of the first n rows; the sums begin anew.
  template <class Y>
  SADMOE_DEVICE void add_to(Y& y, const int16_t* tokens, int n) {
    SADMOE_UNROLL
    for (int i = 0; i < kSums; i += 4) {
      if (i && i / 4 * kEvery >= n) break;
      if (row(i) < n) {
        float* to = y[tokens[row(i)]];
        SADMOE_UNROLL
        for (int j = 0; j < 4; ++j) to[column(j)] += sums[i + j];
      }
      SADMOE_UNROLL
      for (int j = 0; j < 4; ++j) sums[i + j] = 0;
    }
  }
};
struct Fma : FmaTile<4> {};
struct TallFma : FmaTile<2> {};

// Where the sums of a product by tensor cores are: [4 tiles of 16 rows][2 tiles of 8 columns][4]. A warp holds 64 rows of 16
// columns, and kAcross warps are side by side: with all four an expert of few rows wastes no warp.
template <int kAcross>
struct TensorSums {
  float sums[kSums] = {};

  SADMOE_DEVICE static int lane() { return thread_index() % 32; }
  SADMOE_DEVICE static int first_row() { return kAcross == kThreads / 32 ? 0 : thread_index() / 32 / kAcross * 64; }
  SADMOE_DEVICE static int first_column() { return thread_index() / 32 % kAcross * 16; }
  // Whether the 16 rows of sums[i] are beyond the first n of the tile, which has a row.
  SADMOE_DEVICE static bool beyond(int i, int n) {
    if (kAcross == kThreads / 32) return i && i / 8 * 16 >= n;
    return first_row() + i / 8 * 16 >= n;
  }
  SADMOE_DEVICE static int row(int i) { return first_row() + i / 8 * 16 + i % 4 / 2 * 8 + lane() / 4; }
  SADMOE_DEVICE static int column(int i) { return first_column() + i / 4 % 2 * 8 + lane() % 4 * 2 + i % 2; }

  // y[tokens[r]] += row r, of the first n rows; the sums begin anew. 16 rows are read before any is written, for the compiler
  // cannot know that tokens are different, nor that they are not y.
  template <class Y>
  SADMOE_DEVICE void add_to(Y& y, const int16_t* tokens, int n) {
    SADMOE_UNROLL
    for (int i = 0; i < kSums; i += 8) {
      if (beyond(i, n)) break;
      float* to[2];
      Pair pairs[2][2];
      SADMOE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = row(i + half * 2);
        if (r < n) to[half] = y[tokens[r]] + column(0);
      }
      SADMOE_UNROLL
      for (int half = 0; half < 2; ++half) SADMOE_UNROLL
      for (int j = 0; j < 2; ++j)
        if (row(i + half * 2) < n) pairs[half][j] = load_pair(to[half] + j * 8);
      SADMOE_UNROLL
      for (int half = 0; half < 2; ++half) SADMOE_UNROLL
      for (int j = 0; j < 2; ++j) {
        float* own = sums + i + j * 4 + half * 2;
        const Pair sum{pairs[half][j].first + own[0], pairs[half][j].second + own[1]};
        if (row(i + half * 2) < n) store_pair(sum, to[half] + j * 8);
        own[0] = own[1] = 0;
      }
    }
  }
};

// Operands of T, 16 bits, by m16n8k16.
template <class T, int kAcross, bool kExact = false>
struct MmaTile : Operands<T, 32, 8, 256 / kAcross>, TensorSums<kAcross> {
  using Shape = Operands<T, 32, 8, 256 / kAcross>;
  using Sums = TensorSums<kAcross>;
  using Sums::lane, Sums::first_row, Sums::first_column, Sums::beyond, Sums::sums;
  static constexpr bool kTall = kAcross < kThreads / 32;

  // Of 16 columns: depths 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  template <class StageB>
  SADMOE_DEVICE static void fragment(unsigned (&to)[4], const StageB& b, int k) {
    if constexpr (std::is_same_v<StageB, typename Shape::Columns>)
      load_matrices(to, b.from(b.offset(first_column() + lane() / 16 * 8 + lane() % 8, lane() / 8 % 2 * 8) + b.offset(0, k)));
    else
      load_matrices_transposed(to, b.from(b.offset(lane() % 16, first_column() + lane() / 16 * 8) + b.offset(k, 0)));
  }

  // The first n rows of the tile. Of a tall one the first m columns, by 8; the other would have a tenth more instructions.
  template <class StageB>
  SADMOE_DEVICE void multiply(const typename Shape::Rows& a, const StageB& b, int n, int m = Shape::columns) {
    if (kTall && first_column() >= m) return;
    float step[kExact ? kSums : 1] = {};
    float* to = kExact ? step : sums;
    SADMOE_UNROLL
    for (int k = 0; k < Shape::kDepth; k += 16) {
      unsigned bs[4];
      fragment(bs, b, k);
      SADMOE_UNROLL
      for (int i = 0; i < kSums; i += 8) {
        if (beyond(i, n)) break;
        unsigned as[4];
        load_matrices(as, a.from(a.offset(first_row() + lane() % 16, lane() / 16 * 8) + a.offset(i / 8 * 16, k)));
        multiply_16x8x16(to + i, as, bs[0], bs[1], T{});
        if (!kTall || first_column() + 8 < m) multiply_16x8x16(to + i + 4, as, bs[2], bs[3], T{});
      }
    }
    if constexpr (kExact) SADMOE_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] += step[i];
  }
};
template <class T>
struct Mma : MmaTile<T, 4> {};
template <class T>
struct ExactMma : MmaTile<T, 4, true> {
  using Hidden = float;  // in which the router continues
};
template <class T>
struct TallMma : MmaTile<T, 2> {};

// A fragment of floats as a sum of that many of tf32: two are a float32 to one in its last place, and one is what comes from 16
// bits.
template <int kParts>
struct Split {
  unsigned parts[kParts][4];

  SADMOE_DEVICE explicit Split(const unsigned (&of)[4]) {
    SADMOE_UNROLL
    for (int i = 0; i < 4; ++i) {
      float rest = as_float(of[i]);
      SADMOE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        parts[part][i] = to_tf32(rest);
        rest -= as_float(parts[part][i]);
        constexpr float kMost = 3.402823466e38f;  // the largest floats too are rounded to inf
        rest = absolute(rest) <= kMost ? rest : 0;
      }
    }
  }
};

// sums += a b, the smallest parts first; of b the entries i and i + 1.
template <int kParts, int kPartsB>
SADMOE_DEVICE void multiply_parts(float* sums, const Split<kParts>& a, const Split<kPartsB>& b, int i) {
  SADMOE_UNROLL
  for (int part = kParts * kPartsB - 1; part >= 0; --part) {
    const unsigned (&of_b)[4] = b.parts[part % kPartsB];
    multiply_16x8x8(sums, a.parts[part / kPartsB], of_b[i], of_b[i + 1]);
  }
}

// Operands of any dtype by m16n8k8: a as the sum of kParts numbers of 11 bits, b of kPartsB; with the accuracy of
// float32 where those are several.
template <int kParts, int kPartsB, int kAcross>
struct Tf32Tile : Operands<float, 16, 4, 256 / kAcross>, TensorSums<kAcross> {
  using Shape = Operands<float, 16, 4, 256 / kAcross>;
  using Sums = TensorSums<kAcross>;
  using Sums::lane, Sums::first_row, Sums::first_column, Sums::beyond, Sums::sums;
  static constexpr bool kTall = kAcross < kThreads / 32, kExact = kParts * kPartsB > 1;

  template <class StageB>
  SADMOE_DEVICE static void fragment(unsigned (&to)[4], const StageB& b, int k) {
    if constexpr (std::is_same_v<StageB, typename Shape::Columns>)
      load_matrices(to, b.from(b.offset(first_column() + lane() / 16 * 8 + lane() % 8, lane() / 8 % 2 * 4) + b.offset(0, k)));
    else {
      SADMOE_UNROLL
      for (int i = 0; i < 4; ++i) to[i] = as_bits(b.at[k + i % 2 * 4 + lane() % 4][first_column() + i / 2 * 8 + lane() / 4]);
    }
  }

  // As of MmaTile.
  template <class StageB>
  SADMOE_DEVICE void multiply(const typename Shape::Rows& a, const StageB& b, int n, int m = Shape::columns) {
    if (kTall && first_column() >= m) return;
    float step[kExact ? kSums : 1] = {};
    float* to = kExact ? step : sums;
    SADMOE_UNROLL
    for (int k = 0; k < Shape::kDepth; k += 8) {
      unsigned raw[4];
      fragment(raw, b, k);
      const Split<kPartsB> bs(raw);
      SADMOE_UNROLL
      for (int i = 0; i < kSums; i += 8) {
        if (beyond(i, n)) break;
        load_matrices(raw, a.from(a.offset(first_row() + lane() % 16, lane() / 16 * 4) + a.offset(i / 8 * 16, k)));
        const Split<kParts> as(raw);
        multiply_parts(to + i, as, bs, 0);
        if (!kTall || first_column() + 8 < m) multiply_parts(to + i + 4, as, bs, 2);
      }
    }
    if constexpr (kExact) SADMOE_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] += step[i];
  }
};
template <int kParts, int kPartsB>
struct Tf32 : Tf32Tile<kParts, kPartsB, 4> {};
struct TallTf32 : Tf32Tile<1, 1, 2> {};

// What experts add to y, in ascending order. In float32 every kChain of them, by their number, are summed by themselves: in one
// chain the error would grow with how many there are, beyond that of torch. Minus zero adds nothing, not even to minus zero.
constexpr int kChain = 16;
template <class Tile>
constexpr bool kChained = std::is_same_v<typename Tile::Element, float>;

template <class Tile, int kSumsOf>
struct Chain {
  static constexpr bool kOn = kChained<Tile>;
  float y[kSumsOf];
  float part[kOn ? kSumsOf : 1];
  int link = 0;  // e / kChain of the experts in part

  SADMOE_DEVICE Chain() {
    if constexpr (kOn) SADMOE_UNROLL
    for (int i = 0; i < kSumsOf; ++i) part[i] = -0.0f;
  }
  SADMOE_DEVICE void begin(int e) {
    if constexpr (kOn)
      if (e / kChain != link) end(), link = e / kChain;
  }
  SADMOE_DEVICE void add(int i, float v) {
    if constexpr (kOn)
      part[i] += v;
    else
      y[i] += v;
  }
  SADMOE_DEVICE void end() {
    if constexpr (kOn) SADMOE_UNROLL
    for (int i = 0; i < kSumsOf; ++i) y[i] += part[i], part[i] = -0.0f;
  }
};

// To shared memory, whence a warp writes whole lines and an epilogue is compiled once an element.
template <class Tile, class To>
SADMOE_DEVICE void store_sums(const float* sums, To& to) {
  SADMOE_UNROLL
  for (int i = 0; i < kSums; ++i) to[Tile::row(i)][Tile::column(i)] = sums[i];
}
template <class Tile, class To>
SADMOE_DEVICE void store_sums(const Tile& tile, To& to) {
  store_sums<Tile>(tile.sums, to);
}

}  // namespace sadmoe::cuda
