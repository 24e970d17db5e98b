// The whole of a call.
#pragma once

#include "job.h"
#include "problem.h"

namespace easydel_ragged {

// Serves the call. `problem` must have passed `check`. The values in the index arrays are not trusted: a malformed row
// gives zeros and writes nothing. Throws std::bad_alloc alone, and then the output is unspecified.
void run(const Problem& problem, const Executor& executor);

}  // namespace easydel_ragged
