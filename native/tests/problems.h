// Random problems for the harness and the fuzzer: sizes and options from a stream of bytes, index arrays that may be
// anything, and every array in an allocation of exactly its size, so that a sanitizer sees the first byte outside.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "problem.h"

namespace easydel_ragged {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint32_t next() {  // past the end: a fixed pseudo-random continuation
    if (at_ < size_) return data_[at_++];
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 56);
  }
  uint32_t next32() { return next() | next() << 8 | next() << 16 | next() << 24; }
  int64_t between(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }
  bool one_in(int n) { return next() % n == 0; }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
  uint64_t state_ = 0x9e3779b97f4a7c15u;
};

struct Arrays {
  std::vector<uint8_t> queries, keys, values, pages, output;
  std::vector<uint8_t> codes[Codes::kArrays], fresh_codes[Codes::kArrays];  // in place of keys, values and pages
  std::vector<float> codebooks, query_rotation, output_rotation;
  std::vector<int32_t> context_lens, block_tables, query_start_loc;
  std::vector<float> sinks, k_scales, v_scales, lse;
};

inline std::vector<uint8_t> random_elements(Bytes& bytes, int64_t count, DType dtype) {
  std::vector<uint8_t> all(size_t(count) * element_size(dtype));
  uint32_t state = bytes.next32() | 1u;
  for (size_t i = 0; i < size_t(count); ++i) {
    state = state * 1664525u + 1013904223u;
    const uint32_t sign = state & 0x80000000u, mantissa = state & 0x007fffffu;
    if (dtype == DType::kF32) {
      const uint32_t v = sign | 0x3f000000u | mantissa;
      std::memcpy(&all[i * 4], &v, 4);
    } else if (dtype == DType::kBF16) {
      const uint16_t v = uint16_t((sign | 0x3f000000u | mantissa) >> 16);
      std::memcpy(&all[i * 2], &v, 2);
    } else if (dtype == DType::kF16) {
      const uint16_t v = uint16_t(sign >> 16 | 0x3800u | mantissa >> 13);
      std::memcpy(&all[i * 2], &v, 2);
    } else {
      all[i] = uint8_t(state >> 24 & 0xbfu);  // below 2
    }
  }
  return all;
}

// Some elements become infinite, or NaN where the dtype has no infinity.
inline void spoil(Bytes& bytes, std::vector<uint8_t>& elements, DType dtype) {
  const size_t size = element_size(dtype), count = elements.size() / size;
  const uint32_t bits = dtype == DType::kF32      ? 0x7f800000u
                        : dtype == DType::kBF16   ? 0x7f80u
                        : dtype == DType::kF16    ? 0x7c00u
                        : dtype == DType::kF8E5M2 ? 0x7cu
                                                  : 0x7fu;
  for (int64_t i = bytes.between(1, 3); i > 0 && count > 0; --i)
    std::memcpy(&elements[bytes.next32() % count * size], &bits, size);  // little-endian
}

// The arrays of a TurboQuant cache and of the new tokens' codes.
inline void make_codes(Bytes& bytes, Problem& p, Arrays& a, bool writes) {
  const int64_t heads = p.num_kv_heads, norm = int64_t(element_size(p.codes.key_norms)) * heads;
  const int64_t sizes[] = {heads * p.head_dim / 2, heads * (p.key_dim - p.head_dim) / 8, 2 * norm,
                           heads * p.head_dim / 2, int64_t(element_size(p.codes.value_norms)) * heads};
  static uint8_t none;
  for (int i = 0; i < Codes::kArrays; ++i) {
    p.codes.bytes[i] = sizes[i];
    const bool is_norm = i == Codes::kKeyNorms || i == Codes::kValueNorms;
    const DType dtype = i == Codes::kKeyNorms ? p.codes.key_norms : p.codes.value_norms;
    const auto random = [&](int64_t slots) {
      if (is_norm) return random_elements(bytes, slots * sizes[i] / int64_t(element_size(dtype)), dtype);
      std::vector<uint8_t> all(size_t(slots * sizes[i]));
      uint32_t state = bytes.next32() | 1u;
      for (uint8_t& each : all) each = uint8_t((state = state * 1664525u + 1013904223u) >> 24);
      return all;
    };
    a.codes[i] = random(p.num_pages * p.page_size);
    if (is_norm && bytes.one_in(6)) spoil(bytes, a.codes[i], dtype);
    p.codes.arrays[i] = a.codes[i].data();
    if (!writes) continue;
    a.fresh_codes[i] = random(p.num_tokens);
    p.codes.fresh[i] = a.fresh_codes[i].empty() ? &none : a.fresh_codes[i].data();
  }
  for (int i = 0; i < 32; ++i) a.codebooks.push_back(float(bytes.between(-20, 20)) / 16);
  p.codes.key_codebook = a.codebooks.data();
  p.codes.value_codebook = a.codebooks.data() + 16;
  p.keys = p.codes.fresh[Codes::kKeyIndices];
  p.values = p.codes.fresh[Codes::kValueIndices];
  uint32_t state = bytes.next32() | 1u;
  const auto fill = [&](std::vector<float>& matrix, int64_t rows) {  // it need not turn anything
    matrix.resize(size_t(rows * p.head_dim));
    for (float& each : matrix) {
      state = state * 1664525u + 1013904223u;
      each = (float(state >> 8) * 0x1p-23f - 1.0f) / std::sqrt(float(p.head_dim));
    }
  };
  fill(a.query_rotation, p.key_dim);
  fill(a.output_rotation, p.head_dim);
  p.codes.query_rotation = a.query_rotation.data();
  p.codes.output_rotation = a.output_rotation.data();
}

