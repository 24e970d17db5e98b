// Properties of plans, on random rows. No array of the call exists here: a plan that read one would crash.
#include "plan.h"

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "unit.h"
#include "visible.h"

namespace easydel_ragged {
namespace {

struct Request {
  Problem problem;
  Rows rows{{}, true};
  Limits limits;
  std::vector<SharedKeys> shared;

  explicit Request(uint32_t seed) {
    std::mt19937 random(seed);
    const auto between = [&](int64_t low, int64_t high) {
      return std::uniform_int_distribution<int64_t>(low, high)(random);
    };
    static char keys;
    problem.keys = problem.values = seed % 2 ? &keys : nullptr;
    problem.cache_dtype = DType(between(0, 5));
    problem.num_kv_heads = between(1, 8);
    problem.num_q_heads = problem.num_kv_heads * between(1, 8);
    problem.head_dim = problem.key_dim = between(1, 256);
    if (problem.cache_dtype == DType::kCodes) {
      problem.key_dim += 8;
      for (int64_t& bytes : problem.codes.bytes) bytes = problem.num_kv_heads * between(1, 128);
    }
    problem.sliding_window = between(0, 2) ? 0 : between(1, 5000);
    problem.attention_chunk_size = between(0, 2) ? 0 : between(1, 5000);
    limits = {between(1, 20), between(1, 300)};
    const int64_t longest = between(0, 1) ? 100 : 50000;
    for (int64_t r = 0, count = between(1, 12); r < count; ++r) {
      const int64_t queries = between(0, 1) ? 1 : between(1, 1000);
      const int64_t index = (rows.live.empty() ? 0 : rows.live.back().index + 1) + between(0, 1);
      rows.live.push_back({index, problem.num_tokens, queries, between(0, longest)});
      problem.num_tokens += queries + between(0, 2);
    }
    rows.ordered = between(0, 4) != 0;
    if (rows.ordered && problem.sliding_window == 0 && problem.attention_chunk_size == 0) add_shared(between(0, 3));
  }
  // Rows with short ones among their neighbors share keys that all of them see; some of these share further ones.
  void add_shared(int64_t depth) {
    int64_t begin = 0;
    for (int64_t skipped = 0; skipped < depth; ++skipped) {
      SharedKeys keys{{}, begin, begin + 1 + 100 * skipped};
      for (size_t r = size_t(skipped); r < rows.live.size(); ++r)
        if (rows.live[r].count <= limits.most_few && rows.live[r].position >= keys.end) keys.rows.push_back(int32_t(r));
      if (keys.rows.size() < 2) return;
      begin = keys.end;
      shared.push_back(keys);
    }
  }
  Plan plan(int threads) const { return make_plan(problem, rows, shared, limits, threads); }
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

// Of each query token and kv head, the keys that its items read, in order.
using Reads = std::map<std::pair<int64_t, int64_t>, std::vector<KeyRange>>;

Reads reads_of(const Request& request, const Plan& plan) {
  Reads reads;
  for (const Item& item : plan.items) {
    const int64_t first = item.kind == Item::kMany ? item.kv_head : 0;
    const int64_t last = item.kind == Item::kMany ? item.kv_head : request.problem.num_kv_heads - 1;
    for (int32_t i = item.queries; i < item.queries + item.count; ++i)
      for (int64_t head = first; head <= last; ++head)
        reads[{plan.queries.at(i).token, head}].push_back({item.begin, item.end});
  }
  for (auto& [query, ranges] : reads)
    std::sort(ranges.begin(), ranges.end(), [](KeyRange a, KeyRange b) { return a.begin < b.begin; });
  return reads;
}

TEST(each_key_that_a_query_sees_is_read_once_for_it) {
  int cut = 0;
  for_each_plan([&](const Request& request, const Plan& plan, int) {
    if (!request.rows.ordered) return;  // rows may claim one token there
    const Reads reads = reads_of(request, plan);
    size_t queries = 0;
    for (const Row& row : request.rows.live)
      for (int64_t i = 0; i < row.count; ++i, ++queries) {
        const KeyRange seen = visible_keys(request.problem, row.position + i, 1);
        for (int64_t head = 0; head < request.problem.num_kv_heads; ++head) {
          const auto found = reads.find({row.token + i, head});
          CHECK(found != reads.end());
          if (found == reads.end()) continue;
          const std::vector<KeyRange>& ranges = found->second;
          CHECK(ranges.front().begin <= seen.begin && ranges.back().end >= seen.end);
          for (size_t k = 1; k < ranges.size(); ++k) CHECK(ranges[k].begin == ranges[k - 1].end);
          cut += ranges.size() > 1;
        }
      }
    CHECK(reads.size() == queries * size_t(request.problem.num_kv_heads));
  });
  CHECK(cut > 0);
}

TEST(items_have_as_many_queries_as_their_kind_takes_and_keys_of_their_row) {
  int few = 0, many = 0;
  for_each_plan([&](const Request& request, const Plan& plan, int) {
    for (const Item& item : plan.items) {
      const Limits& limits = request.limits;
      CHECK(item.count > 0 && item.queries >= 0 && size_t(item.queries + item.count) <= plan.queries.size());
      CHECK(item.count <= (item.kind == Item::kFew ? limits.most_few : limits.most_many));
      if (item.kind == Item::kMany) CHECK(item.kv_head >= 0 && item.kv_head < request.problem.num_kv_heads);
      const Row& row = request.rows.live.at(item.row);
      CHECK(item.begin >= 0 && item.begin < item.end && item.end <= row.position + row.count);
      ++(item.kind == Item::kFew ? few : many);
    }
  });
  CHECK(few > 0 && many > 0);
}

TEST(partials_of_an_answer_follow_one_another_and_each_is_filled_by_its_items) {
  int merged = 0;
  for_each_plan([&](const Request& request, const Plan& plan, int) {
    int32_t next = 0;
    for (const Answer& answer : plan.answers) {
      CHECK(answer.first == next && answer.count >= 0);
      next += answer.count;
      merged += answer.count > 1;
    }
    CHECK(next == plan.num_partials);
    std::vector<int32_t> items(plan.answers.size(), 0);
    std::map<std::pair<int32_t, int32_t>, int> filled;  // of a partial and kv head, -1: all heads
    for (const Item& item : plan.items)
      for (int32_t i = item.queries; i < item.queries + item.count; ++i) {
        const ItemQuery& query = plan.queries.at(i);
        if (query.answer < 0) {
          CHECK(query.partial < 0 && item.kind == Item::kMany);
          continue;
        }
        const Answer& answer = plan.answers.at(query.answer);
        CHECK(answer.token == query.token);
        CHECK(query.partial >= answer.first && query.partial < answer.first + answer.count);
        const std::pair<int32_t, int32_t> part{query.partial, item.kv_head};
        CHECK(++filled[part] == 1);
        ++items[query.answer];
      }
    for (size_t a = 0; a < items.size(); ++a) CHECK(items[a] == plan.answers[a].items);
    std::vector<int64_t> heads(plan.num_partials, 0);
    for (const auto& [partial, times] : filled)
      heads.at(partial.first) += partial.second < 0 ? request.problem.num_kv_heads : 1;
    for (int64_t number : heads) CHECK(number == request.problem.num_kv_heads);
  });
  CHECK(merged > 0);
}

TEST(shared_keys_are_read_for_all_of_their_rows_together) {
  int together = 0;
  for_each_plan([&](const Request& request, const Plan& plan, int) {
    for (const SharedKeys& keys : request.shared)
      for (const Item& item : plan.items) {
        if (item.begin < keys.begin || item.end > keys.end || keys.end - keys.begin < 2) continue;
        together += item.count > request.rows.live.at(item.row).count;
      }
  });
  CHECK(together > 0);
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
    if (request.shared.empty())
      for (const Answer& answer : plan.answers) CHECK(answer.count == 1);
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
  request.problem.head_dim = request.problem.key_dim = 128;
  request.shared.clear();
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

TEST(one_long_item_of_many_queries_is_cut_and_even_ones_are_not) {
  Request request(1);
  request.problem.keys = request.problem.values = nullptr;
  request.problem.sliding_window = request.problem.attention_chunk_size = 0;
  request.problem.num_kv_heads = 1;
  request.problem.num_q_heads = 8;
  request.problem.head_dim = request.problem.key_dim = 128;
  request.shared.clear();
  request.limits = {8, 32};
  request.rows = Rows{{{0, 0, 32, 16000}}, true};
  CHECK(request.plan(1).items.size() == 1);
  CHECK(request.plan(2).items.size() >= 4);
  request.rows = Rows{{{0, 0, 64, 16000}}, true};
  CHECK(request.plan(2).items.size() == 2);
  request.rows = Rows{{{0, 0, 32, 100}}, true};  // too short
  CHECK(request.plan(2).items.size() == 1);
}

TEST(a_thread_is_woken_where_its_share_pays_for_it) {
  Request request(1);
  request.problem.keys = request.problem.values = nullptr;
  request.problem.sliding_window = request.problem.attention_chunk_size = 0;
  request.problem.num_kv_heads = request.problem.num_q_heads = 8;
  request.problem.head_dim = request.problem.key_dim = 128;
  request.shared.clear();
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
    return a.kind == b.kind && a.row == b.row && a.kv_head == b.kv_head && a.queries == b.queries &&
           a.count == b.count && a.begin == b.begin && a.end == b.end && a.cost == b.cost;
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
