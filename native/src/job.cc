#include "job.h"

#include <atomic>
#include <memory>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "scratch.h"

namespace easydel_ragged {
namespace {

thread_local Scratch thread_scratch;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads take the items of a phase from a counter, and pass on to the next phase once all items of this one are done.
// Nobody waits for a thread that has not started: a thread that comes late finds nothing left. Helpers hold the job
// alive; they touch what `work` refers to only between taking and finishing an item, and the caller returns only when
// all items are finished.
struct Job {
  struct Phase {
    int64_t size = 0;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  Phase phases[kPhases];
  const Work* work = nullptr;
  size_t scratch_bytes = 0;

  void run(char* scratch, bool caller) {
    for (int phase = 0; phase < kPhases; ++phase) {
      Phase& now = phases[phase];
      for (;;) {
        const int64_t item = now.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= now.size) break;
        (*work)(phase, item, scratch);
        now.done.fetch_add(1, std::memory_order_acq_rel);
      }
      if (phase == kPhases - 1 && !caller) return;
      for (int spins = 0; now.done.load(std::memory_order_acquire) < now.size; ++spins) {
        if (spins < 4000)
          pause();
        else
          std::this_thread::yield();
      }
    }
  }

  void help() {
    bool left = false;
    for (Phase& phase : phases) left |= phase.next.load(std::memory_order_relaxed) < phase.size;
    if (!left) return;
    char* scratch;
    try {
      scratch = thread_scratch.reserve(scratch_bytes);
    } catch (const std::bad_alloc&) {
      return;  // the others do it
    }
    run(scratch, false);
  }
};

}  // namespace

void run_job(const std::array<int64_t, kPhases>& sizes, size_t scratch_bytes, const Work& work,
             const Executor& executor, int helpers) {
  auto job = std::make_shared<Job>();
  for (int phase = 0; phase < kPhases; ++phase) job->phases[phase].size = sizes[phase];
  job->work = &work;
  job->scratch_bytes = scratch_bytes;
  char* scratch = thread_scratch.reserve(scratch_bytes);
  try {
    for (int i = 0; i < helpers && executor.spawn; ++i) executor.spawn([job] { job->help(); });
  } catch (const std::bad_alloc&) {
    // Those that have started may be at work, so the caller may not leave: it goes on with fewer.
  }
  job->run(scratch, true);
}

}  // namespace easydel_ragged
