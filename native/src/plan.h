// How a call is divided. A plan follows from the rows, the sizes and the number of threads alone, so results do not
// depend on which thread takes what. Making one touches no array of the call and starts nothing.
#pragma once

#include <vector>

#include "prefixes.h"
#include "problem.h"
#include "rows.h"

namespace easydel_ragged {

// New keys and values that are written together: tokens [begin, end) of a row, counted in the row.
struct Write {
  int32_t row;  // in Rows::live, here and below
  int64_t begin, end;
};

// A query token of an item.
struct ItemQuery {
  int64_t token;     // in the batch
  int64_t position;  // in its row's context
  int32_t answer;    // that its part belongs to; -1: the item stores the output itself
  int32_t partial;   // that takes the part
};

// A piece of attention that one thread does alone: some queries, and the keys at positions [begin, end) of a row.
struct Item {
  enum Kind : int32_t {
    kFew,  // all heads
    kMany  // one kv head, more queries
  } kind;
  int32_t row;
  int32_t kv_head;         // of kMany
  int32_t queries, count;  // in Plan::queries
  int64_t begin, end;
  double cost;  // estimated time, in ns of one thread
};

// A query token whose output is merged from partials [first, first + count), when `items` items are done.
struct Answer {
  int64_t token;
  int32_t first, count, items;
};

struct Plan {
  std::vector<Write> writes;       // all before the first item
  bool shared_writes = false;      // whether they are worth sharing between threads
  std::vector<ItemQuery> queries;  // of all items; those of kv heads are the same
  std::vector<Item> items;         // in the order in which they are taken
  std::vector<Answer> answers;
  int32_t num_partials = 0;
  int32_t helpers = 0;  // threads that are worth waking beside the caller
};

// What the kernels of an instruction set take at a time, in query tokens.
struct Limits {
  int64_t most_few;   // of an item, and of a row or of rows that share keys: more are kMany
  int64_t most_many;  // of an item
};

// The writes of all rows, in parts that are worth sharing between threads.
std::vector<Write> make_writes(const Rows& rows);

// `threads`: those that there are, the caller included.
Plan make_plan(const Problem& problem, const Rows& rows, const std::vector<SharedKeys>& shared, const Limits& limits,
               int threads);

}  // namespace easydel_ragged
