// Rotates vectors: queries and outputs of a cache of codes, which are attended in other coordinates.

struct NothingBeside {
  RAGGED_INLINE_MEMBER void step() {}
};

// Elements of the queries and outputs of Problem::codes, as they are attended.
DType rotated_dtype(const Problem& p) { return pairs(p) ? DType::kBF16 : DType::kF32; }

// Memory of rotate: a matrix, packed, and a block of vectors before and after.
template <class Step>
struct RotateScratch {
  int64_t depth, columns;
  const float** row;
  float *matrix, *from, *to;
  size_t size;
  RotateScratch(int64_t from_dim, int64_t to_dim, void* base) {
    Carver carver{static_cast<char*>(base)};
    depth = round_up(from_dim, Step::kElements * kLanes) / Step::kElements;
    columns = round_up(to_dim, kPanel);
    row = carver.take<const float*>(to_dim);
    matrix = carver.take<float>(columns * depth);
    from = carver.take<float>(Step::kRows * depth);
    to = carver.take<float>(Step::kRows * columns);
    size = carver.used;
  }
};

// to[count][to_dim] = from[count][from_dim] times the transposed matrix[to_dim][from_dim].
template <class Step, class From, class To>
void rotate_vectors(const float* matrix, int64_t from_dim, int64_t to_dim, const From* from, int64_t count, To* to,
                    void* scratch) {
  const RotateScratch<Step> s(from_dim, to_dim, scratch);
  for (int64_t i = 0; i < to_dim; ++i) s.row[i] = matrix + i * from_dim;
  pack_keys<Step>(s.row, to_dim, 0, from_dim, s.depth, s.matrix);
  __builtin_memset(s.from, 0, size_t(Step::kRows * s.depth) * sizeof(float));
  NothingBeside nothing;
  Step::begin();
  for (int64_t first = 0; first < count; first += Step::kRows) {
    const int64_t live = min64(Step::kRows, count - first);
    for (int64_t i = 0; i < live; ++i)
      convert(from + (first + i) * from_dim, reinterpret_cast<ElementOf<Step>*>(s.from + i * s.depth), from_dim);
    multiply_panels<Step>(s.from, s.matrix, s.depth, 0, s.columns, s.to, s.columns, nothing);
    for (int64_t i = 0; i < live; ++i) convert(s.to + i * s.columns, to + (first + i) * to_dim, to_dim);
  }
  Step::end();
}

// Vectors [first, first + count) of the queries into `rotated`, or of `rotated` into the output.
void rotate(const Problem& p, bool outputs, void* rotated, int64_t first, int64_t count, void* scratch) {
  const int64_t dim = outputs ? p.head_dim : p.key_dim;
  with_query_type(p.query_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto rotate_as = [&](auto step) {
      using Step = typename decltype(step)::type;
      using Element = ElementOf<Step>;
      Element* inner = static_cast<Element*>(rotated) + first * dim;
      if (outputs)
        rotate_vectors<Step>(p.codes.output_rotation, dim, dim, inner, count, static_cast<T*>(p.output) + first * dim,
                             scratch);
      else
        rotate_vectors<Step>(p.codes.query_rotation, p.head_dim, dim,
                             static_cast<const T*>(p.queries) + first * p.head_dim, count, inner, scratch);
    };
#if defined(__AVX512BF16__)
    if (pairs(p)) return rotate_as(Tag<BestPairStep>{});
#endif
    rotate_as(Tag<FloatStep>{});
  });
}

size_t rotate_scratch(const Problem& p) {
#if defined(__AVX512BF16__)
  if (pairs(p)) return RotateScratch<BestPairStep>(p.head_dim, p.key_dim, nullptr).size;
#endif
  return RotateScratch<FloatStep>(p.head_dim, p.key_dim, nullptr).size;
}
