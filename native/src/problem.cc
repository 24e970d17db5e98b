#include "problem.h"

#include <initializer_list>

namespace easydel_ragged {

size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    default:
      return 1;
  }
}

const char* check(const Problem& p) {
  const auto positive = {p.num_q_heads, p.num_kv_heads, p.head_dim, p.page_size, p.token_stride, p.head_stride};
  for (int64_t value : positive)
    if (value <= 0 || value > (int64_t{1} << 31)) return "a size or stride is not positive, or too large";
  for (int64_t value : {p.num_tokens, p.num_rows, p.pages_per_row, p.num_pages})
    if (value < 0) return "a size is negative";
  if (p.num_q_heads % p.num_kv_heads != 0) return "query heads are not a multiple of kv heads";
  if (element_size(p.query_dtype) < 2) return "queries of an 8-bit type";
  if (p.padded_head_dim < p.head_dim || p.value_offset < p.padded_head_dim ||
      p.head_stride < p.value_offset + p.padded_head_dim || p.token_stride < p.num_kv_heads * p.head_stride)
    return "strides of the cache overlap";
  if (!(p.logits_soft_cap >= 0)) return "a negative soft cap";
  if (p.sliding_window < 0 || p.attention_chunk_size < 0) return "a negative sliding window or chunk";
  if ((p.keys == nullptr) != (p.values == nullptr)) return "keys without values, or values without keys";
  return nullptr;
}

}  // namespace easydel_ragged
