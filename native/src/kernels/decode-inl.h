// Attention of one query token at a time, all heads: each key and value is loaded once for the queries that share it.

constexpr int kDecodeBlock = 128;               // most tokens of one step
constexpr int64_t kDecodeBlockBytes = 1 << 17;  // and most bytes of it: with the next, they fit a second-level cache

// Tokens of one step, a multiple of what the arithmetic takes at a time.
RAGGED_INLINE int64_t decode_block(const Problem& p, int64_t element_size, int64_t multiple) {
  const int64_t tokens = kDecodeBlockBytes / (p.num_kv_heads * p.head_dim * 2 * element_size);
  return max64(multiple, min64(kDecodeBlock, tokens / multiple * multiple));
}

// How keys meet queries. kStep elements of head_dim are taken at a time.
template <class T>
struct FloatDot {
  using Query = float;
  static constexpr int kStep = kLanes;
  using Vec = VecF;
  RAGGED_INLINE Vec query(const Query* q) { return load(q); }
  RAGGED_INLINE Vec key(const T* k) { return load(k); }
  RAGGED_INLINE Vec key_tail(const T* k, int64_t count) { return load_tail(k, count); }
  RAGGED_INLINE VecF add(VecF sum, Vec q, Vec k) { return fma(q, k, sum); }
};
#if defined(__AVX512BF16__)
struct PairDot {
  using Query = BF16;
  static constexpr int kStep = 2 * kLanes;
  using Vec = __m512i;
  RAGGED_INLINE Vec query(const Query* q) { return load_bits<Vec>(q); }
  RAGGED_INLINE Vec key(const BF16* k) { return load_bits<Vec>(k); }
  RAGGED_INLINE Vec key_tail(const BF16* k, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, k); }
  RAGGED_INLINE VecF add(VecF sum, Vec q, Vec k) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)q, (__m512bh)k);
  }
};
#endif

// Products of kQueries query vectors with kTokens keys; lane q * kTokens + t of the result is query q, token t.
// The same part of the tokens `next` is prefetched on the way: one request for each load, since a burst of them
// would fill the line buffers and stall the arithmetic.
template <class Dot, int kQueries, int kTokens, class T>
RAGGED_INLINE VecF products(const typename Dot::Query* queries, int64_t query_stride, const T* const* keys,
                            const T* const* next, int64_t offset, int64_t head_dim) {
  static_assert(kQueries * kTokens <= kLanes, "one lane for each product");
  VecF sum[kLanes] = {};
  int64_t d = 0;
  for (; d + Dot::kStep <= head_dim; d += Dot::kStep) {
    typename Dot::Vec key[kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) key[t] = Dot::key(keys[t] + offset + d);
    if (d % int64_t(kCacheLine / sizeof(T)) == 0) {
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) prefetch(next[t] + offset + d);
    }
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      const typename Dot::Vec query = Dot::query(queries + q * query_stride + d);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) sum[q * kTokens + t] = Dot::add(sum[q * kTokens + t], query, key[t]);
    }
  }
  if (d < head_dim) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const typename Dot::Vec key = Dot::key_tail(keys[t] + offset + d, head_dim - d);
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q)
        sum[q * kTokens + t] = Dot::add(sum[q * kTokens + t], Dot::query(queries + q * query_stride + d), key);
    }
  }
  return sums<kLanes>(sum);
}

// logits[q * kDecodeBlock + t] of `count` tokens, rounded up to a whole vector with addresses that may repeat.
template <class Dot, int kQueries, class T>
void decode_products(const typename Dot::Query* queries, int64_t query_stride, const T* const* keys,
                     const T* const* next, int64_t count, int64_t offset, int64_t head_dim, float* logits) {
  constexpr int kTokens = kQueries == 1 ? kLanes : (kQueries == 2 ? kLanes / 2 : kLanes / 4);
  for (int64_t t = 0; t < count; t += kTokens) {
    float all[kLanes];
    store(all, products<Dot, kQueries, kTokens>(queries, query_stride, keys + t, next + t, offset, head_dim));
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q)
      __builtin_memcpy(logits + q * kDecodeBlock + t, all + q * kTokens, kTokens * sizeof(float));
  }
}

