// One vector of floats, as wide as the unit's instruction set has. Included once by each unit, inside its namespace:
// nothing here may be shared between units, or the linker could hand one unit's code to a lesser machine.

#if defined(__AVX512F__)
#define RAGGED_LANES 16
#elif defined(__AVX2__)
#define RAGGED_LANES 8
#else
#define RAGGED_LANES 4
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
#define RAGGED_REGISTERS 32
#else
#define RAGGED_REGISTERS 16
#endif

#define RAGGED_INLINE static inline __attribute__((always_inline))
#define RAGGED_INLINE_MEMBER inline __attribute__((always_inline))

constexpr int kLanes = RAGGED_LANES;

typedef float VecF __attribute__((vector_size(RAGGED_LANES * 4)));
typedef int32_t VecI __attribute__((vector_size(RAGGED_LANES * 4)));
typedef uint32_t VecU __attribute__((vector_size(RAGGED_LANES * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(RAGGED_LANES * 2)));
typedef uint8_t VecU8 __attribute__((vector_size(RAGGED_LANES)));

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct E4M3 {
  static constexpr int kMantissaBits = 3, kBias = 7;
  static constexpr bool kHasInfinity = false;
  uint8_t bits;
};
struct E5M2 {
  static constexpr int kMantissaBits = 2, kBias = 15;
  static constexpr bool kHasInfinity = true;
  uint8_t bits;
};

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

template <bool first, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};

template <class To, class From>
RAGGED_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

RAGGED_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
RAGGED_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
RAGGED_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

RAGGED_INLINE VecF splat(float x) {
#if defined(__AVX512F__)
  return (VecF)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (VecF)_mm256_set1_ps(x);
#else
  return VecF{x, x, x, x};
#endif
}
RAGGED_INLINE VecI splat_int(int32_t x) { return bit_cast<VecI>(splat(bit_cast<float>(x))); }

template <class V, class P>
RAGGED_INLINE V load_bits(const P* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class P>
RAGGED_INLINE void store_bits(P* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}
RAGGED_INLINE void store(float* to, VecF v) { __builtin_memcpy(to, &v, sizeof(v)); }

RAGGED_INLINE VecF fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The larger one; `b` where either is not a number.
RAGGED_INLINE VecF maximum(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// Lane i of the vector that takes every other block of `width` lanes from (a, b), starting at block `high`,
// so that blocks of a and of b alternate.
constexpr int block_lane(int width, bool high, int lane) {
  const int start = lane / (2 * width) * (2 * width) + lane % width + (high ? width : 0);
  return lane % (2 * width) < width ? start : start + kLanes;
}
// For what is taken together across lanes, where it is enough that the lanes of each vector stay apart: shuffles that
// are one instruction and leave both registers as they are. After the last step results are in the order of the
// vectors.
constexpr int fold_lane(int width, bool high, int lane) {
  const int in_four = lane % 4, four = lane / 4;
  if (width == 1) return four * 4 + in_four / 2 + (high ? 2 : 0) + in_four % 2 * kLanes;
  if (kLanes < 16 || width == 2) return block_lane(width, high, lane);
  const int from = width == 4 ? four % 2 + (high ? 2 : 0) : four % 2 * 2 + (high ? 1 : 0);
  return from * 4 + in_four + four / 2 * kLanes;
}
template <int... I>
RAGGED_INLINE VecF shuffle(VecF a, VecF b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, VecI{I...});
#endif
}
template <int width, bool high, int... I>
RAGGED_INLINE VecF interleave(VecF a, VecF b, Indices<I...>) {
  return shuffle<block_lane(width, high, I)...>(a, b);
}
template <int width, bool high>
RAGGED_INLINE VecF interleave(VecF a, VecF b) {
  return interleave<width, high>(a, b, typename MakeIndices<kLanes>::type{});
}
// How two are taken together, and that for the lanes of two vectors, or of one.
struct Added {
  RAGGED_INLINE VecF of(VecF a, VecF b) { return a + b; }
};
struct Largest {
  RAGGED_INLINE VecF of(VecF a, VecF b) { return maximum(a, b); }
};
template <class Op, int width, int... I>
RAGGED_INLINE VecF fold(VecF a, VecF b, Indices<I...>) {
  return Op::of(shuffle<fold_lane(width, false, I)...>(a, b), shuffle<fold_lane(width, true, I)...>(a, b));
}

// Lane i of the result: all lanes of v[i % count] taken together. `count` is a power of two, at most kLanes.
template <class Op, int count, int width = 1>
RAGGED_INLINE VecF folded(const VecF* v) {
  if constexpr (width == kLanes) {
    return v[0];
  } else {
    constexpr int left = count > 1 ? count / 2 : 1;
    VecF half[left];
#pragma GCC unroll 16
    for (int i = 0; i < left; ++i)
      half[i] = fold<Op, width>(v[2 * i % count], v[(2 * i + 1) % count], typename MakeIndices<kLanes>::type{});
    return folded<Op, left, 2 * width>(half);
  }
}

template <int width = kLanes / 2>
RAGGED_INLINE void transpose(VecF* v) {
  if constexpr (width >= 1) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i % (2 * width) < width) {
        const VecF a = v[i], b = v[i + width];
        v[i] = interleave<width, false>(a, b);
        v[i + width] = interleave<width, true>(a, b);
      }
    }
    transpose<width / 2>(v);
  }
}

