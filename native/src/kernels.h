// The loops of one instruction set. Each unit isa_*.cc defines RAGGED_ISA and RAGGED_ISA_NAME and includes this file; it
// is compiled with that set's flags. No function of the standard library may be instantiated here, and everything lives
// in the unit's own namespace: the linker keeps one copy of a shared inline function, and it might be a wrong one.
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "routines.h"

namespace easydel_ragged {
namespace RAGGED_ISA {
namespace {

#include "simd.h"

#if defined(__AVX512BF16__)
constexpr bool kDotBF16 = true;
#else
constexpr bool kDotBF16 = false;
#endif

#if defined(__AMX_BF16__)
constexpr bool kDotTiles = true;

// Shapes of the tile registers: 16 rows of up to 64 bytes.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  inline __attribute__((always_inline)) void set(int tile, int bytes) {
    row_bytes[tile] = uint16_t(bytes);
    rows[tile] = 16;
  }
  inline __attribute__((always_inline)) void load() const { _tile_loadconfig(this); }
};
#else
constexpr bool kDotTiles = false;
#endif

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr int kCacheLine = 64;

template <class T>
struct Tag {
  using type = T;
};

template <class F>
RAGGED_INLINE void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(Tag<float>{});
    case DType::kBF16:
      return f(Tag<BF16>{});
    case DType::kF16:
      return f(Tag<F16>{});
    case DType::kF8E4M3FN:
      return f(Tag<E4M3>{});
    case DType::kF8E5M2:
      return f(Tag<E5M2>{});
  }
}
template <class F>
RAGGED_INLINE void with_query_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBF16:
      return f(Tag<BF16>{});
    case DType::kF16:
      return f(Tag<F16>{});
    default:
      return f(Tag<float>{});
  }
}

// Hands out aligned parts of a scratch buffer. With a null buffer it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base ? base + used : nullptr);
    used += (size_t(count) * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return part;
  }
};

template <class T>
struct Cache {
  const T* pages;
  const int32_t* table;
  int64_t page_size, page_stride, token_stride;

  Cache(const Problem& p, int64_t row)
      : pages(static_cast<const T*>(p.pages)),
        table(p.block_tables + row * p.pages_per_row),
        page_size(p.page_size),
        page_stride(p.page_size * p.token_stride),
        token_stride(p.token_stride) {}

  // Addresses of the slots that hold positions [begin, begin + count).
  void slots(int64_t begin, int64_t count, const T** slot) const {
    int64_t entry = begin / page_size, offset = begin % page_size;
    for (int64_t i = 0; i < count; ++entry, offset = 0) {
      const T* at = pages + table[entry] * page_stride + offset * token_stride;
      for (; offset < page_size && i < count; ++offset, ++i, at += token_stride) slot[i] = at;
    }
  }
};

// ---- new rows ------------------------------------------------------------------------------------------------------

template <class From, class To>
RAGGED_INLINE void convert(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_tail(to + i, load_tail(from + i, count - i), count - i);
}
template <class T>
RAGGED_INLINE void convert(const T* from, T* to, int64_t count) {
  __builtin_memcpy(to, from, size_t(count) * sizeof(T));
}

template <class From, class To>
void write_tokens(const Problem& p, int64_t row, int64_t position, int64_t token, int64_t count) {
  const Cache<To> cache(p, row);
  const int64_t padding = p.padded_head_dim - p.head_dim;
  const int64_t used = p.num_kv_heads * p.head_stride;
  for (int64_t i = 0; i < count; ++i) {
    const To* slot;
    cache.slots(position + i, 1, &slot);
    To* to = const_cast<To*>(slot);
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      const int64_t source = ((token + i) * p.num_kv_heads + h) * p.head_dim;
      To* key = to + h * p.head_stride;
      convert(static_cast<const From*>(p.keys) + source, key, p.head_dim);
      convert(static_cast<const From*>(p.values) + source, key + p.value_offset, p.head_dim);
      if (padding > 0) {
        __builtin_memset(key + p.head_dim, 0, size_t(padding) * sizeof(To));
        __builtin_memset(key + p.value_offset + p.head_dim, 0, size_t(padding) * sizeof(To));
      }
    }
    if (used < p.token_stride) __builtin_memset(to + used, 0, size_t(p.token_stride - used) * sizeof(To));
  }
}

