// How threads share a job.
#include "job.h"

#include <atomic>
#include <mutex>
#include <new>
#include <thread>

#include "unit.h"

namespace easydel_ragged {
namespace {

// Does a job of `sizes`, and checks what is true however many threads take part.
void do_job(std::array<int64_t, kPhases> sizes, const Executor& executor, int helpers) {
  std::array<std::vector<std::atomic<int>>, kPhases> times;
  for (int phase = 0; phase < kPhases; ++phase) times[phase] = std::vector<std::atomic<int>>(size_t(sizes[phase]));
  std::atomic<int64_t> finished{0};
  constexpr size_t kScratch = 100000;
  const Work work = [&](int phase, int64_t item, char* scratch) {
    if (phase == 1) CHECK(finished.load() >= sizes[0]);
    scratch[0] = scratch[kScratch - 1] = char(item);
    std::this_thread::yield();
    CHECK(scratch[0] == char(item) && scratch[kScratch - 1] == char(item));  // nobody else's memory
    ++times[phase][size_t(item)];
    ++finished;
  };
  run_job(sizes, kScratch, work, executor, helpers);
  for (const auto& phase : times)
    for (const auto& each : phase) CHECK(each.load() == 1);
}

constexpr std::array<int64_t, kPhases> kSizes[] = {{0, 1}, {0, 50}, {1, 1}, {40, 3}, {3, 40}, {5, 0}};

TEST(the_caller_alone_does_everything) {
  for (const auto& sizes : kSizes) do_job(sizes, Executor{}, 3);
}

TEST(threads_do_each_item_once_and_phase_after_phase) {
  for (int round = 0; round < 20; ++round) {
    std::vector<std::thread> threads;
    Executor executor{4, [&](std::function<void()> task) { threads.emplace_back(std::move(task)); }};
    for (const auto& sizes : kSizes) do_job(sizes, executor, 3);
    CHECK(threads.size() == 3 * std::size(kSizes));
    for (std::thread& thread : threads) thread.join();
  }
}

TEST(a_helper_that_starts_after_the_end_finds_nothing_left) {
  std::vector<std::function<void()>> late;
  Executor executor{4, [&](std::function<void()> task) { late.push_back(std::move(task)); }};
  for (const auto& sizes : kSizes) do_job(sizes, executor, 3);
  for (auto& task : late) task();
}

TEST(an_executor_without_memory_leaves_the_work_to_those_that_have_started) {
  std::vector<std::thread> threads;
  Executor executor{4, [&](std::function<void()> task) {
                      if (threads.size() % 2 == 1) throw std::bad_alloc();
                      threads.emplace_back(std::move(task));
                    }};
  do_job({3, 40}, executor, 3);
  CHECK(threads.size() == 1);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace easydel_ragged
