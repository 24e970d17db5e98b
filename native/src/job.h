// Phases of work that several threads share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace easydel_ragged {

// Where helper threads come from. `spawn` may run the task at any later time, even after the call has returned.
struct Executor {
  int threads = 1;  // the caller included
  std::function<void(std::function<void()>)> spawn;
};

// Threads beside the caller that may share `items`, however little these take.
int helpers_for(const Executor& executor, size_t items);

constexpr int kPhases = 2;

// Does one item. The scratch memory is the thread's own.
using Work = std::function<void(int phase, int64_t item, char* scratch)>;

// Calls `work` once for each item of each phase, `sizes` of them, on the caller and up to `helpers` threads of the
// executor. Items are begun in order; a phase begins when all items of the one before are done. Returns when everything
// is done. If an item throws, items that have not begun are left out, and when none is at work any more the exception
// (the first, of several) is thrown here. Throws std::bad_alloc where the caller has no memory for its scratch, and
// then nothing has been done. Either way, helpers that start after the end touch nothing of the caller's.
void run_job(const std::array<int64_t, kPhases>& sizes, size_t scratch_bytes, const Work& work,
             const Executor& executor, int helpers);

}  // namespace easydel_ragged
