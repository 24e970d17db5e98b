// Attention of few query tokens, all heads, over keys as they lie in the cache. A block of tokens at a time comes into
// the second-level cache; each of its keys and values is loaded there for up to four queries at once.

template <class F>
RAGGED_INLINE void with_count(int64_t count, F&& f) {
  if (count == 4) f(Count<4>{});
  if (count == 3) f(Count<3>{});
  if (count == 2) f(Count<2>{});
  if (count == 1) f(Count<1>{});
}

// Attention of some queries to a block of tokens, on vectors. A row is a query token and a head of the group. Rows that
// fill the lanes of a vector are taken in lanes, where all queries see the whole block; others four at a time.
template <class T, class Dot, bool kStaged>
struct VectorHeads {
  using Element = typename Dot::Element;
  static_assert(kStaged || is_same<T, Element>, "what is converted is staged");
  const Problem& p;
  const FewScratch& s;
  const Query* const queries;
  const int64_t rows, in_lanes;  // of a kv head; the first rows are taken in lanes
  const LaneScratch lanes;
  bool all_seen = false, any_in_lanes = false;

  VectorHeads(const Problem& problem, const FewScratch& scratch, const Query* first, int64_t count, HeadRange heads)
      : p(problem),
        s(scratch),
        queries(first),
        rows(count * problem.group()),
        in_lanes(kStaged ? rows_in_lanes(rows) : 0),
        lanes(problem, kStaged ? rows : 0, scratch.query_stride, scratch.rest) {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t h = heads.begin * p.group(); h < heads.end * p.group(); ++h) {
        queries[q].partial.maximum[h] = -kInfinity;
        queries[q].partial.total[h] = 0.0f;
        __builtin_memset(weighted(q, h), 0, size_t(partial_stride(p)) * sizeof(float));
      }
    if constexpr (kStaged)
      for (int64_t h = heads.begin; h < heads.end; ++h)
        for (int64_t r = 0; r < in_lanes; r += kLanes) start_lanes(h, r);
  }
  VectorHeads(const VectorHeads&) = delete;

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
    int64_t keys = kv_head * p.head_stride, values = keys + p.value_offset, r = 0;
    if constexpr (kStaged) {
      if (all_seen) r = in_lanes;
      // Rows in lanes alone need no staged elements, unless whole vectors of values might end past the cache.
      const bool once = is_same<T, Element> && r == rows && (Dot::kPairs || p.head_dim % kLaneTokens == 0);
      if (!once) stage_head(kv_head, count, slot, keys, values);
      if (r > 0) attend_in_lanes(logits, kv_head, slot, count, keys, values, ahead);
    }
    while (r < rows) {
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
          Norms norms = s.norms;
          if constexpr (is_same<T, Coded>) norms = {norms.keys + seen.low, norms.values + seen.low};
          attend_rows<decltype(number)::value>(logits, kv_head, r, slot + seen.low, seen.high - seen.low, keys, values,
                                               norms, ahead);
        };
        with_count(same, attend_some);
      }
      r += same;
    }
  }

  void finish(HeadRange heads) {
    for (int64_t h = heads.begin; h < heads.end && any_in_lanes; ++h)
      for (int64_t r = 0; r < in_lanes; r += kLanes) finish_lanes(h, r);
#if defined(__AVX512BF16__)
    if constexpr (Dot::kPairs)
      for (int64_t q = 0; q < rows / p.group(); ++q)
        for (int64_t h = heads.begin * p.group(); h < heads.end * p.group(); ++h)
          in_order<Dot>(weighted(q, h), p.head_dim);
#endif
  }

 private:
  int64_t head_of(int64_t kv_head, int64_t row) const { return kv_head * p.group() + row % p.group(); }

  // Keys and values of a block, converted: then they are at `slot`, and `keys` and `values` are their offsets there.
  void stage_head(int64_t kv_head, int64_t count, const char* const*& slot, int64_t& keys, int64_t& values) const {
    Element* staged = reinterpret_cast<Element*>(s.staged);
    for (int64_t t = 0; t < count + kBlockPadding; ++t)
      s.staged_slot[t] = s.staged + min64(t, count - 1) * 2 * s.query_stride * int64_t(sizeof(Element));
    if constexpr (is_same<T, Coded>) {
      unpack_head(p, slot, count, kv_head, staged, s.query_stride, s.norms);
    } else {
      stage<T>(slot, count, keys, p.head_dim, staged, s.query_stride);
      stage<T>(slot, count, values, p.head_dim, staged + s.query_stride, s.query_stride);
    }
    slot = s.staged_slot;
    keys = 0;
    values = s.query_stride;
  }

  void start_lanes(int64_t kv_head, int64_t row) const {
    const LaneRows found = lanes.of(kv_head, row / kLanes);
    // In elements of 32 bits.
    const int64_t stride = s.query_stride * int64_t(sizeof(typename Dot::Query)) / int64_t(sizeof(float));
    queries_in_lanes(reinterpret_cast<const float*>(s.template queries_of<typename Dot::Query>(kv_head * rows + row)),
                     min64(kLanes, rows - row), stride, stride, found.queries);
    store(found.maximum, splat(-kInfinity));
    __builtin_memset(found.total, 0, size_t(lanes.found_size - kLanes) * sizeof(float));
  }

  void attend_in_lanes(const Logits& logits, int64_t kv_head, const char* const* slot, int64_t count, int64_t keys,
                       int64_t values, Ahead& ahead) {
    constexpr bool kNorms = is_same<T, Coded>;
    const int64_t bytes = p.key_dim * int64_t(sizeof(Element)), tokens = FewScratch::most_tokens(p);
    any_in_lanes = true;
    keys_in_lines(slot, count, keys * int64_t(sizeof(Element)), bytes, tokens, lanes.keys);
    typename LaneDot<Dot>::Values beside(slot, count, values, p.head_dim, lanes.values);
    int64_t steps = count, columns = p.head_dim;
    if constexpr (Dot::kPairs) {
      slot = lanes.value;
      values = 0;
      steps = (count + 1) / 2;
      columns = lanes.columns;
    }
    for (int64_t r = 0; r < in_lanes; r += kLanes) {
      const LaneRows found = lanes.of(kv_head, r / kLanes);
      lane_products<Dot>(found.queries, lanes.keys, (bytes + kCacheLine - 1) / kCacheLine, tokens, count, lanes.weights,
                         ahead, beside);
      beside.finish();
      const auto softmax = [&](auto capped) {
        return lane_softmax<Dot, decltype(capped)::value != 0, kNorms>(logits, lanes.weights, count, s.norms,
                                                                       found.maximum, found.total);
      };
      const VecF factor = p.logits_soft_cap > 0 ? softmax(Count<1>{}) : softmax(Count<0>{});
      lane_values<Dot>(lanes.weights, factor, slot, values, steps, columns, found.sums, ahead);
    }
  }

  void finish_lanes(int64_t kv_head, int64_t row) const {
    float *maximum[kLanes], *total[kLanes], *sums[kLanes];
    const int64_t live = min64(kLanes, rows - row);
    for (int64_t i = 0; i < live; ++i) {
      const int64_t query = (row + i) / p.group(), head = head_of(kv_head, row + i);
      maximum[i] = queries[query].partial.maximum + head;
      total[i] = queries[query].partial.total + head;
      sums[i] = weighted(query, head);
    }
    merge_lanes(lanes.of(kv_head, row / kLanes), live, Dot::kPairs ? lanes.columns : p.head_dim, maximum, total, sums);
  }

  float* weighted(int64_t query, int64_t head) const {
    return queries[query].partial.weighted + head * partial_stride(p);
  }

  template <int kQueries>
  void attend_rows(const Logits& logits, int64_t kv_head, int64_t row, const char* const* slot, int64_t count,
                   int64_t keys, int64_t values, const Norms& norms, Ahead& ahead) {
    constexpr bool kNorms = is_same<T, Coded>;
    few_products<Dot, kQueries>(s.template queries_of<typename Dot::Query>(kv_head * rows + row), s.query_stride, slot,
                                count, keys, p.key_dim, s.weights, ahead);
    float factor[kQueries];
    float *sums[kQueries], *maximum[kQueries], *total[kQueries];
    typename Dot::Weight* weights = reinterpret_cast<typename Dot::Weight*>(Dot::kPairs ? s.pairs : s.weights);
    for (int i = 0; i < kQueries; ++i) {
      const int64_t query = (row + i) / p.group(), head = head_of(kv_head, row + i);
      maximum[i] = queries[query].partial.maximum + head;
      total[i] = queries[query].partial.total + head;
      sums[i] = weighted(query, head);
    }
    if (p.logits_soft_cap > 0)
      few_softmax<true, kNorms, kQueries>(logits, s.weights, weights, count, norms, maximum, total, factor);
    else
      few_softmax<false, kNorms, kQueries>(logits, s.weights, weights, count, norms, maximum, total, factor);
    few_all_values<kQueries>(Tag<Dot>{}, weights, factor, slot, count, values, p.head_dim, sums, ahead);
  }
};

