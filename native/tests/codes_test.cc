// Which rows of a cache of codes are restored, and which of them together.
#include "codes.h"

#include <initializer_list>
#include <vector>

#include "unit.h"

namespace easydel_ragged {
namespace {

constexpr int64_t kPageBytes = 1000, kMuch = int64_t{1} << 40;

struct Sizes {
  int64_t count, context;
};

struct Request {
  Problem p;
  Rows rows{{}, true};

  // 32 heads of 128 over 8 kv heads, 128 signs, pages of 100 tokens.
  explicit Request(std::initializer_list<Sizes> all) {
    p.cache_dtype = DType::kCodes;
    p.num_q_heads = 32;
    p.num_kv_heads = 8;
    p.head_dim = 128;
    p.key_dim = 256;
    p.page_size = 100;
    for (const Sizes& row : all) {
      rows.live.push_back({int64_t(rows.live.size()), p.num_tokens, row.count, row.context - row.count});
      p.num_tokens += row.count;
    }
  }
  Ways ways(int64_t most_bytes) const { return ways_of(p, rows, kPageBytes, most_bytes); }
};

std::vector<int64_t> indices(const Rows& rows) {
  std::vector<int64_t> all;
  for (const Row& row : rows.live) all.push_back(row.index);
  return all;
}
using Indices = std::vector<int64_t>;

TEST(rows_of_many_queries_are_restored) {
  const Request request({{1, 2000}, {1000, 1000}, {32, 2000}, {256, 4000}, {16, 16}});
  const Ways ways = request.ways(kMuch);
  CHECK(ways.rotated.ordered);
  CHECK((indices(ways.rotated) == Indices{0, 2}));
  CHECK(ways.restored.size() == 1 && ways.restored[0].ordered);
  CHECK((indices(ways.restored[0]) == Indices{1, 3, 4}));
}

TEST(rows_that_overlap_are_not_restored) {
  Request request({{1000, 1000}, {1, 2000}});
  request.rows.ordered = false;
  const Ways ways = request.ways(kMuch);
  CHECK(!ways.rotated.ordered && ways.restored.empty());
  CHECK((indices(ways.rotated) == Indices{0, 1}));
}

TEST(groups_of_restored_rows_have_a_size) {
  const Request request({{300, 301}, {300, 300}, {301, 301}, {1000, 1000}, {100, 100}});  // 4, 3, 4, 10 and 1 pages
  const Ways ways = request.ways(8 * kPageBytes);
  CHECK((indices(ways.rotated) == Indices{3}));
  CHECK(ways.restored.size() == 2);
  CHECK((indices(ways.restored[0]) == Indices{0, 1}));
  CHECK((indices(ways.restored[1]) == Indices{2, 4}));
}

TEST(only_pages_that_are_seen_are_restored) {
  Request request({{300, 5000}});
  CHECK(request.ways(10 * kPageBytes).restored.empty());  // 50 pages
  request.p.sliding_window = 101;                         // positions from 4600 on
  CHECK(request.ways(4 * kPageBytes).restored.size() == 1);
  CHECK(request.ways(3 * kPageBytes).restored.empty());
}

}  // namespace
}  // namespace easydel_ragged
