// Attention of many query tokens, one kv head: an online softmax over tiles of packed keys and values.

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

// Blocks of rows whose scores are held at a time: two where weights are made beside products.
template <class Step>
constexpr int kScored = kBesideProducts<Step> ? 2 : 1;

// Rows of a block whose largest scores, or sums of weights, are found together.
template <class Step>
constexpr int kFolded = kLanes < 8 || Step::kRows > 8 ? kLanes : 8;
// Rows of a block, in whole vectors.
template <class Step>
constexpr int kBlockRows = (Step::kRows + kLanes - 1) / kLanes * kLanes;

// Columns [from, to) of a tile.
struct Columns {
  int64_t from, to;
  RAGGED_INLINE_MEMBER Columns whole(int64_t steps) const { return {from / steps * steps, round_up(to, steps)}; }
};

// What a block of rows sees of a tile.
struct SeenByBlock {
  Columns any, each;  // what some row sees, and what each of them sees
};

// Columns of what is scored, weighed and summed begin and end with these.
constexpr int64_t kScoredColumns = 2 * kLanes;
template <class Step>
constexpr int64_t kWeighedColumns = Step::kTiles ? kScoredColumns : kLanes;
template <class Step>
constexpr int64_t kSummedColumns = Step::kTiles ? kScoredColumns : kStepsBeside<Step> * Step::kElements;

template <class T, class Step>
struct ManyScratch {
  using Element = ElementOf<Step>;
  using Slot = typename Choose<is_same<T, Coded>, const char*, const T*>::type;
  int64_t rows, depth, width;  // depth: steps over key_dim; width: columns of the sums
  float *queries, *keys, *values, *sums, *maximum, *total;
  // Of one block of rows: its scores (and those of the block after it); its weights, and their sums by lanes; and for
  // each row what logits are held against, negated, and the factor for what was summed before.
  float *scores[kScored<Step>], *weights, *totals, *minus_reference, *factor;
  Slot *slot, *next_slot;       // of a tile, and of the one after it
  int32_t* lines;               // Ahead::lines, of this kv head
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
    sums = carver.take<float>(rows * width);
    maximum = carver.take<float>(rows + kLanes);  // read in whole vectors
    total = carver.take<float>(rows + kLanes);
    for (float*& block : scores) block = carver.take<float>(Step::kRows * kTile);
    weights = Step::kElements == 2 ? carver.take<float>(Step::kRows * kTile / 2) : nullptr;
    totals = carver.take<float>(Step::kRows * kLanes);
    minus_reference = carver.take<float>(kBlockRows<Step>);
    factor = carver.take<float>(kBlockRows<Step>);
    slot = carver.take<Slot>(kTile);
    next_slot = carver.take<Slot>(kTile);
    lines = carver.take<int32_t>(FewScratch::most_lines(p));
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

// The queries of a call and one kv head. Rows of the products are (query token, head of the group).
template <class T, class Step, bool kCapped>
struct Many {
  static constexpr bool kNorms = is_same<T, Coded>;
  const Problem& p;
  const int64_t row, kv_head, group, count, live;  // live: rows of queries; those after them fill the last block
  const Query* const queries;
  const Cache<T> cache;
  const Logits logits;
  const ManyScratch<T, Step> s;
  Beside<Step, kNorms> beside;
  int64_t lines_each = 0;

  Many(const Problem& problem, int64_t row, int64_t kv_head, const Query* queries, int64_t count, void* scratch)
      : p(problem),
        row(row),
        kv_head(kv_head),
        group(p.group()),
        count(count),
        live(count * group),
        queries(queries),
        cache(p, row),
        logits(p, kv_head),
        s(p, count, scratch) {
    beside.totals = s.totals;
    beside.minus_reference = s.minus_reference;
    beside.norms = s.norms.values;
    if constexpr (!kNorms) lines_each = find_lines<T>(p, {kv_head, kv_head + 1}, s.lines);
  }

  int64_t head(int64_t r) const { return kv_head * group + r % group; }

