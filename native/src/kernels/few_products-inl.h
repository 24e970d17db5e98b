// Few queries: products with keys, the softmax of a block, and the sums of weighted values.

// How keys meet queries, and weights values. Elements of both are of type Element.
template <class T>
struct FloatDot {
  using Element = T;
  using Query = float;
  using Weight = float;
  static constexpr int kStep = kLanes;  // elements of head_dim that are taken at a time
  static constexpr bool kPairs = false, kTails = true;
  using Vec = VecF;
  RAGGED_INLINE void arrange(Query*, int64_t) {}
  RAGGED_INLINE Vec query(const Query* q) { return load(q); }
  RAGGED_INLINE Vec key(const T* k) { return load(k); }
  RAGGED_INLINE Vec key_tail(const T* k, int64_t count) { return load_tail(k, count); }
  RAGGED_INLINE VecF add(VecF sum, Vec q, Vec k) { return fma(q, k, sum); }
};
template <class T>
RAGGED_INLINE const T* at(const char* slot, int64_t offset) {
  return reinterpret_cast<const T*>(slot) + offset;
}

// Products of kQueries query vectors with kTokens keys; lane q * kTokens + t of the result is query q, token t.
template <class Dot, int kQueries, int kTokens>
RAGGED_INLINE VecF products(const typename Dot::Query* queries, int64_t query_stride, const char* const* slot,
                            int64_t offset, int64_t head_dim, Ahead& ahead) {
  using T = typename Dot::Element;
  static_assert(kQueries * kTokens <= kLanes, "one lane for each product");
  VecF sum[kLanes] = {};
  int64_t d = 0;
  for (; d + Dot::kStep <= head_dim; d += Dot::kStep) {
    typename Dot::Vec key[kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      key[t] = Dot::key(at<T>(slot[t], offset + d));
      if (d % int64_t(kCacheLine / sizeof(T)) == 0) ahead.request();
    }
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      const typename Dot::Vec query = Dot::query(queries + q * query_stride + d);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) sum[q * kTokens + t] = Dot::add(sum[q * kTokens + t], query, key[t]);
    }
  }
  if (Dot::kTails && d < head_dim) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const typename Dot::Vec key = Dot::key_tail(at<T>(slot[t], offset + d), head_dim - d);
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q)
        sum[q * kTokens + t] = Dot::add(sum[q * kTokens + t], Dot::query(queries + q * query_stride + d), key);
    }
  }
  return folded<Added, kLanes>(sum);
}

// logits[q * kMostBlock + t] of `count` tokens, rounded up to a whole vector with addresses that may repeat.
template <class Dot, int kQueries>
void few_products(const typename Dot::Query* queries, int64_t query_stride, const char* const* slot, int64_t count,
                  int64_t offset, int64_t head_dim, float* logits, Ahead& ahead) {
  constexpr int kTokens = kQueries == 1 ? kLanes : (kQueries == 2 ? kLanes / 2 : kLanes / 4);
  Ahead requests = ahead;
  for (int64_t t = 0; t < count; t += kTokens) {
    float all[kLanes];
    const auto multiply = [&](auto tokens) __attribute__((always_inline)) {
      store(all, products<Dot, kQueries, decltype(tokens)::value>(queries, query_stride, slot + t, offset, head_dim,
                                                                  requests));
    };
    if (kQueries == 1 && count - t <= kTokens / 2)
      multiply(Count<kTokens / 2>{});
    else
      multiply(Count<kTokens>{});
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q)
      __builtin_memcpy(logits + q * kMostBlock + t, all + q * kTokens, kTokens * sizeof(float));
  }
  ahead = requests;
}

