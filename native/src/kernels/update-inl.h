// New keys and values are written to their pages.

template <class From, class To>
RAGGED_INLINE void convert(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_tail(to + i, load_tail(from + i, count - i), count - i);
}
template <class T>
RAGGED_INLINE void convert(const T* from, T* to, int64_t count) {
  constexpr int64_t each = int64_t(sizeof(VecF) / sizeof(T));  // by vectors: a call for each head costs more
  int64_t i = 0;
  for (; i + each <= count; i += each) store_bits(to + i, load_bits<VecF>(from + i));
  if (i < count) __builtin_memcpy(to + i, from + i, size_t(count - i) * sizeof(T));
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

void write_codes(const Problem& p, int64_t row, int64_t position, int64_t token, int64_t count) {
  const Cache<Coded> cache(p, row);
  for (int64_t i = 0; i < count; ++i) {
    uintptr_t slot;
    cache.slots(position + i, 1, &slot);
    for (int array = 0; array < Codes::kArrays; ++array) {
      const int64_t bytes = p.codes.bytes[array];
      __builtin_memcpy(p.codes.arrays[array] + int64_t(slot) * bytes, p.codes.fresh[array] + (token + i) * bytes,
                       size_t(bytes));
    }
  }
}

void write(const Problem& p, int64_t row, int64_t position, int64_t token, int64_t count) {
  if (p.cache_dtype == DType::kCodes) return write_codes(p, row, position, token, count);
  with_type(p.new_dtype, [&](auto from) {
    with_type(p.cache_dtype, [&](auto to) {
      write_tokens<typename decltype(from)::type, typename decltype(to)::type>(p, row, position, token, count);
    });
  });
}
