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

// A query token of an item. Which keys it sees follows from its position.
struct Query {
  int64_t token;     // in the batch
  int64_t position;  // in its row's context
  Partial partial;   // takes what the item finds; without one (null) the item stores output and logsumexp
};

struct Routines {
  const char* name;

  // Writes the new keys and values of tokens [token, token + count) to positions from `position` on of `row`.
  void (*write)(const Problem& problem, int64_t row, int64_t position, int64_t token, int64_t count);

  // Both ways attend `count` queries over the keys at positions [begin, end) of `row`, of which each query takes those
  // that it sees. The queries may belong to other rows that share these keys.

  // Few queries, all heads: keys are multiplied as they lie in the cache.
  int64_t (*most_few)(const Problem& problem);  // queries that one call may have; at least 1
  size_t (*few_scratch)(const Problem& problem);
  void (*attend_few)(const Problem& problem, int64_t row, const Query* queries, int64_t count, int64_t begin,
                     int64_t end, void* scratch);

  // Many queries, one kv head: keys and values are packed first.
  int64_t (*most_many)(const Problem& problem);  // queries that one call should have, and the most that it may
  size_t (*many_scratch)(const Problem& problem);
  void (*attend_many)(const Problem& problem, int64_t row, int64_t kv_head, const Query* queries, int64_t count,
                      int64_t begin, int64_t end, void* scratch);

  // Merges `count` partials in order, adds the sinks, and stores the token's output and logsumexp.
  void (*finish)(const Problem& problem, const Partial* partials, int64_t count, int64_t token);

  // TurboQuant's rotations. Codes are attended as elements of `element_dtype`, in one of two ways. Queries and outputs
  // change into the coordinates of the cache: `rotated` holds them, [tokens, q_heads] vectors like the call's. Rotates
  // vectors [first, first + count) of the queries into `rotated`, or of `rotated` into the output.
  DType (*element_dtype)(const Problem& problem);
  size_t (*rotate_scratch)(const Problem& problem);
  void (*rotate)(const Problem& problem, bool outputs, void* rotated, int64_t first, int64_t count, void* scratch);

  // Or keys and values change back: those at positions [begin, end) of `row` are restored into the slots of these
  // positions in row `plain_row` of `plain`, whose cache has elements. `key_rotation`: [head_dim, key_dim].
  size_t (*restore_scratch)(const Problem& problem);
  void (*restore)(const Problem& problem, int64_t row, const Problem& plain, int64_t plain_row, int64_t begin,
                  int64_t end, const float* key_rotation, void* scratch);
};

// Functions in headers that units of instruction sets include are static: of a shared inline function the linker keeps
// one unit's copy, and it might be that of a unit which needs a better machine.

// Elements between the weighted values of neighboring heads of a Partial: head_dim rounded up to two of any vectors.
static inline int64_t partial_stride(const Problem& problem) { return (problem.head_dim + 31) / 32 * 32; }

}  // namespace easydel_ragged
