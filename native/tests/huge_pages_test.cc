// When caches are moved to huge pages, and how much of them at a time.
#include "huge_pages.h"

#include <fstream>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

TEST(after_failures_in_a_row_caches_stay) {
  HugePages pages = recorded();
  works = false;
  calls(pages, 1000, at(kPage), 1000 * kPage);
  CHECK(steps.size() == HugePages::kMostFailures);
  works = true;
  calls(pages, 1000, at(2000 * kPage), 1000 * kPage);
  CHECK(steps.size() == HugePages::kMostFailures);
}

#if defined(__linux__) && defined(__x86_64__)
// Of the process' memory.
size_t huge_kib() {
  std::ifstream lines("/proc/self/smaps_rollup");
  for (std::string word; lines >> word;) {
    size_t kib = 0;
    if (word == "AnonHugePages:" && lines >> kib) return kib;
  }
  return 0;
}

TEST(the_system_moves_a_cache_and_keeps_what_it_holds) {
  if (!huge_pages_used()) return;  // an older Linux, or one whose huge pages are off
  const size_t bytes = 20 * kPage;
  char* cache = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  CHECK(cache != MAP_FAILED);
  madvise(cache, bytes, MADV_NOHUGEPAGE);
  for (size_t i = 0; i < bytes; ++i) cache[i] = char(i % 251);
  madvise(cache, bytes, MADV_HUGEPAGE);  // those that are there stay small
  const size_t before = huge_kib();
  use_huge_pages(false);
  for (int i = 0; i < 100; ++i) cache_seen(cache, bytes);
  CHECK(huge_kib() == before);
  use_huge_pages(true);
  const size_t wanted = before + (bytes - kPage) / 1024;  // one may be lost at the ends
  for (int i = 0; i < 20000 && huge_kib() < wanted; ++i)
    for (int call = 0; call < 10000; ++call) cache_seen(cache, bytes);
  CHECK(huge_kib() >= wanted);
  bool same = true;
  for (size_t i = 0; i < bytes; ++i) same = same && cache[i] == char(i % 251);
  CHECK(same);
  munmap(cache, bytes);
}
#endif

}  // namespace
}  // namespace easydel_ragged
