// Codes of a TurboQuant cache, unpacked into elements of the products: what is left of keys and values without their
// norms, which are factors of logits and weights. Elements of a vector may be stored past the last one.

// The entries of a codebook that the lowest four bits of each lane select.
struct Codebook {
  using Element = float;
#if defined(__AVX512F__)
  __m512 entries;
  RAGGED_INLINE_MEMBER explicit Codebook(const float* from) : entries((__m512)load(from)) {}
  RAGGED_INLINE_MEMBER VecF of(VecU index) const { return (VecF)_mm512_permutexvar_ps((__m512i)index, entries); }
#elif defined(__AVX2__)
  __m256 low, high;
  RAGGED_INLINE_MEMBER explicit Codebook(const float* from) : low((__m256)load(from)), high((__m256)load(from + 8)) {}
  RAGGED_INLINE_MEMBER VecF of(VecU index) const {
    const __m256i i = (__m256i)index;
    return (VecF)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                                  (__m256)(index << 28));
  }
#else
  const float* entries;
  RAGGED_INLINE_MEMBER explicit Codebook(const float* from) : entries(from) {}
  RAGGED_INLINE_MEMBER VecF of(VecU index) const {
    VecF found;
    for (int i = 0; i < kLanes; ++i) found[i] = entries[index[i] & 15u];
    return found;
  }
#endif
};

template <bool high, int... I>
RAGGED_INLINE VecF alternate(VecF a, VecF b, Indices<I...>) {
  constexpr int first = high ? kLanes / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, VecI{first + I / 2 + I % 2 * kLanes...});
#endif
}
// Lanes of both in turns.
RAGGED_INLINE void store_in_turns(float* to, VecF even, VecF odd) {
  store(to, alternate<false>(even, odd, typename MakeIndices<kLanes>::type{}));
  store(to + kLanes, alternate<true>(even, odd, typename MakeIndices<kLanes>::type{}));
}
RAGGED_INLINE void unpack_indices(const uint8_t* from, int64_t count, const Codebook& codebook, float* to) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const uint8_t* bytes = from + i / 2;
    VecU8 packed;
    if (i + 2 * kLanes <= count) {
      packed = load_bits<VecU8>(bytes);
    } else {
      packed = VecU8{};
      for (int64_t b = 0; b < (count - i) / 2; ++b) packed[b] = bytes[b];
    }
    const VecU indices = widen(packed);
    store_in_turns(to + i, codebook.of(indices), codebook.of(indices >> 4));
  }
}

// A bit of 1 is plus.
RAGGED_INLINE void unpack_signs(const uint8_t* from, int64_t count, float size, float* to) {
  VecU lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
  for (int64_t i = 0; i < count; i += kLanes) {
    uint32_t bits = uint32_t(from[i / 8]) >> i % 8;
    if (kLanes > 8 && i + 8 < count) bits |= uint32_t(from[i / 8 + 1]) << 8;
    const VecU minus = ((VecU)splat_int(int32_t(~bits)) >> lane) << 31;
    store(to + i, bit_cast<VecF>(bit_cast<VecU>(splat(size)) ^ minus));
  }
}

