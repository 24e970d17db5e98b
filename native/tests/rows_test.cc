// Which keys a query sees, which rows are served, and what becomes of the other tokens.
#include "rows.h"

#include <cmath>
#include <cstring>
#include <functional>

#include "unit.h"
#include "visible.h"

namespace easydel_ragged {
namespace {

// Three sound rows of 1, 5 and 3 queries over 12 pages of 4 slots; tokens 9 and 10 are padding.
struct Batch {
  std::vector<int32_t> context_lens = {9, 20, 3}, query_start_loc = {0, 1, 6, 9};
  std::vector<int32_t> block_tables = {3, 1, 2, 0, 0, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0};
  std::vector<float> output = std::vector<float>(11 * 2 * 3, 7.0f), lse = std::vector<float>(11 * 2, 7.0f);
  Problem problem;

  Batch() {
    problem.num_tokens = 11;
    problem.num_rows = problem.live_rows = 3;
    problem.pages_per_row = 5;
    problem.num_pages = 12;
    problem.page_size = 4;
    problem.num_q_heads = 2;
    problem.num_kv_heads = 1;
    problem.head_dim = 3;
  }
  Rows rows() {
    problem.context_lens = context_lens.data();
    problem.block_tables = block_tables.data();
    problem.query_start_loc = query_start_loc.data();
    problem.output = output.data();
    return live_rows(problem);
  }
  std::vector<int64_t> live() {
    std::vector<int64_t> indices;
    for (const Row& row : rows().live) indices.push_back(row.index);
    return indices;
  }
  bool is_cleared(int64_t token) const {
    for (size_t i = 0; i < 6; ++i)
      if (output[size_t(token) * 6 + i] != 0.0f) return false;
    return true;
  }
};
using Indices = std::vector<int64_t>;

TEST(a_query_sees_the_keys_up_to_its_own_and_a_window_leaves_the_last) {
  Problem p;
  for (p.sliding_window = 0; p.sliding_window < 7; ++p.sliding_window)
    for (int64_t position = 0; position < 12; ++position)
      for (int64_t count = 1; count < 5; ++count) {
        const KeyRange keys = visible_keys(p, position, count);
        for (int64_t key = -3; key < 20; ++key) {
          bool seen = false;
          for (int64_t query = position; query < position + count; ++query)
            seen |= key >= 0 && key <= query && (p.sliding_window == 0 || key > query - p.sliding_window);
          CHECK(seen == (keys.begin <= key && key < keys.end));
        }
        CHECK(first_visible(p, position) == keys.begin);
      }
}

TEST(chunks_begin_at_multiples_of_their_size) {
  Problem p;
  for (p.attention_chunk_size = 0; p.attention_chunk_size < 6; ++p.attention_chunk_size)
    for (p.sliding_window = 0; p.sliding_window < 5; ++p.sliding_window)
      for (int64_t position = 0; position < 14; ++position)
        for (int64_t count = 1; count < 7; ++count) {
          const KeyRange keys = visible_keys(p, position, count);
          for (int64_t key = -3; key < 24; ++key) {
            bool seen = false;
            for (int64_t query = position; query < position + count; ++query) {
              const bool in_window = p.sliding_window == 0 || key > query - p.sliding_window;
              const int64_t size = p.attention_chunk_size;
              seen |= key >= 0 && key <= query && in_window && (size == 0 || key / size == query / size);
            }
            CHECK(seen == (keys.begin <= key && key < keys.end));
          }
        }
}

TEST(windows_and_chunks_past_all_positions_hide_nothing) {
  Problem p;
  p.sliding_window = p.attention_chunk_size = INT64_MAX;
  for (int64_t position : {int64_t(0), int64_t(7), int64_t(INT32_MAX)}) CHECK(first_visible(p, position) == 0);
}

TEST(sound_rows_are_all_served) {
  Batch batch;
  const Rows rows = batch.rows();
  CHECK(rows.live.size() == 3);
  CHECK(rows.ordered);
  const Row& row = rows.live[1];
  CHECK(row.index == 1 && row.token == 1 && row.count == 5 && row.position == 15);
}

TEST(rows_past_the_live_ones_are_dead) {
  Batch batch;
  for (int64_t live : {int64_t(INT32_MIN), int64_t(-1), int64_t(0), int64_t(1), int64_t(2), int64_t(3), int64_t(4),
                       int64_t(INT32_MAX)}) {
    batch.problem.live_rows = live;
    CHECK(int64_t(batch.live().size()) == (live < 0 ? 0 : live > 3 ? 3 : live));
  }
}

TEST(a_malformed_row_is_left_out_and_the_others_are_served) {
  const auto served = [](const std::function<void(Batch&)>& spoil) {
    Batch batch;
    spoil(batch);
    return batch.live();
  };
  const Indices others = {0, 2};
  for (int32_t context : {INT32_MIN, -1, 0, 4, 21, INT32_MAX})  // shorter than its queries, longer than its table
    CHECK(served([=](Batch& b) { b.context_lens[1] = context; }) == others);
  for (int32_t page : {INT32_MIN, -1, 12, INT32_MAX})
    for (size_t entry : {5, 9}) CHECK(served([=](Batch& b) { b.block_tables[entry] = page; }) == others);
  // A start belongs to two rows: here both are lost, one that runs backwards and one that is longer than its context.
  for (int32_t start : {INT32_MIN, -1}) CHECK((served([=](Batch& b) { b.query_start_loc[1] = start; }) == Indices{2}));
  CHECK((served([](Batch& b) { b.query_start_loc[3] = 12; }) == Indices{0, 1}));  // leaves the tokens
  CHECK((served([](Batch& b) { b.query_start_loc[3] = INT32_MAX; }) == Indices{0, 1}));
  CHECK((served([](Batch& b) { b.query_start_loc[3] = 6; }) == Indices{0, 1}));  // no queries: idle
}

TEST(only_pages_that_are_needed_have_to_exist) {
  Batch batch;
  batch.block_tables[3] = batch.block_tables[4] = 99;  // row 0 needs three pages
  CHECK(batch.live().size() == 3);
  batch.block_tables[5] = -1;  // row 1: its first query is at position 15
  CHECK((batch.live() == Indices{0, 2}));
  batch.problem.sliding_window = 12;  // the first key that it sees is at position 4
  CHECK(batch.live().size() == 3);
  batch.problem.sliding_window = 13;
  CHECK((batch.live() == Indices{0, 2}));
}

TEST(rows_that_claim_the_same_tokens_are_not_ordered) {
  Batch batch;
  batch.query_start_loc = {0, 6, 4, 9};  // row 1 runs backwards, row 2 begins inside of row 0
  batch.context_lens[2] = 8;
  batch.block_tables[11] = 1;
  CHECK((batch.live() == Indices{0, 2}));
  CHECK(!batch.rows().ordered);
  batch.context_lens[2] = 4;  // row 2 is malformed, and row 0 is left alone
  CHECK((batch.live() == Indices{0}));
  CHECK(batch.rows().ordered);
}

TEST(tokens_of_no_live_row_become_zeros_and_have_no_logsumexp) {
  for (const bool wanted : {false, true}) {
    Batch batch;
    batch.problem.lse = wanted ? batch.lse.data() : nullptr;
    batch.context_lens[1] = 0;
    clear_dead_tokens(batch.problem, batch.rows());
    for (int64_t token = 0; token < 11; ++token) {
      const bool dead = (token >= 1 && token < 6) || token >= 9;
      CHECK(batch.is_cleared(token) == dead);
      for (size_t head : {0, 1}) CHECK(batch.lse[size_t(token) * 2 + head] == (dead && wanted ? -INFINITY : 7.0f));
    }
  }
}

TEST(rows_that_are_not_ordered_have_all_tokens_cleared_first) {
  Batch batch;
  batch.problem.lse = batch.lse.data();
  Rows rows = batch.rows();
  rows.ordered = false;
  clear_dead_tokens(batch.problem, rows);
  for (int64_t token = 0; token < 11; ++token)
    CHECK(batch.is_cleared(token) && batch.lse[size_t(token) * 2] == -INFINITY);
}

}  // namespace
}  // namespace easydel_ragged
