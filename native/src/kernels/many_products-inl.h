// The two matrix products of many queries, in register blocks: in floats, in pairs of bf16, or on AMX tiles.

// Rows of the two products are (query token, head of the group). They are taken a block at a time, whose scores stay in
// the first-level cache between the two products. Columns of one register block:
constexpr int kBlockVectors = RAGGED_REGISTERS == 32 ? 4 : 2;
constexpr int kPanel = kBlockVectors * kLanes;  // columns of a packed panel
// Key tokens of one step. More of them spread what is done once for each block of rows; with tiles the scores of a
// block would leave the first-level cache, and a small second-level cache holds no more of packed floats.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr int kTile = 256;
#else
constexpr int kTile = 128;
#endif
static_assert(kTile % kPanel == 0 && kTile % (2 * kLanes) == 0, "whole panels");

// How products are made, on 32-bit elements: a float, or a pair of bf16. A block has kRows rows.
struct FloatStep {
  static constexpr int kElements = 1;
  static constexpr int kRows = 6;
  static constexpr bool kTiles = false;
  RAGGED_INLINE void begin() {}
  RAGGED_INLINE void end() {}
  RAGGED_INLINE VecF add(VecF sum, float a, VecF b) { return fma(splat(a), b, sum); }
};
#if defined(__AVX512BF16__)
struct PairStep {
  static constexpr int kElements = 2;
  static constexpr int kRows = 6;
  static constexpr bool kTiles = false;
  RAGGED_INLINE void begin() {}
  RAGGED_INLINE void end() {}
  RAGGED_INLINE VecF add(VecF sum, float a, VecF b) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat(a), (__m512bh)b);
  }
};
#endif