RAGGED_INLINE float sum_of(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

// Half precision to single, by integer arithmetic: exact, and no rounding mode or denormal flag takes part.
RAGGED_INLINE VecF half_to_float(VecU bits) {
  const VecU rest = bits & 0x7fffu;
  const VecU sign = (bits & 0x8000u) << 16;
  const VecU normal = (rest << 13) + (112u << 23);
  const VecU special = (rest << 13) + (224u << 23);
  const VecU tiny = bit_cast<VecU>(__builtin_convertvector((VecI)rest, VecF) * splat(0x1p-24f));
  const VecU magnitude = rest < 0x400u ? tiny : (rest >= 0x7c00u ? special : normal);
  return bit_cast<VecF>(magnitude | sign);
}
RAGGED_INLINE VecF e4m3_to_float(VecU bits) {
  const VecU rest = bits & 0x7fu;
  const VecU sign = (bits & 0x80u) << 24;
  const VecU normal = (rest << 20) + (120u << 23);
  const VecU tiny = bit_cast<VecU>(__builtin_convertvector((VecI)rest, VecF) * splat(0x1p-9f));
  const VecU nan = VecU{} + 0x7fc00000u;
  const VecU magnitude = rest < 8u ? tiny : (rest == 0x7fu ? nan : normal);
  return bit_cast<VecF>(magnitude | sign);
}

// Loads kLanes elements as float.
RAGGED_INLINE VecF load(const float* from) { return load_bits<VecF>(from); }
RAGGED_INLINE VecU widen(VecU16 v) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VecU);
#endif
}
RAGGED_INLINE VecU widen(VecU8 v) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(v)));
#else
  return __builtin_convertvector(v, VecU);
#endif
}
RAGGED_INLINE VecF load(const BF16* from) { return bit_cast<VecF>(widen(load_bits<VecU16>(from)) << 16); }
RAGGED_INLINE VecF load(const F16* from) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(load_bits<__m256i>(from));
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(load_bits<__m128i>(from));
#else
  return half_to_float(widen(load_bits<VecU16>(from)));
#endif
}
// Shifted by one bit, e4m3 is half precision times 2^-8, subnormals included; the NaN is one of half precision.
RAGGED_INLINE VecF load(const E4M3* from) {
#if defined(__AVX512F__)
  const __m256i wide = _mm256_cvtepu8_epi16(load_bits<__m128i>(from));
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 1), _mm256_set1_epi16(-0x4080));
  const __mmask16 nan =
      _mm256_cmpeq_epi16_mask(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7f));
  return (VecF)_mm512_cvtph_ps(_mm256_mask_add_epi16(half, nan, half, _mm256_set1_epi16(0x7e00 - 0x3f80))) *
         splat(0x1p8f);
#elif defined(__F16C__)
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i half = _mm_and_si128(_mm_srai_epi16(_mm_slli_epi16(wide, 8), 1), _mm_set1_epi16(-0x4080));
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7f));
  return (VecF)_mm256_cvtph_ps(_mm_add_epi16(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00 - 0x3f80)))) *
         splat(0x1p8f);
#else
  return e4m3_to_float(widen(load_bits<VecU8>(from)));
