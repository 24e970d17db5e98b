// Attention of many query tokens, one kv head: an online softmax over tiles of packed keys and values.

// Keys of a tile, transposed: panels of kPanel tokens, each [depth][kPanel]. Tokens past `count` are zero.
template <class Step, class T>
RAGGED_INLINE VecF packed_key(const T* key, int64_t d, int64_t head_dim) {
  if constexpr (Step::kElements == 2) {
    if constexpr (is_same<T, BF16>)
      if (d + 2 * kLanes <= head_dim) return load_bits<VecF>(key + d);
    BF16 pairs[2 * kLanes] = {};
    convert(key + d, pairs, min64(2 * kLanes, head_dim - d));
    return load_bits<VecF>(pairs);
  } else {
    return d + kLanes <= head_dim ? load(key + d) : load_tail(key + d, head_dim - d);
  }
}
template <class Step, class T>
void pack_keys(const T* const* slot, int64_t count, int64_t offset, int64_t head_dim, int64_t depth, float* packed) {
  for (int64_t t = 0; t < round_up(count, kPanel); t += kLanes) {
    float* panel = packed + t / kPanel * kPanel * depth + t % kPanel;
    for (int64_t d = 0; d < depth; d += kLanes) {
      VecF v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        v[i] = t + i < count ? packed_key<Step>(slot[t + i] + offset, d * Step::kElements, head_dim) : VecF{};
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, v[i]);
    }
  }
}

// Values of a tile: panels of kPanel columns (the last one narrower), each [tokens][columns], zeros past `count`.
template <class Step, class T>
void pack_values(const T* const* slot, int64_t count, int64_t offset, int64_t head_dim, float* packed) {
  const int64_t steps = round_up(count, 2 * kLanes) / Step::kElements, width = round_up(head_dim, kLanes);
  for (int64_t column = 0; column < width; column += kPanel) {
    const int64_t columns = min64(kPanel, width - column);
    float* panel = packed + column * (kTile / Step::kElements);
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t c = column; c < column + columns; c += kLanes) {
        const auto value = [&](int64_t t) {
          if (t >= count) return VecF{};
          const T* from = slot[t] + offset + c;
          return c + kLanes <= head_dim ? load(from) : load_tail(from, head_dim - c);
        };
        VecF v;
        if constexpr (Step::kElements == 2)  // the halves of a bf16 widened to float are its bits and zeros
          v = bit_cast<VecF>((bit_cast<VecU>(value(2 * k)) >> 16) | bit_cast<VecU>(value(2 * k + 1)));
        else
          v = value(k);
        store(panel + k * columns + (c - column), v);
      }
    }
  }
}

// Memory of attend_exactly: a partial, then what few queries need.
RAGGED_INLINE Partial exact_partial(const Problem& p, Carver& carver) {
  float* maximum = carver.take<float>(p.num_q_heads);
  float* total = carver.take<float>(p.num_q_heads);
  return {maximum, total, carver.take<float>(p.num_q_heads * partial_stride(p))};
}
RAGGED_INLINE size_t exact_scratch(const Problem& p) {
  Carver carver{nullptr};
  exact_partial(p, carver);
  return carver.used + few_scratch(p);
}

// Elements of a step's products.
template <class Step>
using ElementOf = typename Choose<Step::kElements == 2, BF16, float>::type;

