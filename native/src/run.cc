#include "run.h"

#include "attend.h"
#include "codes.h"
#include "rows.h"
#include "scratch.h"

namespace easydel_ragged {

void run(const Problem& p, const Executor& executor) {
  if (p.num_tokens == 0) return;
  const Rows rows = live_rows(p);
  clear_dead_tokens(p, rows);
  if (!rows.live.empty()) (p.cache_dtype == DType::kCodes ? attend_codes : attend)(p, rows, executor);
  Scratch::end_call();
}

}  // namespace easydel_ragged