#endif
}
RAGGED_INLINE VecF load(const E5M2* from) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load_bits<__m128i>(from)), 8));
#elif defined(__F16C__)
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return (VecF)_mm256_cvtph_ps(_mm_slli_epi16(wide, 8));
#else
  return half_to_float(widen(load_bits<VecU8>(from)) << 8);
#endif
}

// The first `count` < kLanes elements, the rest zero.
template <class T>
RAGGED_INLINE VecF load_tail(const T* from, int64_t count) {
  T buffer[kLanes];
  __builtin_memset(buffer, 0, sizeof(buffer));
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}

// Float to a shorter type, round to nearest even.
RAGGED_INLINE VecU bf16_bits(VecF x) {
  const VecU bits = bit_cast<VecU>(x);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU quiet = (bits >> 16) | 0x40u;
  return (VecU)(x == x) ? rounded : quiet;
}
RAGGED_INLINE void store(BF16* to, VecF x) {
#if defined(__AVX512F__)
  const __m256i v = _mm512_cvtepi32_epi16((__m512i)bf16_bits(x));
#else
  const VecU16 v = __builtin_convertvector(bf16_bits(x), VecU16);
#endif
  __builtin_memcpy(to, &v, sizeof(v));
}

// Scalar rounding to a small float with `mantissa` bits and exponent bias `bias`; returns magnitude bits, which run
// past the largest finite value when x does. Exact for subnormals.
RAGGED_INLINE uint32_t round_small(float x, int mantissa, int bias) {
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  const int shift = 23 - mantissa;
  const int exponent = int(bits >> 23) - 127;
  const int lowest = 1 - bias;  // exponent of the smallest normal number
  if (exponent >= lowest) {
    const uint32_t rebased = bits - (uint32_t(127 - bias) << 23);
    return (rebased + ((1u << (shift - 1)) - 1) + ((rebased >> shift) & 1u)) >> shift;
  }
  const int more = shift + (lowest - exponent);  // subnormal: the hidden bit moves into the mantissa
  if (more > 24 || exponent < -126) return 0;
  const uint32_t full = (bits & 0x7fffffu) | 0x800000u;
  return (full + ((1u << (more - 1)) - 1) + ((full >> more) & 1u)) >> more;
}
RAGGED_INLINE uint16_t half_bits(float x) {
  const uint16_t sign = uint16_t(bit_cast<uint32_t>(x) >> 16) & 0x8000u;
  if (x != x) return sign | 0x7e00u;
  if (x > 65520.0f || x < -65520.0f) return sign | 0x7c00u;
  return uint16_t(sign | round_small(x, 10, 15));
}
RAGGED_INLINE void store(F16* to, VecF x) {
#if defined(__AVX512F__)
  const __m256i v = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(to, &v, sizeof(v));
#elif defined(__F16C__)
  const __m128i v = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(to, &v, sizeof(v));
#else
  for (int i = 0; i < kLanes; ++i) to[i].bits = half_bits(x[i]);
#endif
}
// The 8-bit types saturate: they hold caches, where one infinity or NaN would poison a whole row.
RAGGED_INLINE void store(E4M3* to, VecF x) {
  for (int i = 0; i < kLanes; ++i) {
    const float v = x[i];
    const uint8_t sign = uint8_t(bit_cast<uint32_t>(v) >> 24) & 0x80u;
    const float clipped = v > 448.0f ? 448.0f : (v < -448.0f ? -448.0f : v);
    to[i].bits = v != v ? uint8_t(sign | 0x7fu) : uint8_t(sign | round_small(clipped, 3, 7));
  }
}
RAGGED_INLINE void store(E5M2* to, VecF x) {
  for (int i = 0; i < kLanes; ++i) {
    const float v = x[i];
    const uint8_t sign = uint8_t(bit_cast<uint32_t>(v) >> 24) & 0x80u;
    const float clipped = v > 57344.0f ? 57344.0f : (v < -57344.0f ? -57344.0f : v);
    to[i].bits = v != v ? uint8_t(sign | 0x7eu) : uint8_t(sign | round_small(clipped, 2, 15));
  }
}
template <class T>
RAGGED_INLINE void store_tail(T* to, VecF x, int64_t count) {
  T buffer[kLanes];
  store(buffer, x);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// Weights of a softmax, as a product takes them.
RAGGED_INLINE void store_weights(float* to, VecF weights) { store(to, weights); }
RAGGED_INLINE void store_weights(BF16* to, VecF weights) {
#if defined(__AVX512BF16__)  // one instruction, which flushes denormals: right for weights, not for caches
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)weights);
  __builtin_memcpy(to, &bits, sizeof(bits));
