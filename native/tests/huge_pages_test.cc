// When caches are moved to huge pages, and how much of them at a time. test_native_library.py has the real system.
#include "huge_pages.h"

#include <vector>

#include "unit.h"

namespace easydel_ragged {
namespace {

constexpr size_t kPage = HugePages::kPage;

struct Step {
  char* memory;
  size_t bytes;
};
std::vector<Step> steps;
int64_t now = 0, each_takes = 0;
bool works = true;

HugePages recorded() {
  steps.clear();
  now = 0;
  each_takes = 0;
  works = true;
  return HugePages({[](char* memory, size_t bytes) {
                      steps.push_back({memory, bytes});
                      now += each_takes;
                      return works;
                    },
                    [] { return now; }});
}

char* at(size_t address) { return reinterpret_cast<char*>(address); }
void calls(HugePages& pages, int number, char* cache, size_t bytes) {
  for (int i = 0; i < number; ++i) pages.seen(cache, bytes);
}

TEST(a_cache_that_stays_is_moved_in_steps_of_whole_huge_pages) {
  HugePages pages = recorded();
  char* cache = at(100 * kPage + 4096);
  const size_t bytes = 10 * kPage;
  calls(pages, HugePages::kLeastCalls - 1, cache, bytes);
  CHECK(steps.empty());
  calls(pages, 100, cache, bytes);
  CHECK(steps.size() == 3);
  size_t next = 101 * kPage;
  for (const Step& step : steps) {
    CHECK(step.memory == at(next));
    CHECK(step.bytes <= HugePages::kStep && step.bytes % kPage == 0);
    next += step.bytes;
  }
  CHECK(next == 110 * kPage);  // the last page is not whole
}

TEST(a_cache_that_is_another_one_at_each_call_stays) {
  HugePages pages = recorded();
  for (size_t i = 0; i < 3 * HugePages::kMostCaches; ++i) pages.seen(at((1 + i) * 100 * kPage), 50 * kPage);
  for (size_t i = 0; i < 100; ++i) pages.seen(at(100 * kPage), (50 + i) * kPage);
  calls(pages, 100, at(100 * kPage), HugePages::kLeastCache - 1);
  CHECK(steps.empty());
}

TEST(steps_take_a_small_share_of_the_time) {
  HugePages pages = recorded();
  each_takes = 1000;
  char* cache = at(kPage);
  for (int i = 0; i < 100000; ++i, now += 10) pages.seen(cache, 1000 * kPage);
  CHECK(now > 1000000);
  CHECK(steps.size() >= 49 && steps.size() <= 51);
}

TEST(a_cache_that_may_be_another_one_is_moved_again) {
  HugePages pages = recorded();
  calls(pages, 100, at(kPage), 8 * kPage);
  CHECK(steps.size() == 2);
  for (int i = 0; i < 100; ++i, now += HugePages::kForgottenNs) pages.seen(at(kPage), 8 * kPage);
  CHECK(steps.size() == 2);  // it was called all the time
  now += HugePages::kForgottenNs;
  calls(pages, HugePages::kLeastCalls - 1, at(kPage), 8 * kPage);
  CHECK(steps.size() == 2);
  calls(pages, 100, at(kPage), 8 * kPage);
  CHECK(steps.size() == 4);
}

TEST(a_cache_is_moved_at_once_on_request) {
  HugePages pages = recorded();
  each_takes = 1000;
  pages.move(at(kPage), 40 * kPage);
  CHECK(steps.size() == 10);
  CHECK(steps.back().memory == at(37 * kPage) && steps.back().bytes == HugePages::kStep);
  calls(pages, 100, at(kPage), 40 * kPage);
  pages.move(at(kPage), HugePages::kLeastCache - 1);
  CHECK(steps.size() == 10);
  works = false;
  pages.move(at(200 * kPage), 1000 * kPage);
  CHECK(steps.size() == 10 + HugePages::kMostFailures);
}

TEST(after_failures_in_a_row_caches_stay) {
  HugePages pages = recorded();
  works = false;
  calls(pages, 1000, at(kPage), 1000 * kPage);
  CHECK(steps.size() == HugePages::kMostFailures);
  works = true;
  calls(pages, 1000, at(2000 * kPage), 1000 * kPage);
  CHECK(steps.size() == HugePages::kMostFailures);
}

}  // namespace
}  // namespace easydel_ragged
