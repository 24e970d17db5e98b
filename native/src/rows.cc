#include "rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "visible.h"

namespace easydel_ragged {
namespace {

bool can_be_served(const Problem& p, const Row& row) {
  const int64_t context = p.context_lens[row.index];
  if (row.token < 0 || row.count <= 0 || row.token + row.count > p.num_tokens) return false;
  if (context < row.count || context > p.pages_per_row * p.page_size) return false;
  const int32_t* table = p.block_tables + row.index * p.pages_per_row;
  const KeyRange keys = visible_keys(p, row.position, row.count);
  const int32_t *first = table + keys.begin / p.page_size, *last = table + (keys.end - 1) / p.page_size;
  return std::all_of(first, last + 1, [&](int32_t page) { return page >= 0 && page < p.num_pages; });
}

void clear(const Problem& p, int64_t token, int64_t end) {
  const size_t bytes = size_t(p.num_q_heads * p.head_dim) * element_size(p.query_dtype);
  std::memset(static_cast<char*>(p.output) + size_t(token) * bytes, 0, size_t(end - token) * bytes);
  if (p.lse != nullptr)
    std::fill(p.lse + token * p.num_q_heads, p.lse + end * p.num_q_heads, -std::numeric_limits<float>::infinity());
}

}  // namespace

Rows live_rows(const Problem& p) {
  Rows rows{{}, true};
  int64_t claimed = 0;  // tokens before this one belong to an earlier row
  const int64_t total = std::max<int64_t>(0, std::min(p.live_rows, p.num_rows));
  rows.live.reserve(size_t(total));
  for (int64_t r = 0; r < total; ++r) {
    const int64_t token = p.query_start_loc[r], count = p.query_start_loc[r + 1] - token;
    const Row row{r, token, count, p.context_lens[r] - count};
    if (!can_be_served(p, row)) continue;
    rows.ordered = rows.ordered && token >= claimed;
    claimed = token + count;
    rows.live.push_back(row);
  }
  return rows;
}

void clear_dead_tokens(const Problem& p, const Rows& rows) {
  int64_t token = 0;
  if (rows.ordered) {
    for (const Row& row : rows.live) {
      clear(p, token, row.token);
      token = row.token + row.count;
    }
  }
  clear(p, token, p.num_tokens);
}

}  // namespace easydel_ragged
