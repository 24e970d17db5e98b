#include "codes.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "attend.h"
#include "isa.h"
#include "routines.h"
#include "scratch.h"
#include "visible.h"

namespace easydel_ragged {
namespace {

constexpr int64_t kLeastRotated = 64;  // vectors of an item: a matrix is packed for each
constexpr int64_t kMostRotated = 1024;

constexpr int64_t kLeastRestored = 64;  // tokens of an item: two matrices are packed for each
constexpr int64_t kMostRestored = 512;
constexpr int64_t kMostRestoredBytes = int64_t{1} << 28;  // at a time; a longer context is not restored
constexpr double kRestoring = 1.3;                        // time of a product that restores, in those of attention

Scratch& thread_scratch() {
  thread_local Scratch of_thread;
  return of_thread;
}

struct Tokens {
  int64_t begin, end;
};

// The tokens of live rows, each once, in parts of at most `most`.
std::vector<Tokens> live_tokens(const Rows& rows, int64_t most) {
  std::vector<Tokens> all, parts;
  for (const Row& row : rows.live) all.push_back({row.token, row.token + row.count});
  std::sort(all.begin(), all.end(), [](const Tokens& a, const Tokens& b) { return a.begin < b.begin; });
  int64_t next = 0;
  for (const Tokens& tokens : all)
    for (next = std::max(next, tokens.begin); next < tokens.end; next = parts.back().end) {
      const bool more = !parts.empty() && parts.back().end == next && next - parts.back().begin < most;
      if (!more) parts.push_back({next, next});
      parts.back().end = std::min(tokens.end, parts.back().begin + most);
    }
  return parts;
}

// Queries are rotated first, and outputs back.
void attend_rotated(const Problem& p, const Rows& rows, const Executor& executor) {
  const Routines& isa = routines();
  const int64_t heads = p.num_q_heads;
  const int64_t vectors =
      std::min(kMostRotated, std::max(kLeastRotated, p.num_tokens * heads / (4 * executor.threads)));
  const std::vector<Tokens> parts = live_tokens(rows, std::max<int64_t>(1, vectors / heads));
  Problem rotated = p;
  rotated.query_dtype = isa.element_dtype(p);
  const size_t size = element_size(rotated.query_dtype) * size_t(p.num_tokens * heads);
  const Scratch::Use memory(thread_scratch(), size * size_t(p.key_dim + p.head_dim));
  char* const queries = memory.memory();
  char* const outputs = queries + size * size_t(p.key_dim);
  rotated.queries = queries;
  rotated.output = outputs;
  const auto rotate = [&](bool back) {
    const auto work = [&](int, int64_t part, char* scratch) {
      const auto [begin, end] = parts[size_t(part)];
      isa.rotate(p, back, back ? outputs : queries, begin * heads, (end - begin) * heads, scratch);
    };
    run_job({0, int64_t(parts.size())}, isa.rotate_scratch(p), std::ref(work), executor,
            helpers_for(executor, parts.size()));
  };
  rotate(false);
  attend(rotated, rows, executor);
  rotate(true);
}

// The pages that hold the keys of a row.
struct Pages {
  int64_t first, end;  // in the row's part of the block table
};
Pages pages_of(const Problem& p, const Row& row) {
  const KeyRange keys = visible_keys(p, row.position, row.count);
  return {keys.begin / p.page_size, (keys.end - 1) / p.page_size + 1};
}

// A cache of elements in place of that of codes, with the layout of v3. It has no pages yet.
Problem without_codes(const Problem& p) {
  Problem plain = p;
  plain.cache_dtype = routines().element_dtype(p);
  plain.key_dim = plain.padded_head_dim = plain.value_offset = p.head_dim;
  plain.head_stride = 2 * p.head_dim;
  plain.token_stride = p.num_kv_heads * plain.head_stride;
  plain.keys = plain.values = nullptr;
  plain.block_tables = nullptr;
  plain.num_rows = plain.num_pages = plain.pages_per_row = 0;
  return plain;
}

int64_t page_bytes(const Problem& p) { return p.page_size * p.token_stride * int64_t(element_size(p.cache_dtype)); }

// Whether the products with the signs and those of the rotations, which are left out for a row whose keys and values
// are restored, take longer than restoring.
bool restoring_pays(const Problem& p, const Row& row) {
  const KeyRange keys = visible_keys(p, row.position, row.count);
  const double all = double(keys.end - keys.begin), seen = all - double(row.count) / 2;
  const double queries = double(row.count * p.group()), of_vector = double((p.key_dim + p.head_dim) * p.head_dim);
  return queries * (seen * double(p.key_dim - p.head_dim) + of_vector) > kRestoring * all * of_vector;
}

// Tokens of a row that one thread restores.
struct Part {
  int64_t row;  // in Rows::live
  KeyRange keys;
};

// Keys and values as they were before they were compressed, in pages of their own.
void attend_restored(const Problem& p, const Rows& rows, Problem plain, const float* restoring,
                     const Executor& executor) {
  const Routines& isa = routines();
  int64_t tokens = 0;
  for (const Row& row : rows.live) {
    const Pages pages = pages_of(p, row);
    plain.pages_per_row = std::max(plain.pages_per_row, pages.end);
    plain.num_pages += pages.end - pages.first;
    ++plain.num_rows;
    tokens += row.position + row.count - visible_keys(p, row.position, row.count).begin;
  }
  const int64_t step = std::min(kMostRestored, std::max(kLeastRestored, tokens / (4 * executor.threads)));
  std::vector<int32_t> tables(size_t(plain.num_rows * plain.pages_per_row), 0);
  std::vector<Part> parts;
  Rows numbered = rows;
  int32_t page = 0;
  for (int64_t r = 0; r < plain.num_rows; ++r) {
    numbered.live[size_t(r)].index = r;
    const Row& row = rows.live[size_t(r)];
    const Pages pages = pages_of(p, row);
    for (int64_t i = pages.first; i < pages.end; ++i) tables[size_t(r * plain.pages_per_row + i)] = page++;
    const KeyRange keys = visible_keys(p, row.position, row.count);
    for (int64_t begin = keys.begin; begin < keys.end; begin += step)
      parts.push_back({r, {begin, std::min(keys.end, begin + step)}});
  }
  plain.block_tables = tables.data();
  const Scratch::Use memory(thread_scratch(), size_t(plain.num_pages * page_bytes(plain)));
  plain.pages = memory.memory();
  const auto work = [&](int, int64_t index, char* scratch) {
    const Part& part = parts[size_t(index)];
    isa.restore(p, rows.live[size_t(part.row)].index, plain, part.row, part.keys.begin, part.keys.end, restoring,
                scratch);
  };
  run_job({0, int64_t(parts.size())}, isa.restore_scratch(p), std::ref(work), executor,
          helpers_for(executor, parts.size()));
  attend(plain, numbered, executor);
}

// The rotation of queries, transposed: that of keys.
std::vector<float> rotation_of_keys(const Problem& p) {
  std::vector<float> transposed(size_t(p.key_dim * p.head_dim));
  for (int64_t i = 0; i < p.key_dim; ++i)
    for (int64_t d = 0; d < p.head_dim; ++d)
      transposed[size_t(d * p.key_dim + i)] = p.codes.query_rotation[i * p.head_dim + d];
  return transposed;
}

}  // namespace

Ways ways_of(const Problem& p, const Rows& rows, int64_t page_bytes, int64_t most_bytes) {
  Ways ways{{{}, rows.ordered}, {}};
  int64_t free = 0;  // bytes of the last group
  for (const Row& row : rows.live) {
    const Pages pages = pages_of(p, row);
    const int64_t bytes = (pages.end - pages.first) * page_bytes;
    // Of rows that overlap the last one's output counts: they stay in order.
    if (!rows.ordered || bytes > most_bytes || !restoring_pays(p, row)) {
      ways.rotated.live.push_back(row);
      continue;
    }
    if (ways.restored.empty() || bytes > free) {
      ways.restored.push_back({{}, true});
      free = most_bytes;
    }
    ways.restored.back().live.push_back(row);
    free -= bytes;
  }
  return ways;
}

void attend_codes(const Problem& p, const Rows& rows, const Executor& executor) {
  const Problem plain = without_codes(p);
  const Ways ways = ways_of(p, rows, page_bytes(plain), kMostRestoredBytes);
  if (ways.restored.empty()) return attend_rotated(p, rows, executor);
  write(p, rows, executor);  // of all rows, before any is attended
  Problem written = p;
  written.keys = written.values = nullptr;
  const std::vector<float> restoring = rotation_of_keys(p);
  for (const Rows& group : ways.restored) attend_restored(written, group, plain, restoring.data(), executor);
  if (!ways.rotated.live.empty()) attend_rotated(written, ways.rotated, executor);
}

}  // namespace easydel_ragged
