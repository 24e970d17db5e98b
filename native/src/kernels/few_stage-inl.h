// Few queries: keys and values of a block, converted to the elements of the products and laid close together.

#if defined(__AVX512VBMI__)
template <class T>
RAGGED_INLINE void stage_by_table(const char* const* slot, int64_t count, int64_t offset, int64_t head_dim, BF16* to,
                                  int64_t stride) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // after which unpacking keeps that of columns
  for (int64_t t = 0; t < count; ++t) {
    BF16* row = to + 2 * t * stride;
    for (int64_t d = 0; d < head_dim; d += 64) {
      const uint64_t columns = head_dim - d >= 64 ? ~uint64_t{0} : (uint64_t{1} << (head_dim - d)) - 1;
      const Widened v =
          looked_up<T>(_mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(columns, at<T>(slot[t], offset + d))));
      store_bits(row + d, v.low);
      store_bits(row + d + 32, v.high);
    }
  }
}
#endif

// Keys or values of a block for one kv head, in the elements of the products.
template <class T, class S>
void stage(const char* const* slot, int64_t count, int64_t offset, int64_t head_dim, S* to, int64_t stride) {
#if defined(__AVX512VBMI__)
  if constexpr (is_same<S, BF16> && sizeof(T) == 1) return stage_by_table<T>(slot, count, offset, head_dim, to, stride);
#endif
  for (int64_t t = 0; t < count; ++t) convert(at<T>(slot[t], offset), to + 2 * t * stride, head_dim);
}
