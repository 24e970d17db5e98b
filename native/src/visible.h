// Which keys a query sees: those at positions up to its own; with a sliding window of N the last N of them; with chunks
// of N tokens those of its own chunk, which begins at a multiple of N.
#pragma once

#include "problem.h"

namespace easydel_ragged {

// Static: see routines.h.
static inline int64_t first_visible(const Problem& problem, int64_t position) {
  const int64_t window = problem.sliding_window, chunk = problem.attention_chunk_size;
  const int64_t of_window = window > 0 && position >= window ? position - window + 1 : 0;
  const int64_t of_chunk = chunk > 0 ? position - position % chunk : 0;
  return of_window > of_chunk ? of_window : of_chunk;
}

struct KeyRange {
  int64_t begin, end;  // positions; the end is one past the last
};

// The keys that `count` queries, the first at `position`, see between them. The first of them sees the oldest key.
static inline KeyRange visible_keys(const Problem& problem, int64_t position, int64_t count) {
  return {first_visible(problem, position), position + count};
}

}  // namespace easydel_ragged