template <class T, class Step>
struct ManyScratch {
  using Element = ElementOf<Step>;
  using Slot = typename Choose<is_same<T, Coded>, const char*, const T*>::type;
  int64_t rows, depth, width;  // depth: steps over key_dim; width: columns of the sums
  float *queries, *keys, *values, *scores, *weights, *sums, *maximum, *total, *factor;
  Slot* slot;
  Element* staged;              // keys and values of a tile of codes, [kTile][2][staged_stride]
  const Element** staged_slot;  // [kTile]
  int64_t staged_stride;
  Norms norms;  // [kTile], of codes
  Seen* seen;   // [queries], of a tile
  char* rest;   // of attend_exactly
  size_t size;
  ManyScratch(const Problem& p, int64_t tokens, void* base) {
    Carver carver{static_cast<char*>(base)};
    rows = round_up(tokens * p.group(), Step::kRows);
    depth = round_up(p.key_dim, Step::kElements * kLanes) / Step::kElements;
    width = round_up(p.head_dim, kLanes);
    queries = carver.take<float>(rows * depth);
    keys = carver.take<float>(kTile * depth);
    values = carver.take<float>(kTile * width);
    scores = carver.take<float>(Step::kRows * kTile);  // of one block of rows
    weights = Step::kElements == 2 ? carver.take<float>(Step::kRows * kTile / 2) : scores;
    sums = carver.take<float>(rows * width);
    maximum = carver.take<float>(rows);
    total = carver.take<float>(rows);
    factor = carver.take<float>(Step::kRows);
    slot = carver.take<Slot>(kTile);
    staged_stride = round_up(p.key_dim, 64);
    const int64_t unpacked = p.cache_dtype == DType::kCodes ? kTile : 0;
    staged = carver.take<Element>(unpacked * 2 * staged_stride);
    staged_slot = carver.take<const Element*>(unpacked);
    norms = {carver.take<float>(unpacked), carver.take<float>(unpacked)};
    for (int64_t t = 0; base != nullptr && t < unpacked; ++t) staged_slot[t] = staged + t * 2 * staged_stride;
    seen = carver.take<Seen>(tokens);
    rest = carver.take<char>(int64_t(exact_scratch(p)));
    size = carver.used;
  }
};

// Where a value is not finite. The queries of a tile see different keys, and a product covers the tile: a weight of 0
// times an infinite value is NaN, also for a query that does not see the value. Such a NaN never leaves the sums again.
// So a query token whose sums are not finite is attended once more, with the loops for few queries, which read only
// keys that the query sees. All other tokens lose no time.
void attend_exactly(const Problem& p, int64_t row, int64_t kv_head, const Query& query, int64_t begin, int64_t end,
                    char* scratch) {
  Carver carver{scratch};
  Query alone = query;
  const KeyRange keys = visible_keys(p, query.position, 1);
  begin = max64(begin, keys.begin);
  end = min64(end, keys.end);
  if (query.partial.weighted == nullptr) alone.partial = exact_partial(p, carver);
  attend_few_heads(p, row, &alone, 1, begin, end, carver.base + carver.used, {kv_head, kv_head + 1});
  if (query.partial.weighted == nullptr)
    finish_heads(p, &alone.partial, 1, query.token, {kv_head * p.group(), (kv_head + 1) * p.group()});
}

// Weights of one row's scores in columns [from, to), of which it sees [low, high). The rest becomes 0.
template <class Step, bool kCapped, bool kNorms, bool kMasked>
RAGGED_INLINE void many_softmax(const Logits& logits, float* scores, float* weights, int64_t from, int64_t to,
                                const Seen& seen, const Norms& norms, float& maximum_seen, float& total,
                                float& factor) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  VecF most = splat(-kInfinity);
  for (int64_t t = from; t < to; t += kLanes) {
    VecF x = load(scores + t);
    if constexpr (kNorms) x = x * load(norms.keys + t);
    x = logits.of<kCapped>(x);
    if constexpr (kMasked) {
      const VecI column = lane + splat_int(int32_t(t));
      x = column >= splat_int(int32_t(seen.low)) ? x : splat(-kInfinity);
      x = column < splat_int(int32_t(seen.high)) ? x : splat(-kInfinity);
    }
    store(scores + t, x);
    most = maximum(x, most);
  }
  if constexpr (Step::kElements == 2)
    factor = add_weights<kNorms>(scores, reinterpret_cast<BF16*>(weights), from, to, most, norms, maximum_seen, total);
  else
    factor = add_weights<kNorms>(scores, weights, from, to, most, norms, maximum_seen, total);
}

