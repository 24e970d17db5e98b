#include "problem.h"

#include <initializer_list>

namespace easydel_ragged {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 31;

const char* check_strides(const Problem& p) {
  for (int64_t value : {p.token_stride, p.head_stride})
    if (value <= 0 || value > kMostSize) return "a stride is not positive, or too large";
  if (p.key_dim != p.head_dim) return "keys that are longer than values";
  if (p.padded_head_dim < p.head_dim || p.value_offset < p.padded_head_dim ||
      p.head_stride < p.value_offset + p.padded_head_dim || p.token_stride < p.num_kv_heads * p.head_stride)
    return "strides of the cache overlap";
  return nullptr;
}

const char* check_codes(const Problem& p) {
  const int64_t signs = p.key_dim - p.head_dim, norm = p.num_kv_heads * int64_t(element_size(p.codes.key_norms));
  if (p.head_dim % 2 != 0 || signs <= 0 || signs % 8 != 0) return "codes that do not fill bytes";
  for (DType dtype : {p.codes.key_norms, p.codes.value_norms})
    if (dtype != DType::kF32 && dtype != DType::kBF16 && dtype != DType::kF16) return "norms of an unsupported dtype";
  const int64_t indices = p.num_kv_heads * p.head_dim / 2;
  const int64_t wanted[] = {indices, p.num_kv_heads * signs / 8, 2 * norm, indices,
                            p.num_kv_heads * int64_t(element_size(p.codes.value_norms))};
  for (int i = 0; i < Codes::kArrays; ++i)
    if (p.codes.bytes[i] != wanted[i]) return "codes of the wrong size";
  return nullptr;
}

}  // namespace

size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kF8E4M3FN:
    case DType::kF8E5M2:
    case DType::kCodes:
      return 1;
  }
  return 0;
}

int64_t slot_bytes(const Problem& p) {
  if (p.cache_dtype != DType::kCodes) return 2 * p.num_kv_heads * p.head_dim * int64_t(element_size(p.cache_dtype));
  int64_t bytes = 0;
  for (int64_t each : p.codes.bytes) bytes += each;
  return bytes;
}

const char* check(const Problem& p) {
  for (int64_t value : {p.num_q_heads, p.num_kv_heads, p.head_dim, p.key_dim, p.page_size})
    if (value <= 0 || value > kMostSize) return "a size is not positive, or too large";
  for (int64_t value : {p.num_tokens, p.num_rows, p.pages_per_row, p.num_pages})
    if (value < 0) return "a size is negative";
  if (p.num_q_heads % p.num_kv_heads != 0) return "query heads are not a multiple of kv heads";
  if (element_size(p.query_dtype) < 2) return "queries of an 8-bit type";
  if (const char* reason = p.cache_dtype == DType::kCodes ? check_codes(p) : check_strides(p)) return reason;
  if (!(p.logits_soft_cap >= 0)) return "a negative soft cap";
  if (p.sliding_window < 0 || p.attention_chunk_size < 0) return "a negative sliding window or chunk";
  if ((p.keys == nullptr) != (p.values == nullptr)) return "keys without values, or values without keys";
  return nullptr;
}

}  // namespace easydel_ragged
