// Ragged page attention on the CPU, without any type of XLA: plain pointers, sizes and strides.
//
// One call attends all rows of a batch over a paged cache; for v3 it first writes the new keys and values into their
// slots. What the arrays mean is defined in easydel_ragged_plugin/types.py and layout.py; names are the same here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace easydel_ragged {

enum class DType : int32_t { kF32, kBF16, kF16, kF8E4M3FN, kF8E5M2 };

struct Problem {
  DType query_dtype = DType::kF32;  // of queries and output; one of kF32, kBF16, kF16
  DType cache_dtype = DType::kF32;
  DType new_dtype = DType::kF32;  // of keys and values

  const void* queries = nullptr;  // [tokens, q_heads, head_dim]
  const void* keys = nullptr;     // [tokens, kv_heads, head_dim]; null for v2
  const void* values = nullptr;
  void* pages = nullptr;  // written only where keys is not null
  void* output = nullptr;  // [tokens, q_heads, head_dim]
  const int32_t* context_lens = nullptr;     // [rows]
  const int32_t* block_tables = nullptr;     // [rows, pages_per_row]
  const int32_t* query_start_loc = nullptr;  // [rows + 1]
  const float* sinks = nullptr;              // [q_heads] or null

  int64_t live_rows = 0;  // run-time value: rows from here on are dead
  int64_t num_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_rows = 0;
  int64_t pages_per_row = 0;
  int64_t num_pages = 0;

  // Layout of the cache, in elements. See layout.py.
  int64_t page_size = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  int64_t value_offset = 0;
  int64_t padded_head_dim = 0;

  float softmax_scale = 1.0f;    // q_scale and k_scale included
  float logits_soft_cap = 0.0f;  // 0: none
  float v_scale = 1.0f;
  int64_t sliding_window = 0;  // 0: none

  __attribute__((always_inline)) int64_t group() const { return num_q_heads / num_kv_heads; }
};

// Where helper threads come from. `spawn` may run the task at any later time, even after `run` has returned.
struct Executor {
  int threads = 1;  // the caller included
  std::function<void(std::function<void()>)> spawn;
};

// Why the static part of a problem is not usable, or null when it is. Reads no array.
const char* check(const Problem& problem);

// Does the work. `problem` must have passed `check`. The values in the index arrays are not trusted: a malformed row
// gives zeros and writes nothing. Throws std::bad_alloc alone, and then the output is unspecified.
void run(const Problem& problem, const Executor& executor);

// Instruction set in use, its choice, and all that this machine can run, best first.
const char* isa_name();
bool set_isa(const char* name);  // null: the best, or the one in EASYDEL_RAGGED_ISA; false: no such level here
const char* isa_levels();        // comma separated

}  // namespace easydel_ragged
