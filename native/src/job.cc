#include "job.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "processors.h"
#include "scratch.h"

namespace easydel_ragged {
namespace {

Scratch& thread_scratch() {
  thread_local Scratch of_thread;
  return of_thread;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads take the items of a phase from a counter, and pass on to the next phase once all items of this one are done.
// Nobody waits for a thread that has not started: a thread that comes late finds nothing left. Helpers hold the job
// alive; they touch what `work` refers to only between taking and finishing an item, and the caller returns or throws
// only when all items are finished.
struct Job {
  struct Phase {
    int64_t size = 0;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  Phase phases[kPhases];
  Places places;  // of the caller, and of the helpers after it
  const Work* work = nullptr;
  size_t scratch_bytes = 0;
  std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // of whoever has set `failed`; the caller reads it when all items are finished

  explicit Job(int helpers) : places(1 + helpers) {}

  void do_item(int phase, int64_t item, char* scratch) {
    try {
      if (!failed.load(std::memory_order_relaxed)) (*work)(phase, item, scratch);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
    phases[phase].done.fetch_add(1, std::memory_order_acq_rel);
  }

  void run(char* scratch, bool is_caller) {
    for (int phase = 0; phase < kPhases; ++phase) {
      Phase& now = phases[phase];
      for (;;) {
        const int64_t item = now.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= now.size) break;
        do_item(phase, item, scratch);
      }
      if (phase == kPhases - 1 && !is_caller) return;
      for (int spins = 0; now.done.load(std::memory_order_acquire) < now.size; ++spins) {
        if (spins < 4000)
          pause();
        else
          std::this_thread::yield();
      }
    }
  }

  void help(int helper) {
    // A full pool runs the task at once, in the caller, which is about to take part anyway.
    if (std::this_thread::get_id() == caller) return;
    bool left = false;
    for (Phase& phase : phases) left |= phase.next.load(std::memory_order_relaxed) < phase.size;
    if (!left) return;
    places.move(helper);
    try {
      const Scratch::Use scratch(thread_scratch(), scratch_bytes);
      run(scratch.memory(), false);
    } catch (const std::bad_alloc&) {
      // No memory for the scratch: the others do it.
    }
  }
};

}  // namespace

int helpers_for(const Executor& executor, size_t items) {
  return int(std::min<size_t>(size_t(executor.threads), items)) - 1;
}

void run_job(const std::array<int64_t, kPhases>& sizes, size_t scratch_bytes, const Work& work,
             const Executor& executor, int helpers) {
  if (helpers <= 0 || !executor.spawn) {
    const Scratch::Use scratch(thread_scratch(), scratch_bytes);
    for (int phase = 0; phase < kPhases; ++phase)
      for (int64_t item = 0; item < sizes[phase]; ++item) work(phase, item, scratch.memory());
    return;
  }
  const auto job = std::make_shared<Job>(helpers);
  for (int phase = 0; phase < kPhases; ++phase) job->phases[phase].size = sizes[phase];
  job->work = &work;
  job->scratch_bytes = scratch_bytes;
  const Scratch::Use scratch(thread_scratch(), scratch_bytes);
  try {
    job->places.stay(0);
    for (int i = 1; i <= helpers; ++i) executor.spawn([job, i] { job->help(i); });
  } catch (...) {
    // Those that have started may be at work, so the caller may not leave: it goes on with fewer.
  }
  job->run(scratch.memory(), true);
  if (job->failure != nullptr) std::rethrow_exception(job->failure);
}

}  // namespace easydel_ragged
