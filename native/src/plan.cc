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

// A thread starts some microseconds after it was woken: below about twice that, alone is faster.
constexpr double kLeastSharedNs = 30000.0;
// Waking one keeps the caller busy for so long.
constexpr double kWakeNs = 2000.0;

constexpr int64_t kLeastSharedWrites = 256 * 1024;  // bytes
constexpr int64_t kWriteTokens = 64;                // of a shared write

constexpr int64_t kLeastDecodeTokens = 64;  // of a part of a context, and the same in bytes
constexpr double kLeastDecodeBytes = 65536;
constexpr double kItemsPerThread = 8.0;

// Keys and values of one token, in bytes of the cache.
double token_bytes(const Problem& p) { return double(2 * p.num_kv_heads * p.head_dim) * element_size(p.cache_dtype); }

int64_t new_tokens(const Rows& rows) {
  int64_t tokens = 0;
  for (const Row& row : rows.live) tokens += row.count;
  return tokens;
}

void add_writes(const Problem& p, const Rows& rows, int threads, Plan& plan) {
  const int64_t tokens = new_tokens(rows);
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

double decode_cost(const Problem& p, const Rows& rows) {
  double cost = 0;
  for (const Row& row : rows.live) {
    if (row.count != 1) continue;
    const KeyRange keys = visible_keys(p, row.position, 1);
    cost += kItemNs + double(keys.end - keys.begin) * token_bytes(p) / kBytesPerNs;
  }
  return cost;
}

// Threads that a call of this cost is worth sharing between. The caller wakes them one after the other, so with n of
// them it takes about cost / n + n * kWakeNs, which is least where n * n is cost / kWakeNs. (sqrt would need libm.)
int useful_threads(double cost, int threads) {
  int useful = 1;
  if (cost < kLeastSharedNs) return useful;
  while (useful < threads && double(useful + 1) * double(useful + 1) * kWakeNs <= cost) ++useful;
  return useful;
}

// Long contexts are cut so that there are about eight items for each thread. `cost_of_call` counts everything.
void add_decode(const Problem& p, const Rows& rows, double cost_of_call, int threads, Plan& plan) {
  const double bytes = token_bytes(p);
  const double all = cost_of_call * kBytesPerNs / bytes;  // as if it were tokens that decode reads
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
  const double attention = add_prefill(p, rows, prefill_chunk, plan) + decode_cost(p, rows);
  const double writes = p.keys != nullptr ? double(new_tokens(rows)) * token_bytes(p) / kBytesPerNs : 0.0;
  threads = useful_threads(attention + writes, threads);
  if (p.keys != nullptr) add_writes(p, rows, threads, plan);
  add_decode(p, rows, attention, threads, plan);
  // The longest first: what is left for the end is short. Rows that overlap keep their order.
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&rows](const Item& a, const Item& b) { return rows.ordered ? a.cost > b.cost : a.row < b.row; });
  const size_t widest = std::max(plan.shared_writes ? plan.writes.size() : 0, plan.items.size());
  plan.helpers = int32_t(std::min<size_t>(size_t(threads), std::max<size_t>(widest, 1))) - 1;
  return plan;
}

}  // namespace easydel_ragged
