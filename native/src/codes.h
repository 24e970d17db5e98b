// Attention over a TurboQuant cache, which holds keys and values in other coordinates.
#pragma once

#include <vector>

#include "job.h"
#include "problem.h"
#include "rows.h"

namespace easydel_ragged {

// Rows by how they are attended: with queries that are rotated into the coordinates of the cache, and outputs that are
// rotated back; or after their keys and values are restored, those of the rows of a group at the same time.
struct Ways {
  Rows rotated;
  std::vector<Rows> restored;
};

// Each row goes the way that takes less time. `page_bytes`: of a page that is restored; `most_bytes`: of a group.
Ways ways_of(const Problem& problem, const Rows& rows, int64_t page_bytes, int64_t most_bytes);

// As `attend`, for a problem whose cache is of codes.
void attend_codes(const Problem& problem, const Rows& rows, const Executor& executor);

}  // namespace easydel_ragged