void write(const Problem& p, int64_t row, int64_t position, int64_t token, int64_t count) {
  with_type(p.new_dtype, [&](auto from) {
    with_type(p.cache_dtype, [&](auto to) {
      write_tokens<typename decltype(from)::type, typename decltype(to)::type>(p, row, position, token, count);
    });
  });
}

// ---- logits --------------------------------------------------------------------------------------------------------

// Turns a product into a base-2 logit.
struct Logits {
  float scale, cap;
  explicit Logits(const Problem& p)
      : scale(p.logits_soft_cap > 0 ? p.softmax_scale / p.logits_soft_cap : p.softmax_scale * kLog2E),
        cap(p.logits_soft_cap > 0 ? p.logits_soft_cap * kLog2E : 0.0f) {}
  template <bool kCapped>
  inline __attribute__((always_inline)) VecF of(VecF product) const {
    const VecF x = product * splat(scale);
    if constexpr (kCapped) return hyperbolic_tangent(x) * splat(cap);
    return x;
  }
};

// ---- decode --------------------------------------------------------------------------------------------------------

constexpr int kDecodeBlock = 128;             // most tokens of one step
constexpr int64_t kDecodeBlockBytes = 1 << 17;  // and most bytes of it: with the next step's, it fits a second-level cache

RAGGED_INLINE int64_t decode_block(const Problem& p, int64_t element_size) {
  const int64_t tokens = kDecodeBlockBytes / max64(1, p.num_kv_heads * p.head_dim * 2 * element_size);
  return max64(16, min64(kDecodeBlock, tokens / 16 * 16));
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
// The same part of the tokens `next` is asked from memory on the way: one request for each load, since a burst of them
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
                                 const T* const* next, int64_t count, int64_t offset, int64_t tail, float* weighted, int64_t stride) {
  VecF sum[kQueries][kVectors];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[q][c] = load(weighted + q * stride + c * kLanes) * splat(factor[q]);
  for (int64_t t = 0; t < count; ++t) {
    const T* from = values[t] + offset;
    VecF value[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c)
      value[c] = kTail ? load_tail(from + c * kLanes, tail) : load(from + c * kLanes);
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
  constexpr int kMost = RAGGED_REGISTERS == 32 ? (kQueries <= 2 ? 8 : 4) : (kQueries == 1 ? 4 : (kQueries == 2 ? 4 : 2));
  int64_t d = 0;
  for (; d + kMost * kLanes <= head_dim; d += kMost * kLanes)
    decode_values<kQueries, kMost, false>(weights, factor, values, next, count, offset + d, 0, weighted + d, stride);
  for (; d + kLanes <= head_dim; d += kLanes)
    decode_values<kQueries, 1, false>(weights, factor, values, next, count, offset + d, 0, weighted + d, stride);
  if (d < head_dim)
    decode_values<kQueries, 1, true>(weights, factor, values, next, count, offset + d, head_dim - d, weighted + d, stride);
}

// Weights of one query's logits; returns the factor for what was summed before.
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

constexpr int kTileQueries = 16;  // most queries of one tile product

template <class T, class Dot>
struct DecodeScratch {
  typename Dot::Query* queries;
  float* weights;   // of the queries that are worked on, [queries][kDecodeBlock]
  uint32_t* tiles;  // the queries once more, as right operands of tile products
  float* factor;
  const T** slot;
  const T** next;
  int64_t query_stride;
  size_t size;
  DecodeScratch(const Problem& p, void* base) {
    Carver carver{static_cast<char*>(base)};
    query_stride = round_up(p.head_dim, 2 * kLanes);
    queries = carver.take<typename Dot::Query>(p.num_q_heads * query_stride);
    weights = carver.take<float>(kTileQueries * kDecodeBlock);
    tiles = carver.take<uint32_t>(p.num_q_heads * query_stride / 2);
    factor = carver.take<float>(4);
    slot = carver.take<const T*>(kDecodeBlock + kLanes);
    next = carver.take<const T*>(kDecodeBlock + kLanes);
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

#if defined(__AMX_BF16__)
// Products on tiles, with keys as left operands, which are loaded from the cache as they lie there: 16 tokens at equal
// distances. All queries of a group are columns of the right operand.
struct DecodeTiles {
  int64_t group, steps;
  bool used;
  bool regular[kDecodeBlock / 16];  // whether 16 tokens of the block lie at equal distances

  DecodeTiles(const Problem& p, const BF16* queries, int64_t query_stride, uint32_t* tiles)
      : group(p.group()), steps(p.head_dim / 32), used(group <= kTileQueries && p.head_dim % 32 == 0) {
    if (!used) return;
    for (int64_t h = 0; h < p.num_kv_heads; ++h)
      for (int64_t pair = 0; pair < steps * 16; ++pair)
        for (int64_t g = 0; g < group; ++g)
          __builtin_memcpy(&tiles[(h * steps * 16 + pair) * group + g], queries + (h * group + g) * query_stride + 2 * pair,
                           sizeof(uint32_t));
    TileConfig config;
    for (int i = 0; i < 5; ++i) config.set(i, i == 2 || i == 3 ? 64 : int(group) * 4);
    config.load();
  }
  ~DecodeTiles() {
    if (used) _tile_release();
  }
  DecodeTiles(const DecodeTiles&) = delete;

  void look(const BF16* const* slot, int64_t count, int64_t token_stride) {
    for (int64_t t = 0; t < count; t += 16) {
      bool equal = t + 16 <= count;
      for (int64_t i = t + 1; equal && i < t + 16; ++i) equal = slot[i] - slot[i - 1] == token_stride;
      regular[t / 16] = equal;
    }
  }

  // Logits of kBlocks blocks of 16 tokens.
  template <int kBlocks>
  void multiply(const BF16* const* slot, const BF16* const* next, int64_t token_stride, int64_t offset,
                const uint32_t* tiles, float* logits) const {
    float products[kBlocks * 16 * kTileQueries];
    _tile_zero(0);
    if constexpr (kBlocks == 2) _tile_zero(1);
    for (int64_t k = 0; k < steps; ++k) {
      _tile_loadd(4, tiles + k * 16 * group, group * 4);
      _tile_loadd(2, slot[0] + offset + k * 32, token_stride * 2);
      _tile_dpbf16ps(0, 2, 4);
      if constexpr (kBlocks == 2) {
        _tile_loadd(3, slot[16] + offset + k * 32, token_stride * 2);
        _tile_dpbf16ps(1, 3, 4);
      }
      for (int t = 0; t < 16 * kBlocks; ++t) prefetch(next[t] + offset + k * 32);
    }
    _tile_stored(0, products, group * 4);
    if constexpr (kBlocks == 2) _tile_stored(1, products + 16 * group, group * 4);
    VecI column;
    for (int i = 0; i < kLanes; ++i) column[i] = i * int32_t(group);
    for (int64_t g = 0; g < group; ++g)
      for (int b = 0; b < kBlocks; ++b)
        store(logits + g * kDecodeBlock + b * 16,
              (VecF)_mm512_i32gather_ps((__m512i)column, products + b * 16 * group + g, 4));
  }
};
#endif

#if defined(__AMX_BF16__)
struct NoTiles {
  template <class... Arguments>
  explicit NoTiles(Arguments&&...) {}
};
template <bool kTiles>
struct ChooseTiles {
  using type = NoTiles;
};
template <>
struct ChooseTiles<true> {
  using type = DecodeTiles;
};
template <bool kTiles>
using TilesOr = typename ChooseTiles<kTiles>::type;
#endif

// Attention of kQueries heads to the tokens of a block; the products may be in s.weights already.
template <int kQueries, bool kCapped, class Dot, class T>
void decode_heads(const Problem& p, const Logits& logits, const DecodeScratch<T, Dot>& s, int64_t head, int64_t offset,
                  int64_t count, Partial partial, int64_t stride, float* weights, bool multiplied) {
  if (!multiplied)
    decode_products<Dot, kQueries>(s.queries + head * s.query_stride, s.query_stride, s.slot, s.next, count, offset,
                                   p.head_dim, weights);
  for (int q = 0; q < kQueries; ++q)
    s.factor[q] = decode_softmax<kCapped>(logits, weights + q * kDecodeBlock, count, partial.maximum[head + q],
                                          partial.total[head + q]);
  decode_all_values<kQueries>(weights, s.factor, s.slot, s.next, count, offset + p.value_offset, p.head_dim,
                              partial.weighted + head * stride, stride);
}

template <int count>
struct Count {
  static constexpr int value = count;
};

template <class T, class Dot, bool kCapped, bool kTiles = false>
void decode_row(const Problem& p, int64_t row, int64_t token, int64_t begin, int64_t end, Partial partial,
                void* scratch) {
  DecodeScratch<T, Dot> s(p, scratch);
  const Logits logits(p);
  const Cache<T> cache(p, row);
  const int64_t stride = partial_stride(p), group = p.group(), block = decode_block(p, sizeof(T));
  with_query_type(p.query_dtype, [&](auto tag) {
    using Source = typename decltype(tag)::type;
    if constexpr (sizeof(typename Dot::Query) == sizeof(float) || sizeof(Source) == sizeof(BF16))
      read_queries<T, Dot>(p, static_cast<const Source*>(p.queries) + token * p.num_q_heads * p.head_dim, s);
  });
  for (int64_t h = 0; h < p.num_q_heads; ++h) {
    partial.maximum[h] = -kInfinity;
    partial.total[h] = 0.0f;
  }
  __builtin_memset(partial.weighted, 0, size_t(p.num_q_heads * stride) * sizeof(float));

#if defined(__AMX_BF16__)
  TilesOr<kTiles> tiles(p, s.queries, s.query_stride, s.tiles);
#endif
  int64_t count = min64(block, end - begin);
  cache.slots(begin, count, s.slot);
  while (count > 0) {
    for (int64_t t = count; t < round_up(count, kLanes); ++t) s.slot[t] = s.slot[count - 1];
    const int64_t ahead = min64(block, end - begin - count);
    if (ahead > 0) cache.slots(begin + count, ahead, s.next);
    for (int64_t t = ahead; t < round_up(count, kLanes); ++t) s.next[t] = s.slot[t];  // nothing left to ask for
#if defined(__AMX_BF16__)
    if constexpr (kTiles) tiles.look(s.slot, count, cache.token_stride);
#endif
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      const int64_t offset = h * p.head_stride;
      bool multiplied = false;
#if defined(__AMX_BF16__)
      if constexpr (kTiles) {
        if (tiles.used) {
          const uint32_t* queries = s.tiles + h * tiles.steps * 16 * group;
          multiplied = true;
          for (int64_t t = 0; t < count; t += 16) {
            if (tiles.regular[t / 16] && t + 32 <= count && tiles.regular[t / 16 + 1]) {
              tiles.template multiply<2>(s.slot + t, s.next + t, cache.token_stride, offset, queries, s.weights + t);
              t += 16;
            } else if (tiles.regular[t / 16]) {
              tiles.template multiply<1>(s.slot + t, s.next + t, cache.token_stride, offset, queries, s.weights + t);
            } else {
              for (int64_t g = 0; g < group; ++g)
                decode_products<Dot, 1>(s.queries + (h * group + g) * s.query_stride, s.query_stride, s.slot + t,
                                        s.next + t, min64(16, count - t), offset, p.head_dim,
                                        s.weights + g * kDecodeBlock + t);
            }
          }
        }
      }
#endif
      float* weights = s.weights;
      for (int64_t head = h * group, left = group; left > 0;) {
        const int64_t taken = min64(left, 4);
        const auto attend = [&](auto queries) {
          decode_heads<decltype(queries)::value, kCapped>(p, logits, s, head, offset, count, partial, stride, weights,
                                                          multiplied);
        };
        if (taken == 4) attend(Count<4>{});
        if (taken == 3) attend(Count<3>{});
        if (taken == 2) attend(Count<2>{});
        if (taken == 1) attend(Count<1>{});
        left -= taken;
        head += taken;
        if (multiplied) weights += taken * kDecodeBlock;
      }
    }
    begin += count;
    count = ahead;
    const T** swapped = s.slot;
    s.slot = s.next;
    s.next = swapped;
  }
}

RAGGED_INLINE bool pairs(const Problem& p) {
  return kDotBF16 && p.query_dtype == DType::kBF16 && p.cache_dtype == DType::kBF16;
}

void decode(const Problem& p, int64_t row, int64_t token, int64_t begin, int64_t end, Partial partial, void* scratch) {
  const bool capped = p.logits_soft_cap > 0;
#if defined(__AVX512BF16__)
  if (pairs(p))
    return capped ? decode_row<BF16, PairDot, true, kDotTiles>(p, row, token, begin, end, partial, scratch)
                  : decode_row<BF16, PairDot, false, kDotTiles>(p, row, token, begin, end, partial, scratch);
#endif
  with_type(p.cache_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (capped)
      decode_row<T, FloatDot<T>, true>(p, row, token, begin, end, partial, scratch);
    else
      decode_row<T, FloatDot<T>, false>(p, row, token, begin, end, partial, scratch);
  });
}

size_t decode_scratch(const Problem& p) { return DecodeScratch<float, FloatDot<float>>(p, nullptr).size; }  // the largest

void finish(const Problem& p, const Partial* partials, int64_t count, int64_t token) {
  const int64_t stride = partial_stride(p);
  for (int64_t h = 0; h < p.num_q_heads; ++h) {
    const float sink = p.sinks ? p.sinks[h] * kLog2E : -kInfinity;
    float most = sink;
    for (int64_t i = 0; i < count; ++i) most = partials[i].maximum[h] > most ? partials[i].maximum[h] : most;
    const float reference = most == -kInfinity ? 0.0f : most;
    float total = p.sinks ? exp2_nonpositive(sink - reference) : 0.0f;
    for (int64_t i = 0; i < count; ++i)
      total += partials[i].total[h] * exp2_nonpositive(partials[i].maximum[h] - reference);
    const float inverse = total > 0 ? p.v_scale / total : (total == total ? 0.0f : total);
    for (int64_t i = 0; i < count; ++i) partials[i].total[h] = exp2_nonpositive(partials[i].maximum[h] - reference) * inverse;
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

// ---- prefill -------------------------------------------------------------------------------------------------------

// Rows of the two products are (query token, head of the group). They are taken a block at a time, whose scores stay in
// the first-level cache between the two products. Columns of one register block:
constexpr int kBlockVectors = RAGGED_REGISTERS == 32 ? 4 : 2;
constexpr int kPanel = kBlockVectors * kLanes;  // columns of a packed panel
constexpr int kTile = 128;                      // key tokens of one step
static_assert(kTile % kPanel == 0 && kTile % (2 * kLanes) == 0, "whole panels");

// How products are made, on 32-bit elements: a float, or a pair of bf16. A block has kRows rows.
struct FloatStep {
  static constexpr int kElements = 1;
  static constexpr int kRows = 6;
  static constexpr bool kTiles = false;
  RAGGED_INLINE void begin() {}
  RAGGED_INLINE void end() {}
  RAGGED_INLINE VecF add(VecF sum, float a, VecF b) { return fma(splat(a), b, sum); }
};
#if defined(__AVX512BF16__)
struct PairStep {
  static constexpr int kElements = 2;
  static constexpr int kRows = 6;
  static constexpr bool kTiles = false;
  RAGGED_INLINE void begin() {}
  RAGGED_INLINE void end() {}
  RAGGED_INLINE VecF add(VecF sum, float a, VecF b) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat(a), (__m512bh)b);
  }
};
#endif

#if defined(__AMX_BF16__)
// Products on tiles of 16 rows x 16 pairs, two by two.
struct TileStep {
  static constexpr int kElements = 2;
  static constexpr int kRows = 32;
  static constexpr bool kTiles = true;
  RAGGED_INLINE void begin() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.set(i, 64);
    config.load();
  }
  RAGGED_INLINE void end() { _tile_release(); }

  // c[32][columns] = (add ? c : 0) + a[32][depth] * b[depth][columns], where columns is 16 or 32 and depth a multiple of 16.
  RAGGED_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                              int64_t c_stride, int64_t columns, bool add) {
    const int64_t a_bytes = a_stride * 4, b_bytes = b_stride * 4, c_bytes = c_stride * 4;
    if (add) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(2, c + 16 * c_stride, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(2);
    }
    if (columns == 16) {
      for (int64_t k = 0; k < depth; k += 16) {
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
        _tile_loadd(6, b + k * b_stride, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
      }
      _tile_stored(0, c, c_bytes);
      _tile_stored(2, c + 16 * c_stride, c_bytes);
      return;
    }
    if (add) {
      _tile_loadd(1, c + 16, c_bytes);
      _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
    } else {
      _tile_zero(1);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 16) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, b + k * b_stride, b_bytes);
      _tile_loadd(7, b + k * b_stride + 16, b_bytes);
      _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * c_stride, c_bytes);
    _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
  }
};
#endif

