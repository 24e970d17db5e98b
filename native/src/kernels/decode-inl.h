// Attention of few query tokens, all heads, over keys as they lie in the cache. A block of tokens at a time comes into
// the second-level cache; each of its keys and values is loaded there for up to four queries at once.

constexpr int kDecodeBlock = 128;               // most tokens of one block
constexpr int64_t kDecodeBlockBytes = 1 << 17;  // and most bytes of it: with the next, they fit a second-level cache
constexpr int64_t kStagedBytes = 1 << 14;       // of a block for one kv head, beside its queries
constexpr int64_t kStagedStride = 2048;         // bytes between tokens that are far apart
constexpr int kDecodePadding = 32;              // addresses after a block's, of tokens that may be read as well
constexpr int kMostQueries = 8;                 // rows of queries whose weights are held at a time
constexpr int64_t kMostFew = 16;                // queries of a call

// Queries of a call: so many that their rows for a kv head still pay, see most_many in prefill.
int64_t most_few(const Problem& p) { return max64(1, min64(kMostFew, 64 / p.group())); }

// Heads [begin, end): kv heads in decode, query heads in finish.
struct HeadRange {
  int64_t begin, end;
};

// Tokens [low, high) of a block, which a query sees; none where high is not above low.
struct Seen {
  int64_t low, high;
};
RAGGED_INLINE Seen seen_of_block(const Problem& p, int64_t position, int64_t begin, int64_t count) {
  const KeyRange keys = visible_keys(p, position, 1);
  return {max64(0, keys.begin - begin), min64(count, keys.end - begin)};
}

// The next block, which is requested from memory while one is worked on: a line at a time, since a burst would fill the
// line buffers and stall the arithmetic, and in the order of addresses. By heads, neighboring requests would lie in
// different pages of memory.
struct Ahead {
  const char* const* slot = nullptr;
  const int32_t* lines = nullptr;  // of a token: the offsets of those that hold elements
  int64_t lines_each = 0;
  int64_t next = 0;    // of the lines of *slot
  int64_t budget = 0;  // lines that may be requested now

  RAGGED_INLINE_MEMBER void request() {
    if (budget == 0) return;
    --budget;
    prefetch(*slot + lines[next]);
    if (++next == lines_each) {
      next = 0;
      ++slot;
    }
  }
};

// What few queries need.
struct DecodeScratch {
  char* queries;             // [kv_heads][rows][query_stride], elements of the products, zeros past head_dim
  float* weights;            // of the rows that are worked on, [rows][kDecodeBlock]
  float* pairs;              // the same in bfloat16
  Seen* seen;                // [queries]
  const char** slot;         // addresses of the block's tokens, and after them of tokens that may be read as well
  const char** next;         // of the next block's
  const char** staged_slot;  // of the block's tokens in `staged`
  int32_t* lines;            // Ahead::lines
  char* staged;              // keys and values of a kv head, converted: [tokens][2][query_stride]
  char* rest;                // what a way to attend needs for itself
  int64_t query_stride;
  size_t size;

  RAGGED_INLINE int64_t most_lines(const Problem& p) {
    return p.token_stride * int64_t(element_size(p.cache_dtype)) / kCacheLine + 1;
  }
  DecodeScratch(const Problem& p, int64_t count, void* base) {
    Carver carver{static_cast<char*>(base)};
    query_stride = round_up(p.head_dim, 64);  // whole vectors of any elements
    queries = carver.take<char>(count * p.num_q_heads * query_stride * int64_t(sizeof(float)));
    weights = carver.take<float>(kMostQueries * kDecodeBlock);
    pairs = carver.take<float>(kMostQueries * kDecodeBlock / 2);
    seen = carver.take<Seen>(count);
    slot = carver.take<const char*>(kDecodeBlock + kDecodePadding);
    next = carver.take<const char*>(kDecodeBlock + kDecodePadding);
    staged_slot = carver.take<const char*>(kDecodeBlock + kDecodePadding);
    lines = carver.take<int32_t>(most_lines(p));
    staged = carver.take<char>(max64(kStagedBytes, 16 * 2 * query_stride * int64_t(sizeof(float))));
    rest = carver.take<char>(0);
    size = carver.used;
  }
  // Tokens of a block that is staged as elements of so many bytes: for one kv head they fit a first-level cache.
  RAGGED_INLINE int64_t staged_block(const Problem& p, int64_t element_size) {
    const int64_t tokens = kStagedBytes / (2 * round_up(p.head_dim, 64) * element_size) / 16 * 16;
    return max64(16, min64(kDecodeBlock, tokens));
  }
  template <class T>
  RAGGED_INLINE_MEMBER T* queries_of(int64_t row) const {
    return reinterpret_cast<T*>(queries) + row * query_stride;
  }
};