// weighted[q][c] = weighted[q][c] * factor[q] + sum over t of weight[q][t] * value[t][c], for kVectors vectors of c.
template <int kQueries, int kVectors, bool kTail, class T>
RAGGED_INLINE void few_values(const float* weights, const float* factor, const char* const* slot, int64_t count,
                              int64_t offset, int64_t tail, float* const* weighted, int64_t column, Ahead& ahead) {
  VecF sum[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[q][c] = load(weighted[q] + column + c * kLanes) * splat(factor[q]);
  for (int64_t t = 0; t < count; ++t) {
    const T* from = at<T>(slot[t], offset + column);
    VecF value[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) value[c] = kTail ? load_tail(from + c * kLanes, tail) : load(from + c * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c)
      if (c * kLanes % int(kCacheLine / sizeof(T)) == 0) ahead.request();
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const VecF weight = splat(weights[q * kMostBlock + t]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) sum[q][c] = fma(weight, value[c], sum[q][c]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(weighted[q] + column + c * kLanes, sum[q][c]);
}

template <int kQueries, class T>
void few_all_values(Tag<FloatDot<T>>, const float* weights, const float* factor, const char* const* slot, int64_t count,
                    int64_t offset, int64_t head_dim, float* const* weighted, Ahead& ahead) {
  // As many vectors at once as the registers hold beside the sums.
  constexpr int kMost = RAGGED_REGISTERS == 32 ? (kQueries <= 2 ? 8 : 4) : (kQueries <= 2 ? 4 : 2);
  Ahead requests = ahead;
  int64_t d = 0;
  for (; d + kMost * kLanes <= head_dim; d += kMost * kLanes)
    few_values<kQueries, kMost, false, T>(weights, factor, slot, count, offset, 0, weighted, d, requests);
  for (; d + kLanes <= head_dim; d += kLanes)
    few_values<kQueries, 1, false, T>(weights, factor, slot, count, offset, 0, weighted, d, requests);
  if (d < head_dim)
    few_values<kQueries, 1, true, T>(weights, factor, slot, count, offset, head_dim - d, weighted, d, requests);
  ahead = requests;
}

// What up to four rows of queries have seen: lane i % 4 is that of row i.
template <int kQueries>
RAGGED_INLINE VecF of_rows(const float* const* from) {
  float four[4] = {};
  for (int i = 0; i < kQueries; ++i) four[i] = *from[i];
#if defined(__AVX512F__)
  return (VecF)_mm512_broadcast_f32x4(load_bits<__m128>(four));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = four[i % 4];
  return v;
#endif
}
template <int kQueries>
RAGGED_INLINE void to_rows(VecF v, float* const* to) {
  float all[kLanes];
  store(all, v);
  for (int i = 0; i < kQueries; ++i) *to[i] = all[i];
}

// From up to four rows of products with the tokens of a block to their weights, which may be in place, each row
// kMostBlock after the last. Raises the rows' maxima and adds to their totals, and stores the factors for what was
// summed before.
template <bool kCapped, bool kNorms, int kQueries, class Weight>
RAGGED_INLINE void few_softmax(const Logits& logits, float* rows, Weight* weights, int64_t count, const Norms& norms,
                               float* const* maximum_seen, float* const* total, float* factor) {
  VecF most[4], sum[4] = {};
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) most[q] = splat(-kInfinity);
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    float* row = rows + q * kMostBlock;
    for (int64_t t = count; t < round_up(count, kLanes); ++t) row[t] = 0.0f;
    for (int64_t t = 0; t < count; t += kLanes) {
      VecF x = load(row + t);
      if constexpr (kNorms) x = x * load(norms.keys + t);
      x = logits.of<kCapped>(x);
      if (t + kLanes > count) x = lane < splat_int(int32_t(count - t)) ? x : splat(-kInfinity);
      store(row + t, x);
      most[q] = maximum(x, most[q]);
    }
  }
  const VecF before = of_rows<kQueries>(maximum_seen), raised = folded<Largest, 4>(most);
  const VecF updated = raised > before ? raised : before;
  const VecF reference = updated == splat(-kInfinity) ? VecF{} : updated;
  float references[kLanes];
  store(references, reference);
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    for (int64_t t = 0; t < count; t += kLanes) {
      const VecF weight =
          exp2_nonpositive<is_same<Weight, BF16>>(load(rows + q * kMostBlock + t) - splat(references[q]));
      if constexpr (kNorms)
        store_weights(weights + q * kMostBlock + t, weight * load(norms.values + t));
      else
        store_weights(weights + q * kMostBlock + t, weight);
      sum[q] = sum[q] + weight;
    }
    // Those of tokens that are not seen: 0 times a norm that is not finite would be no number.
    for (int64_t t = count; kNorms && t < round_up(count, kLanes); ++t) weights[q * kMostBlock + t] = Weight{};
  }
  const VecF factors = exp2_nonpositive(before - reference);
  to_rows<kQueries>(of_rows<kQueries>(total) * factors + folded<Added, 4>(sum), total);
  to_rows<kQueries>(updated, maximum_seen);
  float all[kLanes];
  store(all, factors);
  for (int q = 0; q < kQueries; ++q) factor[q] = all[q];
}
