// Properties of plans, on random rows. No array of the call exists here: a plan that read one would crash.
#include "plan.h"

#include <algorithm>
#include <map>
#include <random>

#include "unit.h"
#include "visible.h"

namespace easydel_ragged {
namespace {

struct Request {
  Problem problem;
  Rows rows{{}, true};
  int64_t chunk;

  explicit Request(uint32_t seed) {
    std::mt19937 random(seed);
    const auto between = [&](int64_t low, int64_t high) {
      return std::uniform_int_distribution<int64_t>(low, high)(random);
    };
    static char keys;
    problem.keys = problem.values = seed % 2 ? &keys : nullptr;
    problem.cache_dtype = DType(between(0, 4));
    problem.num_kv_heads = between(1, 8);
    problem.num_q_heads = problem.num_kv_heads * between(1, 8);
    problem.head_dim = between(1, 256);
    problem.sliding_window = between(0, 2) ? 0 : between(1, 5000);
    problem.attention_chunk_size = between(0, 2) ? 0 : between(1, 5000);
    chunk = between(1, 300);
    const int64_t longest = between(0, 1) ? 100 : 50000;
    for (int64_t r = 0, count = between(1, 12); r < count; ++r) {
      const int64_t queries = between(0, 1) ? 1 : between(1, 1000);
      const int64_t index = (rows.live.empty() ? 0 : rows.live.back().index + 1) + between(0, 1);
      rows.live.push_back({index, problem.num_tokens, queries, between(0, longest)});
      problem.num_tokens += queries + between(0, 2);
    }
    rows.ordered = between(0, 4) != 0;
  }
  Plan plan(int threads) const { return make_plan(problem, rows, chunk, threads); }
};

template <class Property>
void for_each_plan(Property property) {
  for (uint32_t seed = 0; seed < 400; ++seed) {
    const Request request(seed);
    for (int threads : {1, 2, 3, 8, 64}) property(request, request.plan(threads), threads);
  }
}

TEST(new_tokens_are_written_once_and_only_where_there_are_new_keys) {
  int shared = 0;
  for_each_plan([&](const Request& request, const Plan& plan, int threads) {
    std::vector<std::vector<int>> written;
    for (const Row& row : request.rows.live) written.emplace_back(row.count, 0);
    for (const Write& write : plan.writes)
      for (int64_t token = write.begin; token < write.end; ++token) ++written.at(write.row).at(token);
    const int wanted = request.problem.keys ? 1 : 0;
    for (const auto& row : written)
      CHECK(std::all_of(row.begin(), row.end(), [=](int times) { return times == wanted; }));
    if (plan.shared_writes) {
      CHECK(threads > 1 && request.rows.ordered);
      ++shared;
    } else {
      CHECK(plan.writes.size() == (wanted ? request.rows.live.size() : 0));
    }
  });
  CHECK(shared > 0);
}

TEST(each_query_token_of_a_longer_row_and_kv_head_is_attended_once) {
  for_each_plan([](const Request& request, const Plan& plan, int) {
    std::vector<std::vector<int>> attended;
    const int64_t heads = request.problem.num_kv_heads;
    for (const Row& row : request.rows.live) attended.emplace_back(row.count * heads, 0);
    for (const Item& item : plan.items) {
      if (item.kind != Item::kPrefill) continue;
      CHECK(item.end - item.begin <= request.chunk);
      CHECK(item.kv_head >= 0 && item.kv_head < heads);
      for (int64_t token = item.begin; token < item.end; ++token)
        ++attended.at(item.row).at(token * heads + item.kv_head);
    }
    for (size_t r = 0; r < attended.size(); ++r) {
      const int wanted = request.rows.live[r].count > 1 ? 1 : 0;
      for (int times : attended[r]) CHECK(times == wanted);
    }
  });
}

TEST(each_visible_key_of_a_decode_row_is_read_once_and_partials_follow_the_keys) {
  int split = 0;
  for_each_plan([&](const Request& request, const Plan& plan, int) {
    std::map<int32_t, const Item*> by_partial;
    for (const Item& item : plan.items)
      if (item.kind == Item::kDecode) CHECK(by_partial.emplace(item.partial, &item).second);
    CHECK(int32_t(by_partial.size()) == plan.num_partials);
    int32_t next = 0;
    CHECK(plan.partials.size() == request.rows.live.size());
    for (size_t r = 0; r < request.rows.live.size(); ++r) {
      const Row& row = request.rows.live[r];
      const PartialRange& range = plan.partials[r];
      if (row.count != 1) {
        CHECK(range.count == 0);
        continue;
      }
      CHECK(range.first == next && range.count > 0);
      split += range.count > 1;
      const KeyRange keys = visible_keys(request.problem, row.position, 1);
      int64_t position = keys.begin;
      for (next = range.first; next < range.first + range.count; ++next) {
        const auto found = by_partial.find(next);
        CHECK(found != by_partial.end());
        if (found == by_partial.end()) return;
        CHECK(found->second->row == int32_t(r) && found->second->begin == position);
        CHECK(found->second->end > position);
        position = found->second->end;
      }
      CHECK(position == keys.end);
    }
    CHECK(next == plan.num_partials);
  });
  CHECK(split > 0);
}

TEST(costs_are_positive_and_the_longest_items_come_first) {
  for_each_plan([](const Request& request, const Plan& plan, int) {
    for (size_t i = 0; i < plan.items.size(); ++i) {
      CHECK(plan.items[i].cost > 0);
      if (i == 0) continue;
      const Item &before = plan.items[i - 1], &now = plan.items[i];
      CHECK(request.rows.ordered ? before.cost >= now.cost : before.row <= now.row);
    }
  });
}

TEST(nothing_is_cut_or_shared_where_one_thread_does_all) {
  for_each_plan([](const Request& request, const Plan& plan, int threads) {
    if (threads > 1 && request.rows.ordered) return;
    CHECK(plan.helpers == 0);
    CHECK(!plan.shared_writes);
    for (const PartialRange& range : plan.partials) CHECK(range.count <= 1);
  });
}

TEST(helpers_are_fewer_than_threads_and_than_the_items_of_the_wider_phase) {
  int woken = 0;
  for_each_plan([&](const Request&, const Plan& plan, int threads) {
    CHECK(plan.helpers >= 0 && plan.helpers < threads);
    CHECK(plan.helpers < int32_t(std::max(plan.items.size(), plan.writes.size())));
    woken += plan.helpers > 0;
  });
  CHECK(woken > 0);
}

TEST(a_long_context_is_cut_for_all_threads_and_no_further) {
  Request request(1);
  request.problem.keys = request.problem.values = nullptr;
  request.problem.sliding_window = request.problem.attention_chunk_size = 0;
  request.problem.num_kv_heads = request.problem.num_q_heads = 8;
  request.problem.head_dim = 128;
  request.rows = Rows{{{0, 0, 1, 999999}}, true};
  for (int threads : {2, 4, 32}) {
    const Plan plan = request.plan(threads);
    CHECK(plan.num_partials >= threads && plan.num_partials <= 8 * threads);
    CHECK(plan.helpers == threads - 1);
  }
  request.rows.live[0].position = 20;
  CHECK(request.plan(32).num_partials == 1);
  CHECK(request.plan(32).helpers == 0);
}

TEST(a_thread_is_woken_where_its_share_pays_for_it) {
  Request request(1);
  request.problem.keys = request.problem.values = nullptr;
  request.problem.sliding_window = request.problem.attention_chunk_size = 0;
  request.problem.num_kv_heads = request.problem.num_q_heads = 8;
  request.problem.head_dim = 128;
  request.problem.cache_dtype = DType::kF32;  // 8 KiB for a token, less than a microsecond
  const auto helpers = [&](int64_t context, int threads) {
    request.rows = Rows{{{0, 0, 1, context - 1}}, true};
    return request.plan(threads).helpers;
  };
  int32_t before = 0;
  for (int64_t context = 1; context < 200000; context = context * 5 / 4 + 1) {
    const int32_t now = helpers(context, 64);
    CHECK(now >= before);
    before = now;
    CHECK(helpers(context, 2) <= 1);
  }
  CHECK(helpers(20, 64) == 0);
  CHECK(helpers(2000, 64) >= 8 && helpers(2000, 64) <= 40);
  CHECK(helpers(200000, 64) == 63);
  CHECK(helpers(2000, 2) == 1);
}

TEST(a_plan_depends_on_rows_sizes_and_threads_alone) {
  const auto same = [](const Item& a, const Item& b) {
    return a.kind == b.kind && a.row == b.row && a.kv_head == b.kv_head && a.partial == b.partial &&
           a.begin == b.begin && a.end == b.end && a.cost == b.cost;
  };
  for_each_plan([&](const Request& request, const Plan& plan, int threads) {
    Request other = request;
    int32_t anything[4] = {-1, 7, 1 << 30, 0};  // arrays whose numbers a plan may not follow
    other.problem.context_lens = other.problem.block_tables = other.problem.query_start_loc = anything;
    other.problem.live_rows = 1;
    const Plan again = other.plan(threads);
    CHECK(std::equal(plan.items.begin(), plan.items.end(), again.items.begin(), again.items.end(), same));
    CHECK(plan.helpers == again.helpers && plan.writes.size() == again.writes.size());
  });
}

}  // namespace
}  // namespace easydel_ragged
