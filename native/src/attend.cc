#include "attend.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "isa.h"
#include "plan.h"
#include "prefixes.h"
#include "routines.h"
#include "scratch.h"

namespace easydel_ragged {
namespace {

Scratch& thread_scratch() {
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

void write_part(const Problem& p, const Rows& rows, const Write& part) {
  const Row& row = rows.live[part.row];
  routines().write(p, row.index, row.position + part.begin, row.token + part.begin, part.end - part.begin);
}

}  // namespace

void write(const Problem& p, const Rows& rows, const Executor& executor) {
  if (p.keys == nullptr) return;
  const std::vector<Write> writes = make_writes(rows);
  const auto work = [&](int, int64_t index, char*) { write_part(p, rows, writes[size_t(index)]); };
  run_job({0, int64_t(writes.size())}, 0, std::ref(work), executor, helpers_for(executor, writes.size()));
}

void attend(const Problem& p, const Rows& rows, const Executor& executor) {
  const Routines& isa = routines();
  const Limits limits{isa.most_few(p), isa.most_many(p)};
  const Plan plan = make_plan(p, rows, shared_keys(p, rows, limits.most_few), limits, executor.threads);
  const Scratch::Use memory(thread_scratch(), size_t(partial_floats(p) * plan.num_partials) * sizeof(float));
  const std::vector<Partial> partials = make_partials(p, plan.num_partials, memory.memory());
  std::vector<Query> queries;
  queries.reserve(plan.queries.size());
  for (const ItemQuery& query : plan.queries)
    queries.push_back({query.token, query.position, query.partial >= 0 ? partials[query.partial] : Partial{}});
  std::vector<std::atomic<int32_t>> unfinished(plan.answers.size());  // items of each answer
  for (size_t a = 0; a < unfinished.size(); ++a) unfinished[a].store(plan.answers[a].items, std::memory_order_relaxed);

  const auto write = [&](const Write& part) { write_part(p, rows, part); };
  const auto attend_item = [&](const Item& item, char* scratch) {
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
      attend_item(plan.items[index], scratch);
  };
  // A reference, which std::function holds without memory of its own.
  run_job({writes, int64_t(plan.items.size())}, scratch_bytes, std::ref(work), executor, plan.helpers);
}

}  // namespace easydel_ragged
