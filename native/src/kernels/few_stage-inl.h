// Few queries: keys and values of a block, converted to the elements of the products and laid close together.

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
RAGGED_INLINE void stage_by_table(const char* const* slot, int64_t count, int64_t offset, int64_t head_dim, BF16* to,
                                  int64_t stride) {
  static constexpr Table<T> table;
  const __m512i low_a = load_bits<__m512i>(table.low), low_b = load_bits<__m512i>(table.low + 64);
  const __m512i high_a = load_bits<__m512i>(table.high), high_b = load_bits<__m512i>(table.high + 64);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), sign = _mm512_set1_epi8(-128);
  for (int64_t t = 0; t < count; ++t) {
    BF16* row = to + 2 * t * stride;
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
void stage(const char* const* slot, int64_t count, int64_t offset, int64_t head_dim, S* to, int64_t stride) {
#if defined(__AVX512VBMI__)
  if constexpr (is_same<S, BF16> && sizeof(T) == 1) return stage_by_table<T>(slot, count, offset, head_dim, to, stride);
#endif
  for (int64_t t = 0; t < count; ++t) convert(at<T>(slot[t], offset), to + 2 * t * stride, head_dim);
}
