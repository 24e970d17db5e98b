// Keys that several rows share: their block tables begin with the same pages, as those of requests with one system
// prompt and of parallel samples do. Such keys are read once for all of these rows.
#pragma once

#include <vector>

#include "problem.h"
#include "rows.h"

namespace easydel_ragged {

// Keys at positions [begin, end) that all queries of `rows` see, at the same places of the cache.
struct SharedKeys {
  std::vector<int32_t> rows;  // in Rows::live, at least two
  int64_t begin, end;
};

// The shared keys of rows with at most `most_tokens` queries that are worth it. Together with the keys of its own
// behind them, a row's shared keys are all that it sees; each is in one entry for a row.
std::vector<SharedKeys> shared_keys(const Problem& problem, const Rows& rows, int64_t most_tokens);

}  // namespace easydel_ragged
