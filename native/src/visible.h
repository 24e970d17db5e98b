// Which keys a query sees: those at positions up to its own, and with a sliding window of N the last N of them.
#pragma once

#include "problem.h"

namespace easydel_ragged {

// Static: see routines.h.
static inline int64_t first_visible(const Problem& problem, int64_t position) {
  const int64_t first = position - problem.sliding_window + 1;
  return problem.sliding_window > 0 && first > 0 ? first : 0;
}

struct KeyRange {
  int64_t begin, end;  // positions; the end is one past the last
};

// The keys that `count` queries, the first at `position`, see between them.
static inline KeyRange visible_keys(const Problem& problem, int64_t position, int64_t count) {
  return {first_visible(problem, position), position + count};
}

}  // namespace easydel_ragged