// In elements of the products.
template <class Dot, class Source>
RAGGED_INLINE void read_queries(const Problem& p, const Query* queries, int64_t count, HeadRange kv_heads,
                                const FewScratch& s) {
  const int64_t rows = count * p.group();
  for (int64_t h = kv_heads.begin; h < kv_heads.end; ++h)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = queries[r / p.group()].token * p.num_q_heads + h * p.group() + r % p.group();
      typename Dot::Query* to = s.template queries_of<typename Dot::Query>(h * rows + r);
      convert(static_cast<const Source*>(p.queries) + head * p.key_dim, to, p.key_dim);
      __builtin_memset(to + p.key_dim, 0, size_t(s.query_stride - p.key_dim) * sizeof(*to));
      Dot::arrange(to, p.key_dim);
    }
}

template <class T, class Dot, class Heads>
void few_blocks(const Problem& p, int64_t row, const Query* queries, int64_t number, int64_t begin, int64_t end,
                void* scratch, HeadRange kv_heads) {
  FewScratch s(p, number, scratch);
  const Cache<T> cache(p, row);
  with_query_type(p.query_dtype, [&](auto tag) {
    using Source = typename decltype(tag)::type;
    if constexpr (sizeof(typename Dot::Query) == sizeof(float) || is_same<Source, BF16> || is_same<T, Coded>)
      read_queries<Dot, Source>(p, queries, number, kv_heads, s);
  });

  Heads heads(p, s, queries, number, kv_heads);
  const int64_t block = FewScratch::block_tokens(p, number * p.group());
  int64_t lines_each = 0;
  if constexpr (!is_same<T, Coded>) lines_each = find_lines<T>(p, {0, p.num_kv_heads}, s.lines);
  int64_t count = min64(block, end - begin);
  cache.slots(begin, count, s.slot);
  if (end - begin > kLeastBlock) {  // fewer are there as soon as they were requested
    Ahead first = lines_ahead<T>(p, s, s.slot, count, lines_each);
    for (first.budget = first.left; first.budget > 0;) first.request();
  }
  while (count > 0) {
    for (int64_t t = count; t < count + kBlockPadding; ++t) s.slot[t] = s.slot[count - 1];
    const int64_t ahead_count = min64(block, end - begin - count);
    if (ahead_count > 0) cache.slots(begin + count, ahead_count, s.next);
    Ahead ahead = lines_ahead<T>(p, s, s.next, ahead_count, lines_each);
    heads.start(begin, count);
    for (int64_t h = kv_heads.begin; h < kv_heads.end; ++h) {
      // Each head's work is accompanied by its share of the requests.
      ahead.left += ahead.budget;  // what the last head left over
      ahead.budget = ahead.left / (kv_heads.end - h);
      ahead.left -= ahead.budget;
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
#include "kernels/few_tiles-inl.h"
#endif

// Whether products are made in pairs of bfloat16, and weights are rounded to it. It holds all numbers of a plain cache
// and of the queries then. What codes stand for and the rotated queries are rounded to it, too.
RAGGED_INLINE bool pairs(const Problem& p) {
  return kDotBF16 && p.float_products == 0 &&
         (p.cache_dtype == DType::kCodes ||
          (p.query_dtype == DType::kBF16 && p.cache_dtype != DType::kF32 && p.cache_dtype != DType::kF16));
}

void attend_few_heads(const Problem& p, int64_t row, const Query* queries, int64_t count, int64_t begin, int64_t end,
                      void* scratch, HeadRange kv_heads) {
#if defined(__AMX_BF16__)
  if (pairs(p) && p.cache_dtype == DType::kBF16 && tiles_fit(p) && count == 1) {
    if (p.logits_soft_cap > 0)
      few_tiles<true>(p, row, queries, begin, end, scratch, kv_heads);
    else
      few_tiles<false>(p, row, queries, begin, end, scratch, kv_heads);
    // A tile multiplies an element of the neighboring column by 0, which is NaN where that element is not finite.
    const float* sums = queries->partial.weighted;
    const int64_t stride = p.group() * partial_stride(p);
    if (all_finite(sums + kv_heads.begin * stride, (kv_heads.end - kv_heads.begin) * stride)) return;
  }
#endif
  with_cache_type(p.cache_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto attend = [&](auto heads, auto dot) {
      using Heads = typename decltype(heads)::type;
      using Dot = typename decltype(dot)::type;
      few_blocks<T, Dot, Heads>(p, row, queries, count, begin, end, scratch, kv_heads);
    };
    // What more than four rows read is staged: it is converted once, and lies close together. Keys of a head in the
    // cache are whole pages of memory apart, so a first-level cache has but a few places for all of them. What rows in
    // lanes read is, too.
    const bool apart = p.token_stride * int64_t(sizeof(T)) >= kStagedStride;
    const int64_t rows = count * p.group();
    const bool staged = rows > 4 && (apart || sizeof(T) == 1 || rows_in_lanes(rows) > 0);
#if defined(__AVX512BF16__)
    if constexpr (is_same<T, BF16>)
      if (pairs(p) && !staged) return attend(Tag<VectorHeads<T, PairDot, false>>{}, Tag<PairDot>{});
#if defined(__AVX512VBMI__)
    if constexpr (sizeof(T) == 1 && !is_same<T, Coded>)
      if (pairs(p) && rows <= 4 && p.head_dim % ByteDot<T>::kStep == 0)
        return attend(Tag<VectorHeads<T, ByteDot<T>, false>>{}, Tag<ByteDot<T>>{});
#endif
    if constexpr (is_same<T, BF16> || sizeof(T) == 1)
      if (pairs(p)) return attend(Tag<VectorHeads<T, PairDot, true>>{}, Tag<PairDot>{});
#endif
    if (staged || is_same<T, Coded>)
      return attend(Tag<VectorHeads<T, FloatDot<float>, true>>{}, Tag<FloatDot<float>>{});
    if constexpr (!is_same<T, Coded>) attend(Tag<VectorHeads<T, FloatDot<T>, false>>{}, Tag<FloatDot<T>>{});
  });
}

void attend_few(const Problem& p, int64_t row, const Query* queries, int64_t count, int64_t begin, int64_t end,
                void* scratch) {
  attend_few_heads(p, row, queries, count, begin, end, scratch, {0, p.num_kv_heads});
}

size_t few_scratch(const Problem& p) {
  const int64_t count = most_few(p);
  const FewScratch s(p, count, nullptr);
  size_t rest = LaneScratch(p, count * p.group(), s.query_stride, nullptr).size;
#if defined(__AMX_BF16__)
  const size_t of_tiles = TileScratch(p, nullptr).size;
  rest = rest > of_tiles ? rest : of_tiles;
#endif
  return s.size + rest;
}
