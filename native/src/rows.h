// Which rows of a batch are served. The values in the index arrays are not trusted.
#pragma once

#include <vector>

#include "problem.h"

namespace easydel_ragged {

struct Row {
  int64_t index;     // in the batch
  int64_t token;     // the first query token
  int64_t count;     // query tokens
  int64_t position;  // of the first query token
};

struct Rows {
  std::vector<Row> live;
  // Whether each row's tokens come after those of the row before it. Otherwise two rows may claim a token: it is
  // written for both, and its output is the last one's.
  bool ordered;
};

// The rows that can be served. The others are dead, empty or malformed. A row is malformed when its queries run
// backwards or outside the batch, when its context is shorter than its queries or longer than its part of the block
// table, or when a page that it needs is not in the cache.
Rows live_rows(const Problem& problem);

// Stores the results of the tokens that belong to no live row: zeros, and a logsumexp of -inf. Where the rows are not
// ordered, all tokens get them, and the rows overwrite their own later.
void clear_dead_tokens(const Problem& problem, const Rows& rows);

}  // namespace easydel_ragged
