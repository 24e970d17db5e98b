#include "plan.h"

#include <algorithm>
#include <cstdint>

#include "visible.h"

namespace easydel_ragged {
namespace {

// Rough speed of one thread; only the ratios matter.
constexpr double kBytesPerNs = 10.0;
constexpr double kMultipliesPerNs = 40.0;
constexpr double kItemNs = 500.0;

// Waking a thread takes some microseconds: below about twice that, alone is faster.
constexpr double kLeastSharedNs = 30000.0;

constexpr int64_t kLeastSharedWrites = 256 * 1024;  // bytes
constexpr int64_t kWriteTokens = 64;                // of a shared write

constexpr int64_t kLeastDecodeTokens = 64;  // of a part of a context, and the same in bytes
constexpr double kLeastDecodeBytes = 65536;
constexpr double kItemsPerThread = 8.0;

// Keys and values of one token, in bytes of the cache.
double token_bytes(const Problem& p) { return double(2 * p.num_kv_heads * p.head_dim) * element_size(p.cache_dtype); }

void add_writes(const Problem& p, const Rows& rows, int threads, Plan& plan) {
  int64_t tokens = 0;
  for (const Row& row : rows.live) tokens += row.count;
  plan.shared_writes = tokens * token_bytes(p) > kLeastSharedWrites && threads > 1;
  if (!plan.shared_writes) plan.writes.reserve(rows.live.size());
  for (size_t r = 0; r < rows.live.size(); ++r) {
    const int64_t count = rows.live[r].count, step = plan.shared_writes ? kWriteTokens : count;
    for (int64_t begin = 0; begin < count; begin += step)
      plan.writes.push_back({int32_t(r), begin, std::min(count, begin + step)});
  }
}

// Returns the cost of what it adds.
double add_prefill(const Problem& p, const Rows& rows, int64_t chunk, Plan& plan) {
  double all = 0;
  for (size_t r = 0; r < rows.live.size(); ++r) {
    const Row& row = rows.live[r];
    if (row.count == 1) continue;
    for (int64_t begin = 0; begin < row.count; begin += chunk) {
      const int64_t end = std::min(row.count, begin + chunk);
      const double keys = double(row.position + (begin + end) / 2 - first_visible(p, row.position + begin) + 1);
      const double cost =
          kItemNs + keys * double(p.head_dim) * (2.0 * double((end - begin) * p.group()) + 16.0) / kMultipliesPerNs;
      for (int64_t head = 0; head < p.num_kv_heads; ++head)
        plan.items.push_back({Item::kPrefill, int32_t(r), int32_t(head), -1, begin, end, cost});
      all += cost * double(p.num_kv_heads);
    }
  }
  return all;
}

// Long contexts are cut so that there are about eight items for each thread.
void add_decode(const Problem& p, const Rows& rows, double prefill_cost, int threads, Plan& plan) {
  const double bytes = token_bytes(p);
  double tokens = 0;
  for (const Row& row : rows.live) {
    const KeyRange keys = visible_keys(p, row.position, row.count);
    if (row.count == 1) tokens += double(keys.end - keys.begin);
  }
  const double all = tokens + prefill_cost * kBytesPerNs / bytes;  // prefill as if it were tokens that decode reads
  const int64_t least = std::max(kLeastDecodeTokens, int64_t(kLeastDecodeBytes / bytes));
  const int64_t most = threads == 1 ? INT64_MAX : std::max(least, int64_t(all / (kItemsPerThread * threads)) + 1);
  for (size_t r = 0; r < rows.live.size(); ++r) {
    const Row& row = rows.live[r];
    if (row.count != 1) continue;
    const KeyRange keys = visible_keys(p, row.position, 1);
    const int64_t length = keys.end - keys.begin, parts = (length - 1) / most + 1, step = (length + parts - 1) / parts;
    plan.partials[r].first = plan.num_partials;
    for (int64_t begin = keys.begin; begin < keys.end; begin += step) {
      const int64_t end = std::min(keys.end, begin + step);
      const double cost = kItemNs + double(end - begin) * bytes / kBytesPerNs;
      plan.items.push_back({Item::kDecode, int32_t(r), -1, plan.num_partials++, begin, end, cost});
    }
    plan.partials[r].count = plan.num_partials - plan.partials[r].first;
  }
}

}  // namespace

Plan make_plan(const Problem& p, const Rows& rows, int64_t prefill_chunk, int threads) {
  // Nobody may run beside a row whose output is to be overwritten by a later row's.
  threads = rows.ordered ? std::max(1, threads) : 1;
  Plan plan;
  plan.partials.resize(rows.live.size());
  if (p.keys != nullptr) add_writes(p, rows, threads, plan);
  const double prefill_cost = add_prefill(p, rows, prefill_chunk, plan);
  add_decode(p, rows, prefill_cost, threads, plan);
  // The longest first: what is left for the end is short. Rows that overlap keep their order.
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&rows](const Item& a, const Item& b) { return rows.ordered ? a.cost > b.cost : a.row < b.row; });

  double cost = 0;
  for (const Item& item : plan.items) cost += item.cost;
  const size_t widest = std::max(plan.shared_writes ? plan.writes.size() : 0, plan.items.size());
  if (cost >= kLeastSharedNs) plan.helpers = int32_t(std::min<int64_t>(threads, int64_t(widest))) - 1;
  return plan;
}

}  // namespace easydel_ragged