#else
  store(to, weights);
#endif
}

// 2^x for x <= 0, and 0 from about -126 down, where floats become subnormal and products with them slow. NaN stays NaN.
// The polynomials are minimax fits. kShort is for what is rounded to bfloat16: there subnormal results may stay.
#if defined(__AVX512F__)
// 2^x = 2^(i / 16) * 2^floor(r) * 2^(x - r), r being x rounded to sixteenths and i their number modulo 16. Relative
// errors are below 1.1e-7, and 6e-7 if short. Nearly all but the polynomial is done by units that no product needs.
constexpr float kSixteenths[16] __attribute__((aligned(64))) = {
    0x1p0f,        0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f,  0x1.3dea64p0f,
    0x1.4bfdaep0f, 0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
    0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};
template <bool kShort = false>
RAGGED_INLINE VecF exp2_nonpositive(VecF x) {
  if constexpr (kShort) x = maximum(splat(-200.0f), x);
  const VecF magic = splat(0x1.8p19f), shifted = x + magic, r = shifted - magic, f = x - r;
  const VecF sixteenth = (VecF)_mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(kSixteenths));
  VecF p;
  if constexpr (kShort) {
    p = fma(splat(0.24022643f), f, splat(0.69318772f));
  } else {
    p = fma(splat(5.5502136e-2f), f, splat(0.24023429f));
    p = fma(p, f, splat(0.69314718f));
  }
  p = fma(sixteenth * f, p, sixteenth);
  if constexpr (kShort) return (VecF)_mm512_scalef_ps((__m512)p, (__m512)r);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ);
  return (VecF)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)r);
}
#else
// Relative errors are below 2e-9, and 3e-6 if short, before rounding.
template <bool kShort = false>
RAGGED_INLINE VecF exp2_nonpositive(VecF x) {
  x = maximum(splat(-127.0f), x);
  const VecF magic = splat(0x1.8p23f);
  const VecF shifted = x + magic;
  const VecF f = x - (shifted - magic);
  VecF p;
  if constexpr (kShort) {
    p = splat(9.58285e-3f);
    p = fma(p, f, splat(5.590642e-2f));
    p = fma(p, f, splat(2.4024099e-1f));
    p = fma(p, f, splat(6.9312419e-1f));
  } else {
    p = splat(1.53458075e-4f);
    p = fma(p, f, splat(1.33999312e-3f));
    p = fma(p, f, splat(9.61848897e-3f));
    p = fma(p, f, splat(5.55032878e-2f));
    p = fma(p, f, splat(2.40226469e-1f));
    p = fma(p, f, splat(6.93147206e-1f));
  }
  p = fma(p, f, splat(1.0f));
  const VecI power = (bit_cast<VecI>(shifted) - bit_cast<VecI>(magic) + 127) << 23;
  return p * bit_cast<VecF>(power);
}
#endif
RAGGED_INLINE float exp2_nonpositive(float x) { return exp2_nonpositive(splat(x))[0]; }

RAGGED_INLINE VecF hyperbolic_tangent(VecF x) {
  const VecF a = bit_cast<VecF>(bit_cast<VecI>(x) & 0x7fffffff);
  const VecF u = a * a;
  VecF small = splat(-5.85216e-3f);
  small = fma(small, u, splat(2.075363e-2f));
  small = fma(small, u, splat(-5.37687e-2f));
  small = fma(small, u, splat(1.3331689e-1f));
  small = fma(small, u, splat(-3.3333283e-1f));
  small = fma(small, u, splat(1.0f)) * a;
  const VecF e = exp2_nonpositive(a * splat(-2.885390082f));  // exp(-2a)
  const VecF large = (splat(1.0f) - e) / (splat(1.0f) + e);
  const VecF result = a < splat(0.6f) ? small : large;
  return bit_cast<VecF>(bit_cast<VecI>(result) | (bit_cast<VecI>(x) & int32_t(0x80000000)));
}

RAGGED_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }
