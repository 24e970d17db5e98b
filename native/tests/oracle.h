// What a call means, in double and one number after the other. It shares nothing with the library but Problem.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "problem.h"

namespace easydel_ragged {

inline double element(const void* array, int64_t i, DType dtype) {
  const auto small = [](uint32_t bits, int exponent_bits, int mantissa_bits, bool has_infinity) {
    const int exponent = int(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
    const int mantissa = int(bits & ((1u << mantissa_bits) - 1));
    const int bias = (1 << (exponent_bits - 1)) - 1, last = (1 << exponent_bits) - 1;
    double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                     : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    if (has_infinity && exponent == last) magnitude = mantissa == 0 ? INFINITY : NAN;
    if (!has_infinity && exponent == last && mantissa == (1 << mantissa_bits) - 1) magnitude = NAN;
    return bits >> (exponent_bits + mantissa_bits) & 1 ? -magnitude : magnitude;
  };
  const char* at = static_cast<const char*>(array) + size_t(i) * element_size(dtype);
  uint32_t bits = 0;  // little-endian, as the machines are that the kernels are for
  std::memcpy(&bits, at, element_size(dtype));
  float single;
  switch (dtype) {
    case DType::kF32:
      std::memcpy(&single, &bits, 4);
      return single;
    case DType::kBF16:
      return small(bits, 8, 7, true);
    case DType::kF16:
      return small(bits, 5, 10, true);
    case DType::kF8E4M3FN:
      return small(bits, 4, 3, false);
    case DType::kF8E5M2:
      return small(bits, 5, 2, true);
    case DType::kCodes:
      break;
  }
  return NAN;
}

// The first key position that a query at `position` sees. The last is its own.
inline int64_t oldest_key(const Problem& p, int64_t position) {
  const int64_t begin = p.attention_chunk_size == 0 ? 0 : position / p.attention_chunk_size * p.attention_chunk_size;
  return p.sliding_window == 0 ? begin : std::max<int64_t>(begin, position + 1 - p.sliding_window);
}

inline bool is_served(const Problem& p, int64_t row) {
  const int64_t start = p.query_start_loc[row], end = p.query_start_loc[row + 1], context = p.context_lens[row];
  if (row >= p.live_rows || start < 0 || end <= start || end > p.num_tokens) return false;
  if (context < end - start || context > p.pages_per_row * p.page_size) return false;
  for (int64_t position = oldest_key(p, context - (end - start)); position < context; ++position) {
    const int32_t page = p.block_tables[row * p.pages_per_row + position / p.page_size];
    if (page < 0 || page >= p.num_pages) return false;
  }
  return true;
}

// For each token the number of served rows that claim it, and the last one of them.
struct Claims {
  std::vector<int> count;
  std::vector<int64_t> row;
  explicit Claims(const Problem& p) : count(size_t(p.num_tokens), 0), row(size_t(p.num_tokens), -1) {
    for (int64_t r = 0; r < p.num_rows; ++r) {
      if (!is_served(p, r)) continue;
      for (int64_t token = p.query_start_loc[r]; token < p.query_start_loc[r + 1]; ++token) {
        ++count[size_t(token)];
        row[size_t(token)] = r;
      }
    }
  }
};

// Coordinate `d` of the key of a slot and kv head: of a TurboQuant cache one that is rotated, or a sign.
inline double key_number(const Problem& p, int64_t slot, int64_t kv_head, int64_t d) {
  if (p.cache_dtype != DType::kCodes)
    return element(p.pages, slot * p.token_stride + kv_head * p.head_stride + d, p.cache_dtype);
  const int64_t head = slot * p.num_kv_heads + kv_head, signs = p.key_dim - p.head_dim;
  const bool is_sign = d >= p.head_dim;
  const double norm = element(p.codes.arrays[Codes::kKeyNorms], 2 * head + is_sign, p.codes.key_norms);
  // Times coordinates of both signs, infinity is no number. A key whose products all have one sign is none as well.
  if (!std::isfinite(norm)) return NAN;
  if (is_sign) {
    const int64_t bit = head * signs + d - p.head_dim;
    return p.codes.arrays[Codes::kKeySigns][bit / 8] >> bit % 8 & 1 ? norm : -norm;
  }
  const int64_t at = head * p.head_dim + d;
  return norm * p.codes.key_codebook[p.codes.arrays[Codes::kKeyIndices][at / 2] >> at % 2 * 4 & 15];
}

inline double value_number(const Problem& p, int64_t slot, int64_t kv_head, int64_t d) {
  if (p.cache_dtype != DType::kCodes)
    return element(p.pages, slot * p.token_stride + kv_head * p.head_stride + p.value_offset + d, p.cache_dtype);
  const int64_t head = slot * p.num_kv_heads + kv_head, at = head * p.head_dim + d;
  return element(p.codes.arrays[Codes::kValueNorms], head, p.codes.value_norms) *
         p.codes.value_codebook[p.codes.arrays[Codes::kValueIndices][at / 2] >> at % 2 * 4 & 15];
}

// A matrix of `rows` rows times a vector.
inline std::vector<double> rotated(const std::vector<double>& vector, const float* matrix, int64_t rows) {
  std::vector<double> product(size_t(rows), 0.0);
  for (double& sum : product)
    for (double number : vector) sum += number * *matrix++;
  return product;
}

struct Answer {
  std::vector<double> output;  // [head_dim]
  double lse;
};

// The answer of one token and query head. `row` is served, and the pages are those after its keys have been written.
inline Answer attend(const Problem& p, int64_t row, int64_t token, int64_t head) {
  const int64_t kv_head = head / (p.num_q_heads / p.num_kv_heads);
  const int64_t position = p.context_lens[row] - p.query_start_loc[row + 1] + token;
  const auto slot = [&](int64_t key) {
    return p.block_tables[row * p.pages_per_row + key / p.page_size] * p.page_size + key % p.page_size;
  };
  std::vector<double> query, logits;
  for (int64_t d = 0; d < p.head_dim; ++d)
    query.push_back(element(p.queries, (token * p.num_q_heads + head) * p.head_dim + d, p.query_dtype));
  if (p.cache_dtype == DType::kCodes) query = rotated(query, p.codes.query_rotation, p.key_dim);
  double most = p.sinks ? p.sinks[head] : -INFINITY;
  for (int64_t key = oldest_key(p, position); key <= position; ++key) {
    double product = 0;
    for (int64_t d = 0; d < p.key_dim; ++d) product += query[size_t(d)] * key_number(p, slot(key), kv_head, d);
    const double k_scale = p.k_scales ? p.k_scales[kv_head] : 1.0;
    const double logit = product * k_scale * p.softmax_scale, cap = p.logits_soft_cap;
    logits.push_back(cap > 0 ? cap * std::tanh(logit / cap) : logit);
    most = std::max(most, logits.back());
  }
  double total = p.sinks ? std::exp(p.sinks[head] - most) : 0.0;
  Answer answer{std::vector<double>(size_t(p.head_dim), 0.0), 0.0};
  for (int64_t key = oldest_key(p, position); key <= position; ++key) {
    const double weight = std::exp(logits[size_t(key - oldest_key(p, position))] - most);
    total += weight;
    for (int64_t d = 0; d < p.head_dim; ++d)
      answer.output[size_t(d)] += weight * value_number(p, slot(key), kv_head, d);
  }
  for (double& value : answer.output) value *= p.v_scale * (p.v_scales ? p.v_scales[kv_head] : 1.0) / total;
  if (p.cache_dtype == DType::kCodes) answer.output = rotated(answer.output, p.codes.output_rotation, p.head_dim);
  answer.lse = most + std::log(total);
  return answer;
}

}  // namespace easydel_ragged
