#include "huge_pages.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <new>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace easydel_ragged {
namespace {

std::atomic<bool> wanted{true};

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

#if defined(__linux__)
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack

bool collapse(char* memory, size_t bytes) { return madvise(memory, bytes, kCollapse) == 0; }

std::string setting(const char* name) {
  std::ifstream file(std::string("/sys/kernel/mm/transparent_hugepage/") + name);
  std::string text;
  std::getline(file, text);
  return text;
}

bool system_collapses() {
  static const bool found = setting("hpage_pmd_size") == std::to_string(HugePages::kPage) &&
                            setting("enabled").find("[never]") == std::string::npos &&
                            madvise(nullptr, 0, kCollapse) == 0;  // an unknown request is refused for no bytes, too
  return found;
}
#else
bool collapse(char*, size_t) { return false; }
bool system_collapses() { return false; }
#endif

HugePages& of_process() {
  static HugePages* const pages = new HugePages({collapse, now_ns});  // lives on while threads end
  return *pages;
}

}  // namespace

HugePages::Cache& HugePages::known(void* cache, size_t bytes) {
  if (caches_.size() >= kMostCaches && caches_.count(cache) == 0) caches_.clear();
  Cache& found = caches_[cache];
  const int64_t now = system_.now_ns();
  if (found.bytes != bytes || now - found.called_ns > kForgottenNs) {
    found = {bytes, 0, now, (kPage - reinterpret_cast<uintptr_t>(cache) % kPage) % kPage};
  }
  found.called_ns = now;
  return found;
}

bool HugePages::step(void* cache, Cache& known) {
  const size_t end = known.bytes - (reinterpret_cast<uintptr_t>(cache) + known.bytes) % kPage;
  if (known.next >= end || failures_ == kMostFailures) return false;
  const size_t bytes = std::min(kStep, end - known.next);
  failures_ = system_.collapse(static_cast<char*>(cache) + known.next, bytes) ? 0 : failures_ + 1;
  known.next += bytes;
  return true;
}

void HugePages::seen(void* cache, size_t bytes) {
  if (bytes < kLeastCache) return;
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock || failures_ == kMostFailures) return;
  Cache& found = known(cache, bytes);
  if (++found.calls < kLeastCalls) return;
  found.calls = kLeastCalls;
  const int64_t started = found.called_ns;
  if (started < next_step_ns_ || !step(cache, found)) return;
  const int64_t ended = system_.now_ns();
  next_step_ns_ = ended + kPause * (ended - started);
}

void HugePages::move(void* cache, size_t bytes) {
  if (bytes < kLeastCache) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  Cache& found = known(cache, bytes);
  while (step(cache, found)) {
  }
}

void cache_seen(void* cache, size_t bytes) {
  if (!huge_pages_used()) return;
  try {
    of_process().seen(cache, bytes);
  } catch (const std::bad_alloc&) {  // it stays where it is
  }
}

void move_cache(void* cache, size_t bytes) {
  if (!huge_pages_used()) return;
  try {
    of_process().move(cache, bytes);
  } catch (const std::bad_alloc&) {  // it stays where it is
  }
}

void use_huge_pages(bool use) { wanted.store(use, std::memory_order_relaxed); }

bool huge_pages_used() { return wanted.load(std::memory_order_relaxed) && system_collapses(); }

}  // namespace easydel_ragged