// How keys meet queries, and weights values. Elements of both are of type Element.
template <class T>
struct FloatDot {
  using Element = T;
  using Query = float;
  using Weight = float;
  static constexpr int kStep = kLanes;  // elements of head_dim that are taken at a time
  static constexpr bool kPairs = false;
  using Vec = VecF;
  RAGGED_INLINE Vec query(const Query* q) { return load(q); }
  RAGGED_INLINE Vec key(const T* k) { return load(k); }
  RAGGED_INLINE Vec key_tail(const T* k, int64_t count) { return load_tail(k, count); }
  RAGGED_INLINE VecF add(VecF sum, Vec q, Vec k) { return fma(q, k, sum); }
};
#if defined(__AVX512BF16__)
struct PairDot {
  using Element = BF16;
  using Query = BF16;
  using Weight = BF16;
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kPairs = true;
  using Vec = __m512i;
  RAGGED_INLINE Vec query(const Query* q) { return load_bits<Vec>(q); }
  RAGGED_INLINE Vec key(const BF16* k) { return load_bits<Vec>(k); }
  RAGGED_INLINE Vec key_tail(const BF16* k, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, k); }
  RAGGED_INLINE VecF add(VecF sum, Vec q, Vec k) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)q, (__m512bh)k);
  }
};
#endif

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
    for (int t = 0; t < kTokens; ++t) key[t] = Dot::key(at<T>(slot[t], offset + d));
    if (d % int64_t(kCacheLine / sizeof(T)) == 0) {
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) ahead.request();
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
      const typename Dot::Vec key = Dot::key_tail(at<T>(slot[t], offset + d), head_dim - d);
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q)
        sum[q * kTokens + t] = Dot::add(sum[q * kTokens + t], Dot::query(queries + q * query_stride + d), key);
    }
  }
  return sums<kLanes>(sum);
}

// logits[q * kDecodeBlock + t] of `count` tokens, rounded up to a whole vector with addresses that may repeat.
template <class Dot, int kQueries>
void decode_products(const typename Dot::Query* queries, int64_t query_stride, const char* const* slot, int64_t count,
                     int64_t offset, int64_t head_dim, float* logits, Ahead& ahead) {
  constexpr int kTokens = kQueries == 1 ? kLanes : (kQueries == 2 ? kLanes / 2 : kLanes / 4);
  Ahead requests = ahead;
  for (int64_t t = 0; t < count; t += kTokens) {
    float all[kLanes];
    store(all, products<Dot, kQueries, kTokens>(queries, query_stride, slot + t, offset, head_dim, requests));
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q)
      __builtin_memcpy(logits + q * kDecodeBlock + t, all + q * kTokens, kTokens * sizeof(float));
  }
  ahead = requests;
}

