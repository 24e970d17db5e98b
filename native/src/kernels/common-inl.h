// What the loops share: types and their dispatch, scratch memory, the paged cache, logits. Included once by each unit.

#if defined(__AVX512BF16__)
constexpr bool kDotBF16 = true;
#else
constexpr bool kDotBF16 = false;
#endif

#if defined(__AMX_BF16__)
// A tile load. GCC does not know that it reads memory, and would leave out or move the stores around it.
#define RAGGED_TILE_LOAD(tile, from, stride) \
  do {                                       \
    asm volatile("" ::: "memory");           \
    _tile_loadd(tile, from, stride);         \
    asm volatile("" ::: "memory");           \
  } while (false)

// Shapes of the tile registers: 16 rows of up to 64 bytes.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  inline __attribute__((always_inline)) void set(int tile, int bytes, int count = 16) {
    row_bytes[tile] = uint16_t(bytes);
    rows[tile] = uint8_t(count);
  }
  inline __attribute__((always_inline)) void load() const { _tile_loadconfig(this); }
};
#endif

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = __FLT_MAX__;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr int kCacheLine = 64;

template <class T>
struct Tag {
  using type = T;
};
template <int count>
struct Count {
  static constexpr int value = count;
};

// In place of an element's type: a cache of codes, whose slots have numbers in place of addresses. It is several
// arrays.
struct Coded {
  uint8_t bits;
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
    case DType::kCodes:
      return;
  }
}
// Codes included.
template <class F>
RAGGED_INLINE void with_cache_type(DType dtype, F&& f) {
  if (dtype == DType::kCodes) return f(Tag<Coded>{});
  with_type(dtype, f);
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

// Heads [begin, end): kv heads or query heads.
struct HeadRange {
  int64_t begin, end;
};

template <class T>
struct Cache {
  const T* pages;
  const int32_t* table;
  int64_t page_size, token_stride;

  Cache(const Problem& p, int64_t row)
      : pages(static_cast<const T*>(p.pages)),
        table(p.block_tables + row * p.pages_per_row),
        page_size(p.page_size),
        token_stride(p.token_stride) {}

  // Addresses of the slots that hold positions [begin, begin + count).
  template <class Address>
  void slots(int64_t begin, int64_t count, Address* slot) const {
    int64_t entry = begin / page_size, offset = begin % page_size;
    for (int64_t i = 0; i < count; ++entry, offset = 0) {
      const int64_t first = table[entry] * page_size;
      for (; offset < page_size && i < count; ++offset, ++i) {
        if constexpr (is_same<T, Coded>)
          slot[i] = reinterpret_cast<Address>(uintptr_t(first + offset));
        else
          slot[i] = reinterpret_cast<Address>(pages + (first + offset) * token_stride);
      }
    }
  }
};

// Turns a product with a key of a kv head into a base-2 logit. Where there is a soft cap, the scale is not divided by
// it first: the quotient may be too large or too small for a float, and 0 times infinity is no number.
struct Logits {
  float scale, inverse_cap, cap;
  Logits(const Problem& p, int64_t kv_head)
      : scale(p.softmax_scale * (p.k_scales ? p.k_scales[kv_head] : 1.0f)), inverse_cap(0.0f), cap(0.0f) {
    if (p.logits_soft_cap > 0) {
      inverse_cap = 1.0f / p.logits_soft_cap;
      cap = p.logits_soft_cap * kLog2E;
    } else {
      scale *= kLog2E;
    }
  }
  template <bool kCapped>
  inline __attribute__((always_inline)) VecF of(VecF product) const {
    const VecF x = product * splat(scale);
    if constexpr (kCapped) return hyperbolic_tangent(x * splat(inverse_cap)) * splat(cap);
    return x;
  }
};

// Where nothing is done beside products.
struct NothingBeside {
  RAGGED_INLINE_MEMBER void step() {}
  RAGGED_INLINE_MEMBER void finish() {}
};

// The norms of the keys and values of a block of codes.
struct Norms {
  float *keys, *values;  // of logits, and of weights
};

// What the weighted values of a kv head are multiplied by.
RAGGED_INLINE float value_scale(const Problem& p, int64_t kv_head) {
  return p.v_scales ? p.v_scale * p.v_scales[kv_head] : p.v_scale;
}

RAGGED_INLINE bool all_finite(const float* from, int64_t count) {  // a multiple of kLanes
  VecF sum = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF v = load(from + i);
    sum = sum + (v - v);  // 0 where finite, else NaN
  }
  const float total = sum_of(sum);
  return total == total;
}

// A sink as a base-2 logit. It is never infinity, which minus itself is no number.
RAGGED_INLINE float base2_sink(float sink) {
  const float logit = sink * kLog2E;
  return logit > kLargest ? kLargest : logit;
}

// Natural logarithm of x, which is 0, positive and normal, or not finite. The error is below 2e-7 absolute where the
// result is below 1, and relative above. (logf would make the library need libm.)
RAGGED_INLINE float natural_log(float x) {
  if (!(x > 0.0f && x < kInfinity)) return x == 0.0f ? -kInfinity : x;
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;  // so that the mantissa is between sqrt(1/2) and sqrt(2)
  const float mantissa = bit_cast<float>(bits - (uint32_t(exponent) << 23));
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f), u = s * s;
  // log(m) = 2 atanh(s), |s| < 0.172
  const float rest = u * (0.6666666667f + u * (0.4f + u * (0.2857142857f + u * (0.2222222222f + u * 0.1818181818f))));
  return float(exponent) * kLn2 + (2.0f * s + s * rest);
}

// Logsumexp from a softmax's maximum, a base-2 logit, and its sum: the sum of all 2^(logit - maximum). `sink`: a
// natural logit that is the maximum, or null. The largest floats are no base-2 logits.
RAGGED_INLINE float logsumexp(float maximum, float total, const float* sink) {
  return (sink ? *sink : maximum * kLn2) + natural_log(total);
}
