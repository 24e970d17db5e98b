// Few queries, in pairs of bfloat16: of neighboring elements of a key, and of the values of neighboring tokens.

#if defined(__AVX512BF16__)
RAGGED_INLINE VecF add_pairs(VecF sum, __m512i a, __m512i b) {
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

struct PairDot {
  using Element = BF16;
  using Query = BF16;
  using Weight = BF16;
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kPairs = true, kTails = true;
  using Vec = __m512i;
  RAGGED_INLINE void arrange(Query*, int64_t) {}
  RAGGED_INLINE Vec query(const Query* q) { return load_bits<Vec>(q); }
  RAGGED_INLINE Vec key(const BF16* k) { return load_bits<Vec>(k); }
  RAGGED_INLINE Vec key_tail(const BF16* k, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, k); }
  RAGGED_INLINE VecF add(VecF sum, Vec q, Vec k) { return add_pairs(sum, q, k); }

  // Of kStep columns of values, or the first ones: those of two tokens (null: 0) side by side. The first vector has
  // columns 0 to 3, 8 to 11, 16 to 19 and 24 to 27, the second the others; in_order mends that.
  RAGGED_INLINE void values(const BF16* even, const BF16* odd, int64_t columns, __m512i* value) {
    const __mmask32 mask = columns >= kStep ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(mask, even);
    const __m512i b = odd != nullptr ? _mm512_maskz_loadu_epi16(mask, odd) : _mm512_setzero_si512();
    value[0] = _mm512_unpacklo_epi16(a, b);
    value[1] = _mm512_unpackhi_epi16(a, b);
  }
  RAGGED_INLINE void in_order(float* sums) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512 first = (__m512)load(sums), second = (__m512)load(sums + kLanes);
    store(sums, (VecF)_mm512_permutex2var_ps(first, low, second));
    store(sums + kLanes, (VecF)_mm512_permutex2var_ps(first, _mm512_add_epi32(low, _mm512_set1_epi32(8)), second));
  }
};
#endif

#if defined(__AVX512VBMI__)
// bfloat16 for each magnitude of a float of 8 bits, the two bytes apart.
template <class T>
struct Table {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr Table() {
    constexpr int mantissa_bits = T::kMantissaBits, bias = T::kBias;
    for (int i = 0; i < 128; ++i) {
      int exponent = i >> mantissa_bits, mantissa = i & ((1 << mantissa_bits) - 1);
      uint32_t bits = 0;
      if (T::kHasInfinity && exponent == 128 / (1 << mantissa_bits) - 1) {
        bits = mantissa == 0 ? 0x7f80 : 0x7fc0;
      } else if (!T::kHasInfinity && i == 127) {
        bits = 0x7fc0;
      } else if (i > 0) {
        if (exponent == 0)  // subnormal: shifted until its first bit is the hidden one
          for (exponent = 1; mantissa < 1 << mantissa_bits; --exponent) mantissa <<= 1;
        bits = uint32_t(exponent - bias + 127) << 7 | uint32_t(mantissa & ((1 << mantissa_bits) - 1))
                                                          << (7 - mantissa_bits);
      }
      low[i] = uint8_t(bits);
      high[i] = uint8_t(bits >> 8);
    }
  }
};

// bfloat16 of 64 floats of 8 bits. `low` has the first half of each 16 of them, `high` the second.
struct Widened {
  __m512i low, high;
};
template <class T>
RAGGED_INLINE Widened looked_up(__m512i bytes) {
  static constexpr Table<T> table;
  const __m512i low_a = load_bits<__m512i>(table.low), low_b = load_bits<__m512i>(table.low + 64);
  const __m512i high_a = load_bits<__m512i>(table.high), high_b = load_bits<__m512i>(table.high + 64);
  const __m512i low = _mm512_permutex2var_epi8(low_a, bytes, low_b);
  const __m512i high =
      _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(high_a, bytes, high_b), bytes, _mm512_set1_epi8(-128), 0xf8);
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// Floats of 8 bits that are looked up as they are loaded, 64 at a time: head_dim is a multiple.
template <class T>
struct ByteDot {
  using Element = T;
  using Query = BF16;
  using Weight = BF16;
  static constexpr int kStep = 4 * kLanes;
  static constexpr bool kPairs = true, kTails = false;
  using Vec = Widened;
  // A query has its elements in the order of looked_up.
  RAGGED_INLINE void arrange(Query* query, int64_t count) {
    for (Query* q = query; q < query + count; q += kStep) {
      const __m512i a = load_bits<__m512i>(q), b = load_bits<__m512i>(q + 32);
      store_bits(q, _mm512_shuffle_i32x4(a, b, 0x88));
      store_bits(q + 32, _mm512_shuffle_i32x4(a, b, 0xdd));
    }
  }
  RAGGED_INLINE Vec query(const Query* q) { return {load_bits<__m512i>(q), load_bits<__m512i>(q + 32)}; }
  RAGGED_INLINE Vec key(const T* k) { return looked_up<T>(load_bits<__m512i>(k)); }
  RAGGED_INLINE Vec key_tail(const T* k, int64_t) { return key(k); }
  RAGGED_INLINE VecF add(VecF sum, Vec q, Vec k) { return add_pairs(add_pairs(sum, q.low, k.low), q.high, k.high); }