// weighted[q][c] = weighted[q][c] * factor[q] + sum over t of weight[q][t] * value[t][c], for kVectors vectors of c.
template <int kQueries, int kVectors, bool kTail, class T>
RAGGED_INLINE void decode_values(const float* weights, const float* factor, const T* const* values,
                                 const T* const* next, int64_t count, int64_t offset, int64_t tail, float* weighted,
                                 int64_t stride) {
  VecF sum[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[q][c] = load(weighted + q * stride + c * kLanes) * splat(factor[q]);
  for (int64_t t = 0; t < count; ++t) {
    const T* from = values[t] + offset;
    VecF value[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) value[c] = kTail ? load_tail(from + c * kLanes, tail) : load(from + c * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c)
      if (c * kLanes % int(kCacheLine / sizeof(T)) == 0) prefetch(next[t] + offset + c * kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const VecF weight = splat(weights[q * kDecodeBlock + t]);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) sum[q][c] = fma(weight, value[c], sum[q][c]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(weighted + q * stride + c * kLanes, sum[q][c]);
}

template <int kQueries, class T>
void decode_all_values(const float* weights, const float* factor, const T* const* values, const T* const* next,
                       int64_t count, int64_t offset, int64_t head_dim, float* weighted, int64_t stride) {
  // As many vectors at once as the registers hold beside the sums.
  constexpr int kMost = RAGGED_REGISTERS == 32 ? (kQueries <= 2 ? 8 : 4) : (kQueries <= 2 ? 4 : 2);
  int64_t d = 0;
  for (; d + kMost * kLanes <= head_dim; d += kMost * kLanes)
    decode_values<kQueries, kMost, false>(weights, factor, values, next, count, offset + d, 0, weighted + d, stride);
  for (; d + kLanes <= head_dim; d += kLanes)
    decode_values<kQueries, 1, false>(weights, factor, values, next, count, offset + d, 0, weighted + d, stride);
  if (d < head_dim)
    decode_values<kQueries, 1, true>(weights, factor, values, next, count, offset + d, head_dim - d, weighted + d,
                                     stride);
}

// From one query's products with the tokens of a block to its weights; returns the factor for what was summed before.
template <bool kCapped>
RAGGED_INLINE float decode_softmax(const Logits& logits, float* row, int64_t count, float& maximum_seen, float& total) {
  VecF most = splat(-kInfinity);
  for (int64_t t = count; t < round_up(count, kLanes); ++t) row[t] = 0.0f;
  for (int64_t t = 0; t < count; t += kLanes) {
    VecF x = logits.of<kCapped>(load(row + t));
    if (t + kLanes > count) {
      VecI lane;
      for (int i = 0; i < kLanes; ++i) lane[i] = i;
      x = lane < splat_int(int32_t(count - t)) ? x : splat(-kInfinity);
    }
    store(row + t, x);
    most = maximum(x, most);
  }
  const float block_maximum = max_of(most);
  const float updated = block_maximum > maximum_seen ? block_maximum : maximum_seen;
  const float reference = updated == -kInfinity ? 0.0f : updated;
  VecF sum = {};
  for (int64_t t = 0; t < count; t += kLanes) {
    const VecF weight = exp2_nonpositive(load(row + t) - splat(reference));
    store(row + t, weight);
    sum = sum + weight;
  }
  const float factor = exp2_nonpositive(maximum_seen - reference);
  total = total * factor + sum_of(sum);
  maximum_seen = updated;
  return factor;
}

constexpr int kMostQueries = 8;  // whose weights are held at a time

template <class T, class Dot>
struct DecodeScratch {
  typename Dot::Query* queries;  // [q_heads][query_stride], zeros past head_dim
  float* weights;                // of the queries that are worked on, [queries][kDecodeBlock]
  const T** slot;                // addresses of the block's tokens, and after them of tokens that may be read as well
  const T** next;                // of the next block's, to be prefetched
  char* rest;                    // what a way to attend needs for itself
  int64_t query_stride;
  size_t size;
  DecodeScratch(const Problem& p, void* base) {
    Carver carver{static_cast<char*>(base)};
    query_stride = round_up(p.head_dim, 2 * kLanes);
    queries = carver.take<typename Dot::Query>(p.num_q_heads * query_stride);
    weights = carver.take<float>(kMostQueries * kDecodeBlock);
    slot = carver.take<const T*>(kDecodeBlock + 2 * kLanes);
    next = carver.take<const T*>(kDecodeBlock + 2 * kLanes);
    rest = carver.take<char>(0);
    size = carver.used;
  }
};

template <class T, class Dot, class Source>
void read_queries(const Problem& p, const Source* from, const DecodeScratch<T, Dot>& s) {
  for (int64_t h = 0; h < p.num_q_heads; ++h) {
    auto* to = s.queries + h * s.query_stride;
    convert(from + h * p.head_dim, to, p.head_dim);
    __builtin_memset(to + p.head_dim, 0, size_t(s.query_stride - p.head_dim) * sizeof(*to));
  }
}
template <int count>
struct Count {
  static constexpr int value = count;
};

// Attention of a group's queries to a block of tokens, on vectors: up to four queries at a time.
template <class T, class Dot, bool kCapped>
struct VectorHeads {
  static constexpr int64_t kTokens = 16;
  const Problem& p;
  const DecodeScratch<T, Dot>& s;
  const Partial& partial;
  const int64_t stride;

  VectorHeads(const Problem& problem, const DecodeScratch<T, Dot>& scratch, const Partial& sums)
      : p(problem), s(scratch), partial(sums), stride(partial_stride(problem)) {}
  void start(int64_t) {}
  void finish() {}

  void attend(int64_t kv_head, int64_t count) {
    const Logits logits(p, kv_head);
    const int64_t end = (kv_head + 1) * p.group();
    for (int64_t head = end - p.group(); head < end; head += 4) {
      if (end - head >= 4) attend(Count<4>{}, logits, kv_head, head, count);
      if (end - head == 3) attend(Count<3>{}, logits, kv_head, head, count);
      if (end - head == 2) attend(Count<2>{}, logits, kv_head, head, count);
      if (end - head == 1) attend(Count<1>{}, logits, kv_head, head, count);
    }
  }

 private:
  template <int kQueries>
  void attend(Count<kQueries>, const Logits& logits, int64_t kv_head, int64_t head, int64_t count) {
    const int64_t offset = kv_head * p.head_stride;
    decode_products<Dot, kQueries>(s.queries + head * s.query_stride, s.query_stride, s.slot, s.next, count, offset,
                                   p.head_dim, s.weights);
    float factor[kQueries];
    for (int q = 0; q < kQueries; ++q) {
      float* weights = s.weights + q * kDecodeBlock;
      factor[q] = decode_softmax<kCapped>(logits, weights, count, partial.maximum[head + q], partial.total[head + q]);
    }
    decode_all_values<kQueries>(s.weights, factor, s.slot, s.next, count, offset + p.value_offset, p.head_dim,
                                partial.weighted + head * stride, stride);
  }
};

// Heads [begin, end): kv heads in decode, query heads in finish.
struct HeadRange {
  int64_t begin, end;
};

template <class T, class Dot, class Heads>
void decode_row(const Problem& p, int64_t row, int64_t token, int64_t begin, int64_t end, Partial partial,
                void* scratch, HeadRange kv_heads) {
  DecodeScratch<T, Dot> s(p, scratch);
  const Cache<T> cache(p, row);
  const int64_t block = decode_block(p, sizeof(T), Heads::kTokens);
  with_query_type(p.query_dtype, [&](auto tag) {
    using Source = typename decltype(tag)::type;
    if constexpr (sizeof(typename Dot::Query) == sizeof(float) || sizeof(Source) == sizeof(BF16))
      read_queries<T, Dot>(p, static_cast<const Source*>(p.queries) + token * p.num_q_heads * p.head_dim, s);
  });
  for (int64_t h = 0; h < p.num_q_heads; ++h) {
    partial.maximum[h] = -kInfinity;
    partial.total[h] = 0.0f;
  }
  __builtin_memset(partial.weighted, 0, size_t(p.num_q_heads * partial_stride(p)) * sizeof(float));

  Heads heads(p, s, partial);
  int64_t count = min64(block, end - begin);
  cache.slots(begin, count, s.slot);
  while (count > 0) {
    const int64_t whole = round_up(count, Heads::kTokens);
    for (int64_t t = count; t < whole; ++t) s.slot[t] = s.slot[count - 1];
    const int64_t ahead = min64(block, end - begin - count);
    if (ahead > 0) cache.slots(begin + count, ahead, s.next);
    for (int64_t t = ahead; t < whole; ++t) s.next[t] = s.slot[t];  // nothing is left to prefetch
    heads.start(count);
    for (int64_t h = kv_heads.begin; h < kv_heads.end; ++h) heads.attend(h, count);
    begin += count;
    count = ahead;
    const T** swapped = s.slot;
    s.slot = s.next;
    s.next = swapped;
  }
  heads.finish();
}

#if defined(__AMX_BF16__)
#include "kernels/decode_tiles-inl.h"
#endif

// Whether products are made in pairs of bfloat16, for which weights are rounded.
RAGGED_INLINE bool pairs(const Problem& p) {
  return kDotBF16 && p.float_products == 0 && p.query_dtype == DType::kBF16 && p.cache_dtype == DType::kBF16;
}

template <class T, class Dot>
void decode_vectors(const Problem& p, int64_t row, int64_t token, int64_t begin, int64_t end, Partial partial,
                    void* scratch, HeadRange kv_heads) {
  if (p.logits_soft_cap > 0)
    decode_row<T, Dot, VectorHeads<T, Dot, true>>(p, row, token, begin, end, partial, scratch, kv_heads);
  else
    decode_row<T, Dot, VectorHeads<T, Dot, false>>(p, row, token, begin, end, partial, scratch, kv_heads);
}

// Heads outside of `kv_heads` of the partial are those of no keys.
void decode_heads(const Problem& p, int64_t row, int64_t token, int64_t begin, int64_t end, Partial partial,
                  void* scratch, HeadRange kv_heads) {
#if defined(__AMX_BF16__)
  if (pairs(p) && tiles_fit(p))
    return p.logits_soft_cap > 0 ? decode_tiles<true>(p, row, token, begin, end, partial, scratch, kv_heads)
                                 : decode_tiles<false>(p, row, token, begin, end, partial, scratch, kv_heads);
#endif
#if defined(__AVX512BF16__)
  if (pairs(p)) return decode_vectors<BF16, PairDot>(p, row, token, begin, end, partial, scratch, kv_heads);
#endif
  with_type(p.cache_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    decode_vectors<T, FloatDot<T>>(p, row, token, begin, end, partial, scratch, kv_heads);
  });
}

void decode(const Problem& p, int64_t row, int64_t token, int64_t begin, int64_t end, Partial partial, void* scratch) {
  decode_heads(p, row, token, begin, end, partial, scratch, {0, p.num_kv_heads});
}

size_t decode_scratch(const Problem& p) {
  size_t size = DecodeScratch<float, FloatDot<float>>(p, nullptr).size;  // the largest
#if defined(__AMX_BF16__)
  size += TileScratch(p, nullptr).size;
#endif
  return size;
}

void finish_heads(const Problem& p, const Partial* partials, int64_t count, int64_t token, HeadRange heads) {
  const int64_t stride = partial_stride(p);
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    const float sink = p.sinks ? base2_sink(p.sinks[h]) : -kInfinity;
    float most = sink;
    for (int64_t i = 0; i < count; ++i) most = partials[i].maximum[h] > most ? partials[i].maximum[h] : most;
    const float reference = most == -kInfinity ? 0.0f : most;
    float total = p.sinks ? exp2_nonpositive(sink - reference) : 0.0f;
    for (int64_t i = 0; i < count; ++i)
      total += partials[i].total[h] * exp2_nonpositive(partials[i].maximum[h] - reference);
    if (p.lse)
      p.lse[token * p.num_q_heads + h] =
          logsumexp(reference, total, p.sinks && reference == sink ? p.sinks + h : nullptr);
    const float inverse = total > 0 ? value_scale(p, h / p.group()) / total : (total == total ? 0.0f : total);
    for (int64_t i = 0; i < count; ++i)
      partials[i].total[h] = exp2_nonpositive(partials[i].maximum[h] - reference) * inverse;
    with_query_type(p.query_dtype, [&](auto tag) {
      using To = typename decltype(tag)::type;
      To* to = static_cast<To*>(p.output) + (token * p.num_q_heads + h) * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; d += kLanes) {
        VecF sum = {};
        for (int64_t i = 0; i < count; ++i)
          sum = fma(load(partials[i].weighted + h * stride + d), splat(partials[i].total[h]), sum);
        if (d + kLanes <= p.head_dim)
          store(to + d, sum);
        else
          store_tail(to + d, sum, p.head_dim - d);
      }
    });
  }
}

void finish(const Problem& p, const Partial* partials, int64_t count, int64_t token) {
  finish_heads(p, partials, count, token, {0, p.num_q_heads});
}
