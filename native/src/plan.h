// How a call is divided. A plan follows from the rows, the sizes and the number of threads alone, so results do not
// depend on which thread takes what. Making one touches no array of the call and starts nothing.
#pragma once

#include <vector>

#include "problem.h"
#include "rows.h"

namespace easydel_ragged {

// New keys and values that are written together: tokens [begin, end) of a row, counted in the row.
struct Write {
  int32_t row;  // in Rows::live, here and below
  int64_t begin, end;
};

// A piece of attention that one thread does alone.
struct Item {
  enum Kind : int32_t {
    kDecode,  // the row's one query, all heads, keys at positions [begin, end)
    kPrefill  // queries [begin, end) counted in the row, one kv head, all keys that they see
  } kind;
  int32_t row;
  int32_t kv_head;  // prefill
  int32_t partial;  // decode: the partial that takes the result
  int64_t begin, end;
  double cost;  // estimated time, in ns of one thread
};

// Partials [first, first + count) are those of a row. None for a row of several queries.
struct PartialRange {
  int32_t first = 0, count = 0;
};

struct Plan {
  std::vector<Write> writes;           // all before the first item
  bool shared_writes = false;          // whether they are worth sharing between threads
  std::vector<Item> items;             // in the order in which they are taken
  std::vector<PartialRange> partials;  // by row
  int32_t num_partials = 0;            // one for each decode item
  int32_t helpers = 0;                 // threads that are worth waking beside the caller
};

// `prefill_chunk` is the most queries of an item, and `threads` the threads that there are, the caller included.
Plan make_plan(const Problem& problem, const Rows& rows, int64_t prefill_chunk, int threads);

}  // namespace easydel_ragged
