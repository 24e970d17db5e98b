// Which keys rows share, on tables whose prefixes are known.
#include "prefixes.h"

#include <algorithm>
#include <random>
#include <vector>

#include "problems.h"
#include "unit.h"

namespace easydel_ragged {
namespace {

struct Tables {
  Problem p;
  Rows rows{{}, true};
  std::vector<int32_t> tables;

  explicit Tables(int64_t page_size, std::vector<std::vector<int32_t>> of_rows, std::vector<int64_t> positions,
                  int64_t count = 1) {
    p.page_size = page_size;
    for (const auto& table : of_rows) p.pages_per_row = std::max(p.pages_per_row, int64_t(table.size()));
    for (size_t r = 0; r < of_rows.size(); ++r) {
      of_rows[r].resize(size_t(p.pages_per_row), -7);
      tables.insert(tables.end(), of_rows[r].begin(), of_rows[r].end());
      rows.live.push_back({int64_t(r), int64_t(r) * count, count, positions[r]});
    }
    p.block_tables = tables.data();
    p.num_rows = int64_t(of_rows.size());
  }
  std::vector<SharedKeys> shared(int64_t most_tokens = 16) const { return shared_keys(p, rows, most_tokens); }
};

bool is(const SharedKeys& keys, std::vector<int32_t> rows, int64_t begin, int64_t end) {
  std::vector<int32_t> sorted = keys.rows;
  std::sort(sorted.begin(), sorted.end());
  return sorted == rows && keys.begin == begin && keys.end == end;
}

TEST(rows_share_the_pages_that_their_tables_begin_with) {
  const Tables tables(100, {{1, 2, 3, 4}, {5, 2, 3, 4}, {1, 2, 9, 4}, {6}}, {399, 399, 350, 50});
  const auto shared = tables.shared();
  CHECK(shared.size() == 1 && is(shared[0], {0, 2}, 0, 200));
}

TEST(a_tree_of_prefixes_is_shared_level_by_level) {
  const Tables tables(64, {{1, 2, 3, 4, 5}, {1, 2, 3, 7, 8}, {1, 2, 3, 4, 9}, {1, 6, 6, 6, 6}}, {319, 319, 319, 319});
  const auto shared = tables.shared();
  CHECK(shared.size() == 3);
  if (shared.size() != 3) return;
  CHECK(is(shared[0], {0, 1, 2, 3}, 0, 64));
  CHECK(is(shared[1], {0, 1, 2}, 64, 192));
  CHECK(is(shared[2], {0, 2}, 192, 256));
}

TEST(only_whole_pages_that_every_query_sees_are_shared) {
  const std::vector<std::vector<int32_t>> same{{1, 2, 3}, {1, 2, 3}};
  CHECK(is(Tables(100, same, {299, 299}).shared().at(0), {0, 1}, 0, 300));
  CHECK(is(Tables(100, same, {299, 298}).shared().at(0), {0, 1}, 0, 200));
  CHECK(is(Tables(100, same, {299, 199}, 4).shared().at(0), {0, 1}, 0, 200));
  CHECK(Tables(100, same, {299, 98}).shared().empty());
}

TEST(little_is_not_shared_and_waits_for_what_follows) {
  CHECK(Tables(16, {{1, 2, 3, 8}, {1, 2, 3, 9}}, {63, 63}).shared().empty());  // 48 keys
  const Tables tables(16, {{1, 2, 3, 4, 5}, {1, 2, 3, 4, 6}, {1, 7, 7, 7, 7}}, {79, 79, 79});
  const auto shared = tables.shared();
  CHECK(shared.size() == 1 && is(shared[0], {0, 1}, 0, 64));
}

TEST(windows_chunks_longer_rows_and_rows_out_of_order_share_nothing) {
  Tables tables(100, {{1, 2, 3}, {1, 2, 3}}, {299, 299}, 2);
  CHECK(tables.shared(2).size() == 1);
  CHECK(tables.shared(1).empty());
  tables.rows.ordered = false;
  CHECK(tables.shared().empty());
  tables.rows.ordered = true;
  tables.p.sliding_window = 300;  // hides a key from the second query
  CHECK(tables.shared().empty());
  tables.p.sliding_window = 301;
  CHECK(tables.shared().size() == 1);
  tables.p.attention_chunk_size = 250;
  CHECK(tables.shared().empty());
}

TEST(each_row_has_its_shared_keys_once_and_from_the_first_on) {
  std::mt19937 random(1);
  const auto between = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  int levels = 0;
  for (int round = 0; round < 300; ++round) {
    const int rows = between(2, 12), pages = between(1, 12);
    std::vector<std::vector<int32_t>> of_rows;
    std::vector<int64_t> positions;
    for (int r = 0; r < rows; ++r) {
      of_rows.emplace_back();
      for (int i = 0; i < pages; ++i) of_rows.back().push_back(between(0, i < 4 ? 1 : 3));
      positions.push_back(between(0, pages * 40 - 1));
    }
    const Tables tables(40, of_rows, positions);
    std::vector<int64_t> next(size_t(rows), 0);
    for (const SharedKeys& keys : tables.shared()) {
      CHECK(keys.rows.size() >= 2 && keys.end - keys.begin >= 64);
      for (int32_t r : keys.rows) {
        CHECK(keys.begin == next[r] && keys.end <= positions[r] + 1);
        levels += next[r] > 0;
        next[r] = keys.end;
        for (int64_t page = 0; page < keys.end / 40; ++page) CHECK(of_rows[r][page] == of_rows[keys.rows[0]][page]);
      }
    }
  }
  CHECK(levels > 0);
}

TEST(the_random_problems_of_the_harness_have_shared_keys) {
  int sharing = 0;
  for (uint32_t seed = 0; seed < 200; ++seed) {
    std::vector<uint8_t> stream(600);
    uint32_t state = seed * 2654435761u + 12345u;  // as the harness makes them
    for (uint8_t& byte : stream) {
      state = state * 1664525u + 1013904223u;
      byte = uint8_t(state >> 24);
    }
    Bytes bytes(stream.data(), stream.size());
    Arrays arrays;
    const Problem p = make_problem(bytes, arrays, true);
    sharing += !shared_keys(p, live_rows(p), 16).empty();
  }
  CHECK(sharing >= 10);
}

}  // namespace
}  // namespace easydel_ragged