#if defined(__AMX_BF16__)
// Products on tiles of 16 rows x 16 pairs, two by two.
struct TileStep {
  static constexpr int kElements = 2;
  static constexpr int kRows = 32;
  static constexpr bool kTiles = true;
  RAGGED_INLINE void begin() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.set(i, 64);
    config.load();
  }
  RAGGED_INLINE void end() { _tile_release(); }

  // c[32][columns] = (add ? c : 0) + a[32][depth] * b[depth][columns]: 16 or 32 columns, depth a multiple of 16.
  RAGGED_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                              float* c, int64_t c_stride, int64_t columns, bool add) {
    const int64_t a_bytes = a_stride * 4, b_bytes = b_stride * 4, c_bytes = c_stride * 4;
    if (add) {
      RAGGED_TILE_LOAD(0, c, c_bytes);
      RAGGED_TILE_LOAD(2, c + 16 * c_stride, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(2);
    }
    if (columns == 16) {
      for (int64_t k = 0; k < depth; k += 16) {
        RAGGED_TILE_LOAD(4, a + k, a_bytes);
        RAGGED_TILE_LOAD(5, a + 16 * a_stride + k, a_bytes);
        RAGGED_TILE_LOAD(6, b + k * b_stride, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
      }
      _tile_stored(0, c, c_bytes);
      _tile_stored(2, c + 16 * c_stride, c_bytes);
      return;
    }
    if (add) {
      RAGGED_TILE_LOAD(1, c + 16, c_bytes);
      RAGGED_TILE_LOAD(3, c + 16 * c_stride + 16, c_bytes);
    } else {
      _tile_zero(1);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 16) {
      RAGGED_TILE_LOAD(4, a + k, a_bytes);
      RAGGED_TILE_LOAD(6, b + k * b_stride, b_bytes);
      RAGGED_TILE_LOAD(7, b + k * b_stride + 16, b_bytes);
      RAGGED_TILE_LOAD(5, a + 16 * a_stride + k, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * c_stride, c_bytes);
    _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
  }
};
#endif

// Whether something else is done beside products, after every so many steps. With 16 registers the sums need them all,
// and tiles leave nothing to wait for.
template <class Step>
constexpr bool kBesideProducts = RAGGED_REGISTERS == 32 && !Step::kTiles;
template <class Step>
constexpr int64_t kStepsBeside = kBesideProducts<Step> ? 2 : 1;

// c[kRows][kVectors] = (factor ? c * factor[row] : 0) + a[kRows][depth] * b[depth][kVectors].
template <class Step, int kVectors, class Work>
RAGGED_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                            int64_t c_stride, const float* factor, Work& beside) {
  VecF sum[Step::kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Step::kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = factor ? load(c + r * c_stride + v * kLanes) * splat(factor[r]) : VecF{};
  for (int64_t step = 0; step < depth; step += kStepsBeside<Step>) {  // depth is a multiple of kLanes
#pragma GCC unroll 4
    for (int64_t k = step; k < step + kStepsBeside<Step>; ++k) {
      VecF column[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) column[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Step::kRows; ++r) {
        const float element = a[r * a_stride + k];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Step::add(sum[r][v], element, column[v]);
      }
    }
    if constexpr (kBesideProducts<Step>) beside.step();
  }
#pragma GCC unroll 8
  for (int r = 0; r < Step::kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

template <class Step, class Work>
void multiply_any(int64_t vectors, const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                  int64_t c_stride, const float* factor, Work& beside) {
  switch (vectors) {
    case 1:
      return multiply<Step, 1>(a, a_stride, b, kLanes, depth, c, c_stride, factor, beside);
    case 2:
      return multiply<Step, 2>(a, a_stride, b, 2 * kLanes, depth, c, c_stride, factor, beside);
#if RAGGED_REGISTERS == 32
    case 3:
      return multiply<Step, 3>(a, a_stride, b, 3 * kLanes, depth, c, c_stride, factor, beside);
    case 4:
      return multiply<Step, 4>(a, a_stride, b, 4 * kLanes, depth, c, c_stride, factor, beside);
#endif
  }
}

// The same without a factor, of a panel or half of one. Not inlined: its loop needs all registers.
template <class Step, class Work>
__attribute__((noinline)) void multiply_panel(bool whole, const float* a, const float* panel, int64_t depth, float* c,
                                              int64_t c_stride, Work& beside) {
  if (whole)
    multiply<Step, kBlockVectors>(a, depth, panel, kPanel, depth, c, c_stride, nullptr, beside);
  else
    multiply<Step, 2>(a, depth, panel, kPanel, depth, c, c_stride, nullptr, beside);
}

// c[kRows][columns from, to) = a[kRows][depth] * b, which is in packed panels. Columns are whole steps of them.
template <class Step, class Work>
RAGGED_INLINE void multiply_panels(const float* a, const float* b, int64_t depth, int64_t from, int64_t to, float* c,
                                   int64_t c_stride, Work& beside) {
  if constexpr (Step::kTiles) {
    for (int64_t column = from; column < to; column += 32)
      Step::multiply(a, depth, b + column / kPanel * kPanel * depth + column % kPanel, kPanel, depth, c + column,
                     c_stride, 32, false);
  } else {
    constexpr int64_t kHalf = 2 * kLanes;
    for (int64_t column = from, columns; column < to; column += columns) {
      const float* panel = b + column / kPanel * kPanel * depth + column % kPanel;
      columns = column % kPanel || to - column == kHalf ? kHalf : kPanel;
      multiply_panel<Step>(columns == kPanel, a, panel, depth, c + column, c_stride, beside);
    }
  }
}

// What the weights of a block of rows in columns [from, to) add to its sums.
template <class Step, class Work>
RAGGED_INLINE void sum_block(const float* weights, const float* values, int64_t from, int64_t to, const float* factor,
                             float* sums, int64_t width, Work& beside) {
  const int64_t first = from / Step::kElements, steps = (to - from) / Step::kElements;
  if constexpr (Step::kTiles) {
    for (int r = 0; r < Step::kRows; ++r) {
      if (factor[r] == 1.0f) continue;
      for (int64_t c = 0; c < width; c += kLanes)
        store(sums + r * width + c, load(sums + r * width + c) * splat(factor[r]));
    }
    for (int64_t column = 0; column < width; column += 32) {
      const int64_t panel = column / kPanel * kPanel, columns = min64(kPanel, width - panel);
      Step::multiply(weights + first, kTile / 2, values + panel * (kTile / 2) + first * columns + (column - panel),
                     columns, steps, sums + column, width, min64(32, width - column), true);
    }
  } else {
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = min64(kPanel, width - column);
      multiply_any<Step>(columns / kLanes, weights + first, kTile / Step::kElements,
                         values + column * (kTile / Step::kElements) + first * columns, steps, sums + column, width,
                         factor, beside);
    }
  }
}

#if defined(__AMX_BF16__)
using BestPairStep = TileStep;
#elif defined(__AVX512BF16__)
using BestPairStep = PairStep;
#endif

// Elements of a step's products.
template <class Step>
using ElementOf = typename Choose<Step::kElements == 2, BF16, float>::type;