// weighted[q][c] = weighted[q][c] * factor[q] + sum over t of weight[q][t] * value[t][c], for kVectors vectors of c.
template <int kQueries, int kVectors, bool kTail, class T>
RAGGED_INLINE void decode_values(const float* weights, const float* factor, const char* const* slot, int64_t count,
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
      const VecF weight = splat(weights[q * kDecodeBlock + t]);
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
void decode_all_values(Tag<FloatDot<T>>, const float* weights, const float* factor, const char* const* slot,
                       int64_t count, int64_t offset, int64_t head_dim, float* const* weighted, Ahead& ahead) {
  // As many vectors at once as the registers hold beside the sums.
  constexpr int kMost = RAGGED_REGISTERS == 32 ? (kQueries <= 2 ? 8 : 4) : (kQueries <= 2 ? 4 : 2);
  Ahead requests = ahead;
  int64_t d = 0;
  for (; d + kMost * kLanes <= head_dim; d += kMost * kLanes)
    decode_values<kQueries, kMost, false, T>(weights, factor, slot, count, offset, 0, weighted, d, requests);
  for (; d + kLanes <= head_dim; d += kLanes)
    decode_values<kQueries, 1, false, T>(weights, factor, slot, count, offset, 0, weighted, d, requests);
  if (d < head_dim)
    decode_values<kQueries, 1, true, T>(weights, factor, slot, count, offset, head_dim - d, weighted, d, requests);
  ahead = requests;
}

#if defined(__AVX512BF16__)
// The same in pairs of tokens, whose values are interleaved, for kVectors vectors of 32 columns. A vector gives two of
// sums: the first has columns 0 to 3, 8 to 11, 16 to 19 and 24 to 27, the second the others; in_order mends that.
template <int kQueries, int kVectors>
RAGGED_INLINE void decode_pairs(const BF16* weights, const float* factor, const char* const* slot, int64_t count,
                                int64_t offset, uint32_t columns, float* const* weighted, int64_t column,
                                Ahead& ahead) {
  VecF sum[kQueries][2 * kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * kVectors; ++c) sum[q][c] = load(weighted[q] + column + c * kLanes) * splat(factor[q]);
  const auto add = [&](int64_t t, bool both) __attribute__((always_inline)) {
    __m512i value[2 * kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const __m512i even = _mm512_maskz_loadu_epi16(columns, at<BF16>(slot[t], offset + column) + 32 * c);
      const __m512i odd = both ? _mm512_maskz_loadu_epi16(columns, at<BF16>(slot[t + 1], offset + column) + 32 * c)
                               : _mm512_setzero_si512();
      ahead.request();
      ahead.request();
      value[2 * c] = _mm512_unpacklo_epi16(even, odd);
      value[2 * c + 1] = _mm512_unpackhi_epi16(even, odd);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const VecF weight = splat(load_bits<float>(weights + q * kDecodeBlock + t));
#pragma GCC unroll 8
      for (int c = 0; c < 2 * kVectors; ++c) sum[q][c] = PairDot::add(sum[q][c], bit_cast<__m512i>(weight), value[c]);
    }
  };
  int64_t t = 0;
  for (; t + 2 <= count; t += 2) add(t, true);
  // The last token may have no neighbor that the queries see: a weight of 0 is no help where a value is infinite.
  if (t < count) add(t, false);
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * kVectors; ++c) store(weighted[q] + column + c * kLanes, sum[q][c]);
}

template <int kQueries>
void decode_all_values(Tag<PairDot>, const BF16* weights, const float* factor, const char* const* slot, int64_t count,
                       int64_t offset, int64_t head_dim, float* const* weighted, Ahead& ahead) {
  constexpr int kMost = kQueries <= 2 ? 4 : 2;
  Ahead requests = ahead;
  int64_t d = 0;
  for (; d + kMost * 32 <= head_dim; d += kMost * 32)
    decode_pairs<kQueries, kMost>(weights, factor, slot, count, offset, ~0u, weighted, d, requests);
  for (; d < head_dim; d += 32)
    decode_pairs<kQueries, 1>(weights, factor, slot, count, offset,
                              head_dim - d >= 32 ? ~0u : (1u << (head_dim - d)) - 1, weighted, d, requests);
  ahead = requests;
}

// Sums of decode_pairs with their columns in order.
RAGGED_INLINE void in_order(float* weighted, int64_t head_dim) {
  for (float* sums = weighted; sums < weighted + head_dim; sums += 2 * kLanes) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512 first = (__m512)load(sums), second = (__m512)load(sums + kLanes);
    store(sums, (VecF)_mm512_permutex2var_ps(first, low, second));
    store(sums + kLanes, (VecF)_mm512_permutex2var_ps(first, _mm512_add_epi32(low, _mm512_set1_epi32(8)), second));
  }
}
#endif

// From one query's products with the tokens of a block to its weights, which may be in place; returns the factor for
// what was summed before.
template <class Weight, bool kCapped>
RAGGED_INLINE float decode_softmax(const Logits& logits, float* row, Weight* weights, int64_t count,
                                   float& maximum_seen, float& total) {
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
    store_weights(weights + t, weight);
    sum = sum + weight;
  }
  const float factor = exp2_nonpositive(maximum_seen - reference);
  total = total * factor + sum_of(sum);
  maximum_seen = updated;
  return factor;
}

