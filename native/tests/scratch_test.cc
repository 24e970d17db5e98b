// When threads keep memory, and when they give it back.
#include "scratch.h"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "unit.h"

namespace easydel_ragged {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

// So many that a whole period has passed, wherever the count stood before.
void end_calls() {
  for (int i = 0; i < 2 * Scratch::kPeriod; ++i) Scratch::end_call();
}

// What is kept when earlier tests' memory is gone.
size_t kept_by_others() {
  end_calls();
  return Scratch::kept_bytes();
}

void use(Scratch& scratch, size_t bytes) {
  const Scratch::Use now(scratch, bytes);
  if (bytes == 0) return;
  CHECK(reinterpret_cast<uintptr_t>(now.memory()) % 64 == 0);
  now.memory()[0] = now.memory()[bytes - 1] = 1;
}

TEST(memory_is_kept_from_call_to_call) {
  Scratch scratch;
  const size_t before = kept_by_others();
  const char* memory = nullptr;
  for (int i = 0; i < 3 * Scratch::kPeriod; ++i) {
    const Scratch::Use now(scratch, i % 2 ? kMiB : kMiB / 3);
    if (i > 1) CHECK(now.memory() == memory);
    memory = now.memory();
    Scratch::end_call();
  }
  CHECK(Scratch::kept_bytes() == before + kMiB);
}

TEST(memory_that_small_calls_do_not_need_is_given_back) {
  Scratch scratch;
  const size_t before = kept_by_others();
  use(scratch, 40 * kMiB);
  CHECK(Scratch::kept_bytes() == before + 40 * kMiB);
  int calls = 0;
  for (; Scratch::kept_bytes() > before + kMiB; ++calls) {
    CHECK(calls < 2 * Scratch::kPeriod);
    if (calls >= 2 * Scratch::kPeriod) return;
    use(scratch, kMiB);
    Scratch::end_call();
  }
  use(scratch, kMiB);
  CHECK(Scratch::kept_bytes() == before + kMiB);
  end_calls();
  CHECK(Scratch::kept_bytes() == before);  // nobody used it
  use(scratch, 40 * kMiB);
  CHECK(Scratch::kept_bytes() == before + 40 * kMiB);
}

TEST(memory_of_a_few_pages_stays) {
  Scratch scratch;
  const size_t before = kept_by_others();
  use(scratch, Scratch::kLeastFreed / 2);
  end_calls();
  CHECK(Scratch::kept_bytes() == before + Scratch::kLeastFreed / 2);
}

TEST(memory_in_use_is_left_alone) {
  Scratch scratch;
  const Scratch::Use now(scratch, 8 * kMiB);
  end_calls();
  for (size_t i = 0; i < 8 * kMiB; i += 4096) now.memory()[i] = 1;
}

TEST(a_thread_that_is_idle_gives_memory_back_and_one_that_ends_too) {
  const size_t before = kept_by_others();
  std::mutex mutex;
  std::condition_variable changed;
  bool large = false, leave = false;
  std::thread idle([&] {
    Scratch scratch, other;
    use(scratch, 8 * kMiB);
    use(other, Scratch::kLeastFreed / 2);
    std::unique_lock<std::mutex> lock(mutex);
    large = true;
    changed.notify_all();
    changed.wait(lock, [&] { return leave; });
    use(scratch, kMiB);
  });
  {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return large; });
  }
  CHECK(Scratch::kept_bytes() == before + 8 * kMiB + Scratch::kLeastFreed / 2);
  end_calls();
  CHECK(Scratch::kept_bytes() == before + Scratch::kLeastFreed / 2);
  {
    std::lock_guard<std::mutex> lock(mutex);
    leave = true;
  }
  changed.notify_all();
  idle.join();
  CHECK(Scratch::kept_bytes() == before);
}

}  // namespace
}  // namespace easydel_ragged
