// New tokens of rows into the cache, and attention over it as it lies.
#pragma once

#include "job.h"
#include "problem.h"
#include "rows.h"

namespace easydel_ragged {

// Writes the new keys and values of the rows, if the problem has some.
void write(const Problem& problem, const Rows& rows, const Executor& executor);

// Does that and then attends the rows.
void attend(const Problem& problem, const Rows& rows, const Executor& executor);

}  // namespace easydel_ragged
