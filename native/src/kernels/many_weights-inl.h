// Weights of many queries, made while the processor multiplies for other ones.

// What is done beside a product, a little after some of its steps, so that the processor is at both: first the weights
// of the block of rows that was scored before, a vector at a time, then requests for the next tile.
template <class Step, bool kNorms>
struct Beside {
  float* scores = nullptr;                 // [kRows][kTile]
  ElementOf<Step>* weights = nullptr;      // [kRows][kTile], which may be the scores
  float* totals = nullptr;                 // [kRows][kLanes]: sums of the weights
  const float* minus_reference = nullptr;  // [kRows]
  const float* norms = nullptr;            // [kTile], of values
  float scale = 1.0f;                      // from scores to logits
  int64_t from = 0, to = 0;                // columns
  int64_t row = Step::kRows, column = 0;   // of the next vector; no row: all are done
  Ahead ahead;

  RAGGED_INLINE_MEMBER VecF weigh(int64_t row, int64_t column) {
    const int64_t at = row * kTile + column;
    const VecF weight =
        exp2_nonpositive<Step::kElements == 2>(fma(load(scores + at), splat(scale), splat(minus_reference[row])));
    if constexpr (kNorms)
      store_weights(weights + at, weight * load(norms + column));
    else
      store_weights(weights + at, weight);
    return weight;
  }
  RAGGED_INLINE_MEMBER void step() {
    if (row == Step::kRows) return ahead.request();
    float* total = totals + row * kLanes;
    store(total, load(total) + weigh(row, column));
    column += kLanes;
    if (column == to) next_row();
  }
  void finish() {
    for (; row < Step::kRows; next_row()) {
      float* total = totals + row * kLanes;
      VecF sum = load(total);
      for (; column < to; column += kLanes) sum = sum + weigh(row, column);
      store(total, sum);
    }
  }
  RAGGED_INLINE_MEMBER void next_row() {
    column = from;
    ++row;
  }
};

// Logits of one row's products in columns [from, to), in place.
template <bool kCapped, bool kNorms>
RAGGED_INLINE void many_logits(const Logits& logits, float* scores, int64_t from, int64_t to, const float* norms) {
  for (int64_t t = from; t < to; t += kLanes) {
    VecF x = load(scores + t);
    if constexpr (kNorms) x = x * load(norms + t);
    store(scores + t, logits.of<kCapped>(x));
  }
}

// Hides from one row, which sees columns [low, high), the others of [from, to).
RAGGED_INLINE void hide(float* scores, int64_t from, int64_t to, const Seen& seen) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const auto hide_vectors = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += kLanes) {
      const VecI column = lane + splat_int(int32_t(t));
      VecF x = load(scores + t);
      x = column >= splat_int(int32_t(seen.low)) ? x : splat(-kInfinity);
      store(scores + t, column < splat_int(int32_t(seen.high)) ? x : splat(-kInfinity));
    }
  };
  hide_vectors(from, min64(seen.low, to));
  hide_vectors(max64(from, seen.high / kLanes * kLanes), to);
}

RAGGED_INLINE VecF largest(const float* scores, int64_t from, int64_t to) {
  VecF most = splat(-kInfinity);
  for (int64_t t = from; t < to; t += kLanes) most = maximum(load(scores + t), most);
  return most;
}