template <int count>
struct Count {
  static constexpr int value = count;
};

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
template <class T>
RAGGED_INLINE void stage_by_table(const char* const* slot, int64_t count, int64_t offset, int64_t head_dim, char* to,
                                  int64_t stride) {
  static constexpr Table<T> table;
  const __m512i low_a = load_bits<__m512i>(table.low), low_b = load_bits<__m512i>(table.low + 64);
  const __m512i high_a = load_bits<__m512i>(table.high), high_b = load_bits<__m512i>(table.high + 64);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), sign = _mm512_set1_epi8(-128);
  for (int64_t t = 0; t < count; ++t) {
    BF16* row = reinterpret_cast<BF16*>(to) + 2 * t * stride;
    for (int64_t d = 0; d < head_dim; d += 64) {
      const uint64_t columns = head_dim - d >= 64 ? ~uint64_t{0} : (uint64_t{1} << (head_dim - d)) - 1;
      const __m512i bytes =
          _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(columns, at<T>(slot[t], offset + d)));
      const __m512i low = _mm512_permutex2var_epi8(low_a, bytes, low_b);
      const __m512i high =
          _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(high_a, bytes, high_b), bytes, sign, 0xf8);
      store_bits(row + d, _mm512_unpacklo_epi8(low, high));
      store_bits(row + d + 32, _mm512_unpackhi_epi8(low, high));
    }
  }
}
#endif

// Keys or values of a block for one kv head, in the elements of the products.
template <class T, class S>
void stage(const char* const* slot, int64_t count, int64_t offset, int64_t head_dim, char* to, int64_t stride) {
#if defined(__AVX512VBMI__)
  if constexpr (is_same<S, BF16> && sizeof(T) == 1) return stage_by_table<T>(slot, count, offset, head_dim, to, stride);
#endif
  for (int64_t t = 0; t < count; ++t)
    convert(at<T>(slot[t], offset), reinterpret_cast<S*>(to) + 2 * t * stride, head_dim);
}

// Attention of some queries to a block of tokens, on vectors: up to four rows of queries at a time. A row is a query
// token and a head of the group.
template <class T, class Dot, bool kStaged>
struct VectorHeads {
  using Element = typename Dot::Element;
  static constexpr int64_t kTokens = 16;
  static_assert(kStaged || is_same<T, Element>, "what is converted is staged");
  const Problem& p;
  const DecodeScratch& s;
  const Query* const queries;
  const int64_t rows;  // of a kv head
  bool all_seen = false;

  VectorHeads(const Problem& problem, const DecodeScratch& scratch, const Query* first, int64_t count, HeadRange heads)
      : p(problem), s(scratch), queries(first), rows(count * problem.group()) {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t h = heads.begin * p.group(); h < heads.end * p.group(); ++h) {
        queries[q].partial.maximum[h] = -kInfinity;
        queries[q].partial.total[h] = 0.0f;
        __builtin_memset(weighted(q, h), 0, size_t(partial_stride(p)) * sizeof(float));
      }
  }
  VectorHeads(const VectorHeads&) = delete;

  RAGGED_INLINE int64_t most_tokens(const Problem& p, const DecodeScratch& s) {
    return kStaged ? s.staged_block(p, sizeof(Element)) : kDecodeBlock;
  }

  void start(int64_t begin, int64_t count) {
    all_seen = true;
    for (int64_t q = 0; q < rows / p.group(); ++q) {
      s.seen[q] = seen_of_block(p, queries[q].position, begin, count);
      all_seen = all_seen && s.seen[q].low == 0 && s.seen[q].high == count;
    }
  }

  void attend(int64_t kv_head, int64_t count, Ahead& ahead) {
    const Logits logits(p, kv_head);
    const char* const* slot = s.slot;
    int64_t keys = kv_head * p.head_stride, values = keys + p.value_offset;
    if constexpr (kStaged) {
      for (int64_t t = 0; t < count + kDecodePadding; ++t)
        s.staged_slot[t] = s.staged + min64(t, count - 1) * 2 * s.query_stride * int64_t(sizeof(Element));
      stage<T, Element>(slot, count, keys, p.head_dim, s.staged, s.query_stride);
      stage<T, Element>(slot, count, values, p.head_dim, s.staged + s.query_stride * int64_t(sizeof(Element)),
                        s.query_stride);
      slot = s.staged_slot;
      keys = 0;
      values = s.query_stride;
    }
    for (int64_t r = 0; r < rows;) {
      const Seen seen = all_seen ? Seen{0, count} : s.seen[r / p.group()];
      int64_t most = min64(4, rows - r), same = 1;
      if (all_seen)
        same = most;
      else
        while (same < most && s.seen[(r + same) / p.group()].low == seen.low &&
               s.seen[(r + same) / p.group()].high == seen.high)
          ++same;
      if (seen.high > seen.low) {
        const auto attend_some = [&](auto number) {
          attend_rows<decltype(number)::value>(logits, kv_head, r, slot + seen.low, seen.high - seen.low, keys, values,
                                               ahead);
        };
        if (same == 4) attend_some(Count<4>{});
        if (same == 3) attend_some(Count<3>{});
        if (same == 2) attend_some(Count<2>{});
        if (same == 1) attend_some(Count<1>{});
      }
      r += same;
    }
  }

  void finish(HeadRange heads) {
#if defined(__AVX512BF16__)
    if constexpr (Dot::kPairs)
      for (int64_t q = 0; q < rows / p.group(); ++q)
        for (int64_t h = heads.begin * p.group(); h < heads.end * p.group(); ++h) in_order(weighted(q, h), p.head_dim);
#endif
    (void)heads;
  }

 private:
  float* weighted(int64_t query, int64_t head) const {
    return queries[query].partial.weighted + head * partial_stride(p);
  }

  template <int kQueries>
  void attend_rows(const Logits& logits, int64_t kv_head, int64_t row, const char* const* slot, int64_t count,
                   int64_t keys, int64_t values, Ahead& ahead) {
    decode_products<Dot, kQueries>(s.template queries_of<typename Dot::Query>(kv_head * rows + row), s.query_stride,
                                   slot, count, keys, p.head_dim, s.weights, ahead);
    float factor[kQueries];
    float* sums[kQueries];
    typename Dot::Weight* weights = reinterpret_cast<typename Dot::Weight*>(Dot::kPairs ? s.pairs : s.weights);
    for (int i = 0; i < kQueries; ++i) {
      const int64_t query = (row + i) / p.group(), head = kv_head * p.group() + (row + i) % p.group();
      const Partial& partial = queries[query].partial;
      float* logit = s.weights + i * kDecodeBlock;
      typename Dot::Weight* weight = weights + i * kDecodeBlock;
      float &most = partial.maximum[head], &total = partial.total[head];
      factor[i] = p.logits_soft_cap > 0
                      ? decode_softmax<typename Dot::Weight, true>(logits, logit, weight, count, most, total)
                      : decode_softmax<typename Dot::Weight, false>(logits, logit, weight, count, most, total);
      sums[i] = weighted(query, head);
    }
    decode_all_values<kQueries>(Tag<Dot>{}, weights, factor, slot, count, values, p.head_dim, sums, ahead);
  }
};