// Output and logsumexp of one row of queries, whose sums are over all keys that it sees.
template <class Scratch>
RAGGED_INLINE void store_output(const Problem& p, const Scratch& s, int64_t r, int64_t token, int64_t kv_head,
                                int64_t head) {
  float total = s.total[r], reference = s.maximum[r] == -kInfinity ? 0.0f : s.maximum[r], rescale = 1.0f;
  const float* highest = nullptr;  // the sink, where it is the largest logit
  if (p.sinks) {
    const float sink = base2_sink(p.sinks[head]);
    const float most = sink > s.maximum[r] ? sink : s.maximum[r];
    reference = most == -kInfinity ? 0.0f : most;
    rescale = exp2_nonpositive(s.maximum[r] - reference);
    total = total * rescale + exp2_nonpositive(sink - reference);
    if (reference == sink) highest = p.sinks + head;
  }
  if (p.lse) p.lse[token * p.num_q_heads + head] = logsumexp(reference, total, highest);
  const float inverse = total > 0 ? value_scale(p, kv_head) * rescale / total : (total == total ? 0.0f : total);
  with_query_type(p.query_dtype, [&](auto tag) {
    using To = typename decltype(tag)::type;
    To* to = static_cast<To*>(p.output) + (token * p.num_q_heads + head) * p.head_dim;
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      const VecF v = load(s.sums + r * s.width + d) * splat(inverse);
      if (d + kLanes <= p.head_dim)
        store(to + d, v);
      else
        store_tail(to + d, v, p.head_dim - d);
    }
  });
}

template <class T, class Step, bool kCapped>
void many_rows(const Problem& p, int64_t row, int64_t kv_head, const Query* queries, int64_t count, int64_t begin,
               int64_t end, void* scratch) {
  using Element = ElementOf<Step>;
  constexpr bool kNorms = is_same<T, Coded>;
  ManyScratch<T, Step> s(p, count, scratch);
  const Logits logits(p, kv_head);
  const Cache<T> cache(p, row);
  const int64_t group = p.group(), live = count * group, offset = kv_head * p.head_stride;
  const auto head = [&](int64_t r) { return kv_head * group + r % group; };

  with_query_type(p.query_dtype, [&](auto tag) {
    using Source = typename decltype(tag)::type;
    for (int64_t r = 0; r < s.rows; ++r) {
      float* to = s.queries + r * s.depth;
      __builtin_memset(to, 0, size_t(s.depth) * sizeof(float));
      if (r >= live) continue;
      const Source* query =
          static_cast<const Source*>(p.queries) + (queries[r / group].token * p.num_q_heads + head(r)) * p.key_dim;
      convert(query, reinterpret_cast<Element*>(to), p.key_dim);
    }
  });
  for (int64_t r = 0; r < s.rows; ++r) {
    s.maximum[r] = -kInfinity;
    s.total[r] = 0.0f;
  }
  __builtin_memset(s.sums, 0, size_t(s.rows * s.width) * sizeof(float));

  Step::begin();
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t tokens = min64(kTile, end - start);
    cache.slots(start, tokens, s.slot);
    const auto pack = [&](auto slot, int64_t key, int64_t value) {
      pack_keys<Step>(slot, tokens, key, p.key_dim, s.depth, s.keys);
      pack_values<Step>(slot, tokens, value, p.head_dim, s.values);
    };
    if constexpr (is_same<T, Coded>) {
      unpack_head(p, s.slot, tokens, kv_head, s.staged, s.staged_stride, s.norms);
      for (int64_t t = tokens; t < round_up(tokens, 2 * kLanes); ++t) s.norms.keys[t] = s.norms.values[t] = 0.0f;
      pack(s.staged_slot, 0, s.staged_stride);
    } else {
      pack(s.slot, offset, offset + p.value_offset);
    }
    for (int64_t q = 0; q < count; ++q) s.seen[q] = seen_of_block(p, queries[q].position, start, tokens);
    for (int64_t r = 0; r < s.rows; r += Step::kRows) {
      int64_t from = kTile, to = 0;
      for (int64_t q = r / group; q <= (min64(r + Step::kRows, live) - 1) / group; ++q) {
        from = min64(from, s.seen[q].low);
        to = max64(to, s.seen[q].high);
      }
      from = from / (2 * kLanes) * (2 * kLanes);
      to = round_up(to, 2 * kLanes);
      if (to <= from) continue;
      score_block<Step>(s.queries + r * s.depth, s.keys, s.depth, from, to, s.scores);
      for (int64_t i = 0; i < Step::kRows; ++i) {
        float* scores = s.scores + i * kTile;
        float* weights = s.weights + i * (kTile / Step::kElements);
        s.factor[i] = 0.0f;
        if (r + i >= live) {
          __builtin_memset(weights, 0, kTile / Step::kElements * sizeof(float));
          continue;
        }
        const Seen seen = s.seen[(r + i) / group];
        if (seen.low <= from && seen.high >= to)
          many_softmax<Step, kCapped, kNorms, false>(logits, scores, weights, from, to, seen, s.norms, s.maximum[r + i],
                                                     s.total[r + i], s.factor[i]);
        else
          many_softmax<Step, kCapped, kNorms, true>(logits, scores, weights, from, to, seen, s.norms, s.maximum[r + i],
                                                    s.total[r + i], s.factor[i]);
      }
      sum_block<Step>(s.weights, s.values, from, to, s.factor, s.sums + r * s.width, s.width);
    }
  }
  Step::end();

  for (int64_t r = 0; r < live; ++r) {
    const Query& query = queries[r / group];
    if (query.partial.weighted == nullptr) {
      store_output(p, s, r, query.token, kv_head, head(r));
      continue;
    }
    query.partial.maximum[head(r)] = s.maximum[r];
    query.partial.total[head(r)] = s.total[r];
    __builtin_memcpy(query.partial.weighted + head(r) * partial_stride(p), s.sums + r * s.width,
                     size_t(s.width) * sizeof(float));
  }
  for (int64_t i = 0; i < count; ++i)
    if (!all_finite(s.sums + i * group * s.width, group * s.width))
      attend_exactly(p, row, kv_head, queries[i], begin, end, s.rest);
}

