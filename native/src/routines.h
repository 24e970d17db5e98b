// What every instruction set provides: the loops that touch elements.
#pragma once

#include "problem.h"

namespace easydel_ragged {

// The unnormalized softmax of some keys, for all q heads.
struct Partial {
  float* maximum;   // [q_heads], of the base-2 logits
  float* total;     // [q_heads], sum of the weights 2^(logit - maximum)
  float* weighted;  // [q_heads][partial_stride], sum of the weighted values
};

struct Routines {
  const char* name;

  // Writes the new keys and values of tokens [token, token + count) to positions from `position` on of `row`.
  void (*write)(const Problem& problem, int64_t row, int64_t position, int64_t token, int64_t count);

  // One query token, its row's keys at positions [begin, end), all heads.
  size_t (*decode_scratch)(const Problem& problem);
  void (*decode)(const Problem& problem, int64_t row, int64_t token, int64_t begin, int64_t end, Partial partial,
                 void* scratch);

  // Merges `count` partials in order, adds the sinks, and stores the token's output and logsumexp.
  void (*finish)(const Problem& problem, const Partial* partials, int64_t count, int64_t token);

  // Several query tokens [token, token + count), the first at `position`, one kv head: output and logsumexp.
  int64_t (*prefill_chunk)(const Problem& problem);  // tokens that one call should take, and the most that it may
  size_t (*prefill_scratch)(const Problem& problem);
  void (*prefill)(const Problem& problem, int64_t row, int64_t kv_head, int64_t position, int64_t token, int64_t count,
                  void* scratch);
};

// Functions in headers that units of instruction sets include are static: of a shared inline function the linker keeps
// one unit's copy, and it might be that of a unit which needs a better machine.

// Elements between the weighted values of neighboring heads of a Partial: head_dim rounded up to any vector's width.
static inline int64_t partial_stride(const Problem& problem) { return (problem.head_dim + 15) / 16 * 16; }

}  // namespace easydel_ragged
