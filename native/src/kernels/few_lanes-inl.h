// Few queries that fill the lanes of a vector, a row of queries in each. A product takes one element of a key or of a
// value for all of them, which the processor spreads over the lanes as it loads it, and no sum goes across lanes.

// Vectors of up to kLanes queries, one 32-bit element of each: [elements][kLanes]. Lanes without a query are zero.
RAGGED_INLINE void queries_in_lanes(const float* queries, int64_t count, int64_t stride, int64_t elements, float* to) {
  for (int64_t k = 0; k < elements; k += kLanes) {
    VecF v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = i < count ? load(queries + i * stride + k) : VecF{};
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + (k + i) * kLanes, v[i]);
  }
}

// A block's keys, line by line: [lines][tokens][kLineElements]. Neighboring tokens are a line apart, so that they
// don't compete for a place in the first-level cache. The last line of a key is filled up with zeros.
RAGGED_INLINE void keys_in_lines(const char* const* slot, int64_t count, int64_t offset, int64_t bytes, int64_t tokens,
                                 float* to) {
  const int64_t whole = bytes / kCacheLine, rest = bytes % kCacheLine;
  for (int64_t t = 0; t < count; ++t) {
    const char* from = slot[t] + offset;
    char* line = reinterpret_cast<char*>(to + t * kLineElements);
    for (int64_t l = 0; l < whole; ++l, line += tokens * kCacheLine, from += kCacheLine)
      __builtin_memcpy(line, from, kCacheLine);
    for (int64_t i = 0; rest > 0 && i < kCacheLine; ++i) line[i] = i < rest ? from[i] : 0;
  }
}

#if defined(__AVX512BF16__)
// A block's values in pairs of tokens: [pairs][columns], the columns in the order of PairDot. A last token without a
// neighbor has zeros for one.
struct ValuesInPairs {
  const char* const* slot;  // of the first token of a pair
  const char* const* end;   // after the last token
  int64_t offset, head_dim;
  float* to;
  int64_t column = 0;

  ValuesInPairs(const char* const* slot, int64_t count, int64_t offset, int64_t head_dim, float* to)
      : slot(slot), end(slot + count), offset(offset), head_dim(head_dim), to(to) {}

  RAGGED_INLINE_MEMBER void step() {
    if (slot >= end) return;
    const int64_t left = head_dim - column;
    const __mmask32 columns = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    const __m512i even = _mm512_maskz_loadu_epi16(columns, at<BF16>(slot[0], offset + column));
    const __m512i odd =
        slot + 1 < end ? _mm512_maskz_loadu_epi16(columns, at<BF16>(slot[1], offset + column)) : _mm512_setzero_si512();
    store_bits(to, _mm512_unpacklo_epi16(even, odd));
    store_bits(to + kLanes, _mm512_unpackhi_epi16(even, odd));
    to += 2 * kLanes;
    column += 32;
    if (left > 32) return;
    column = 0;
    slot += 2;
  }
  RAGGED_INLINE_MEMBER void finish() {
    while (slot < end) step();
  }
};
#endif

// How an element, or a pair of them, is taken for all lanes.
template <class Dot>
struct LaneDot;
template <>
struct LaneDot<FloatDot<float>> {
  static constexpr int kTokens = 1;  // whose weights and values are side by side
  struct Values : NothingBeside {    // they are used where they are
    Values(const char* const*, int64_t, int64_t, int64_t, float*) {}
  };
  RAGGED_INLINE VecF add(VecF sum, VecF lanes, const float* element) { return fma(lanes, splat(*element), sum); }
  RAGGED_INLINE void store_weights(float* weights, VecF first, VecF) { store(weights, first); }
};
#if defined(__AVX512BF16__)
template <>
struct LaneDot<PairDot> {
  static constexpr int kTokens = 2;
  using Values = ValuesInPairs;
  // Compilers load the pair into a register of its own first, and that takes a third longer.
  RAGGED_INLINE VecF add(VecF sum, VecF lanes, const float* pair) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(lanes), "m"(*pair));
    return sum;
  }
  RAGGED_INLINE void store_weights(float* weights, VecF first, VecF second) {
    store_bits(weights,
               _mm512_permutexvar_epi16(
                   _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                     0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f),
                   (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first)));
  }
};
#endif