#if defined(__AMX_BF16__)
using BestPairStep = TileStep;
#elif defined(__AVX512BF16__)
using BestPairStep = PairStep;
#endif

// Rows of the two products: what they need then fits a second-level cache. Tiles are so fast that packing keys and
// values for them is what costs, so each packed key should serve more rows.
int64_t most_many(const Problem& p) {
#if defined(__AMX_BF16__)
  const int64_t rows = pairs(p) ? 1024 : 256;
#else
  const int64_t rows = 256;
#endif
  return max64(1, rows / p.group());
}

void attend_many(const Problem& p, int64_t row, int64_t kv_head, const Query* queries, int64_t count, int64_t begin,
                 int64_t end, void* scratch) {
  const bool capped = p.logits_soft_cap > 0;
  with_cache_type(p.cache_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto attend = [&](auto step) {
      using Step = typename decltype(step)::type;
      if (capped)
        many_rows<T, Step, true>(p, row, kv_head, queries, count, begin, end, scratch);
      else
        many_rows<T, Step, false>(p, row, kv_head, queries, count, begin, end, scratch);
    };
#if defined(__AVX512BF16__)
    if constexpr (is_same<T, BF16> || sizeof(T) == 1)
      if (pairs(p)) return attend(Tag<BestPairStep>{});
#endif
    attend(Tag<FloatStep>{});
  });
}

size_t many_scratch(const Problem& p) {
  const int64_t tokens = most_many(p);
#if defined(__AVX512BF16__)
  if (pairs(p)) return ManyScratch<BF16, BestPairStep>(p, tokens, nullptr).size;
#endif
  return ManyScratch<float, FloatStep>(p, tokens, nullptr).size;
}
