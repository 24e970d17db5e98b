// One call of ragged page attention: its sizes, options and arrays, without any type of XLA.
//
// A call attends all rows of a batch over a paged cache; for v3 it first writes the new keys and values into their
// slots. What the arrays mean is defined in easydel_ragged_plugin/types.py and layout.py; names are the same here.
//
// The files in the order in which a call passes through them: ffi (from XLA's arguments to a Problem), rows (which rows
// can be served), codes (a TurboQuant cache, whose coordinates are changed), attend (the rows of a cache), prefixes
// (which keys they share), plan (how the work is divided), job (threads that share it), and then the routines of an
// instruction set, which isa chooses and kernels/ implements. run begins with the rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace easydel_ragged {

enum class DType : int32_t { kF32, kBF16, kF16, kF8E4M3FN, kF8E5M2, kCodes };

// A TurboQuant cache (easydel_ragged_plugin/turboquant.py), dtype kCodes. Its keys have head_dim coordinates and then
// the signs. Either queries are rotated and projected likewise, and outputs are of rotated values; or keys and values
// are restored. See codes.h.
struct Codes {
  enum Name { kKeyIndices, kKeySigns, kKeyNorms, kValueIndices, kValueNorms, kArrays };
  uint8_t* arrays[kArrays] = {};       // [pages, page_size, bytes[name]]
  const uint8_t* fresh[kArrays] = {};  // of the new tokens, [tokens, bytes[name]]
  int64_t bytes[kArrays] = {};         // of a slot, all kv heads
  DType key_norms = DType::kF32;       // their dtypes
  DType value_norms = DType::kF32;
  const float* key_codebook = nullptr;  // [16]
  const float* value_codebook = nullptr;
  const float* query_rotation = nullptr;   // [key_dim, head_dim]: of queries; after head_dim rows those for the signs
  const float* output_rotation = nullptr;  // [head_dim, head_dim]: of outputs
};

// Numbers that are fixed when a call is compiled. Each line is a field of Problem and an attribute of the FFI call; a
// new one needs a line here and one in `_attributes` of cpu_native.py. The last five are the layout of the cache, in
// elements (layout.py); of codes only the page size means anything.
// clang-format off
#define RAGGED_ATTRIBUTES(_)                                     \
  _(float, softmax_scale)           /* a k_scale that is a number included */ \
  _(float, logits_soft_cap)         /* 0: none */                             \
  _(float, v_scale)                 /* 1 where it is an array */              \
  _(int64_t, sliding_window)        /* 0: none */                             \
  _(int64_t, attention_chunk_size)  /* 0: none */                             \
  _(int64_t, float_products)        /* 1: none of their operands is rounded */ \
  _(int64_t, num_kv_heads)                                                    \
  _(int64_t, page_size)             /* in slots */                            \
  _(int64_t, token_stride)                                                    \
  _(int64_t, head_stride)                                                     \
  _(int64_t, value_offset)                                                    \
  _(int64_t, padded_head_dim)
// clang-format on

struct Attributes {
#define RAGGED_FIELD(type, name) type name = 0;
  RAGGED_ATTRIBUTES(RAGGED_FIELD)
#undef RAGGED_FIELD
};

struct Problem : Attributes {
  DType query_dtype = DType::kF32;  // of queries and output; one of kF32, kBF16, kF16
  DType cache_dtype = DType::kF32;
  DType new_dtype = DType::kF32;  // of keys and values

  const void* queries = nullptr;  // [tokens, q_heads, head_dim]
  const void* keys = nullptr;     // [tokens, kv_heads, head_dim]; null for v2
  const void* values = nullptr;
  void* pages = nullptr;                     // written only where keys is not null
  Codes codes;                               // in place of pages where cache_dtype is kCodes; keys are codes.fresh then
  void* output = nullptr;                    // [tokens, q_heads, head_dim]
  float* lse = nullptr;                      // [tokens, q_heads]; null: not wanted
  const int32_t* context_lens = nullptr;     // [rows]
  const int32_t* block_tables = nullptr;     // [rows, pages_per_row]
  const int32_t* query_start_loc = nullptr;  // [rows + 1]
  const float* sinks = nullptr;              // [q_heads] or null; -inf is no sink
  const float* k_scales = nullptr;           // [kv_heads] or null: further factors of keys
  const float* v_scales = nullptr;           // and of values

  int64_t live_rows = 0;  // run-time value: rows from here on are dead
  int64_t num_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t head_dim = 0;  // of values and output
  int64_t key_dim = 0;   // of keys, and of queries beside them: head_dim, except that of codes has their signs, too
  int64_t num_rows = 0;
  int64_t pages_per_row = 0;
  int64_t num_pages = 0;

  // Query heads that share a kv head.
  __attribute__((always_inline)) int64_t group() const { return num_q_heads / num_kv_heads; }
};

size_t element_size(DType dtype);

// Keys and values of one slot, in bytes of the cache.
int64_t slot_bytes(const Problem& problem);

// Why the static part of a problem is not usable, or null when it is. Reads no array.
const char* check(const Problem& problem);

}  // namespace easydel_ragged