  void begin() {
    with_query_type(p.query_dtype, [&](auto tag) {
      using Source = typename decltype(tag)::type;
      for (int64_t r = 0; r < s.rows; ++r) {
        float* to = s.queries + r * s.depth;
        __builtin_memset(to, 0, size_t(s.depth) * sizeof(float));
        if (r >= live) continue;
        const Source* query =
            static_cast<const Source*>(p.queries) + (queries[r / group].token * p.num_q_heads + head(r)) * p.key_dim;
        convert(query, reinterpret_cast<ElementOf<Step>*>(to), p.key_dim);
      }
    });
    for (int64_t r = 0; r < s.rows + kLanes; ++r) s.maximum[r] = -kInfinity;
    __builtin_memset(s.total, 0, size_t(s.rows + kLanes) * sizeof(float));
    __builtin_memset(s.sums, 0, size_t(s.rows * s.width) * sizeof(float));
  }

  // Tokens [start, start + tokens), of which the slots are known.
  void pack(int64_t start, int64_t tokens) {
    const auto pack = [&](auto slot, int64_t key, int64_t value) {
      pack_keys<Step>(slot, tokens, key, p.key_dim, s.depth, s.keys);
      pack_values<Step>(slot, tokens, value, p.head_dim, s.values);
    };
    if constexpr (kNorms) {
      unpack_head(p, s.slot, tokens, kv_head, s.staged, s.staged_stride, s.norms);
      for (int64_t t = tokens; t < round_up(tokens, 2 * kLanes); ++t) s.norms.keys[t] = s.norms.values[t] = 0.0f;
      pack(s.staged_slot, 0, s.staged_stride);
    } else {
      pack(s.slot, kv_head * p.head_stride, kv_head * p.head_stride + p.value_offset);
    }
    for (int64_t q = 0; q < count; ++q) s.seen[q] = seen_of_block(p, queries[q].position, start, tokens);
  }

  SeenByBlock seen_by_block(int64_t r) const {
    SeenByBlock seen{{kTile, 0}, {0, kTile}};
    for (int64_t q = r / group; q <= (min64(r + Step::kRows, live) - 1) / group; ++q) {
      seen.any = {min64(seen.any.from, s.seen[q].low), max64(seen.any.to, s.seen[q].high)};
      seen.each = {max64(seen.each.from, s.seen[q].low), min64(seen.each.to, s.seen[q].high)};
    }
    return seen;
  }

  // The rows of a block from `i` on, kFolded of them if there are so many.
  static void store_rows(float* of_block, int64_t i, VecF v) {
    float each[kLanes];
    store(each, v);
    __builtin_memcpy(of_block + i, each, size_t(min64(kFolded<Step>, Step::kRows - i)) * sizeof(float));
  }

  // Raises the maxima of a block of rows by its scores. After that its weights can be made.
  void raise(int64_t r, const SeenByBlock& seen, float* scores) {
    const Columns weighed = seen.any.whole(kWeighedColumns<Step>);
    const int64_t from = weighed.from, to = weighed.to;
    // A positive scale leaves the largest product the largest logit: then nothing has to be stored.
    const bool scaled = !kCapped && !kNorms && logits.scale > 0;
    if (!scaled)
      for (int64_t i = 0; i < Step::kRows; ++i)
        many_logits<kCapped, kNorms>(logits, scores + i * kTile, from, to, s.norms.keys);
    if (seen.each.from > from || seen.each.to < to)
      for (int64_t i = 0; i < min64(Step::kRows, live - r); ++i)
        hide(scores + i * kTile, from, to, s.seen[(r + i) / group]);
    for (int64_t i = 0; i < Step::kRows; i += kFolded<Step>) {
      VecF most[kFolded<Step>];
      for (int64_t j = 0; j < kFolded<Step>; ++j)
        most[j] = i + j < Step::kRows ? largest(scores + (i + j) * kTile, from, to) : VecF{};
      const VecF before = load(s.maximum + r + i);
      const VecF raised = folded<Largest, kFolded<Step>>(most) * splat(scaled ? logits.scale : 1.0f);
      const VecF updated = raised > before ? raised : before;
      const VecF reference = updated == splat(-kInfinity) ? VecF{} : updated;
      store(s.minus_reference + i, VecF{} - reference);
      store(s.factor + i, exp2_nonpositive(before - reference));
      store_rows(s.maximum + r, i, updated);
    }
    __builtin_memset(s.totals, 0, sizeof(float) * Step::kRows * kLanes);
    beside.scores = scores;
    beside.weights = reinterpret_cast<ElementOf<Step>*>(s.weights ? s.weights : scores);
    beside.scale = scaled ? logits.scale : 1.0f;
    beside.from = beside.column = from;
    beside.to = to;
    beside.row = 0;
  }