// The lines of a token that hold elements, as offsets in bytes.
template <class T>
int64_t find_lines(const Problem& p, int32_t* lines) {
  int64_t count = 0, next = 0;
  for (int64_t part = 0; part < 2 * p.num_kv_heads; ++part) {
    const int64_t begin = (part / 2 * p.head_stride + part % 2 * p.value_offset) * int64_t(sizeof(T));
    const int64_t last = (begin + p.head_dim * int64_t(sizeof(T)) - 1) / kCacheLine;
    for (next = max64(next, begin / kCacheLine); next <= last; ++next) lines[count++] = int32_t(next * kCacheLine);
  }
  return count;
}

template <class Element, class Source>
RAGGED_INLINE void read_queries(const Problem& p, const Query* queries, int64_t count, HeadRange kv_heads,
                                const DecodeScratch& s) {
  const int64_t rows = count * p.group();
  for (int64_t h = kv_heads.begin; h < kv_heads.end; ++h)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = queries[r / p.group()].token * p.num_q_heads + h * p.group() + r % p.group();
      Element* to = s.queries_of<Element>(h * rows + r);
      convert(static_cast<const Source*>(p.queries) + head * p.head_dim, to, p.head_dim);
      __builtin_memset(to + p.head_dim, 0, size_t(s.query_stride - p.head_dim) * sizeof(*to));
    }
}

