#include "run.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "isa.h"
#include "plan.h"
#include "prefixes.h"
#include "routines.h"
#include "rows.h"
#include "scratch.h"

namespace easydel_ragged {
namespace {

constexpr int64_t kLeastRotated = 64;  // vectors of an item: a matrix is packed for each
constexpr int64_t kMostRotated = 1024;

Scratch& thread_scratch_for_rotated() {
  thread_local Scratch of_thread;
  return of_thread;
}
Scratch& thread_scratch_for_partials() {
  thread_local Scratch of_thread;
  return of_thread;
}

int64_t partial_floats(const Problem& p) { return (p.num_q_heads * (partial_stride(p) + 2) + 15) / 16 * 16; }

std::vector<Partial> make_partials(const Problem& p, int64_t count, char* memory_of_all) {
  const int64_t stride = partial_stride(p), floats = partial_floats(p);
  float* memory = reinterpret_cast<float*>(memory_of_all);
  std::vector<Partial> partials;
  partials.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i, memory += floats)
    partials.push_back({memory + p.num_q_heads * stride, memory + p.num_q_heads * (stride + 1), memory});
  return partials;
}

void run_rows(const Problem& p, const Rows& rows, const Executor& executor) {
  const Routines& isa = routines();
  const Limits limits{isa.most_few(p), isa.most_many(p)};
  const Plan plan = make_plan(p, rows, shared_keys(p, rows, limits.most_few), limits, executor.threads);
  const Scratch::Use memory(thread_scratch_for_partials(),
                            size_t(partial_floats(p) * plan.num_partials) * sizeof(float));
  const std::vector<Partial> partials = make_partials(p, plan.num_partials, memory.memory());
  std::vector<Query> queries;
  queries.reserve(plan.queries.size());
  for (const ItemQuery& query : plan.queries)
    queries.push_back({query.token, query.position, query.partial >= 0 ? partials[query.partial] : Partial{}});
  std::vector<std::atomic<int32_t>> unfinished(plan.answers.size());  // items of each answer
  for (size_t a = 0; a < unfinished.size(); ++a) unfinished[a].store(plan.answers[a].items, std::memory_order_relaxed);

  const auto write = [&](const Write& part) {
    const Row& row = rows.live[part.row];
    isa.write(p, row.index, row.position + part.begin, row.token + part.begin, part.end - part.begin);
  };
  const auto attend = [&](const Item& item, char* scratch) {
    const int64_t row = rows.live[item.row].index;
    if (item.kind == Item::kFew)
      isa.attend_few(p, row, &queries[item.queries], item.count, item.begin, item.end, scratch);
    else
      isa.attend_many(p, row, item.kv_head, &queries[item.queries], item.count, item.begin, item.end, scratch);
    for (int32_t i = 0; i < item.count; ++i) {
      const int32_t at = plan.queries[item.queries + i].answer;
      if (at < 0 || unfinished[at].fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
      const Answer& answer = plan.answers[at];  // the last item merges, in fixed order
      isa.finish(p, &partials[answer.first], answer.count, answer.token);
    }
  };

  if (!plan.shared_writes) std::for_each(plan.writes.begin(), plan.writes.end(), write);
  const auto any = [&](Item::Kind kind) {
    return std::any_of(plan.items.begin(), plan.items.end(), [=](const Item& item) { return item.kind == kind; });
  };
  const size_t scratch_bytes =
      std::max(any(Item::kFew) ? isa.few_scratch(p) : 0, any(Item::kMany) ? isa.many_scratch(p) : 0);
  const int64_t writes = plan.shared_writes ? int64_t(plan.writes.size()) : 0;
  const auto work = [&](int phase, int64_t index, char* scratch) {
    if (phase == 0)
      write(plan.writes[index]);
    else
      attend(plan.items[index], scratch);
  };
  // A reference, which std::function holds without memory of its own.
  run_job({writes, int64_t(plan.items.size())}, scratch_bytes, std::ref(work), executor, plan.helpers);
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

// A cache of codes holds keys and values in other coordinates: the queries are rotated first, and the outputs back.
void run_rotated(const Problem& p, const Rows& rows, const Executor& executor) {
  const Routines& isa = routines();
  const int64_t heads = p.num_q_heads;
  const int64_t vectors =
      std::min(kMostRotated, std::max(kLeastRotated, p.num_tokens * heads / (4 * executor.threads)));
  const std::vector<Tokens> parts = live_tokens(rows, std::max<int64_t>(1, vectors / heads));
  Problem rotated = p;
  rotated.query_dtype = isa.rotated_dtype(p);
  const size_t size = element_size(rotated.query_dtype) * size_t(p.num_tokens * heads);
  const Scratch::Use memory(thread_scratch_for_rotated(), size * size_t(p.key_dim + p.head_dim));
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
            int(std::min<size_t>(size_t(executor.threads), parts.size())) - 1);
  };
  rotate(false);
  run_rows(rotated, rows, executor);
  rotate(true);
}

}  // namespace

void run(const Problem& p, const Executor& executor) {
  if (p.num_tokens == 0) return;
  const Rows rows = live_rows(p);
  clear_dead_tokens(p, rows);
  if (!rows.live.empty()) (p.cache_dtype == DType::kCodes ? run_rotated : run_rows)(p, rows, executor);
  Scratch::end_call();
}

}  // namespace easydel_ragged
