// How threads share a job.
#include "job.h"

#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
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

TEST(a_full_pool_that_runs_tasks_at_once_in_the_caller_is_no_helper) {
  Executor executor{4, [](std::function<void()> task) { task(); }};
  for (const auto& sizes : kSizes) do_job(sizes, executor, 3);
}

TEST(a_failure_is_thrown_in_the_caller_when_no_item_is_at_work) {
  for (const bool in_helper : {false, true}) {
    for (int64_t failing : {0, 7, 49}) {
      std::vector<std::function<void()>> late;
      std::vector<std::thread> threads;
      Executor executor{6, [&](std::function<void()> task) {
                          if (threads.size() < 2)
                            threads.emplace_back(std::move(task));
                          else
                            late.push_back(std::move(task));
                        }};
      std::atomic<int> at_work{0};
      std::atomic<bool> failed{false};
      const auto caller = std::this_thread::get_id();
      const char* caught = "";
      {
        // What the job refers to is gone at the end of this block, before the late helpers start.
        auto numbers = std::make_unique<std::vector<std::atomic<int>>>(50);
        const Work work = [&](int phase, int64_t item, char*) {
          ++at_work;
          if (phase == 0) ++(*numbers)[size_t(item)];
          std::this_thread::yield();
          const bool here = in_helper ? std::this_thread::get_id() != caller : item == failing;
          --at_work;
          if (!here || failed.exchange(true)) return;
          if (item % 2 == 0) throw std::bad_alloc();
          throw std::runtime_error("item");
        };
        try {
          run_job({50, 50}, 1000, work, executor, 5);
        } catch (const std::bad_alloc&) {
          caught = "bad_alloc";
        } catch (const std::runtime_error&) {
          caught = "runtime_error";
        }
        CHECK(at_work == 0);
      }
      // A helper may come too late for any item to fail in it.
      if (!in_helper) CHECK(std::string(caught) == (failing % 2 == 0 ? "bad_alloc" : "runtime_error"));
      CHECK(failed == (*caught != '\0'));
      for (auto& task : late) task();
      for (std::thread& thread : threads) thread.join();
    }
  }
}

TEST(nothing_is_begun_after_a_failure) {
  std::vector<std::function<void()>> late;
  const Executor executor{4, [&](std::function<void()> task) { late.push_back(std::move(task)); }};
  int begun = 0;
  const Work work = [&](int, int64_t item, char*) {
    ++begun;
    if (item == 7) throw std::bad_alloc();
  };
  bool thrown = false;
  try {
    run_job({20, 50}, 1000, work, executor, 3);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  for (auto& task : late) task();
  CHECK(thrown && begun == 8);
}

TEST(an_executor_that_fails_otherwise_leaves_the_work_to_the_caller) {
  Executor executor{4, [](std::function<void()>) { throw std::runtime_error("a pool that is shut down"); }};
  do_job({3, 40}, executor, 3);
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