#if defined(__AVX512BF16__)
// The entries in bfloat16, their two bytes apart, for look-ups within 16 bytes.
struct PairCodebook {
  using Element = BF16;
  __m512i low, high;
  RAGGED_INLINE_MEMBER explicit PairCodebook(const float* from) {
    const __m512i bits = (__m512i)bf16_bits(load(from));
    low = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(bits));
    high = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8)));
  }
};
RAGGED_INLINE void unpack_indices(const uint8_t* from, int64_t count, const PairCodebook& codebook, BF16* to) {
  // So that what is put together within 16 bytes comes out in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i lowest = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < count; i += 128) {
    const uint64_t bytes = count - i >= 128 ? ~uint64_t{0} : (uint64_t{1} << (count - i) / 2) - 1;
    const __m512i packed = _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(bytes, from + i / 2));
    const __m512i even = _mm512_and_si512(packed, lowest);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(packed, 4), lowest);
    const __m512i even_low = _mm512_shuffle_epi8(codebook.low, even);
    const __m512i even_high = _mm512_shuffle_epi8(codebook.high, even);
    const __m512i odd_low = _mm512_shuffle_epi8(codebook.low, odd);
    const __m512i odd_high = _mm512_shuffle_epi8(codebook.high, odd);
    const __m512i evens[] = {_mm512_unpacklo_epi8(even_low, even_high), _mm512_unpackhi_epi8(even_low, even_high)};
    const __m512i odds[] = {_mm512_unpacklo_epi8(odd_low, odd_high), _mm512_unpackhi_epi8(odd_low, odd_high)};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      BF16* at = to + i + 64 * half;
      if (i + 64 * half < count) store_bits(at, _mm512_unpacklo_epi16(evens[half], odds[half]));
      if (i + 64 * half + 32 < count) store_bits(at + 32, _mm512_unpackhi_epi16(evens[half], odds[half]));
    }
  }
}
RAGGED_INLINE void unpack_signs(const uint8_t* from, int64_t count, float size, BF16* to) {
  const uint32_t bits = bf16_bits(splat(size))[0];
  const __m512i plus = _mm512_set1_epi16(int16_t(bits)), minus = _mm512_set1_epi16(int16_t(bits ^ 0x8000u));
  for (int64_t i = 0; i < count; i += 32) {
    uint32_t signs = 0;
    if (i + 32 <= count)
      signs = load_bits<uint32_t>(from + i / 8);
    else
      for (int64_t b = 0; b < (count - i) / 8; ++b) signs |= uint32_t(from[i / 8 + b]) << 8 * b;
    store_bits(to + i, _mm512_mask_blend_epi16(signs, minus, plus));
  }
}
#endif

RAGGED_INLINE float norm_at(const uint8_t* array, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return bit_cast<float>(uint32_t(load_bits<uint16_t>(array + 2 * i)) << 16);
    case DType::kF16:
      return load_tail(reinterpret_cast<const F16*>(array) + i, 1)[0];
    default:
      return load_bits<float>(array + 4 * i);
  }
}

// Infinity times coordinates of both signs is no number; times their sum it would be one.
RAGGED_INLINE float finite_norm(float norm) { return norm - norm == 0.0f ? norm : __builtin_nanf(""); }

// Keys and values of some slots for one kv head, [count][2][stride]. A residual is stored as a multiple of the key.
template <class Book>
void unpack(const Problem& p, const char* const* slot, int64_t count, int64_t kv_head, typename Book::Element* to,
            int64_t stride, const Norms& norms) {
  constexpr float kTiny = 1e-20f;
  const Codes& codes = p.codes;
  const Book keys(codes.key_codebook), values(codes.value_codebook);
  const int64_t indices = p.head_dim / 2, signs = p.key_dim - p.head_dim;
  const uint8_t* key_norms = codes.arrays[Codes::kKeyNorms];
  for (int64_t t = 0; t < count; ++t, to += 2 * stride) {
    const int64_t head = int64_t(reinterpret_cast<uintptr_t>(slot[t])) * p.num_kv_heads + kv_head;
    const float norm = finite_norm(norm_at(key_norms, 2 * head, codes.key_norms));
    const float residual = norm_at(key_norms, 2 * head + 1, codes.key_norms);
    norms.keys[t] = norm < kTiny && norm > -kTiny ? kTiny : norm;
    norms.values[t] = norm_at(codes.arrays[Codes::kValueNorms], head, codes.value_norms);
    unpack_indices(codes.arrays[Codes::kKeyIndices] + head * indices, p.head_dim, keys, to);
    unpack_signs(codes.arrays[Codes::kKeySigns] + head * signs / 8, signs, residual / norms.keys[t], to + p.head_dim);
    unpack_indices(codes.arrays[Codes::kValueIndices] + head * indices, p.head_dim, values, to + stride);
  }
}
#if defined(__AVX512BF16__)
RAGGED_INLINE void unpack_head(const Problem& p, const char* const* slot, int64_t count, int64_t kv_head, BF16* to,
                               int64_t stride, const Norms& norms) {
  unpack<PairCodebook>(p, slot, count, kv_head, to, stride, norms);
}
#endif
RAGGED_INLINE void unpack_head(const Problem& p, const char* const* slot, int64_t count, int64_t kv_head, float* to,
                               int64_t stride, const Norms& norms) {
  unpack<Codebook>(p, slot, count, kv_head, to, stride, norms);
}