// `orderly`: rows of the batch follow one another and share no page that is written; else the index arrays may hold
// anything.
inline Problem make_problem(Bytes& bytes, Arrays& a, bool orderly) {
  Problem p;
  const bool v3 = bytes.one_in(2);
  p.query_dtype = DType(bytes.between(0, 2));
  p.cache_dtype = DType(bytes.between(0, 4));
  if (bytes.one_in(2)) p.cache_dtype = p.query_dtype;
  p.new_dtype = bytes.one_in(3) ? DType(bytes.between(0, 4)) : p.query_dtype;
  p.num_kv_heads = bytes.between(1, 3);
  p.num_q_heads = p.num_kv_heads * bytes.between(1, 9);
  const int64_t dims[] = {1, 7, 16, 31, 33, 64, 72, 80, 96, 128, 192};
  p.head_dim = p.key_dim = dims[bytes.between(0, 10)];
  const bool codes = bytes.one_in(6);
  if (codes) {
    p.cache_dtype = DType::kCodes;
    p.head_dim += p.head_dim % 2;
    p.key_dim = p.head_dim + 8 * bytes.between(1, 17);
    p.codes.key_norms = DType(bytes.between(0, 2));
    p.codes.value_norms = DType(bytes.between(0, 2));
  }
  p.page_size = bytes.between(1, 40);
  p.num_rows = bytes.between(0, 6);
  p.pages_per_row = bytes.between(1, 12);
  // Whether rows begin with the same pages, many enough to be read together.
  const bool prefixes = orderly && bytes.one_in(3);
  if (prefixes) p.pages_per_row = 400 / p.page_size + 1;
  p.num_pages = orderly ? p.num_rows * p.pages_per_row + 1 : bytes.between(0, 30);
  const float caps[] = {5.0f, 5.0f, 0x1p-126f, 0x1p59f};
  if (bytes.one_in(3)) p.logits_soft_cap = caps[bytes.between(0, 3)];
  if (bytes.one_in(prefixes ? 9 : 3)) p.sliding_window = bytes.one_in(8) ? int64_t{1} << 62 : bytes.between(1, 90);
  if (bytes.one_in(prefixes ? 9 : 3))
    p.attention_chunk_size = bytes.one_in(8) ? int64_t{1} << 62 : bytes.between(1, 90);
  p.softmax_scale = 0.2f;
  p.v_scale = 1.0f;
  p.padded_head_dim = p.head_dim;
  p.value_offset = p.head_dim;
  p.token_stride = codes ? 0 : p.num_kv_heads * 2 * p.head_dim;
  if (codes) {
  } else if (v3 && p.head_dim != 64) {
    p.padded_head_dim = (p.head_dim + 127) / 128 * 128;
    p.value_offset = p.padded_head_dim;
    const int64_t pack = int64_t(4 / element_size(p.cache_dtype));
    p.token_stride = (2 * p.num_kv_heads + pack - 1) / pack * pack * p.padded_head_dim;
  } else if (v3) {
    const int64_t pack = int64_t(4 / element_size(p.cache_dtype));
    p.token_stride = (p.num_kv_heads + pack - 1) / pack * pack * 128;
  }
  p.head_stride = p.value_offset + p.padded_head_dim;

  const int64_t capacity = p.pages_per_row * p.page_size;
  a.query_start_loc.assign(1, 0);
  for (int64_t r = 0; r < p.num_rows; ++r) {
    const int64_t count = bytes.one_in(2) ? 1 : bytes.one_in(2) ? bytes.between(2, 8) : bytes.between(0, 100);
    int64_t context = count + (prefixes ? bytes.between(100, 250) : bytes.between(0, 200));
    if (orderly && context > capacity) context = capacity;
    a.context_lens.push_back(int32_t(context));
    a.query_start_loc.push_back(a.query_start_loc.back() + int32_t(count));
    for (int64_t i = 0; i < p.pages_per_row; ++i)
      a.block_tables.push_back(orderly ? int32_t(1 + r * p.pages_per_row + i)
                                       : int32_t(bytes.between(0, 30)) - (bytes.one_in(20) ? 2 : 0));
  }
  // Rows may begin with pages of an earlier one: whole pages, which no token of this call is written to.
  for (int64_t r = 1; prefixes && r < p.num_rows; ++r) {
    const auto old = [&](int64_t row) {
      return (a.context_lens[row] - a.query_start_loc[row + 1] + a.query_start_loc[row]) / p.page_size;
    };
    const int64_t other = bytes.between(0, r - 1), shared = std::min(old(r), old(other));
    if (shared > 0)
      std::copy_n(a.block_tables.begin() + other * p.pages_per_row, bytes.one_in(4) ? bytes.between(1, shared) : shared,
                  a.block_tables.begin() + r * p.pages_per_row);
  }
  p.num_tokens = a.query_start_loc.back() + bytes.between(0, 5);
  p.live_rows = bytes.one_in(4) ? bytes.between(0, 8) : p.num_rows;
  if (!orderly) {
    const auto spoil = [&](std::vector<int32_t>& values) {
      for (int32_t& value : values)
        if (bytes.one_in(8)) value = bytes.one_in(2) ? int32_t(bytes.next32()) : int32_t(bytes.between(0, 120)) - 20;
    };
    spoil(a.context_lens);
    spoil(a.query_start_loc);
    if (bytes.one_in(2)) spoil(a.block_tables);
    if (bytes.one_in(6)) p.live_rows = int32_t(bytes.next32());
    if (bytes.one_in(6)) p.num_tokens = bytes.between(0, 200);
  }
  a.queries = random_elements(bytes, p.num_tokens * p.num_q_heads * p.head_dim, p.query_dtype);
  a.output.assign(a.queries.size(), 0xff);
  if (codes) make_codes(bytes, p, a, v3);
  if (!codes) a.pages = random_elements(bytes, p.num_pages * p.page_size * p.token_stride, p.cache_dtype);
  if (!codes && bytes.one_in(4)) spoil(bytes, a.pages, p.cache_dtype);
  if (v3 && !codes) {
    a.keys = random_elements(bytes, p.num_tokens * p.num_kv_heads * p.head_dim, p.new_dtype);
    a.values = random_elements(bytes, p.num_tokens * p.num_kv_heads * p.head_dim, p.new_dtype);
    if (bytes.one_in(4)) spoil(bytes, a.values, p.new_dtype);
    static uint8_t none;
    p.keys = a.keys.empty() ? &none : a.keys.data();
    p.values = a.values.empty() ? &none : a.values.data();
  }
  if (bytes.one_in(3)) {
    const float extremes[] = {-__builtin_inff(), -3.4e38f, 3.4e38f};
    for (int64_t h = 0; h < p.num_q_heads; ++h)
      a.sinks.push_back(bytes.one_in(12) ? extremes[bytes.between(0, 2)] : float(bytes.between(-8, 24)) / 4);
    p.sinks = a.sinks.data();
  }
  for (std::vector<float>* scales : {&a.k_scales, &a.v_scales})
    if (bytes.one_in(4) && !codes)
      for (int64_t h = 0; h < p.num_kv_heads; ++h) scales->push_back(float(bytes.between(1, 12)) / 8);
  p.k_scales = a.k_scales.empty() ? nullptr : a.k_scales.data();
  p.v_scales = a.v_scales.empty() ? nullptr : a.v_scales.data();
  if (bytes.one_in(2)) {
    a.lse.assign(size_t(p.num_tokens * p.num_q_heads), 7.0f);
    static float no_lse;
    p.lse = a.lse.empty() ? &no_lse : a.lse.data();
  }
  p.float_products = bytes.one_in(4);
  p.queries = a.queries.data();
  p.output = a.output.data();
  p.pages = a.pages.data();
  p.context_lens = a.context_lens.data();
  p.block_tables = a.block_tables.data();
  p.query_start_loc = a.query_start_loc.data();
  return p;
}

}  // namespace easydel_ragged