template <class T, class Dot, class Heads>
void decode_blocks(const Problem& p, int64_t row, const Query* queries, int64_t number, int64_t begin, int64_t end,
                   void* scratch, HeadRange kv_heads) {
  DecodeScratch s(p, number, scratch);
  const Cache<T> cache(p, row);
  with_query_type(p.query_dtype, [&](auto tag) {
    using Source = typename decltype(tag)::type;
    if constexpr (sizeof(typename Dot::Query) == sizeof(float) || is_same<Source, BF16>)
      read_queries<typename Dot::Query, Source>(p, queries, number, kv_heads, s);
  });

  Heads heads(p, s, queries, number, kv_heads);
  const int64_t bytes = p.num_kv_heads * p.head_dim * 2 * int64_t(sizeof(T));
  const int64_t tokens = min64(Heads::most_tokens(p, s), kDecodeBlockBytes / bytes / Heads::kTokens * Heads::kTokens);
  const int64_t block = max64(Heads::kTokens, tokens);
  const int64_t lines_each = find_lines<T>(p, s.lines);
  int64_t count = min64(block, end - begin);
  cache.slots(begin, count, s.slot);
  while (count > 0) {
    for (int64_t t = count; t < count + kDecodePadding; ++t) s.slot[t] = s.slot[count - 1];
    const int64_t ahead_count = min64(block, end - begin - count);
    if (ahead_count > 0) cache.slots(begin + count, ahead_count, s.next);
    Ahead ahead{s.next, s.lines, lines_each, 0, 0};
    heads.start(begin, count);
    for (int64_t h = kv_heads.begin; h < kv_heads.end; ++h) {
      // Each head's work is accompanied by its share of the requests.
      const int64_t all = ahead_count * lines_each, heads_left = kv_heads.end - h;
      const int64_t asked = (ahead.slot - s.next) * lines_each + ahead.next;
      ahead.budget = (all - asked) / heads_left;
      heads.attend(h, count, ahead);
    }
    begin += count;
    count = ahead_count;
    const char** swapped = s.slot;
    s.slot = s.next;
    s.next = swapped;
  }
  heads.finish(kv_heads);
}

#if defined(__AMX_BF16__)
#include "kernels/decode_tiles-inl.h"
#endif

// Whether products are made in pairs of bfloat16, which holds all of the cache's numbers, and weights are rounded to
// it.
RAGGED_INLINE bool pairs(const Problem& p) {
  return kDotBF16 && p.float_products == 0 && p.query_dtype == DType::kBF16 &&
         (p.cache_dtype == DType::kBF16 || element_size(p.cache_dtype) == 1);
}

void attend_few_heads(const Problem& p, int64_t row, const Query* queries, int64_t count, int64_t begin, int64_t end,
                      void* scratch, HeadRange kv_heads) {
#if defined(__AMX_BF16__)
  if (pairs(p) && p.cache_dtype == DType::kBF16 && tiles_fit(p) && count == 1) {
    if (p.logits_soft_cap > 0)
      decode_tiles<true>(p, row, queries, begin, end, scratch, kv_heads);
    else
      decode_tiles<false>(p, row, queries, begin, end, scratch, kv_heads);
    // A tile multiplies an element of the neighboring column by 0, which is NaN where that element is not finite.
    const float* sums = queries->partial.weighted;
    const int64_t stride = p.group() * partial_stride(p);
    if (all_finite(sums + kv_heads.begin * stride, (kv_heads.end - kv_heads.begin) * stride)) return;
  }
#endif
  with_type(p.cache_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto attend = [&](auto heads, auto dot) {
      using Heads = typename decltype(heads)::type;
      using Dot = typename decltype(dot)::type;
      decode_blocks<T, Dot, Heads>(p, row, queries, count, begin, end, scratch, kv_heads);
    };
    // What more than four rows read is staged: it is converted once, and lies close together. Keys of a head in the
    // cache are whole pages of memory apart, so a first-level cache has but a few places for all of them.
    const bool apart = p.token_stride * int64_t(sizeof(T)) >= kStagedStride;
    const bool staged = count * p.group() > 4 && (apart || sizeof(T) == 1);
#if defined(__AVX512BF16__)
    if constexpr (is_same<T, BF16>)
      if (pairs(p) && !staged) return attend(Tag<VectorHeads<T, PairDot, false>>{}, Tag<PairDot>{});
    if constexpr (is_same<T, BF16> || sizeof(T) == 1)
      if (pairs(p)) return attend(Tag<VectorHeads<T, PairDot, true>>{}, Tag<PairDot>{});
#endif
    if (staged) return attend(Tag<VectorHeads<T, FloatDot<float>, true>>{}, Tag<FloatDot<float>>{});
    attend(Tag<VectorHeads<T, FloatDot<T>, false>>{}, Tag<FloatDot<T>>{});
  });
}

void attend_few(const Problem& p, int64_t row, const Query* queries, int64_t count, int64_t begin, int64_t end,
                void* scratch) {
  attend_few_heads(p, row, queries, count, begin, end, scratch, {0, p.num_kv_heads});
}

size_t few_scratch(const Problem& p) {
  size_t size = DecodeScratch(p, most_few(p), nullptr).size;
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
