// One query on AMX tiles. Keys and values are both taken from the cache as they lie there, 16 tokens x 32 elements at
// a time.
//
// Keys are left operands and the queries of a group columns of the right one, so products come out token by token with
// the group's queries side by side. Values are right operands, where a tile product multiplies pairs of neighboring
// elements by pairs of weights and adds the two up: weights (w, 0) give the even columns and weights (0, w) the odd
// ones, and both stand in one left operand as different rows. Nothing has to be interleaved on the way.
//
// Tile registers keep their shapes through both products:
//   0, 1  products of 16 tokens with the queries     2  the queries     3, 4  16 tokens' keys or values
//   5, 6  weights for 16 tokens each                 7  weighted values, 32 columns

// Queries of a group that are worked on together: a power of two, so that they fill whole vectors (some may be
// dummies), and no more than 8: their weights take two rows each, and a tile has 16 rows.
RAGGED_INLINE int64_t tile_queries(const Problem& p) {
  int64_t count = 1;
  while (count < p.group() && count < kMostQueries) count *= 2;
  return count;
}

RAGGED_INLINE VecI lanes() { return VecI{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// v[i] holds elements [16 i, 16 i + 16) of a sequence; afterwards it holds every kCount-th one, from element i on.
template <int kCount>
RAGGED_INLINE void deinterleave(VecF* v) {
  if constexpr (kCount > 1) {
    VecF even[kCount / 2], odd[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) {
      even[i] = (VecF)_mm512_permutex2var_ps((__m512)v[2 * i], (__m512i)(lanes() * 2), (__m512)v[2 * i + 1]);
      odd[i] = (VecF)_mm512_permutex2var_ps((__m512)v[2 * i], (__m512i)(lanes() * 2 + 1), (__m512)v[2 * i + 1]);
    }
    deinterleave<kCount / 2>(even);
    deinterleave<kCount / 2>(odd);
    for (int i = 0; i < kCount / 2; ++i) {
      v[2 * i] = even[i];
      v[2 * i + 1] = odd[i];
    }
  }
}

// Lanes i, i + kCount, i + 2 kCount, ... are taken together; every one of them gets the result.
template <class Operation, int kCount>
RAGGED_INLINE VecF across(VecF v) {
#pragma GCC unroll 4
  for (int stride = kCount; stride < kLanes; stride *= 2)
    v = Operation::of((VecF)_mm512_permutexvar_ps((__m512i)(lanes() ^ stride), (__m512)v), v);
  return v;
}

struct TileScratch {
  uint32_t* queries;  // [kv_heads][chunks][head_dim / 2][kQueries], pairs of elements: right operands
  uint32_t* weights;  // [tokens / 16][2 kQueries][16]: left operands
  float* sums;        // [kv_heads][chunks][head_dim / 32][2 kQueries][16], even columns above odd ones
  float* maximum;     // [kv_heads][chunks][16], a query in lanes i, i + kQueries, ...
  float* total;       // the same
  size_t size;
  TileScratch(const Problem& p, char* base) {
    Carver carver{base};
    const int64_t queries_each = tile_queries(p), chunks = (p.group() + queries_each - 1) / queries_each;
    const int64_t count = p.num_kv_heads * chunks;
    queries = carver.take<uint32_t>(count * queries_each * p.head_dim / 2);
    weights = carver.take<uint32_t>(2 * queries_each * kMostBlock);
    sums = carver.take<float>(count * queries_each * p.head_dim);
    maximum = carver.take<float>(count * kLanes);
    total = carver.take<float>(count * kLanes);
    size = carver.used;
  }
};

template <int kQueries, bool kCapped>
struct TileHeads {
  const Problem& p;
  const FewScratch& s;
  const Partial partial;
  const TileScratch tiles;
  const int64_t steps, chunks;
  bool regular[kMostBlock / 16];  // whether 16 tokens of the block lie at equal distances

  TileHeads(const Problem& problem, const FewScratch& scratch, const Query* query, int64_t, HeadRange heads)
      : p(problem),
        s(scratch),
        partial(query->partial),
        tiles(problem, scratch.rest),
        steps(problem.head_dim / 32),
        chunks((problem.group() + kQueries - 1) / kQueries) {
    for (int64_t h = heads.begin; h < heads.end; ++h)
      for (int64_t q = 0; q < chunks * kQueries; ++q) {
        uint32_t* to = tiles.queries + (h * chunks + q / kQueries) * steps * 16 * kQueries + q % kQueries;
        const BF16* from = s.queries_of<BF16>(h * p.group() + q);
        for (int64_t pair = 0; pair < steps * 16; ++pair)
          to[pair * kQueries] = q < p.group() ? load_bits<uint32_t>(from + 2 * pair) : 0;
      }
    for (int64_t i = 0; i < p.num_kv_heads * chunks; ++i) {
      store(tiles.maximum + i * kLanes, splat(-kInfinity));
      store(tiles.total + i * kLanes, VecF{});
    }
    __builtin_memset(tiles.sums, 0, size_t(p.num_kv_heads * chunks * kQueries * p.head_dim) * sizeof(float));
    TileConfig config;
    for (int tile = 0; tile < 3; ++tile) config.set(tile, kQueries * 4);
    for (int tile = 3; tile < 5; ++tile) config.set(tile, 64);
    for (int tile = 5; tile < 8; ++tile) config.set(tile, 64, 2 * kQueries);
    config.load();
  }
  TileHeads(const TileHeads&) = delete;

  void start(int64_t, int64_t count) {
    for (int64_t t = 0; t < round_up(count, 32); t += 16) {
      bool equal = t + 16 <= count;
      for (int64_t i = t + 1; equal && i < t + 16; ++i) equal = s.slot[i] - s.slot[i - 1] == p.token_stride * 2;
      regular[t / 16] = equal;
    }
  }

  void attend(int64_t kv_head, int64_t count, Ahead& ahead) {
    const Logits logits(p, kv_head);
    for (int64_t chunk = kv_head * chunks; chunk < (kv_head + 1) * chunks; ++chunk) {
      multiply_keys(chunk, kv_head * p.head_stride, count, ahead);
      softmax(logits, chunk, count);
      add_values(chunk, kv_head * p.head_stride + p.value_offset, count, ahead);
    }
  }

  void finish(HeadRange heads) {
    _tile_release();
    const VecI low = lanes() / 2 + lanes() % 2 * 16, high = low + 8;
    for (int64_t head = heads.begin * p.group(); head < heads.end * p.group(); ++head) {
      const int64_t q = head % p.group(), chunk = head / p.group() * chunks + q / kQueries;
      partial.maximum[head] = tiles.maximum[chunk * kLanes + q % kQueries];
      partial.total[head] = tiles.total[chunk * kLanes + q % kQueries];
      float* to = partial.weighted + head * partial_stride(p);
      for (int64_t step = 0; step < steps; ++step) {
        const float* from = sums_of(chunk, step) + q % kQueries * 16;
        const __m512 even = (__m512)load(from), odd = (__m512)load(from + kQueries * 16);
        store(to + step * 32, (VecF)_mm512_permutex2var_ps(even, (__m512i)low, odd));
        store(to + step * 32 + 16, (VecF)_mm512_permutex2var_ps(even, (__m512i)high, odd));
      }
    }
  }

 private:
  float* sums_of(int64_t chunk, int64_t step) const { return tiles.sums + (chunk * steps + step) * 2 * kQueries * 16; }

  // Loads keys or values of 16 tokens from the t-th of the block on. Tiles are named by constants.
#define RAGGED_LOAD_TOKENS(tile, t, offset)                                                                \
  do {                                                                                                     \
    if (regular[(t) / 16]) {                                                                               \
      RAGGED_TILE_LOAD(tile, at<BF16>(s.slot[t], offset), p.token_stride * 2);                             \
    } else {                                                                                               \
      alignas(64) BF16 copy[16 * 32];                                                                      \
      for (int i = 0; i < 16; ++i) __builtin_memcpy(copy + i * 32, at<BF16>(s.slot[(t) + i], offset), 64); \
      RAGGED_TILE_LOAD(tile, copy, 64);                                                                    \
    }                                                                                                      \
  } while (false)

  // Products with the block's keys, to s.weights [tokens][kQueries]; the count is rounded up to 32.
  void multiply_keys(int64_t chunk, int64_t offset, int64_t count, Ahead& ahead) {
    const uint32_t* queries = tiles.queries + chunk * steps * 16 * kQueries;
    for (int64_t t = 0; t < count; t += 32) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t k = 0; k < steps; ++k) {
        RAGGED_TILE_LOAD(2, queries + k * 16 * kQueries, kQueries * 4);
        RAGGED_LOAD_TOKENS(3, t, offset + k * 32);
        _tile_dpbf16ps(0, 3, 2);
        RAGGED_LOAD_TOKENS(4, t + 16, offset + k * 32);
        _tile_dpbf16ps(1, 4, 2);
        for (int i = 0; i < 32; ++i) ahead.request();  // as many lines as were read
      }
      _tile_stored(0, s.weights + t * kQueries, kQueries * 4);
      _tile_stored(1, s.weights + (t + 16) * kQueries, kQueries * 4);
    }
  }

  // From the products in s.weights to tiles.weights.
  void softmax(const Logits& logits, int64_t chunk, int64_t count) {
    float* products = s.weights;
    const int64_t size = count * kQueries, whole = round_up(count, 32) * kQueries;
    VecF most = splat(-kInfinity);
    for (int64_t i = 0; i < whole; i += kLanes) {
      VecF x = logits.of<kCapped>(load(products + i));
      if (i + kLanes > size) x = lanes() < splat_int(int32_t(size - i)) ? x : splat(-kInfinity);
      store(products + i, x);
      most = maximum(x, most);
    }
    const VecF before = load(tiles.maximum + chunk * kLanes), after = maximum(across<Largest, kQueries>(most), before);
    const VecF reference = after == splat(-kInfinity) ? VecF{} : after;
    VecF sum = {};
    for (int64_t t = 0; t < whole / kQueries; t += 16) {
      VecF weight[kQueries];
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        weight[q] = exp2_nonpositive(load(products + t * kQueries + q * kLanes) - reference);
        sum = sum + weight[q];
      }
      deinterleave<kQueries>(weight);
      uint32_t* operand = tiles.weights + t * 2 * kQueries;
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        // Flushes denormals: right for weights, not for caches.
        const VecU bits = (VecU)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weight[q]));
        store_bits(operand + q * 16, bits);
        store_bits(operand + (kQueries + q) * 16, bits << 16);
      }
    }
    const VecF factor = exp2_nonpositive(before - reference);
    store(tiles.total + chunk * kLanes, load(tiles.total + chunk * kLanes) * factor + across<Added, kQueries>(sum));
    store(tiles.maximum + chunk * kLanes, after);
    if (_mm512_cmp_ps_mask((__m512)factor, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) return;
    float factors[kLanes];
    store(factors, factor);
    for (int64_t step = 0; step < steps; ++step)
      for (int r = 0; r < 2 * kQueries; ++r) {
        float* row = sums_of(chunk, step) + r * 16;
        store(row, load(row) * splat(factors[r % kQueries]));
      }
  }

  void add_values(int64_t chunk, int64_t offset, int64_t count, Ahead& ahead) {
    for (int64_t t = 0; t < count; t += 32) {
      RAGGED_TILE_LOAD(5, tiles.weights + t * 2 * kQueries, 64);
      RAGGED_TILE_LOAD(6, tiles.weights + (t + 16) * 2 * kQueries, 64);
      for (int64_t step = 0; step < steps; ++step) {
        RAGGED_TILE_LOAD(7, sums_of(chunk, step), 64);
        RAGGED_LOAD_TOKENS(3, t, offset + step * 32);
        _tile_dpbf16ps(7, 5, 3);
        RAGGED_LOAD_TOKENS(4, t + 16, offset + step * 32);
        _tile_dpbf16ps(7, 6, 4);
        _tile_stored(7, sums_of(chunk, step), 64);
        for (int i = 0; i < 32; ++i) ahead.request();
      }
    }
  }
#undef RAGGED_LOAD_TOKENS
};

// Whether the tiles can serve the request, which has queries and a cache of bf16.
RAGGED_INLINE bool tiles_fit(const Problem& p) { return p.head_dim % 32 == 0; }

template <bool kCapped>
void few_tiles(const Problem& p, int64_t row, const Query* query, int64_t begin, int64_t end, void* scratch,
               HeadRange kv_heads) {
  switch (tile_queries(p)) {
    case 1:
      return few_blocks<BF16, PairDot, TileHeads<1, kCapped>>(p, row, query, 1, begin, end, scratch, kv_heads);
    case 2:
      return few_blocks<BF16, PairDot, TileHeads<2, kCapped>>(p, row, query, 1, begin, end, scratch, kv_heads);
    case 4:
      return few_blocks<BF16, PairDot, TileHeads<4, kCapped>>(p, row, query, 1, begin, end, scratch, kv_heads);
    default:
      return few_blocks<BF16, PairDot, TileHeads<8, kCapped>>(p, row, query, 1, begin, end, scratch, kv_heads);
  }
}