// logits[t][kLanes] of `count` tokens, rounded up to kLaneTokens with keys that may hold anything. Beside them, steps
// of something else, which the processor makes while it multiplies.
template <class Dot, class Beside>
void lane_products(const float* queries, const float* keys, int64_t lines, int64_t tokens, int64_t count, float* logits,
                   Ahead& ahead, Beside& beside) {
  Ahead requests = ahead;
  Beside other = beside;
  for (int64_t t = 0; t < count; t += kLaneTokens) {
    VecF sum[kLaneTokens] = {};
    const float *line = keys + t * kLineElements, *query = queries;
    for (int64_t l = 0; l < lines; ++l, line += tokens * kLineElements) {
      for (int e = 0; e < kLineElements; ++e, query += kLanes) {
        const VecF q = load(query);
#pragma GCC unroll 16
        for (int i = 0; i < kLaneTokens; ++i) sum[i] = LaneDot<Dot>::add(sum[i], q, line + i * kLineElements + e);
        requests.request();
        other.step();
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLaneTokens; ++i) store(logits + (t + i) * kLanes, sum[i]);
  }
  ahead = requests;
  beside = other;
}

// sums[c][kLanes] = sums[c][kLanes] * factor + sum over t of weights[t][kLanes] * value[t][c]; in pairs of tokens where
// weights are. Columns are rounded up to kLaneTokens, of values that may hold anything.
template <class Dot>
void lane_values(const float* weights, VecF factor, const char* const* value, int64_t offset, int64_t count,
                 int64_t columns, float* sums, Ahead& ahead) {
  Ahead requests = ahead;
  for (int64_t c = 0; c < columns; c += kLaneTokens, sums += kLaneTokens * kLanes) {
    VecF sum[kLaneTokens];
#pragma GCC unroll 16
    for (int i = 0; i < kLaneTokens; ++i) sum[i] = load(sums + i * kLanes) * factor;
    for (int64_t t = 0; t < count; ++t) {
      const VecF weight = load(weights + t * kLanes);
      const float* element = at<float>(value[t], offset + c);
      asm("" : "+r"(element));  // else GCC keeps an index for each column, in more registers than there are
#pragma GCC unroll 16
      for (int i = 0; i < kLaneTokens; ++i) sum[i] = LaneDot<Dot>::add(sum[i], weight, element + i);
      requests.request();
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLaneTokens; ++i) store(sums + i * kLanes, sum[i]);
  }
  ahead = requests;
}

// As few_softmax, for a query in each lane; weights are in place.
template <class Dot, bool kCapped, bool kNorms>
RAGGED_INLINE VecF lane_softmax(const Logits& logits, float* rows, int64_t count, const Norms& norms,
                                float* maximum_seen, float* total) {
  constexpr int kTokens = LaneDot<Dot>::kTokens;
  float* weights = rows;
  VecF most = splat(-kInfinity);
  for (int64_t t = 0; t < count; ++t) {
    VecF x = load(rows + t * kLanes);
    if constexpr (kNorms) x = x * splat(norms.keys[t]);
    x = logits.of<kCapped>(x);
    store(rows + t * kLanes, x);
    most = maximum(x, most);
  }
  const VecF before = load(maximum_seen), updated = most > before ? most : before;
  const VecF reference = updated == splat(-kInfinity) ? VecF{} : updated;
  VecF sum = {};
  const auto weigh = [&](int64_t t) __attribute__((always_inline)) {
    if (t >= count) return VecF{};
    const VecF weight = exp2_nonpositive<kTokens == 2>(load(rows + t * kLanes) - reference);
    sum = sum + weight;
    if constexpr (kNorms) return weight * splat(norms.values[t]);
    return weight;
  };
  for (int64_t t = 0; t < count; t += kTokens, weights += kLanes) {
    const VecF first = weigh(t);
    LaneDot<Dot>::store_weights(weights, first, kTokens == 2 ? weigh(t + 1) : VecF{});
  }
  const VecF factor = exp2_nonpositive(before - reference);
  store(total, load(total) * factor + sum);
  store(maximum_seen, updated);
  return factor;
}

// Rows of queries of a kv head, as many as there are lanes, and what they have found so far.
struct LaneRows {
  float* queries;          // queries_in_lanes
  float *maximum, *total;  // [kLanes]
  float* sums;             // [columns][kLanes]
};

// What rows in lanes need.
struct LaneScratch {
  float* queries;                        // [kv_heads][sets][query_stride][kLanes], elements or pairs
  float* found;                          // [kv_heads][sets][2 + columns][kLanes]
  float* keys;                           // keys_in_lines
  float* values;                         // ValuesInPairs
  const char** value;                    // addresses of these pairs
  float* weights;                        // [tokens][kLanes], logits at first
  int64_t sets, query_size, found_size;  // the sizes: of a set, in floats
  int64_t columns;                       // of sums: head_dim, rounded up
  size_t size;

  LaneScratch(const Problem& p, int64_t rows, int64_t query_stride, void* base) {
    Carver carver{static_cast<char*>(base)};
    sets = (rows_in_lanes(rows) + kLanes - 1) / kLanes;
    columns = kDotBF16 ? round_up(p.head_dim, 32) : round_up(p.head_dim, 16);
    const int64_t tokens = sets > 0 ? FewScratch::most_tokens(p) : 0;
    static_assert(16 % kLanes == 0 && 16 % kLaneTokens == 0, "whole vectors");
    query_size = query_stride * kLanes;
    found_size = (2 + columns) * kLanes;
    queries = carver.take<float>(p.num_kv_heads * sets * query_size);
    found = carver.take<float>(p.num_kv_heads * sets * found_size);
    keys = carver.take<float>(tokens * query_stride);
    values = carver.take<float>(kDotBF16 ? tokens / 2 * columns : 0);
    value = carver.take<const char*>(tokens);
    weights = carver.take<float>(tokens * kLanes);
    size = carver.used;
    for (int64_t t = 0; base != nullptr && t < tokens; ++t)
      value[t] = reinterpret_cast<const char*>(values + t * columns);
  }
  RAGGED_INLINE_MEMBER LaneRows of(int64_t kv_head, int64_t set) const {
    const int64_t i = kv_head * sets + set;
    float* at = found + i * found_size;
    return {queries + i * query_size, at, at + kLanes, at + 2 * kLanes};
  }
};

// Adds what rows in lanes have found to their partials: maximum, total and weighted values of each of `count` rows.
RAGGED_INLINE void merge_lanes(const LaneRows& rows, int64_t count, int64_t columns, float* const* maximum,
                               float* const* total, float* const* weighted) {
  float before[kLanes], factor[kLanes];
  for (int64_t i = 0; i < count; ++i) {
    const float updated = rows.maximum[i] > *maximum[i] ? rows.maximum[i] : *maximum[i];
    const float reference = updated == -kInfinity ? 0.0f : updated;
    before[i] = exp2_nonpositive(*maximum[i] - reference);
    factor[i] = exp2_nonpositive(rows.maximum[i] - reference);
    *total[i] = *total[i] * before[i] + rows.total[i] * factor[i];
    *maximum[i] = updated;
  }
  for (int64_t c = 0; c < columns; c += kLanes) {
    VecF v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = load(rows.sums + (c + i) * kLanes);
    transpose(v);
    for (int64_t i = 0; i < count; ++i)
      store(weighted[i] + c, fma(v[i], splat(factor[i]), load(weighted[i] + c) * splat(before[i])));
  }
}
