// A tile of keys and values of one kv head, packed for the products of many queries.

// Keys of a tile, transposed: panels of kPanel tokens, each [depth][kPanel]. Tokens past `count` are zero.
template <class Step, class T>
RAGGED_INLINE VecF packed_key(const T* key, int64_t d, int64_t head_dim) {
  if constexpr (Step::kElements == 2) {
    if constexpr (is_same<T, BF16>)
      if (d + 2 * kLanes <= head_dim) return load_bits<VecF>(key + d);
    BF16 pairs[2 * kLanes] = {};
    convert(key + d, pairs, min64(2 * kLanes, head_dim - d));
    return load_bits<VecF>(pairs);
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