  // Adds what a block of rows has weighed to its sums.
  void add(int64_t r, const SeenByBlock& seen) {
    const Columns summed = seen.any.whole(kSummedColumns<Step>);
    beside.finish();
    sum_block<Step>(reinterpret_cast<float*>(beside.weights), s.values, summed.from, summed.to, s.factor,
                    s.sums + r * s.width, s.width, beside);
    for (int64_t i = 0; i < Step::kRows; i += kFolded<Step>) {
      VecF sum[kFolded<Step>];
      for (int64_t j = 0; j < kFolded<Step>; ++j)
        sum[j] = i + j < Step::kRows ? load(s.totals + (i + j) * kLanes) : VecF{};
      store_rows(s.total + r, i, fma(load(s.total + r + i), load(s.factor + i), folded<Added, kFolded<Step>>(sum)));
    }
  }

  // A block of rows is scored while the weights of the block before it are made, or one after the other. `requests`:
  // lines of the next tile, which are asked for beside the last blocks. There they fit between the products, and come
  // late enough to be in the cache still when the tile is packed.
  void attend_tile(int64_t requests) {
    constexpr int64_t kRequesting = 24 * Step::kRows;
    int64_t scored = -1, turn = 0;
    SeenByBlock of_scored{};
    for (int64_t r = 0; r < s.rows; r += Step::kRows) {
      if (s.rows - r <= kRequesting && requests > 0) {
        beside.ahead.budget = requests;
        requests = 0;
      }
      const SeenByBlock seen = seen_by_block(r);
      if (seen.any.to <= seen.any.from) continue;
      const Columns columns = seen.any.whole(kScoredColumns);
      multiply_panels<Step>(s.queries + r * s.depth, s.keys, s.depth, columns.from, columns.to, s.scores[turn], kTile,
                            beside);
      if (scored >= 0) add(scored, of_scored);
      raise(r, seen, s.scores[turn]);
      if constexpr (!kBesideProducts<Step>) {
        add(r, seen);
      } else {
        scored = r;
        of_scored = seen;
        turn = 1 - turn;
      }
    }
    if (scored >= 0) add(scored, of_scored);
  }

  void attend(int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += kTile) {
      const int64_t tokens = min64(kTile, end - start), coming = min64(kTile, end - start - tokens);
      cache.slots(start, tokens, s.slot);
      pack(start, tokens);
      int64_t requests = 0;
      if (kBesideProducts<Step> && !kNorms && coming > 0) {
        cache.slots(start + tokens, coming, s.next_slot);
        beside.ahead = {reinterpret_cast<const char* const*>(s.next_slot), s.lines, lines_each};
        requests = coming * lines_each;
      }
      attend_tile(requests);
      beside.ahead.budget = 0;
    }
  }

  void finish(int64_t begin, int64_t end) const {
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
};

template <class T, class Step, bool kCapped>
void many_rows(const Problem& p, int64_t row, int64_t kv_head, const Query* queries, int64_t count, int64_t begin,
               int64_t end, void* scratch) {
  Many<T, Step, kCapped> many(p, row, kv_head, queries, count, scratch);
  many.begin();
  Step::begin();
  many.attend(begin, end);
  Step::end();
  many.finish(begin, end);
}

// Rows of the two products. What they need fits a second-level cache, which is larger where bfloat16 is multiplied. The
// faster the products, the more of the time is packing, so each packed key should serve more rows. Codes are unpacked
// first, and that costs more than sums which leave the cache.
int64_t most_many(const Problem& p) {
#if defined(__AMX_BF16__)
  const int64_t of_pairs = 1024;
#else
  const int64_t of_pairs = p.cache_dtype == DType::kCodes ? 1024 : 512;
#endif
  const int64_t rows = pairs(p) ? of_pairs : 256;
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
