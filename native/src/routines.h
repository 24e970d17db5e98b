// What every instruction set provides: the loops that touch elements. Everything around them is in attention.cc.
#pragma once

#include "attention.h"

namespace easydel_ragged {

// Unnormalised softmax of some keys, for all q heads: maximum (base-2 logits), sum, weighted values [q_heads][stride].
struct Partial {
  float* maximum;
  float* total;
  float* weighted;
};

struct Routines {
  const char* name;

  // Writes the new keys and values of tokens [token, token + count) to positions from `position` on of `row`.
  void (*write)(const Problem& problem, int64_t row, int64_t position, int64_t token, int64_t count);

  // One query token, its row's keys at positions [begin, end), all heads. The partial must hold what `stride` says.
  size_t (*decode_scratch)(const Problem& problem);
  void (*decode)(const Problem& problem, int64_t row, int64_t token, int64_t begin, int64_t end, Partial partial,
                 void* scratch);

  // Merges `count` partials in order, adds the sinks, and stores the token's output.
  void (*finish)(const Problem& problem, const Partial* partials, int64_t count, int64_t token);

  // Several query tokens [token, token + count), the first at `position`, one kv head.
  int64_t (*prefill_chunk)(const Problem& problem);  // tokens that one call should take, and the most that it may
  size_t (*prefill_scratch)(const Problem& problem);
  void (*prefill)(const Problem& problem, int64_t row, int64_t kv_head, int64_t position, int64_t token, int64_t count,
                  void* scratch);
};

// Static: a shared inline function could be kept in the copy of a unit that needs a better machine.

// Elements between the weighted values of neighbouring heads of a Partial: head_dim rounded up to any vector's width.
static inline int64_t partial_stride(const Problem& problem) { return (problem.head_dim + 15) / 16 * 16; }

const Routines& routines();

}  // namespace easydel_ragged