  // Vector i has columns 4 i to 4 i + 3 of each 16.
  RAGGED_INLINE void values(const T* even, const T* odd, int64_t, __m512i* value) {
    const Widened a = looked_up<T>(load_bits<__m512i>(even));
    const Widened b = looked_up<T>(odd != nullptr ? load_bits<__m512i>(odd) : _mm512_setzero_si512());
    value[0] = _mm512_unpacklo_epi16(a.low, b.low);
    value[1] = _mm512_unpackhi_epi16(a.low, b.low);
    value[2] = _mm512_unpacklo_epi16(a.high, b.high);
    value[3] = _mm512_unpackhi_epi16(a.high, b.high);
  }
  RAGGED_INLINE void in_order(float* sums) {
    __m512 v[4];
    for (int i = 0; i < 4; ++i) v[i] = (__m512)load(sums + i * kLanes);
    const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(v[2], v[3], 0x44), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    store(sums, (VecF)_mm512_shuffle_f32x4(a, c, 0x88));
    store(sums + kLanes, (VecF)_mm512_shuffle_f32x4(a, c, 0xdd));
    store(sums + 2 * kLanes, (VecF)_mm512_shuffle_f32x4(b, d, 0x88));
    store(sums + 3 * kLanes, (VecF)_mm512_shuffle_f32x4(b, d, 0xdd));
  }
};
#endif

#if defined(__AVX512BF16__)
// As few_values, for kVectors times Dot::kStep columns; the columns of sums are in the order of Dot::values.
template <class Dot, int kQueries, int kVectors>
RAGGED_INLINE void few_pairs(const BF16* weights, const float* factor, const char* const* slot, int64_t count,
                             int64_t offset, int64_t columns, float* const* weighted, int64_t column, Ahead& ahead) {
  using T = typename Dot::Element;
  constexpr int kEach = Dot::kStep / kLanes, kSums = kVectors * kEach;
  VecF sum[kQueries][kSums];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < kSums; ++c) sum[q][c] = load(weighted[q] + column + c * kLanes) * splat(factor[q]);
  const auto add = [&](int64_t t, bool both) __attribute__((always_inline)) {
    __m512i value[kSums];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const int64_t from = offset + column + c * Dot::kStep;
      Dot::values(at<T>(slot[t], from), both ? at<T>(slot[t + 1], from) : nullptr, columns, value + c * kEach);
      ahead.request();
      ahead.request();
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const VecF weight = splat(load_bits<float>(weights + q * kMostBlock + t));
#pragma GCC unroll 8
      for (int c = 0; c < kSums; ++c) sum[q][c] = add_pairs(sum[q][c], bit_cast<__m512i>(weight), value[c]);
    }
  };
  int64_t t = 0;
  for (; t + 2 <= count; t += 2) add(t, true);
  // The last token may have no neighbor that the queries see: a weight of 0 is no help where a value is infinite.
  if (t < count) add(t, false);
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < kSums; ++c) store(weighted[q] + column + c * kLanes, sum[q][c]);
}

template <int kQueries, class Dot>
void few_all_values(Tag<Dot>, const BF16* weights, const float* factor, const char* const* slot, int64_t count,
                    int64_t offset, int64_t head_dim, float* const* weighted, Ahead& ahead) {
  constexpr int kMost = (kQueries <= 2 ? 8 : 4) * kLanes / Dot::kStep;
  Ahead requests = ahead;
  int64_t d = 0;
  for (; d + kMost * Dot::kStep <= head_dim; d += kMost * Dot::kStep)
    few_pairs<Dot, kQueries, kMost>(weights, factor, slot, count, offset, Dot::kStep, weighted, d, requests);
  for (; d < head_dim; d += Dot::kStep)
    few_pairs<Dot, kQueries, 1>(weights, factor, slot, count, offset, head_dim - d, weighted, d, requests);
  ahead = requests;
}

// Sums of few_pairs with their columns in order.
template <class Dot>
RAGGED_INLINE void in_order(float* weighted, int64_t head_dim) {
  for (float* sums = weighted; sums < weighted + head_dim; sums += Dot::kStep) Dot::in_order(sums);
}
#endif
