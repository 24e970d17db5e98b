// When caches are moved to huge pages, and how much of them at a time.
#include "huge_pages.h"

#include <chrono>
#include <cstdio>
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
// Bytes in huge pages, of the mappings that some memory has a part in.
size_t huge_bytes(const char* memory, size_t bytes) {
  const size_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  std::ifstream lines("/proc/self/smaps");
  bool inside = false;
  size_t found = 0;
  for (std::string line; std::getline(lines, line);) {
    unsigned long long from = 0, to = 0, kib = 0;
    if (std::sscanf(line.c_str(), "%llx-%llx ", &from, &to) == 2)
      inside = from < end && to > begin;
    else if (inside && std::sscanf(line.c_str(), "AnonHugePages: %llu kB", &kib) == 1)
      found += size_t(kib) << 10;
  }
  return found;
}

TEST(the_system_moves_a_cache_and_keeps_what_it_holds) {
  if (!huge_pages_used()) return;  // an older Linux, or one whose huge pages are off
  const size_t bytes = HugePages::kLeastCache, apart = 509;
  char* cache = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  CHECK(cache != MAP_FAILED);
  madvise(cache, bytes, MADV_NOHUGEPAGE);
  for (size_t i = 0; i < bytes; i += apart) cache[i] = char(i % 251);
  madvise(cache, bytes, MADV_HUGEPAGE);  // those that are there stay small
  use_huge_pages(false);
  for (int i = 0; i < 100; ++i) cache_seen(cache, bytes);
  CHECK(huge_bytes(cache, bytes) == 0);
  use_huge_pages(true);
  const size_t wanted = bytes - kPage;  // one may be lost at the ends
  const auto started = std::chrono::steady_clock::now();
  while (huge_bytes(cache, bytes) < wanted && std::chrono::steady_clock::now() - started < std::chrono::seconds(20))
    for (int call = 0; call < 100; ++call) cache_seen(cache, bytes);
  CHECK(huge_bytes(cache, bytes) >= wanted);
  bool same = true;
  for (size_t i = 0; i < bytes; i += apart) same = same && cache[i] == char(i % 251);
  CHECK(same);
  munmap(cache, bytes);
}
#endif

}  // namespace
}  // namespace easydel_ragged