// c[6][kVectors] = (factor ? c * factor[row] : 0) + a[6][depth] * b[depth][kVectors]; b is packed without gaps.
template <class Step, int kVectors>
RAGGED_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride,
                            const float* factor) {
  constexpr int kBlockRows = Step::kRows;
  VecF sum[kBlockRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = factor ? load(c + r * c_stride + v * kLanes) * splat(factor[r]) : VecF{};
  for (int64_t k = 0; k < depth; ++k) {
    VecF column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + (k * kVectors + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kBlockRows; ++r) {
      const float element = a[r * a_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Step::add(sum[r][v], element, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

template <class Step>
void multiply_any(int64_t vectors, const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                  int64_t c_stride, const float* factor) {
  switch (vectors) {
    case 1:
      return multiply<Step, 1>(a, a_stride, b, depth, c, c_stride, factor);
    case 2:
      return multiply<Step, 2>(a, a_stride, b, depth, c, c_stride, factor);
#if RAGGED_REGISTERS == 32
    case 3:
      return multiply<Step, 3>(a, a_stride, b, depth, c, c_stride, factor);
    case 4:
      return multiply<Step, 4>(a, a_stride, b, depth, c, c_stride, factor);
#endif
  }
}

// Scores of a block of rows in columns [from, to), whole panels of them; and what the block's weights add to its sums.
template <class Step>
RAGGED_INLINE void score_block(const float* queries, const float* keys, int64_t depth, int64_t from, int64_t to,
                               float* scores) {
  if constexpr (Step::kTiles) {
    for (int64_t column = from; column < to; column += 32)
      Step::multiply(queries, depth, keys + column / kPanel * kPanel * depth + column % kPanel, kPanel, depth,
                     scores + column, kTile, 32, false);
  } else {
    for (int64_t panel = from / kPanel * kPanel; panel < to; panel += kPanel)
      multiply<Step, kBlockVectors>(queries, depth, keys + panel * depth, depth, scores + panel, kTile, nullptr);
  }
}
template <class Step>
RAGGED_INLINE void sum_block(const float* weights, const float* values, int64_t from, int64_t to, const float* factor,
                             float* sums, int64_t width) {
  const int64_t first = from / Step::kElements, steps = (to - from) / Step::kElements;
  if constexpr (Step::kTiles) {
    for (int r = 0; r < Step::kRows; ++r) {
      if (factor[r] == 1.0f) continue;
      for (int64_t c = 0; c < width; c += kLanes)
        store(sums + r * width + c, load(sums + r * width + c) * splat(factor[r]));
    }
    for (int64_t column = 0; column < width; column += 32) {
      const int64_t panel = column / kPanel * kPanel, columns = min64(kPanel, width - panel);
      Step::multiply(weights + first, kTile / 2, values + panel * (kTile / 2) + first * columns + (column - panel),
                     columns, steps, sums + column, width, min64(32, width - column), true);
    }
  } else {
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = min64(kPanel, width - column);
      multiply_any<Step>(columns / kLanes, weights + first, kTile / Step::kElements,
                         values + column * (kTile / Step::kElements) + first * columns, steps, sums + column, width,
                         factor);
    }
  }
}
// Keys of a tile, transposed: panels of kPanel tokens, each [depth][kPanel]. Tokens past `count` are zero.
template <class Step, class T>
RAGGED_INLINE VecF packed_key(const T* key, int64_t d, int64_t head_dim) {
  if constexpr (Step::kElements == 2) {
    VecF v = {};
    const int64_t left = head_dim - d;
    if (left >= 2 * kLanes)
      __builtin_memcpy(&v, key + d, sizeof(v));
    else
      for (int64_t i = 0; i < left; ++i) __builtin_memcpy(reinterpret_cast<T*>(&v) + i, key + d + i, sizeof(T));
    return v;
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

template <class T, class Step>
struct PrefillScratch {
  int64_t rows, depth, width;  // depth: steps over head_dim; width: columns of the sums
  float *queries, *keys, *values, *scores, *weights, *sums, *maximum, *total, *factor;
  const T** slot;
  size_t size;
  PrefillScratch(const Problem& p, int64_t tokens, void* base) {
    Carver carver{static_cast<char*>(base)};
    rows = round_up(tokens * p.group(), Step::kRows);
    depth = round_up(p.head_dim, Step::kElements * kLanes) / Step::kElements;
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
    slot = carver.take<const T*>(kTile);
    size = carver.used;
  }
};

RAGGED_INLINE void store_weights(BF16* to, VecF weights) {
#if defined(__AVX512BF16__)  // one instruction, which flushes denormals: right for weights, not for caches
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)weights);
  __builtin_memcpy(to, &bits, sizeof(bits));
#else
  store(to, weights);
#endif
}

// Weights of one row's scores in columns [from, to), of which it sees [low, high). Everything but the visible becomes 0.
template <class Step, bool kCapped, bool kMasked>
RAGGED_INLINE void prefill_softmax(const Logits& logits, float* scores, float* weights, int64_t from, int64_t to,
                                   int64_t low, int64_t high, float& maximum_seen, float& total, float& factor) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  VecF most = splat(-kInfinity);
  for (int64_t t = from; t < to; t += kLanes) {
    VecF x = logits.of<kCapped>(load(scores + t));
    if constexpr (kMasked) {
      const VecI column = lane + splat_int(int32_t(t));
      x = column >= splat_int(int32_t(low)) ? x : splat(-kInfinity);
      x = column < splat_int(int32_t(high)) ? x : splat(-kInfinity);
    }
    store(scores + t, x);
    most = maximum(x, most);
  }
  const float tile_maximum = max_of(most);
  const float updated = tile_maximum > maximum_seen ? tile_maximum : maximum_seen;
  const float reference = updated == -kInfinity ? 0.0f : updated;
  VecF sum = {};
  for (int64_t t = from; t < to; t += kLanes) {
    const VecF weight = exp2_nonpositive(load(scores + t) - splat(reference));
    if constexpr (Step::kElements == 2)
      store_weights(reinterpret_cast<BF16*>(weights) + t, weight);
    else
      store(weights + t, weight);
    sum = sum + weight;
  }
  factor = exp2_nonpositive(maximum_seen - reference);
  total = total * factor + sum_of(sum);
  maximum_seen = updated;
}

template <class T, class Step, bool kCapped>
void prefill_rows(const Problem& p, int64_t row, int64_t kv_head, int64_t position, int64_t token, int64_t count,
                  void* scratch) {
  PrefillScratch<T, Step> s(p, count, scratch);
  const Logits logits(p);
  const Cache<T> cache(p, row);
  const int64_t group = p.group(), live = count * group, offset = kv_head * p.head_stride;
  const int64_t window = p.sliding_window > 0 ? p.sliding_window : INT64_MAX;

  with_query_type(p.query_dtype, [&](auto tag) {
    using Source = typename decltype(tag)::type;
    const Source* from = static_cast<const Source*>(p.queries) + (token * p.num_q_heads + kv_head * group) * p.head_dim;
    for (int64_t r = 0; r < s.rows; ++r) {
      float* to = s.queries + r * s.depth;
      __builtin_memset(to, 0, size_t(s.depth) * sizeof(float));
      if (r >= live) continue;
      const Source* query = from + (r / group * p.num_q_heads + r % group) * p.head_dim;
      if constexpr (Step::kElements == 2)
        __builtin_memcpy(to, query, size_t(p.head_dim) * sizeof(Source));
      else
        convert(query, to, p.head_dim);
    }
  });
  for (int64_t r = 0; r < s.rows; ++r) {
    s.maximum[r] = -kInfinity;
    s.total[r] = 0.0f;
  }
  __builtin_memset(s.sums, 0, size_t(s.rows * s.width) * sizeof(float));

  Step::begin();
  const int64_t begin = position >= window ? position - window + 1 : 0, end = position + count;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t tokens = min64(kTile, end - start);
    cache.slots(start, tokens, s.slot);
    pack_keys<Step>(s.slot, tokens, offset, p.head_dim, s.depth, s.keys);
    pack_values<Step>(s.slot, tokens, offset + p.value_offset, p.head_dim, s.values);
    // Columns that a row of this query token sees.
    const auto low = [&](int64_t query) { return max64(0, position + query >= window ? position + query - window + 1 - start : 0); };
    const auto high = [&](int64_t query) { return min64(tokens, position + query + 1 - start); };
    for (int64_t r = 0; r < s.rows; r += Step::kRows) {
      const int64_t last = min64(r + Step::kRows, live) - 1;
      const int64_t from = low(r / group) / (2 * kLanes) * (2 * kLanes);
      const int64_t to = round_up(high(last / group), 2 * kLanes);
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
        const int64_t row_low = low((r + i) / group), row_high = high((r + i) / group);
        if (row_low <= from && row_high >= to)
          prefill_softmax<Step, kCapped, false>(logits, scores, weights, from, to, row_low, row_high, s.maximum[r + i],
                                                s.total[r + i], s.factor[i]);
        else
          prefill_softmax<Step, kCapped, true>(logits, scores, weights, from, to, row_low, row_high, s.maximum[r + i],
                                               s.total[r + i], s.factor[i]);
      }
      sum_block<Step>(s.weights, s.values, from, to, s.factor, s.sums + r * s.width, s.width);
    }
  }
  Step::end();

  with_query_type(p.query_dtype, [&](auto tag) {
    using To = typename decltype(tag)::type;
    To* output = static_cast<To*>(p.output) + (token * p.num_q_heads + kv_head * group) * p.head_dim;
    for (int64_t r = 0; r < live; ++r) {
      float total = s.total[r], rescale = 1.0f;
      if (p.sinks) {
        const float sink = p.sinks[kv_head * group + r % group] * kLog2E;
        const float most = sink > s.maximum[r] ? sink : s.maximum[r];
        const float reference = most == -kInfinity ? 0.0f : most;
        rescale = exp2_nonpositive(s.maximum[r] - reference);
        total = total * rescale + exp2_nonpositive(sink - reference);
      }
      const float inverse = total > 0 ? p.v_scale * rescale / total : (total == total ? 0.0f : total);
      To* to = output + (r / group * p.num_q_heads + r % group) * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; d += kLanes) {
        const VecF v = load(s.sums + r * s.width + d) * splat(inverse);
        if (d + kLanes <= p.head_dim)
          store(to + d, v);
        else
          store_tail(to + d, v, p.head_dim - d);
      }
    }
  });
}

#if defined(__AMX_BF16__)
using BestPairStep = TileStep;
#elif defined(__AVX512BF16__)
using BestPairStep = PairStep;
#endif

// Rows of the two products: what they need then fits a second-level cache. Tiles are so fast that packing keys and
// values for them is what costs, so each packed key should serve more rows.
int64_t prefill_chunk(const Problem& p) {
#if defined(__AMX_BF16__)
  const int64_t rows = pairs(p) ? 1024 : 256;
#else
  const int64_t rows = 256;
#endif
  return max64(1, rows / p.group());
}

void prefill(const Problem& p, int64_t row, int64_t kv_head, int64_t position, int64_t token, int64_t count,
             void* scratch) {
  const bool capped = p.logits_soft_cap > 0;
#if defined(__AVX512BF16__)
  if (pairs(p))
    return capped ? prefill_rows<BF16, BestPairStep, true>(p, row, kv_head, position, token, count, scratch)
                  : prefill_rows<BF16, BestPairStep, false>(p, row, kv_head, position, token, count, scratch);
#endif
  with_type(p.cache_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (capped)
      prefill_rows<T, FloatStep, true>(p, row, kv_head, position, token, count, scratch);
    else
      prefill_rows<T, FloatStep, false>(p, row, kv_head, position, token, count, scratch);
  });
}

size_t prefill_scratch(const Problem& p) {
  const int64_t tokens = prefill_chunk(p);
#if defined(__AVX512BF16__)
  if (pairs(p)) return PrefillScratch<BF16, BestPairStep>(p, tokens, nullptr).size;
#endif
  return PrefillScratch<float, FloatStep>(p, tokens, nullptr).size;
}

}  // namespace

extern const Routines kRoutines;
const Routines kRoutines = {RAGGED_ISA_NAME, write,           decode_scratch, decode,
                            finish,          prefill_chunk, prefill_scratch, prefill};

}  // namespace RAGGED_ISA
}  // namespace easydel_ragged
