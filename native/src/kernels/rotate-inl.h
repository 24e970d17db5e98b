// Products of vectors with a matrix: queries, outputs, keys and values of a cache of codes change their coordinates.

// Elements that keys, values, queries and outputs of Problem::codes have in the products.
DType element_dtype(const Problem& p) { return pairs(p) ? DType::kBF16 : DType::kF32; }

// A matrix [to_dim][from_dim], packed, and a block of vectors before and after.
template <class Step>
struct Rotation {
  using Element = ElementOf<Step>;
  int64_t from_dim, to_dim, depth, columns;
  const float** row;
  float *matrix, *from, *to;

  Rotation(int64_t from_dim, int64_t to_dim, Carver& carver) : from_dim(from_dim), to_dim(to_dim) {
    depth = round_up(from_dim, Step::kElements * kLanes) / Step::kElements;
    columns = round_up(to_dim, kPanel);
    row = carver.take<const float*>(to_dim);
    matrix = carver.take<float>(columns * depth);
    from = carver.take<float>(Step::kRows * depth);
    to = carver.take<float>(Step::kRows * columns);
  }

  void pack(const float* elements) const {
    for (int64_t i = 0; i < to_dim; ++i) row[i] = elements + i * from_dim;
    pack_keys<Step>(row, to_dim, 0, from_dim, depth, matrix);
    __builtin_memset(from, 0, size_t(Step::kRows * depth) * sizeof(float));
  }

  // Calls `read(i, vector)` to get vector i of `count`, and `write(i, rotated)` with what has become of it: whole
  // vectors of lanes.
  template <class Read, class Write>
  void rotate(int64_t count, Read&& read, Write&& write) const {
    NothingBeside nothing;
    for (int64_t first = 0; first < count; first += Step::kRows) {
      const int64_t live = min64(Step::kRows, count - first);
      for (int64_t i = 0; i < live; ++i) read(first + i, reinterpret_cast<Element*>(from + i * depth));
      multiply_panels<Step>(from, matrix, depth, 0, columns, to, columns, nothing);
      for (int64_t i = 0; i < live; ++i) write(first + i, to + i * columns);
    }
  }
};

// to[count][to_dim] = from[count][from_dim] times the transposed matrix[to_dim][from_dim].
template <class Step, class From, class To>
void rotate_vectors(const float* matrix, int64_t from_dim, int64_t to_dim, const From* from, int64_t count, To* to,
                    void* scratch) {
  Carver carver{static_cast<char*>(scratch)};
  const Rotation<Step> rotation(from_dim, to_dim, carver);
  rotation.pack(matrix);
  Step::begin();
  rotation.rotate(
      count, [&](int64_t i, ElementOf<Step>* vector) { convert(from + i * from_dim, vector, from_dim); },
      [&](int64_t i, const float* rotated) { convert(rotated, to + i * to_dim, to_dim); });
  Step::end();
}

template <class F>
RAGGED_INLINE void with_step([[maybe_unused]] const Problem& p, F&& f) {
#if defined(__AVX512BF16__)
  if (pairs(p)) return f(Tag<BestPairStep>{});
#endif
  f(Tag<FloatStep>{});
}

// Vectors [first, first + count) of the queries into `rotated`, or of `rotated` into the output.
void rotate(const Problem& p, bool outputs, void* rotated, int64_t first, int64_t count, void* scratch) {
  const int64_t dim = outputs ? p.head_dim : p.key_dim;
  with_query_type(p.query_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_step(p, [&](auto step) {
      using Step = typename decltype(step)::type;
      ElementOf<Step>* inner = static_cast<ElementOf<Step>*>(rotated) + first * dim;
      if (outputs)
        rotate_vectors<Step>(p.codes.output_rotation, dim, dim, inner, count, static_cast<T*>(p.output) + first * dim,
                             scratch);
      else
        rotate_vectors<Step>(p.codes.query_rotation, p.head_dim, dim,
                             static_cast<const T*>(p.queries) + first * p.head_dim, count, inner, scratch);
    });
  });
}

size_t rotate_scratch(const Problem& p) {
  size_t size = 0;
  with_step(p, [&](auto step) {
    Carver carver{nullptr};
    Rotation<typename decltype(step)::type>(p.head_dim, p.key_dim, carver);
    size = carver.used;
  });
  return size;
}

template <class Step>
struct RestoreScratch {
  using Element = ElementOf<Step>;
  Carver carver;
  Rotation<Step> keys, values;
  int64_t stride;
  Element* staged;  // of one kv head, [kTile][2][stride]
  Norms norms;      // [kTile]
  const char** slot;
  const Element** plain;
  RestoreScratch(const Problem& p, void* base)
      : carver{static_cast<char*>(base)},
        keys(p.key_dim, p.head_dim, carver),
        values(p.head_dim, p.head_dim, carver),
        stride(round_up(p.key_dim, 64)) {
    staged = carver.take<Element>(kTile * 2 * stride);
    norms = {carver.take<float>(kTile), carver.take<float>(kTile)};
    slot = carver.take<const char*>(kTile);
    plain = carver.take<const Element*>(kTile);
  }
};

// Keys and values at positions [begin, end) of a row of codes, into the slots of those positions in another row.
template <class Step>
void restore_tokens(const Problem& p, int64_t row, const Problem& plain, int64_t plain_row, int64_t begin, int64_t end,
                    const float* key_rotation, void* scratch) {
  using Element = ElementOf<Step>;
  const RestoreScratch<Step> s(p, scratch);
  s.keys.pack(key_rotation);
  s.values.pack(p.codes.output_rotation);
  const Cache<Coded> codes(p, row);
  const Cache<Element> cache(plain, plain_row);
  Step::begin();
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t tokens = min64(kTile, end - start);
    codes.slots(start, tokens, s.slot);
    cache.slots(start, tokens, s.plain);
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      unpack_head(p, s.slot, tokens, head, s.staged, s.stride, s.norms);
      const auto restore = [&](const Rotation<Step>& rotation, int64_t from, const float* norms, int64_t to) {
        rotation.rotate(
            tokens,
            [&](int64_t t, Element* vector) { convert(s.staged + t * 2 * s.stride + from, vector, rotation.from_dim); },
            [&](int64_t t, float* rotated) {
              const VecF norm = splat(finite_norm(norms[t]));
              for (int64_t d = 0; d < p.head_dim; d += kLanes) store(rotated + d, load(rotated + d) * norm);
              convert(rotated, const_cast<Element*>(s.plain[t]) + head * plain.head_stride + to, p.head_dim);
            });
      };
      restore(s.keys, 0, s.norms.keys, 0);
      restore(s.values, s.stride, s.norms.values, plain.value_offset);
    }
  }
  Step::end();
}

void restore(const Problem& p, int64_t row, const Problem& plain, int64_t plain_row, int64_t begin, int64_t end,
             const float* key_rotation, void* scratch) {
  with_step(p, [&](auto step) {
    restore_tokens<typename decltype(step)::type>(p, row, plain, plain_row, begin, end, key_rotation, scratch);
  });
}

size_t restore_scratch(const Problem& p) {
  size_t size = 0;
  with_step(p, [&](auto step) { size = RestoreScratch<typename decltype(step)::type>(p, nullptr).carver.used; });
  return size;
}
