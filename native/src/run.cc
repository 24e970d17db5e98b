#include "run.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "plan.h"
#include "routines.h"
#include "rows.h"
#include "scratch.h"

namespace easydel_ragged {
namespace {

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
  const Plan plan = make_plan(p, rows, isa.prefill_chunk(p), executor.threads);
  const Scratch::Use memory(thread_scratch_for_partials(),
                            size_t(partial_floats(p) * plan.num_partials) * sizeof(float));
  const std::vector<Partial> partials = make_partials(p, plan.num_partials, memory.memory());
  // Of each row, partials that are not finished.
  std::vector<std::atomic<int32_t>> unfinished(plan.num_partials > 0 ? rows.live.size() : 0);
  for (size_t r = 0; r < unfinished.size(); ++r) unfinished[r].store(plan.partials[r].count, std::memory_order_relaxed);

  const auto write = [&](const Write& part) {
    const Row& row = rows.live[part.row];
    isa.write(p, row.index, row.position + part.begin, row.token + part.begin, part.end - part.begin);
  };
  const auto attend = [&](const Item& item, char* scratch) {
    const Row& row = rows.live[item.row];
    if (item.kind == Item::kPrefill) {
      isa.prefill(p, row.index, item.kv_head, row.position + item.begin, row.token + item.begin, item.end - item.begin,
                  scratch);
      return;
    }
    isa.decode(p, row.index, row.token, item.begin, item.end, partials[item.partial], scratch);
    const PartialRange& all = plan.partials[item.row];
    if (unfinished[item.row].fetch_sub(1, std::memory_order_acq_rel) == 1)  // the last one merges, in fixed order
      isa.finish(p, &partials[all.first], all.count, row.token);
  };

  if (!plan.shared_writes) std::for_each(plan.writes.begin(), plan.writes.end(), write);
  const bool any_decode = plan.num_partials > 0, any_prefill = plan.items.size() > size_t(plan.num_partials);
  const size_t scratch_bytes =
      std::max(any_decode ? isa.decode_scratch(p) : 0, any_prefill ? isa.prefill_scratch(p) : 0);
  const int64_t writes = plan.shared_writes ? int64_t(plan.writes.size()) : 0;
  const Work work = [&](int phase, int64_t index, char* scratch) {
    if (phase == 0)
      write(plan.writes[index]);
    else
      attend(plan.items[index], scratch);
  };
  run_job({writes, int64_t(plan.items.size())}, scratch_bytes, work, executor, plan.helpers);
}

}  // namespace

void run(const Problem& p, const Executor& executor) {
  if (p.num_tokens == 0) return;
  const Rows rows = live_rows(p);
  clear_dead_tokens(p, rows);
  if (!rows.live.empty()) run_rows(p, rows, executor);
  Scratch::end_call();
}

}  // namespace easydel_ragged
