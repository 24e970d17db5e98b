#include "prefixes.h"

#include <algorithm>
#include <cstdint>

#include "visible.h"

namespace easydel_ragged {
namespace {

// Below so many keys, merging the parts takes more than reading the keys again.
constexpr int64_t kLeastShared = 64;

struct Sharing {
  const Problem& p;
  const Rows& rows;
  std::vector<SharedKeys>& found;

  const int32_t* table(int32_t row) const { return p.block_tables + rows.live[row].index * p.pages_per_row; }
  // Whole pages that all queries of a row see.
  int64_t pages(int32_t row) const { return (rows.live[row].position + 1) / p.page_size; }

  // The rows [first, last) have pages before `page` in common; of these, keys from `begin` on are in no entry.
  void find(int32_t* first, int32_t* last, int64_t page, int64_t begin) {
    const auto entry = [&](int32_t row) { return page < pages(row) ? table(row)[page] : -1; };
    while (entry(*first) >= 0 && std::all_of(first, last, [&](int32_t row) { return entry(row) == entry(*first); }))
      ++page;
    const int64_t end = page * p.page_size;
    if (end - begin >= kLeastShared) {
      found.push_back({{first, last}, begin, end});
      begin = end;
    }
    std::sort(first, last, [&](int32_t a, int32_t b) { return entry(a) != entry(b) ? entry(a) < entry(b) : a < b; });
    while (first != last) {
      int32_t* next = first + 1;
      while (next != last && entry(*next) == entry(*first)) ++next;
      if (next - first > 1 && entry(*first) >= 0) find(first, next, page + 1, begin);
      first = next;
    }
  }
};

}  // namespace

std::vector<SharedKeys> shared_keys(const Problem& p, const Rows& rows, int64_t most_tokens) {
  std::vector<SharedKeys> found;
  if (!rows.ordered) return found;
  const Sharing sharing{p, rows, found};
  // By their first page: where all of these differ, nothing is shared.
  std::vector<uint64_t> by_page;
  for (size_t r = 0; r < rows.live.size(); ++r) {
    const Row& row = rows.live[r];
    if (row.count > most_tokens || sharing.pages(int32_t(r)) * p.page_size < kLeastShared) continue;
    if (first_visible(p, row.position + row.count - 1) > 0) continue;
    by_page.push_back(uint64_t(uint32_t(sharing.table(int32_t(r))[0])) << 32 | uint64_t(r));
  }
  std::sort(by_page.begin(), by_page.end());
  for (size_t first = 0, last; first < by_page.size(); first = last) {
    for (last = first + 1; last < by_page.size() && by_page[last] >> 32 == by_page[first] >> 32; ++last) {
    }
    if (last - first < 2) continue;
    std::vector<int32_t> together;
    for (size_t i = first; i < last; ++i) together.push_back(int32_t(by_page[i] & UINT32_MAX));
    Sharing{p, rows, found}.find(together.data(), together.data() + together.size(), 1, 0);
  }
  return found;
}

}  // namespace easydel_ragged
